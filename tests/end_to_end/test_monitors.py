"""Monitors through the command line and the client, on a served fable that is killed and comes back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from glasshouse.cli.main import app
from glasshouse.client import Client, ProbeWeights
from glasshouse.tour.server_process import ServerProcess

from .conftest import HOOK_POINT, PROMPT, until


def glasshouse(target: str, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--target", target])
    assert result.exit_code == 0, result.output
    return result.output


def test_what_was_published_watches_again_after_a_kill(tmp_path: Path) -> None:
    options = (
        "--listen",
        "127.0.0.1:0",
        "--metrics",
        "127.0.0.1:0",
        "--threads",
        "1",
        "--data",
        str(tmp_path),
    )
    with ServerProcess(*options) as server, Client(server.target) as client:
        model = client.model()
        width = model.info.d_model
        model.create_probe(
            "always", ProbeWeights(layers=[(np.zeros((width, 1), np.float32), np.full(1, 4.0, np.float32))]),
            labels=["no", "yes"], hook_points=HOOK_POINT, pooling="token",
        )  # fmt: skip
        glasshouse(
            server.target, "monitors", "create", "seen", "--probe", "always", "--above", "0.5", "--action", "flag",
            "--request-label", "tenant=a",
        )  # fmt: skip
        said = glasshouse(
            server.target, "generate", PROMPT, "--max-tokens", "3", "--label", "tenant=a", "--json"
        )
        (flag,) = json.loads(said.splitlines()[-1])["flags"]
        assert flag["monitor"] == "models/fable/monitors/seen@1"
        assert not json.loads(
            glasshouse(server.target, "generate", PROMPT, "--max-tokens", "3", "--json").splitlines()[-1]
        )["flags"]
        first = model.monitor("seen").watch(since=model.monitor("seen").info.created)
        with first as events:
            kept = next(events)
        until(lambda: model.monitor("seen").events())
        server.kill()
    with ServerProcess(*options) as again, Client(again.target) as client:
        model = client.model()
        (monitor,) = model.monitors()
        assert (monitor.name, monitor.state, monitor.counts.requests) == ("seen", "running", 0)
        with monitor.watch(after=kept) as events:
            stream = model.generate(PROMPT, max_tokens=3, labels={"tenant": "a"})
            stream.result()
            later = next(events)
        assert [one.monitor for one in stream.flags] == [monitor.resource_name]
        assert later.id > kept.id and later.labels == {"tenant": "a"}
        listed = glasshouse(again.target, "monitors", "list").split("\t")
        assert listed[:4] == ["seen@1", "running", "flag", "always@1"]
        again.stop()
