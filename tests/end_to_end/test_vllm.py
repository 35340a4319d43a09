"""The vLLM engine behind a real server: the same client gets the same answers, and its death is told."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from glasshouse.client import (
    Client,
    FailedPreconditionError,
    GenerationResult,
    Intervention,
    ProbeWeights,
    UnavailableError,
    ablate_direction,
    add_vector,
    generated,
    read_activations,
    read_features,
    read_logit_lens,
    read_probe,
)
from glasshouse.tour.server_process import ServerProcess

from ..oracles.vllm_engines import require
from .conftest import HOOK_POINT, PROMPT, read_metric, until


@pytest.fixture(scope="module")
def vllm_server() -> Iterator[ServerProcess]:
    require()
    arguments = (
        "--listen",
        "127.0.0.1:0",
        "--metrics",
        "127.0.0.1:0",
        "--registry",
        "memory",
        "--threads",
        "1",
    )
    with ServerProcess(
        *arguments, "--engine", "vllm", "--vllm", "enforce_eager=true", timeout_s=240.0
    ) as process:
        yield process


def answers(target: str, vectors: np.ndarray) -> list[GenerationResult]:
    treatments: list[list[Intervention]] = [
        [],
        [add_vector(HOOK_POINT, vectors[0])],
        [
            add_vector("blocks.1.hook_mlp_out", vectors[1] * 0.1, positions=generated()),
            ablate_direction(HOOK_POINT, vectors[2]),
        ],
    ]
    with Client(target) as client:
        model = client.model()
        # Twice by name, once within another's request: workers hold it from the first on.
        named = model.create_direction("turned", {HOOK_POINT: vectors[1]})
        treatments += [
            [add_vector(named, 0.5)],
            [ablate_direction(HOOK_POINT, vectors[2]), add_vector(named, 0.5, positions=generated())],
        ]
        return [
            model.generate(
                PROMPT,
                max_tokens=16,
                temperature=0.0,
                ignore_eos=True,
                interventions=treatment,
                readouts=[
                    read_activations(HOOK_POINT),
                    read_features("resid-post-3", top_k=4),
                    read_logit_lens("blocks.5.hook_resid_post", top_k=2),
                ],
            ).result()
            for treatment in treatments
        ]


def test_the_same_answers_as_the_other_engine(
    server: ServerProcess, vllm_server: ServerProcess, vectors: np.ndarray
) -> None:
    for ours, theirs in zip(
        answers(vllm_server.target, vectors), answers(server.target, vectors), strict=True
    ):
        assert ours.token_ids == theirs.token_ids
        assert ours.text == theirs.text
        assert ours.receipt == theirs.receipt
        for mine, other in zip(ours.tokens, theirs.tokens, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            found, expected = mine.activations[HOOK_POINT], other.activations[HOOK_POINT]
            np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))
    assert read_metric(vllm_server, "glasshouse_hooked_steps_total") > 0
    until(lambda: read_metric(vllm_server, "glasshouse_edit_slots") == 0)


def watched(target: str, vectors: np.ndarray) -> list[GenerationResult]:
    """A generation that a monitor steers from some way in, one beside it that it does not choose, one when it is gone."""
    weights = np.random.default_rng(1).standard_normal((192, 1)).astype(np.float32) * 0.02
    with Client(target) as client:
        model = client.model()
        probe = model.create_probe(
            "leaning", ProbeWeights(layers=[(weights, np.zeros(1, np.float32))]),
            labels=["no", "yes"], hook_points=HOOK_POINT, pooling="token",
        )  # fmt: skip
        wanted = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True}
        with model.generate(PROMPT, readouts=[read_probe(probe)], **wanted) as stream:
            scores = [float(token.probes["leaning"]) for token in list(stream)[1:]]
        # Where a score is well above all before it.
        at = next(place for place in range(4, 30) if scores[place] > max(scores[:place]) + 0.05)
        bar = (scores[at] + max(scores[:at])) / 2
        monitor = model.create_monitor(
            "leans", probe=probe, above=bar, positions=generated(), action="steer", labels={"tenant": "a"},
            interventions=[add_vector(HOOK_POINT, vectors[3], 0.5)],
        )  # fmt: skip
        with monitor.watch() as events:
            streams = [model.generate(PROMPT, labels={"tenant": tenant}, **wanted) for tenant in "ab"]
            results = [stream.result() for stream in streams]
            event = next(events)
        (flag,) = results[0].flags
        n_prompt = len(results[0].prompt)
        assert (event.kind, event.position, flag.action) == ("raised", flag.position, "steer")
        assert flag.position == n_prompt + at
        # The token that the position predicted is free; those after it are not.
        assert results[0].token_ids[: at + 2] == results[1].token_ids[: at + 2]
        assert results[0].token_ids != results[1].token_ids and not results[1].flags
        monitor.delete()
        until(lambda: not model.monitors())
        last = model.generate(PROMPT, labels={"tenant": "a"}, **wanted).result()
        assert last.token_ids == results[1].token_ids
        probe.delete()
        return [*results, last]


def test_a_monitor_steers_as_on_the_other_engine(
    server: ServerProcess, vllm_server: ServerProcess, vectors: np.ndarray
) -> None:
    for ours, theirs in zip(
        watched(vllm_server.target, vectors), watched(server.target, vectors), strict=True
    ):
        assert ours.token_ids == theirs.token_ids
        assert ours.receipt == theirs.receipt == []
        assert [flag.position for flag in ours.flags] == [flag.position for flag in theirs.flags]
        for mine, other in zip(ours.tokens, theirs.tokens, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
    until(lambda: read_metric(vllm_server, "glasshouse_edit_slots") == 0)


def test_what_is_not_reached_is_refused_by_name(vllm_server: ServerProcess) -> None:
    with Client(vllm_server.target) as client:
        model = client.model()
        assert model.info.name == "fable"
        points = {point.name: point for point in model.hook_points()}
        assert points[HOOK_POINT].writable
        assert not points["blocks.3.attn.hook_q"].readable
        with pytest.raises(FailedPreconditionError) as caught:
            model.activations("Hello", hook_points="blocks.3.attn.hook_q")
        assert caught.value.reason == "HOOK_POINT_NOT_READABLE"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker in /proc")
def test_a_dead_engine_is_told(vllm_server: ServerProcess) -> None:
    """The last test of this server: it ends it."""
    with Client(vllm_server.target) as client:
        model = client.model()
        stream = model.generate(PROMPT, max_tokens=400, ignore_eos=True, seed=1)
        next(stream)
        assert serving(vllm_server.target)
        for pid in _workers(vllm_server.pid):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(UnavailableError):
            list(stream)
        with pytest.raises(UnavailableError) as caught:
            model.generate(PROMPT, max_tokens=2, seed=1).result()
        assert caught.value.reason == "ENGINE_STOPPED"
        assert "vLLM" in str(caught.value)
        assert caught.value.remedy
    until(lambda: not serving(vllm_server.target))
    vllm_server.kill()


def serving(target: str) -> bool:
    """What gRPC's health service says of the whole server."""
    with grpc.insecure_channel(target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10.0)
    assert answer.status in (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _workers(pid: int) -> list[int]:
    """Processes below the server's."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return sorted(below - {pid}, reverse=True)
