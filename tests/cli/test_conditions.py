"""`generate` with probes, conditions and named directions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from glasshouse.cli.main import app
from glasshouse.client.testing import FakeServer
from glasshouse.v1 import conditions_pb2


@pytest.fixture
def server() -> Any:
    with FakeServer(reply="xyz and then") as server:
        yield server


def run(server: FakeServer, *arguments: str) -> Any:
    return CliRunner().invoke(
        app, ["generate", "hm", "--target", server.target, "--max-tokens", "9", *arguments]
    )


def sent(server: FakeServer) -> Any:
    return next(call.request for call in server.calls if call.method == "Generate")


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("vowels>0.5", {"probe": {"probe": "vowels", "output": 1}, "above": 0.5, "scope": 1}),
        (
            "letters:vowel < .25",
            {"probe": {"probe": "letters", "label": "vowel", "output": 1}, "below": 0.25, "scope": 1},
        ),
        (
            "models/fake/probes/vowels@1 > 5e-1 over prompt",
            {"probe": {"probe": "models/fake/probes/vowels@1", "output": 1}, "above": 0.5, "scope": 2},
        ),
        (
            "resid-post-1#7>2 over latched",
            {"feature": {"dictionary": "resid-post-1", "feature": 7}, "above": 2.0, "scope": 3},
        ),
    ],
)
def test_conditions(server: FakeServer, text: str, condition: dict[str, Any]) -> None:
    expected = conditions_pb2.Condition(**condition)
    assert (
        run(server, "--steer", "joy*2", "--when", text, "--abort-when", text, "--abort-when", text).exit_code
        == 0
    )
    request = sent(server)
    assert request.interventions[0].condition == expected
    assert list(request.abort_when) == [expected, expected]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--when", "vowels>0.5"),
        ("--steer", "joy", "--when", "vowels"),
        ("--steer", "joy", "--when", "vowels>high"),
        ("--steer", "joy", "--when", "vowels>0.5 over there"),
        ("--abort-when", "vowels=0.5"),
        ("--abort-when", ">0.5"),
        ("--probe", "vowels:odds"),
        ("--steer", ""),
        ("--ablate", ""),
        ("--steer", "joy*much"),
    ],
)
def test_bad_usage_exits_2(server: FakeServer, arguments: tuple[str, ...]) -> None:
    done = run(server, *arguments)
    assert done.exit_code == 2 and arguments[-2] in done.stderr
    assert not any(call.method == "Generate" for call in server.calls)


def test_named_directions(server: FakeServer) -> None:
    assert run(server, "--steer", "joy*2.5", "--steer", "joy", "--ablate", "joy@1").exit_code == 0
    first, second, third = sent(server).interventions
    assert (first.hook_point, first.add_vector.direction, first.add_vector.coefficient) == ("", "joy", 2.5)
    assert second.add_vector.coefficient == 1.0 and third.ablate_direction.direction == "joy@1"


def test_an_aborted_text_says_why(server: FakeServer) -> None:
    done = run(server, "--abort-when", "vowels>0.5")
    assert done.exit_code == 0 and done.stdout == "xyz a\n"
    assert done.stderr == "aborted by --abort-when 0: 0.9 at position 7, threshold 0.5\n"


def test_probes_are_a_column(server: FakeServer) -> None:
    done = run(server, "--probe", "letters", "--probe", "vowels:margin")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert lines[1][-2:] == ["letters: vowel 0.1 consonant 0.9", "vowels: vowel -2.2"]


def test_json(server: FakeServer) -> None:
    done = run(server, "--probe", "letters", "--abort-when", "vowels>0.5", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    over_prompt = events[0]["probes"]["letters"]
    assert over_prompt["probe"] == "models/fake/probes/letters@1"
    assert over_prompt["labels"] == ["vowel", "consonant"] and over_prompt["positions"] == [0, 1, 2]
    np.testing.assert_allclose(over_prompt["scores"], [[0.1, 0.1], [0.1, 0.9], [0.1, 0.9]], rtol=1e-6)
    assert events[1]["probes"]["letters"]["consonant"] == pytest.approx(0.9)
    assert events[-1]["finish_reason"] == "aborted" and events[-1]["flags"] == []
    assert events[-1]["abort"] == {
        "condition": 0, "monitor": "", "position": 7, "score": 0.9, "threshold": 0.5,
    }  # fmt: skip
