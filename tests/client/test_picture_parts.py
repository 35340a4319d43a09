"""Heat maps, coloured text and bars: on a page, as an image, on a terminal, with the values they were given."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from glasshouse.client import pictures
from glasshouse.client.pictures import (
    Bars,
    CircuitDiagram,
    HeatMap,
    Part,
    TokenText,
    circuit_diagram,
    draw,
    render,
    report_page,
    save_figure,
)
from glasshouse.client.pictures.parts import same_scale, scale_of, shown_cell, shown_number, shown_token

TOKENS = ["<bos>", " a", " </b>", "\n", " $5"]
HEAT = HeatMap(
    title="hook_resid_pre",
    rows=["L0", "L1"],
    columns=TOKENS,
    values=np.array([[0.0, 1.0, -4.0, np.nan, 0.5], [2.0, 0.0, 0.0, 0.0, 0.0]]),
    unit="logit difference",
)
TEXT = TokenText(title="tokens", tokens=TOKENS, values=np.array([0.0, 1.0, -2.0, 0.1, 0.0]))
BARS = Bars(title="parts $x$", labels=["embed", "L0 mlp"], values=np.array([3.0, -1.5]), unit="logit")
PARTS: list[Part] = [HEAT, TEXT, BARS]


def held(html: str) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', html, re.S)
    assert found is not None
    return dict(json.loads(found[1]))


def test_what_there_is() -> None:
    assert set(pictures.__all__) == {
        "Bars", "CircuitDiagram", "FeatureNote", "HeatMap", "Part", "TokenText", "circuit_diagram", "draw",
        "feature_notes", "graph_page", "picture", "render", "report_page", "save_figure",
    }  # fmt: skip
    assert all(hasattr(pictures, name) for name in pictures.__all__)


def test_values_and_labels_must_agree() -> None:
    with pytest.raises(ValueError, match=r"x: values have shape \(2,\) and the labels \(3,\)"):
        Bars(title="x", labels=["a", "b", "c"], values=np.zeros(2))
    with pytest.raises(ValueError, match="shape"):
        HeatMap(title="x", rows=["a"], columns=["b"], values=np.zeros((1, 2)))


def test_the_scale_is_the_largest_magnitude() -> None:
    assert scale_of(HEAT) == 4.0 and same_scale(PARTS) == 4.0
    assert scale_of(Bars(title="", labels=[], values=np.zeros(0))) > 0
    assert scale_of(Bars(title="", labels=["a"], values=np.array([np.nan]))) > 0
    assert scale_of(Bars(title="", labels=["a"], values=np.ones(1), scale=7.0)) == 7.0


def test_of_many_rows_the_strongest_stay() -> None:
    values = np.zeros((1_000, 1))
    values[[10, 500], 0] = -3.0, 2.0
    wide = HeatMap(title="units", rows=[str(n) for n in range(1_000)], columns=["a"], values=values)
    assert wide.strongest(2).rows == ["10", "500"] and scale_of(wide.strongest(1)) == 3.0
    assert "2 strongest of 1,000" in wide.strongest(2).title and HEAT.strongest() is HEAT
    assert len(held(report_page("", [wide]))["parts"][0]["rows"]) == 240


def test_numbers_and_tokens_as_labels() -> None:
    assert [shown_number(value) for value in (1.23456, -0.5, 1e-5, float("nan"))] == [
        "+1.23",
        "−0.5",
        "+1e−5",
        "",
    ]
    assert [shown_cell(value, 2.0) for value in (1.234, -0.5, 0.001)] == ["+1.23", "−0.50", "0"]
    assert shown_cell(123.4, 500.0) == "+123"
    assert [shown_token(token) for token in (" a", "\n", "  ", "")] == ["a", "↵", "␣␣", "∅"]


def test_the_page_holds_the_values_and_reaches_for_nothing() -> None:
    html = report_page("why </script>", PARTS, about="fable", facts={"clean": "+1"})
    assert not re.search(r"https?:|src=|href=|@import|url\(", html), "nothing from elsewhere"
    assert "default-src 'none'" in html and html.count("</script>") == 2
    assert not re.search(r"/\*[A-Z]+\*/", html), "every part is put in"
    data = held(html)
    assert [part["kind"] for part in data["parts"]] == ["heat", "text", "bars"]
    assert data["parts"][0]["values"][0] == [0.0, 1.0, -4.0, None, 0.5] and data["parts"][0]["scale"] == 4.0
    assert data["title"] == "why </script>" and data["facts"] == [["clean", "+1"]]


def test_the_image_has_the_labels_and_the_colours(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    figure = draw("why", PARTS)
    heat, text, bars, colour_bar = sorted(figure.axes, key=lambda axes: axes.get_ylabel() != "")
    assert [label.get_text() for label in heat.get_xticklabels()] == ["<bos>", "a", "</b>", "↵", r"\$5"]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["L0", "L1"]
    np.testing.assert_array_equal(np.ma.filled(heat.images[0].get_array(), np.nan), HEAT.values)
    assert heat.images[0].get_clim() == (-4.0, 4.0) and colour_bar.get_ylabel() == "logit difference"
    assert [bar.get_width() for bar in bars.patches] == [3.0, -1.5]
    assert "".join(label.get_text() for label in text.texts) == r"<bos> a </b>↵ \$5"
    save_figure(tmp_path / "a.png", "why", PARTS)
    pixels = (imread(tmp_path / "a.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for colour in ((0xD4, 0x67, 0x0B), (0x25, 0x63, 0xC9)):
        assert (np.abs(pixels - colour).max(axis=1) <= 2).sum() > 1_000, "both ends of the scale are there"
    with pytest.raises(ValueError, match=r"cannot write \.xyz: use one of"):
        save_figure(tmp_path / "a.xyz", "why", PARTS)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"glasshouse\[plot\]"):
        save_figure(tmp_path / "a.png", "why", PARTS)


def test_a_terminal_shows_the_same() -> None:
    def shown(part: Part) -> tuple[str, str]:
        out = io.StringIO()
        Console(file=out, force_terminal=True, color_system="truecolor", width=120).print(render(part))
        return out.getvalue(), re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())

    colours, plain = shown(TEXT)
    assert "<bos> a </b>" in plain and "48;2;66;132;246m </b>" in colours, "the strongest is the deepest blue"
    colours, plain = shown(HEAT)
    assert re.search(r"L0 +0 +\+1.00 +−4.00", plain) and "48;2;66;132;246m" in colours
    colours, plain = shown(BARS)
    assert plain.index("embed") < plain.index("L0 mlp") and plain.count("█") == 28 + 14


def circuit() -> CircuitDiagram:
    edges = [
        ("embed", "a0.h1.q"),
        ("embed", "a0.h1.k"),
        ("a0.h1", "m0"),
        ("a0.h1", "a2.h3.v"),
        ("a2.h3", "logits"),
    ]
    return circuit_diagram("pronouns", edges, np.array([1.0, 0.5, -2.0, 0.1, 1.0]))


def test_a_circuit_is_read_from_its_labels() -> None:
    found = circuit()
    assert list(found.levels) == ["embed", "L0 attn", "L0 mlp", "L2 attn", "logits"]
    assert list(found.nodes) == [("embed", 0), ("a0.h1", 1), ("m0", 2), ("a2.h3", 3), ("logits", 4)]
    assert list(found.edges) == [(0, 1), (0, 1), (1, 2), (1, 3), (3, 4)]
    assert list(found.ports) == ["q", "k", "", "v", ""] and scale_of(found) == 2.0
    assert found.places()[0] == (0.5, 0.1) and found.places()[-1] == (0.5, 0.9)
    assert circuit_diagram("", [("embed", "logits")]).values.tolist() == [1.0]
    with pytest.raises(ValueError, match=r"'x3' names no part of a circuit"):
        circuit_diagram("", [("x3", "logits")])


def test_a_circuit_is_drawn_everywhere(tmp_path: Path) -> None:
    out = io.StringIO()
    Console(file=out, width=120).print(render(circuit()))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[1] == ["logits", "a2.h3"] and lines[-1] == ["a0.h1", "embed:q", "embed:k"]
    assert held(report_page("", [circuit()]))["parts"][0]["ports"] == ["q", "k", "", "v", ""]
    pytest.importorskip("matplotlib")
    (axes,) = draw("", [circuit()]).axes
    assert [text.get_text() for text in axes.texts] == ["embed", "a0.h1", "m0", "a2.h3", "logits"]
    assert len(axes.patches) == 5
