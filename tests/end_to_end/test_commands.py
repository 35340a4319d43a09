"""The `glasshouse` command against a real server, as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasshouse.client import Model, add_vector
from glasshouse.tour.server_process import ServerProcess

from .conftest import HOOK_POINT, PROMPT


@pytest.fixture
def command(server: ServerProcess) -> Any:
    def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "glasshouse.cli.main", *arguments, "--target", server.target],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done

    return run


def test_models_and_hook_points(command: Any, model: Model) -> None:
    (found,) = json.loads(command("models", "--json").stdout)
    assert found["name"] == "fable" and found["d_model"] == model.info.d_model
    points = json.loads(command("hook-points", "--json").stdout)
    assert [point["name"] for point in points] == [point.name for point in model.hook_points()]
    assert HOOK_POINT in command("hook-points").stdout


def test_tokens(command: Any, model: Model) -> None:
    found = json.loads(command("tokenize", PROMPT, "--json").stdout)
    assert found["ids"] == model.tokenize(PROMPT).ids


def test_text_streams_to_standard_output(command: Any, model: Model) -> None:
    done = command("generate", PROMPT, "--max-tokens", "20", "--temperature", "0")
    expected = model.generate(PROMPT, max_tokens=20, temperature=0.0).result()
    assert done.stdout == expected.text + "\n"


def test_steering_from_a_file(command: Any, model: Model, vectors: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "direction.npy"
    np.save(file, vectors[5])
    done = command(
        "generate",
        PROMPT,
        "--max-tokens",
        "20",
        "--temperature",
        "0",
        "--steer",
        f"{HOOK_POINT}={file}*-2",
        "--json",
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    edits = [add_vector(HOOK_POINT, vectors[5], coefficient=-2.0)]
    expected = model.generate(PROMPT, max_tokens=20, temperature=0.0, interventions=edits).result()
    assert events[0]["event"] == "prompt" and events[-1]["event"] == "finished"
    assert events[-1]["text"] == expected.text
    assert events[-1]["receipt"][0]["positions_applied"] == expected.receipt[0].positions_applied
    assert [e["token_id"] for e in events if e["event"] == "token"] == expected.token_ids


def test_activations_to_a_file(command: Any, model: Model, tmp_path: Path) -> None:
    out = tmp_path / "acts.npz"
    command("activations", PROMPT, "--hook-point", HOOK_POINT, "--output", str(out))
    expected = model.activations(PROMPT, hook_points=HOOK_POINT)[HOOK_POINT]
    with np.load(out) as arrays:
        (name,) = (each for each in arrays if HOOK_POINT in each)
        np.testing.assert_array_equal(arrays[name], expected)


def test_scores(command: Any, model: Model) -> None:
    found = json.loads(command("score", PROMPT, "--json").stdout)
    np.testing.assert_allclose(found["logprobs"][1:], model.score(PROMPT).logprobs[1:], atol=1e-5)


def test_a_refusal_has_its_remedy_and_status_1(command: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "acts.npz")
    done = command(
        "activations", PROMPT, "--hook-point", "blocks.3.hook_resid_pots", "--output", out, status=1
    )
    assert HOOK_POINT in done.stderr and "remedy" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_usage_is_status_2(command: Any) -> None:
    assert "--max-tokens" in command("generate", PROMPT, "--max-tokens", "many", status=2).stderr


def test_no_server_is_status_1() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "glasshouse.cli.main", "models", "--target", "127.0.0.1:1", "--timeout", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr and "Traceback" not in done.stderr
