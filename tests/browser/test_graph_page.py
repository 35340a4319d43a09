"""The graph page in Chromium: it prunes as the server prunes, shows what is pointed at, and keeps what is marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.browser.graphs import Traced, made_up

from glasshouse.client.pictures import FeatureNote, graph_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from .conftest import OpenPage

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def traced() -> Traced:
    return Traced(PROMPT)


@pytest.fixture(scope="module")
def whole(traced: Traced) -> dict[str, Any]:
    return traced.json(1.0, 1.0)


def counts(page: Page) -> tuple[int, int]:
    found = page.locator("#counts").evaluate("element => ({...element.dataset})")
    return int(found["nodes"]), int(found["edges"])


def slide(page: Page, name: str, value: float) -> None:
    """Sets a slider as a hand does, and waits for what follows."""
    page.locator(f"#{name}-threshold").evaluate(
        "(element, value) => { element.value = value; element.dispatchEvent(new Event('input', {bubbles: true})); }",
        value,
    )
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def saved(page: Page, which: str) -> dict[str, Any]:
    page.click("#save")
    with page.expect_download() as download:
        page.click(f"#save-{which}")
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))


def find(page: Page, text: str) -> None:
    """Selects the first node that a search finds."""
    page.fill("#search", text)
    page.press("#search", "Enter")


@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.6, 0.9), (0.95, 0.995), (1.0, 1.0)])
def test_it_prunes_as_the_server_does(
    thresholds: tuple[float, float], traced: Traced, whole: dict[str, Any], open_page: OpenPage
) -> None:
    node_threshold, edge_threshold = thresholds
    page = open_page(graph_page(whole))
    slide(page, "node", node_threshold)
    slide(page, "edge", edge_threshold)
    server = traced.json(node_threshold, edge_threshold)
    # float32 against float64: an edge at the cut may fall on either side.
    n_nodes, n_edges = counts(page)
    assert n_nodes == len(server["nodes"]) and abs(n_edges - len(server["links"])) <= 2
    shown = saved(page, "shown")
    assert {node["node_id"] for node in shown["nodes"]} == {node["node_id"] for node in server["nodes"]}
    assert shown["metadata"]["pruning_settings"] == {
        "node_threshold": node_threshold,
        "edge_threshold": edge_threshold,
    }
    weights = [np.sort([link["weight"] for link in each["links"]]) for each in (shown, server)]
    if n_edges == len(server["links"]):
        np.testing.assert_allclose(*weights, rtol=1e-6)
    scores = traced.graph.scores(
        traced.graph.prune(node_threshold=node_threshold, edge_threshold=edge_threshold)
    )
    texts = page.locator("#scores dd").all_inner_texts()
    assert [float(text.split()[0]) for text in texts] == pytest.approx(
        [scores.replacement, scores.completeness], abs=2e-3
    )


def test_it_ranks_nodes_itself_where_the_graph_does_not(
    traced: Traced, whole: dict[str, Any], open_page: OpenPage
) -> None:
    bare = whole | {"nodes": [node | {"influence": None} for node in whole["nodes"]]}
    page = open_page(graph_page(bare))
    for threshold in (0.5, 0.8, 0.9):
        slide(page, "node", threshold)
        # An edge at the cut may fall on either side, and with it a node.
        assert abs(counts(page)[0] - len(traced.json(threshold, 0.98)["nodes"])) <= 1


def test_a_slider_prunes(whole: dict[str, Any], open_page: OpenPage) -> None:
    page = open_page(graph_page(whole))
    before = counts(page)
    slide(page, "node", 0.4)
    fewer = counts(page)
    assert 10 < fewer[0] < before[0] and fewer[1] < before[1]
    slide(page, "edge", 0.5)
    assert counts(page)[1] < fewer[1]
    page.uncheck("#errors")
    assert counts(page)[0] < fewer[0]


def test_a_node_is_clicked(whole: dict[str, Any], open_page: OpenPage) -> None:
    feature = max(
        (node for node in whole["nodes"] if node["feature_type"] == "cross layer transcoder"),
        key=lambda node: -node["influence"],
    )
    layer, index, _ = map(int, feature["node_id"].split("_"))
    note = FeatureNote(
        label="cities </script><b>", promoted=[(" Paris", 1.5), ("\n", 0.5)], suppressed=[(" the", -2.0)]
    )
    page = open_page(graph_page(whole, notes={(layer, index): note}))
    find(page, f"L{layer} #{index}")
    box = page.locator("#stage").bounding_box()
    assert box is not None
    page.keyboard.press("Escape")
    assert "What made it say that?" in page.inner_text("#node")
    # Its place on the canvas: the page says where the pointer is over something.
    hit = page.evaluate(
        """() => {
          const canvas = document.getElementById("nodes"), box = canvas.getBoundingClientRect();
          for (let y = 60; y < box.height - 60; y += 4) for (let x = 70; x < box.width; x += 4) {
            canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: box.x + x, clientY: box.y + y, pointerId: 9}));
            if (document.querySelector("#tip b")?.textContent.startsWith("cities")) return [box.x + x, box.y + y];
          }
        }"""
    )
    assert hit is not None, "the strongest feature is under no point of the canvas"
    tip = page.inner_text("#tip")
    assert "activation" in tip and "␣Paris" in tip and "␣the" in tip
    page.mouse.click(*hit)
    panel = page.inner_text("#node")
    assert panel.startswith("cities </script><b>") and f"L{layer} #{index}" in panel and "Inputs" in panel
    values = [
        abs(float(text.replace("−", "-")))
        for text in page.locator("#node ul").last.locator(".value").all_inner_texts()
    ]
    server = [link["weight"] for link in whole["links"] if link["source"] == feature["node_id"]]
    assert values == sorted(values, reverse=True), "sorted by strength"
    assert values[0] == pytest.approx(max(map(abs, server)), rel=0.01)
    page.locator("#node ul button").first.click()
    assert not page.inner_text("#node").startswith("cities"), "a row opens the node at the other end"


def test_the_keyboard_reaches_everything(whole: dict[str, Any], open_page: OpenPage) -> None:
    page = open_page(graph_page(whole))
    page.focus("#nodes")
    page.keyboard.press("ArrowUp")
    first = page.inner_text("#node h2")
    assert "the" in first and page.inner_text("#said").startswith("logit")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#node h2") != first
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#said").startswith(("feature", "error"))
    page.keyboard.press("i")
    page.keyboard.press("p")
    assert page.inner_text("#pin-count") == "1" and page.inner_text("#pin") == "Unpin"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Escape")
    page.focus("#nodes")
    page.keyboard.press("?")
    assert page.is_visible("#keys")
    page.keyboard.press("Escape")
    page.keyboard.press("v")
    assert page.get_attribute("#tab-circuit", "aria-selected") == "true"


def test_pins_and_groups_are_kept(whole: dict[str, Any], open_page: OpenPage) -> None:
    page = open_page(graph_page(whole))
    for text in ("L0 france", "L5 is", "token france"):
        find(page, text)
        page.keyboard.press("p")
    assert page.inner_text("#pin-count") == "3"
    for row in range(2):
        page.locator("#pins .pin input").nth(row).check()
    page.fill("#group-name", "about a city")
    page.click("#group")
    assert page.input_value("#pins .group-head input") == "about a city"
    page.keyboard.press("v")
    assert "2 boxes" in page.inner_text("#counts")
    kept = saved(page, "all")
    assert set(kept) == set(whole) and len(kept["links"]) == len(whole["links"])
    assert set(kept["qParams"]) >= set(whole["qParams"])
    (supernode,) = kept["qParams"]["supernodes"]
    assert supernode[0] == "about a city" and len(supernode) == 3
    assert len(kept["qParams"]["pinnedIds"]) == 3 and set(supernode[1:]) < set(kept["qParams"]["pinnedIds"])
    weights = [np.array([link["weight"] for link in each["links"]]) for each in (kept, whole)]
    np.testing.assert_allclose(np.sort(weights[0]), np.sort(weights[1]), rtol=1e-6)

    again = open_page(graph_page(kept))
    assert again.inner_text("#pin-count") == "3"
    assert again.input_value("#pins .group-head input") == "about a city"
    again.get_by_role("button", name="Ungroup").click()
    assert again.locator("#pins .group-head").count() == 0 and again.inner_text("#pin-count") == "3"


def test_the_theme_follows_the_system_and_toggles(whole: dict[str, Any], open_page: OpenPage) -> None:
    def ground(page: Page) -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour[4:-1].split(",")))

    light, dark = open_page(graph_page(whole)), open_page(graph_page(whole), scheme="dark")
    assert ground(light) > 600 and ground(dark) < 150
    dark.click("#theme")
    assert ground(dark) > 600
    light.focus("#nodes")
    light.keyboard.press("t")
    assert ground(light) < 150


def test_it_works_at_two_thousand_nodes(open_page: OpenPage) -> None:
    page = open_page(graph_page(made_up(), node_threshold=1.0, edge_threshold=1.0))
    assert counts(page)[0] > 2_000
    box = page.locator("#nodes").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.wheel(0, -400)
    page.mouse.down()
    page.mouse.move(x - 120, y + 40, steps=6)
    page.mouse.up()
    page.keyboard.press("0")
    find(page, "say0")
    assert "Inputs" in page.inner_text("#node") and page.locator("#node ul button").count() >= 40
    page.get_by_role("button", name="more").click()
    assert page.locator("#node ul button").count() > 100
    slide(page, "node", 0.5)
    assert 0 < counts(page)[0] < 2_000


def test_a_page_that_leaves_edges_out_prunes_nearly_as_the_server_does(
    traced: Traced, whole: dict[str, Any], open_page: OpenPage
) -> None:
    page = open_page(graph_page(whole, max_edges=len(whole["links"]) // 5))
    for node_threshold, edge_threshold in ((0.8, 0.98), (0.6, 0.9), (0.9, 0.95)):
        slide(page, "node", node_threshold)
        slide(page, "edge", edge_threshold)
        n_nodes, n_edges = counts(page)
        server = traced.json(node_threshold, edge_threshold)
        assert n_nodes == pytest.approx(len(server["nodes"]), rel=0.02)
        assert n_edges == pytest.approx(len(server["links"]), rel=0.05)


def test_a_page_holds_no_more_than_it_may(whole: dict[str, Any], open_page: OpenPage) -> None:
    page = open_page(graph_page(whole, max_nodes=300, max_edges=5_000))
    slide(page, "node", 1.0)
    slide(page, "edge", 1.0)
    n_nodes, n_edges = counts(page)
    assert 100 < n_nodes <= 300 and n_edges <= 5_000
    assert float(page.get_attribute("#node-threshold", "max") or 1) < 1
