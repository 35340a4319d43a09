"""`glasshouse monitors` against a fake server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from glasshouse.cli.main import app
from glasshouse.client import Client
from glasshouse.client.testing import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(reply="ok") as server:
        yield server


def run(server: FakeServer, *arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["monitors", *arguments, "--target", server.target])
    assert result.exit_code == status, result.output
    return result.output


def made(server: FakeServer, *arguments: str) -> dict[str, Any]:
    return dict(json.loads(run(server, *arguments, "--json")))


def test_from_creation_to_deletion(server: FakeServer, tmp_path: Path) -> None:
    typical = tmp_path / "typical.txt"
    typical.write_text("one\ntwo\n")
    info = made(
        server, "create", "sad", "--probe", "mood", "--above", "0.5", "--clear-below", "0.25", "--action", "flag",
        "--request-label", "tenant=a", "--sampling-rate", "0.5", "--positions", "generated",
        "--calibration", str(typical), "--webhook", "https://x/y", "--webhook-secret", "pager",
    )  # fmt: skip
    assert (info["scored"], info["above"], info["clear_below"]) == ("mood", 0.5, 0.25)
    assert info["labels"] == {"tenant": "a"} and info["webhook"]["secret"] == "pager"
    assert info["positions"] == "generated"
    assert len(server.calls[-1].request.spec.drift.calibration_inputs) == 2
    assert made(server, "update", "sad", "--above", "0.4")["above"] == 0.4
    assert made(server, "disable", "sad")["state"] == "disabled"
    assert made(server, "enable", "sad")["version"] == 4
    listed = run(server, "list").splitlines()
    assert listed[0].split("\t")[:4] == ["sad@4", "running", "flag", "mood"]
    assert "webhook\thttps://x/y" in run(server, "get", "sad")
    assert "deleted" in run(server, "delete", "sad")
    assert json.loads(run(server, "list", "--json")) == []


def test_events_are_printed_as_they_come_and_afterwards(server: FakeServer) -> None:
    made(server, "create", "vowels", "--probe", "mood", "--above", "0.5")
    with Client(server.target) as client:
        for _ in range(3):
            client.model().generate("aeiou", max_tokens=1).result()
    stored = json.loads(run(server, "events", "vowels", "--limit", "2", "--json"))
    assert [event["kind"] for event in stored] == ["raised", "raised"]
    watched = run(server, "watch", "vowels", "--since", "5", "--count", "3", "--json").splitlines()
    assert len({json.loads(line)["id"] for line in watched}) == 3
    assert run(server, "events", "vowels").splitlines()[0].split("\t")[1:4] == [
        "vowels@1",
        "raised",
        "observe",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "x", "--above", "1", "--feature", "seven"), "DICTIONARY/INDEX"),
        (("create", "x", "--above", "1", "--request-label", "a"), "NAME=VALUE"),
        (("create", "x", "--above", "1", "--probe", "p", "--positions", "last"), "none of all"),
        (("update", "x"), "say what to change"),
        (("create", "x", "--probe", "p"), "--above"),
    ],
)
def test_bad_usage(server: FakeServer, arguments: tuple[str, ...], message: str) -> None:
    assert message in run(server, *arguments, status=2)


def test_refusals(server: FakeServer) -> None:
    assert "no monitor" in run(server, "get", "nobody", status=1)
