"""`glasshouse graph` and `attribute` against a real server: what they print and write is what the client gets."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from glasshouse.cli.main import app
from glasshouse.client import AttributionGraph, Client, Model, kl_divergence, logit_difference, patch_grid
from glasshouse.tour.server_process import ServerProcess

CLEAN, CORRUPT = "The capital of France is called", "The capital of Italy is called"
ANSWER = ("--answer", " Paris", "--versus", " Rome")
METRIC = logit_difference(" Paris", " Rome")

Run = Callable[..., Result]


@pytest.fixture
def run(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("GLASSHOUSE_TARGET", server.target)

    def run_(*arguments: object, status: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == status, (result.output, result.stderr, result.exception)
        return result

    return run_


def lines(result: Result) -> list[list[str]]:
    return [line.split("\t") for line in result.stdout.splitlines()]


def page_data(path: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    assert found is not None
    return dict(json.loads(found[1]))


def test_tokens(run: Run, model: Model, tmp_path: Path) -> None:
    expected = model.attribute_tokens(CLEAN, METRIC, baseline=CORRUPT)
    rows = lines(run("attribute", "tokens", CLEAN, *ANSWER, "--baseline", CORRUPT))
    assert [row[1] for row in rows] == [repr(token) for token in expected.input.strings]
    assert [float(row[2]) for row in rows] == pytest.approx(expected.scores.tolist(), rel=1e-3, abs=1e-3)
    assert max(rows, key=lambda row: float(row[2]))[1] == "' France'"
    expected = model.attribute_tokens(CLEAN, METRIC)
    found = json.loads(run("attribute", "tokens", CLEAN, *ANSWER, "--json", "-o", tmp_path / "a.html").stdout)
    assert found["scores"] == pytest.approx(expected.scores.tolist(), rel=1e-3, abs=1e-3)
    assert abs(found["residual"]) < 1e-3, "the default baseline converges"
    zeros = json.loads(run("attribute", "tokens", CLEAN, *ANSWER, "--json", "--baseline", "zeros").stdout)
    assert zeros["baseline_value"] != pytest.approx(found["baseline_value"], abs=0.1)
    assert found["residual"] == pytest.approx(expected.residual, abs=1e-3)
    data = page_data(tmp_path / "a.html")
    assert data["title"] == CLEAN and "logit of ' Paris' less ' Rome'" in data["about"]
    (part,) = data["parts"]
    assert part["kind"] == "text" and part["values"] == pytest.approx(found["scores"], rel=1e-3)


def test_direct(run: Run, model: Model, tmp_path: Path) -> None:
    expected = model.direct_attribution(CLEAN, " Paris", " Rome", dictionaries="resid-post-5")
    arguments = ("attribute", "direct", CLEAN, *ANSWER, "--dictionary", "resid-post-5", "--top", 3)
    rows = lines(run(*arguments, "-o", tmp_path / "a.html"))
    parts = {row[0]: float(row[1]) for row in rows}
    written = sum(parts[name] for name in [*expected.contributions, "constant"])
    assert written == pytest.approx(expected.logit, abs=1e-2), "the parts sum to the logit"
    (layer, head, part), *_ = expected.top_heads(1)
    assert parts[f"L{layer}.H{head}"] == pytest.approx(part, rel=1e-3)
    titles = [each["title"] for each in page_data(tmp_path / "a.html")["parts"]]
    assert titles[1] == "Heads" and titles[-1].startswith("Features of resid-post-5")


def test_features(run: Run, model: Model, tmp_path: Path) -> None:
    expected = model.attribute_features(CLEAN, METRIC, dictionaries="resid-post-3").dictionaries[0]
    arguments = ("attribute", "features", CLEAN, *ANSWER, "--dictionary", "resid-post-3", "--top", 4)
    rows = lines(run(*arguments, "-o", tmp_path / "a.html"))
    assert [(int(row[1]), int(row[3])) for row in rows] == [entry[:2] for entry in expected.top(4)]
    bars, heat = page_data(tmp_path / "a.html")["parts"]
    strongest = next(iter(expected.by_feature()))
    assert re.match(rf"{strongest} \w", bars["labels"][0]), "a feature is told by what it promotes"
    assert bars["labels"][-1] == "errors" and heat["rows"] == bars["labels"]


def test_patch(run: Run, model: Model, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    expected = model.patch_sweep(CLEAN, CORRUPT, metric=METRIC, grids="hook_resid_pre").result()
    rows = lines(run("attribute", "patch", CLEAN, CORRUPT, *ANSWER, "--top", 5, "-o", tmp_path / "a.png"))
    top = expected.grid.top(5)
    assert [row[:4] for row in rows] == [["hook_resid_pre", str(e.layer), "", str(e.position)] for e in top]
    assert [float(row[-1]) for row in rows] == pytest.approx([e.effect for e in top], rel=1e-3)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    every = lines(run("attribute", "patch", CLEAN, CORRUPT, *ANSWER, "--top", 0, "--layer", 1, "--denoise"))
    assert {row[1] for row in every} == {"1"} and len(every) == len(expected.clean.strings)


def test_heads(run: Run, model: Model, tmp_path: Path) -> None:
    grid = patch_grid("attn.hook_z", by_head=True, all_positions_at_once=True)
    expected = model.patch_sweep(CLEAN, CORRUPT, metric=METRIC, grids=grid).result().grid
    rows = lines(run("attribute", "heads", CLEAN, CORRUPT, *ANSWER, "--top", 1, "-o", tmp_path / "a.html"))
    (best,) = expected.top(1)
    assert rows[0][:4] == ["attn.hook_z", str(best.layer), str(best.column), "all"]
    (part,) = page_data(tmp_path / "a.html")["parts"]
    assert part["columns"][:2] == ["H0", "H1"] and len(part["rows"]) == model.info.n_layers
    assert part["values"][best.layer][best.column] == pytest.approx(best.effect, rel=1e-3)
    ablated = lines(run("attribute", "heads", CLEAN, *ANSWER, "--ablate", "zero", "--top", 1))
    assert float(ablated[0][-1]) != pytest.approx(best.effect)


def test_mediate(run: Run) -> None:
    found = json.loads(run("attribute", "mediate", CLEAN, CORRUPT, *ANSWER, "--layer", 0, "--json").stdout)
    indirect = found["grids"][0]["indirect"]
    assert sum(map(sum, indirect[0])) == pytest.approx(found["total"], rel=0.05), (
        "all of it runs through the input"
    )


def test_nodes_and_edges(run: Run, tmp_path: Path) -> None:
    rows = lines(run("attribute", "nodes", CLEAN, CORRUPT, *ANSWER, "--verify", 3, "--top", 3))
    assert all(len(row) == 3 for row in rows) and "@" in rows[0][0]
    rows = lines(run("attribute", "edges", CLEAN, CORRUPT, *ANSWER, "--top", 4, "-o", tmp_path / "a.html"))
    (part,) = page_data(tmp_path / "a.html")["parts"]
    assert part["kind"] == "circuit" and len(part["edges"]) == 60
    source, target = rows[0][0].split("->")
    assert (source in dict(part["nodes"]) and target.rpartition(".")[0]) or target in dict(part["nodes"])
    assert abs(float(rows[0][1])) == pytest.approx(part["scale"], rel=1e-3)


def test_paths(run: Run) -> None:
    ends = (
        "--sender",
        "blocks.0.attn.hook_z:1",
        "--sender",
        "blocks.0.hook_mlp_out@4",
        "--receiver",
        "blocks.3.attn.hook_v",
    )
    rows = lines(run("attribute", "paths", CLEAN, CORRUPT, *ANSWER, *ends))
    assert [row[0] for row in rows] == ["blocks.0.attn.hook_z.head1", "blocks.0.hook_mlp_out@4"]
    assert abs(float(rows[1][1])) > abs(float(rows[0][1])), "where the country is, and its MLP"


def test_circuit(run: Run, tmp_path: Path) -> None:
    arguments = ("attribute", "circuit", CLEAN, CORRUPT, "--metric", "kl", "--threshold", 0.05)
    rows = lines(run(*arguments, "-o", tmp_path / "a.html"))
    (part,) = page_data(tmp_path / "a.html")["parts"]
    assert rows and len(part["edges"]) == len(rows) and any(row[1] == "logits" for row in rows)
    estimate = lines(run(*arguments, "--estimate"))
    assert estimate[0][0] == "memory" and estimate[-1][:2] == ["refused", "no"]
    expected, at_most = (int(number.replace(",", "")) for number in estimate[2][1:3])
    assert 0 < expected < at_most


def test_connections_and_interventions(run: Run, model: Model) -> None:
    expected = model.feature_connections(3, 100, top=2)
    rows = lines(run("attribute", "connections", 3, 100, "--top", 2))
    assert [row[0] for row in rows] == ["in", "in", "out", "out"]
    assert [int(row[2]) for row in rows] == [each.feature for each in expected.incoming + expected.outgoing]
    rows = lines(run("attribute", "intervene", CLEAN, "--set", "3:100@4=10", "--token", " Rome"))
    measured = {row[0]: (float(row[3]), float(row[4])) for row in rows}
    assert "' Rome'" in measured
    for change, predicted in measured.values():
        assert change == pytest.approx(predicted, abs=1e-3), "direct effects predict a constrained change"


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        (("mediate", CLEAN, CORRUPT, *ANSWER), ["heat", "heat"]),
        (("nodes", CLEAN, CORRUPT, *ANSWER), ["heat"] * 5),
        (("heads", CLEAN, "--ablate", "zero"), ["heat"]),
        (
            ("paths", CLEAN, CORRUPT, "--sender", "hook_embed@4", "--receiver", "blocks.2.attn.hook_v"),
            ["bars"],
        ),
        (("connections", 3, 100), ["bars", "bars"]),
        (("intervene", CLEAN, "--set", "3:100@4=10"), ["bars", "bars"]),
        (("intervene", CLEAN, "--set", "3:100@4=10", "--mode", "open"), ["bars", "bars"]),
    ],
)
def test_every_result_has_its_picture(
    run: Run, arguments: tuple[object, ...], kinds: list[str], tmp_path: Path
) -> None:
    run("attribute", *arguments, "-o", tmp_path / "a.html")
    assert [part["kind"] for part in page_data(tmp_path / "a.html")["parts"]] == kinds


def test_a_graph_as_a_page_and_as_files(run: Run, client: Client, tmp_path: Path) -> None:
    page, saved, whole = tmp_path / "a.html", tmp_path / "a.json", tmp_path / "a.npz"
    found = json.loads(run("graph", CLEAN, "-o", whole, "--json").stdout)
    assert found["logits"][0]["label"] == " Paris" and found["nodes"]["kept"] < found["nodes"]["whole"]
    graph = AttributionGraph.load(whole)
    pruned = graph.prune()
    assert found["nodes"] == {"whole": graph.n_nodes, "kept": pruned.n_nodes}
    assert found["scores"]["kept"]["completeness"] == pytest.approx(pruned.scores.completeness)
    rows = dict(
        line[:2] for line in lines(run("graph", "--from", found["name"], "-o", page, "--notes", 20))[:6]
    )
    assert rows["nodes"] == f"{pruned.n_nodes:,} of {graph.n_nodes:,}"
    data = page_data(page)
    assert len(data["nodes"]) == graph.n_nodes and data["limits"] == {"node": 1.0, "edge": 1.0}
    assert len(data["features"]) == 20 and all(note["promoted"] for note in data["features"].values())
    node = pruned.top_features(1)[0]
    assert f"{node.layer}/{node.feature}" in data["features"]
    run("graph", "--from", whole, "-o", saved)
    viewer = json.loads(saved.read_text())
    assert len(viewer["nodes"]) == pruned.n_nodes and len(viewer["links"]) == len(pruned.edges)
    assert run("graph", "--from", saved, "-o", tmp_path / "b.html").stdout == ""
    assert len(page_data(tmp_path / "b.html")["nodes"]) == pruned.n_nodes
    assert found["name"].removeprefix("attributionGraphs/") in run("graphs").stdout
    run("graphs", "--delete", found["name"])
    assert found["name"] not in [info.name for info in client.attribution_graphs()]
    assert "memory" in run("graph", CLEAN, "--estimate").stdout


def test_a_terminal_gets_colour(server: ServerProcess) -> None:
    ours, theirs = pty.openpty()
    arguments = (
        *("attribute", "tokens", CLEAN, *ANSWER),
        *("--baseline", CORRUPT, "--target", server.target),
    )
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "glasshouse.cli.main", *arguments],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # The other end is closed.
            break
        if not chunk:
            break
        shown += chunk
    _, errors = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, errors
    assert "48;2;236;128;20m France" in shown.decode() and "residual" in shown.decode()


@pytest.mark.parametrize(
    "arguments",
    [
        ("attribute", "tokens", CLEAN, "--metric", "kl", "--answer", " Paris"),
        ("attribute", "tokens", CLEAN, "--metric", "probability", "--versus", " Rome"),
        ("attribute", "tokens", CLEAN, "--of-feature", "resid-post-3"),
        ("attribute", "tokens", CLEAN, "--of-feature", "resid-post-3:1", "--of-probe", "mood"),
        ("attribute", "tokens", CLEAN, "--of-direction", "hook_embed=missing.npy"),
        ("attribute", "tokens", CLEAN, "-o", "picture.gif"),
        ("attribute", "tokens", CLEAN, "-o", "no/such/folder.html"),
        ("attribute", "tokens", CLEAN, "--steps", 0),
        ("attribute", "patch", CLEAN),
        ("attribute", "patch", CLEAN, CORRUPT, "--ablate", "zero"),
        ("attribute", "heads", CLEAN, "--ablate", "zero", "--denoise"),
        ("attribute", "paths", CLEAN, CORRUPT, "--sender", "a:b", "--receiver", "c"),
        ("attribute", "circuit", CLEAN, CORRUPT, "--metric", "kl"),
        ("attribute", "intervene", CLEAN, "--set", "3:100=1"),
        ("graph",),
        ("graph", CLEAN, "--from", "name"),
        ("graph", CLEAN, "--node-threshold", 0),
        ("graph", CLEAN, "-o", "graph.png"),
        ("graph", "--from", "missing.npz"),
        ("graph", "--from", "missing.json", "-o", "graph.html"),
    ],
)
def test_bad_usage_is_said_before_a_server_is_asked(
    arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSHOUSE_TARGET", "127.0.0.1:9")  # Nobody answers there.
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output


def test_refusals(run: Run) -> None:
    refused = run("attribute", "tokens", CLEAN, "--answer", " Paris and more", status=1)
    assert "error:" in refused.stderr and "field: metric" in refused.stderr
    assert (
        "closest"
        in run("attribute", "patch", CLEAN, CORRUPT, "--component", "hook_resid_per", status=1).stderr
    )
    run("graph", "--from", "attributionGraphs/none", status=1)


def test_the_metric_is_the_one_asked_for(run: Run, model: Model) -> None:
    found = json.loads(
        run(
            "attribute",
            "nodes",
            CLEAN,
            CORRUPT,
            "--metric",
            "log-probability",
            "--answer",
            " Paris",
            "--json",
        ).stdout
    )
    logprob = model.score(CLEAN + " Paris").logprobs[-1]
    assert found["clean_value"] == pytest.approx(float(logprob), abs=1e-4)
    kl = model.patch_sweep(CLEAN, CORRUPT, metric=kl_divergence(), grids="hook_resid_pre").result()
    rows = lines(run("attribute", "patch", CLEAN, CORRUPT, "--metric", "kl", "--top", 1))
    assert float(rows[0][-1]) == pytest.approx(kl.grid.top(1)[0].effect, rel=1e-3)
