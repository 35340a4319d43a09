"""The commands of dictionaries: lines in a pipe, tints on a terminal, and a page that needs nothing else."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from glasshouse.cli.feature_page import feature_page, page_data
from glasshouse.cli.features import portrait
from glasshouse.cli.main import app
from glasshouse.client import Client, EncodedFeatures
from glasshouse.client.feature_tables import tint
from glasshouse.client.testing import Failure, FakeServer

SAE = "resid-post-1"


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_dictionaries(server: FakeServer) -> None:
    lines = [line.split("\t") for line in run("dictionaries").stdout.splitlines()]
    assert [line[0] for line in lines] == ["resid-post-0", SAE]
    assert lines[1][1:4] == ["sae", "standard", "blocks.1.hook_resid_post"] and lines[1][-2:] == [
        "6.5",
        "0.125",
    ]
    assert json.loads(run("dictionaries", "--json").stdout)[0]["decoder_norms"]["mean"] == 0.5


def test_feature(server: FakeServer) -> None:
    lines = run("feature", SAE, 3, "--tokens", 2, "--nearest", 3).stdout.splitlines()
    assert lines[:2] == ["feature\t3", "label\ta vowel"]
    ranks = [line.split("\t") for line in lines[4:]]
    assert len(ranks) == 3 and ranks[0][0] == "'h'" and ranks[0][1].startswith("-1.3") and ranks[2][0] == ""
    assert json.loads(run("feature", SAE, 3, "--json").stdout)["nearest"][0]["cosine"] > 0.3
    assert "no feature 24" in run("feature", SAE, 24, status=1).stderr


def test_evaluate_dictionary(server: FakeServer, tmp_path: Path) -> None:
    lines = dict(line.split("\t") for line in run("evaluate-dictionary", SAE).stdout.splitlines())
    assert lines == {
        "ce_loss_score": "0.9688", "explained_variance": "0.875", "fvu": "0.125", "l0": "6.5", "tokens": "16384",
    }  # fmt: skip
    texts = tmp_path / "lines.txt"
    texts.write_text("one\ntwo\n")
    found = json.loads(run("evaluate-dictionary", SAE, "--file", texts, "--max-tokens", 7, "--json").stdout)
    assert found["tokens"] == 7 and found["metrics"]["l0"] == 6.5
    server.fail_operation(Failure("INTERNAL", "it broke", reason="DEFECT"))
    assert "error: it broke" in run("evaluate-dictionary", SAE, status=1).stderr


def test_features_in_a_pipe(server: FakeServer) -> None:
    lines = [
        line.split("\t")
        for line in run(
            "features", "hi", "--dictionary", SAE, "--top-k", 2, "--feature", 3
        ).stdout.splitlines()
    ]
    assert [line[:2] for line in lines] == [["0", "'<bos>'"], ["1", "'h'"], ["2", "'i'"]]
    assert all(len(line) == 5 and line[2].startswith("3:") for line in lines)


def test_features_as_json(server: FakeServer) -> None:
    out = run("features", "hi", "--dictionary", SAE, "--feature", 3, "--positions", "1:", "--json").stdout
    found = json.loads(out)
    assert found["tokens"] == ["<bos>", "h", "i"] and found["positions"] == [1, 2]
    with Client(server.target) as client:
        encoded = client.model().dictionary(SAE).encode("hi", positions=slice(1, None))
    assert found["features"][0][0]["feature"] == encoded.row(1).top(1).ids[0]
    assert found["chosen"]["3"] == encoded.column(3).tolist()


def test_refusals(server: FakeServer, tmp_path: Path) -> None:
    assert "closest: resid-post-1" in run("features", "a", "--dictionary", "resid-post-11", status=1).stderr
    run("features", "a", "--dictionary", SAE, "--feature", 99, status=1)
    run("features", "a", "--dictionary", SAE, "--top-k", 0, status=2)
    run("features", "a", "--dictionary", SAE, "--html", tmp_path / "no" / "p.html", status=2)
    for wrong in ("3=1", f"{SAE}:x=1", f"{SAE}:3", f"{SAE}:3=much"):
        run("generate", "a", "--set-feature", wrong, status=2)
        run("generate", "a", "--scale-feature", wrong, status=2)
    run("generate", "a", "--read-features", f"{SAE}:many", status=2)


def test_generate_with_features(server: FakeServer) -> None:
    arguments = (
        *("generate", "ab", "--max-tokens", 3, "--seed", 1, "--positions", "1:"),
        *(
            "--set-feature",
            f"{SAE}:3=9.5",
            "--scale-feature",
            "resid-post-0:1,2=0",
            "--read-features",
            f"{SAE}:2",
        ),
    )
    lines = run(*arguments).stdout.splitlines()
    assert len(lines) == 3 and all(f"{SAE}: " in line for line in lines)
    setting, scaling = server.calls[-1].request.interventions
    assert (list(setting.set_features.features), list(setting.set_features.values)) == ([3], [9.5])
    assert list(scaling.scale_features.features) == [1, 2] and setting.positions.span.start == 1
    events = [json.loads(line) for line in run(*arguments, "--json").stdout.splitlines()]
    assert len(events[0]["features"][SAE]["values"]) == 3
    assert set(events[1]["features"][SAE][0]) == {"feature", "activation"}
    assert events[-1]["receipt"][0]["edit"] == "set_features"


@pytest.fixture
def encoded(server: FakeServer) -> EncodedFeatures:
    with Client(server.target) as client:
        return client.model().dictionary(SAE).encode("a <b>\n</script>", positions=slice(1, None))


def test_tints_grow_with_the_activation() -> None:
    styles = [tint(value, 10) for value in (1, 5, 10, -10)]
    assert len(set(styles[:3])) == 3 and styles[2] == styles[3]
    assert tint(0, 10) == tint(1, 0) == "dim"


def test_the_portrait_tints_the_text(encoded: EncodedFeatures) -> None:
    def shown(chosen: list[int]) -> str:
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, color_system="truecolor", width=100)
        console.print(*portrait(encoded, 2, chosen, {}), sep="\n")
        return out.getvalue()

    strongest = encoded.strongest(1).ids[0]
    assert "strongest feature of each token" in shown([])
    chosen = shown([int(strongest)])
    assert f"feature {strongest}" in chosen and "48;2;255;212;122" in chosen, (
        "its peak has the strongest tint"
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", chosen)
    assert "<bos>a <b>" in plain and "</script>" in plain


class Page(HTMLParser):
    """What the page holds: every element and attribute, and the text of each script."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


def test_the_page_is_whole_and_reaches_for_nothing(server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    text = "a <b>\n</script>"
    run("features", text, "--dictionary", SAE, "--feature", 3, "--html", path)
    html = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html), "nothing from elsewhere"
    assert not [tag for tag, _ in page.elements if tag in ("link", "img", "iframe")]
    assert not [attrs for _, attrs in page.elements if "src" in attrs or "href" in attrs]
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in html
    assert len(page.scripts) == 2, "a token cannot end the script"
    data = json.loads(page.scripts[0])
    assert "".join(data["tokens"]) == f"<bos>{text}" and data["chosen"] == [3]
    assert data["features"][0]["label"] == "a vowel" and data["features"][0]["promoted"]
    for name in set(re.findall(r'\bat\("([a-z-]+)"\)', page.scripts[1])) | {"data"}:
        assert any(attrs.get("id") == name for _, attrs in page.elements), name
    for key in set(re.findall(r"\bdata\.([a-z]+)", page.scripts[1])) - {"push"}:
        assert key in data, key


def test_page_data_is_the_encoding(encoded: EncodedFeatures, server: FakeServer) -> None:
    with Client(server.target) as client:
        info = client.model().dictionary(SAE).info
    data = page_data(info, encoded, {}, [23, 5])
    assert [each["index"] for each in data["features"]][:2] == [23, 5]
    assert {each["index"] for each in data["features"]} == {*encoded.ids.tolist(), 23, 5}
    for row, (_, features) in enumerate(encoded):
        assert data["active"][row] == len(features)
        for index, value in features:
            assert dict(map(tuple, data["columns"][str(index)]))[row] == pytest.approx(value, rel=1e-3)
    assert json.dumps(data, allow_nan=False)
    assert feature_page(info, encoded, {}).count("</script>") == 2
