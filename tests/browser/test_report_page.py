"""Heat maps, coloured text and bars in Chromium."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from glasshouse.client.pictures import Bars, HeatMap, TokenText, circuit_diagram, report_page

if TYPE_CHECKING:
    from .conftest import OpenPage

TOKENS = [" The", " capital", " of", " <i>", "\n"]
PAGE = report_page(
    "why?",
    [
        HeatMap(
            title="grid",
            rows=["L0", "L1"],
            columns=TOKENS,
            values=np.arange(10).reshape(2, 5) - 4.0,
            unit="nats",
        ),
        TokenText(title="text", tokens=TOKENS, values=np.array([0.0, 2.0, -2.0, 1.0, 0.0])),
        Bars(title="bars", labels=["embed", "L0 mlp"], values=np.array([2.0, -1.0])),
    ],
    facts={"clean": "+1.5"},
)


def test_it_shows_every_part(open_page: OpenPage) -> None:
    page = open_page(PAGE)
    assert page.locator(".part").count() == 3 and "clean" in page.inner_text("#facts")
    cells = page.locator(".heat td")
    assert cells.count() == 10 and cells.nth(9).inner_text() == "+5.00"
    assert page.locator(".heat tfoot th").nth(4).inner_text() == "<i>"
    widths = page.locator(".bars i").evaluate_all(
        "bars => bars.map(bar => bar.getBoundingClientRect().width)"
    )
    assert abs(widths[0] - 2 * widths[1]) < 1.5


def test_colours_say_the_sign_and_the_size(open_page: OpenPage) -> None:
    page = open_page(PAGE)
    # Red less blue: how orange the cell is.
    warmth = page.locator(".heat td").evaluate_all(
        """cells => cells.map(cell => {
          const pen = document.createElement("canvas").getContext("2d");
          pen.fillStyle = getComputedStyle(cell).backgroundColor; pen.fillRect(0, 0, 1, 1);
          const [red, , blue] = pen.getImageData(0, 0, 1, 1).data; return red - blue; })"""
    )
    assert warmth == sorted(warmth) and warmth[0] < -50 and warmth[-1] > 100


def test_pointing_and_keys_tell_the_value(open_page: OpenPage) -> None:
    page = open_page(PAGE)
    page.locator(".heat td").nth(2).hover()
    assert page.inner_text("#tip").replace("\xa0", " ").startswith("−2") and "L0, “␣of”" in page.inner_text(
        "#tip"
    )
    page.locator(".heat td").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "L1, “␣capital”" in page.inner_text("#tip")


def test_the_theme_toggles(open_page: OpenPage) -> None:
    page = open_page(PAGE, scheme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(250, 248, 244)"


def test_a_circuit_shows_what_a_node_hears(open_page: OpenPage) -> None:
    edges = [("embed", "a0.h1.q"), ("a0.h1", "m0"), ("embed", "m0"), ("m0", "logits")]
    page = open_page(
        report_page("circuit", [circuit_diagram("pronouns", edges, np.array([1.0, -2.0, 0.5, 1.0]))])
    )
    assert page.locator(".circuit .box").count() == 4 and page.locator(".circuit .line.negative").count() == 1
    page.locator(".circuit .box", has_text="m0").hover()
    assert page.inner_text("#tip").split() == ["m0", "2", "in,", "1", "out:", "from", "a0.h1,", "embed"]
    assert page.locator(".circuit .line.here").count() == 3
