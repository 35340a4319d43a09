"""The whole path by commands, as a user would take it: a file of examples, a direction, a probe, scores, steering."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glasshouse import fable
from glasshouse.client import Model, add_vector, read_probe
from glasshouse.tour.server_process import ServerProcess

NUMBERS = Path(str(fable.__file__)).parent / "labelled" / "number.jsonl"


def command(server: ServerProcess, *arguments: object, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "glasshouse.cli.main", *map(str, arguments)],
        env={**os.environ, "GLASSHOUSE_TARGET": server.target},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    return done.stdout if not status else done.stderr


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "few.jsonl"
    path.write_text("\n".join(NUMBERS.read_text().splitlines()[:160]) + "\n")
    return path


def test_from_a_file_to_a_steered_generation(
    server: ServerProcess, model: Model, few: Path, tmp_path: Path
) -> None:
    vectors = tmp_path / "v.npz"
    made = json.loads(
        command(
            server,
            "directions",
            "compute",
            few,
            "--positive",
            "plural",
            "--name",
            "many",
            "-o",
            vectors,
            "--json",
        )
    )
    assert made["resource_name"] == "models/fable/directions/many@1"
    best = made["best_hook_point"]
    assert made["at"][best]["held_out"]["auroc"]["value"] >= 0.98
    handle = model.direction("many")
    with np.load(vectors) as written:
        assert np.array_equal(written[best], handle.vector)
    listed = command(server, "directions", "list").splitlines()
    assert {line.split("\t")[0] for line in listed} >= {"mood@1", "gender@1", "number@1", "many@1"}
    taken = command(server, "directions", "compute", few, "--positive", "plural", "--name", "many", status=1)
    assert "the next is 2" in taken and "ALREADY_EXISTS" in taken

    by_name, by_handle, by_vector = (
        model.generate(
            "The frog near the house",
            max_tokens=1,
            temperature=0,
            interventions=[add_vector(best, what, 3.0)],
        ).result()
        for what in ("many", handle, handle.vector)
    )
    assert by_name.text == by_handle.text == by_vector.text
    assert by_name.receipt[0].resources == ["models/fable/directions/many@1"]


def test_from_a_file_to_scores(server: ServerProcess, model: Model, few: Path) -> None:
    hook = "blocks.2.hook_resid_post"
    shown = command(
        server, "probes", "train", few, "--hook-point", hook, "--positive", "plural", "--name", "many"
    )
    assert shown.startswith(f"many@1: logistic, singular/plural, last of {hook}\n")
    lines = command(
        server, "probes", "score", "many", "The frogs near the hill", "The frog near the hill"
    ).splitlines()
    plural, singular = (float(line.split("\t")[1]) for line in lines)
    assert plural > 0.9 > 0.1 > singular
    with model.generate(
        "The frogs near the hill", max_tokens=2, seed=0, readouts=[read_probe("many")]
    ) as stream:
        read = stream.prompt_readouts.probes["many"].scores[-1, 0]
    assert read == pytest.approx(plural, abs=2e-3)
    missing = command(server, "probes", "get", "manny", status=1)
    assert "closest: many" in missing
