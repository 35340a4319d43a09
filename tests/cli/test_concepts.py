"""The commands of directions and probes: files in, tables and JSON out, and what is bad usage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from glasshouse.cli.example_files import read_examples
from glasshouse.cli.main import app
from glasshouse.client import Example, Pair
from glasshouse.client.testing import FakeServer

HOOK = "blocks.1.hook_resid_post"
CSV = 'text,label,split\n"it laughed, twice",happy,train\nit wept,sad,test\nit sang,happy,\nit sighed,sad,train\n'


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "moods.csv"
    path.write_text(CSV)
    return path


def test_files_of_examples(tmp_path: Path, examples: Path) -> None:
    found, pairs = read_examples(examples)
    assert not pairs and found[0] == Example("it laughed, twice", "happy")
    assert [example.held_out for example in found] == [False, True, False, False]
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        '{"token_ids": [1, 2], "labels": ["x", "y"]}\n\n'
        '{"messages": [{"role": "user", "content": "hi"}], "label": "x"}\n'
    )
    found, _ = read_examples(lines)
    assert found[0] == Example([1, 2], ["x", "y"]) and found[1].label == "x"
    (tmp_path / "many.csv").write_text("text,labels\na,x|y\nb,\n")
    assert [example.label for example in read_examples(tmp_path / "many.csv")[0]] == [["x", "y"], []]
    (tmp_path / "p.jsonl").write_text('{"positive": "a", "negative": "b", "split": "test"}\n')
    assert read_examples(tmp_path / "p.jsonl") == ([], [Pair("a", "b", held_out=True)])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,feeling\na,b\n", "it needs text and label"),
        ("a.csv", "text,label\na,b,c\n", "another number of columns"),
        ("a.csv", "text,label\n", "holds no example"),
        ("a.jsonl", "not json\n", "line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "no JSON object"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"positive": "a", "negative": "b"}\n', "mixes"),
    ],
)
def test_files_that_are_no_examples(
    server: FakeServer, tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    refused = run("directions", "compute", tmp_path / name, status=2)
    assert message in " ".join(refused.output.replace("│", " ").split())
    assert run("probes", "train", tmp_path / "none.csv", "--hook-point", HOOK, status=2)


def test_directions(server: FakeServer, examples: Path, tmp_path: Path) -> None:
    made = run(
        "directions", "compute", examples, "--positive", "sad", "--name", "mood", "-o", tmp_path / "v.npz"
    )
    lines = made.stdout.splitlines()
    assert lines[0] == "mood@1: sad against happy, difference_in_means"
    assert lines[1].split("\t")[:2] == ["", "blocks.0.hook_resid_post"] and lines[2].split("\t")[0] == "*"
    with np.load(tmp_path / "v.npz") as vectors:
        assert list(vectors) == ["blocks.0.hook_resid_post", HOOK] and vectors[HOOK].shape == (8,)
    assert run("directions", "list").stdout.split("\t")[:4] == ["mood@1", "difference_in_means", "sad", HOOK]
    shown = json.loads(run("directions", "get", "mood", "--json").stdout)
    assert shown["resource_name"] == "models/fake/directions/mood@1"
    assert shown["at"][HOOK]["held_out"]["auroc"]["level"] == 0.95 and "vector" not in shown["at"][HOOK]
    taken = run("directions", "compute", examples, "--positive", "sad", "--name", "mood", status=1)
    assert "published already" in taken.stderr
    again = run("directions", "compute", examples, "--positive", "sad", "--name", "mood", "--next-version")
    assert again.stdout.startswith("mood@2: ")
    assert json.loads(run("directions", "delete", "mood", "--json").stdout) == {
        "deleted": ["models/fake/directions/mood@2"]
    }


def test_a_picture_of_a_direction(server: FakeServer, examples: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("directions", "compute", examples, "--positive", "sad", "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_probes(server: FakeServer, examples: Path) -> None:
    made = run("probes", "train", examples, "--hook-point", HOOK, "--best", "--name", "mood", "--fpr", 0.1)
    assert made.stdout.startswith(f"mood@1: logistic, happy/sad, last of {HOOK}\n")
    assert "control 0.500; learnt from 3, judged by 1" in made.stdout
    assert any(
        call.method == "TrainProbe" and call.request.false_positive_rates == [0.1] for call in server.calls
    )
    assert run("probes", "list").stdout.split("\t")[:3] == ["mood@1", "logistic", "happy/sad"]
    assert run("probes", "score", "mood", "aeiou", "xyz").stdout == "aeiou\t0.833\nxyz\t0.000\n"
    every = run("probes", "score", "mood", "ax", "--every-position").stdout.splitlines()
    assert len(every) == 3 and every[1] == "'a'\t0.500"
    shown = json.loads(run("probes", "score", "mood", "ax", "--json").stdout)
    assert shown[0]["columns"] == ["sad"] and shown[0]["scores"] == [[pytest.approx(1 / 3)]]
    assert "weights" not in json.loads(run("probes", "get", "mood", "--json").stdout)
    assert run("probes", "delete", "mood").stdout == "deleted models/fake/probes/mood@1\n"
    assert "no 'models/fake/probes/mood'" in run("probes", "get", "mood", status=1).stderr
    assert run("probes", "score", "mood", status=2)
