"""A real server through the real clients: what is served, and that its parts agree with one another."""

from __future__ import annotations

import re
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from glasshouse.client import (
    AsyncClient,
    Client,
    Model,
    add_vector,
    at,
    generated,
    read_activations,
    read_logit_lens,
    replace,
)
from glasshouse.tour.server_process import ServerProcess

from .conftest import HOOK_POINT, PROMPT, until


def test_the_start_line(server: ServerProcess) -> None:
    assert re.fullmatch(r"glasshouse: serving fable on 127\.0\.0\.1:\d+", server.start_line)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", server.metrics_url)


def test_health_and_reflection(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "glasshouse.v1.GenerationService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([question]), timeout=5)
        names = {service.name for service in answer.list_services_response.service}
    assert {
        "glasshouse.v1.ModelService",
        "glasshouse.v1.GenerationService",
        "glasshouse.v1.ActivationService",
        "grpc.health.v1.Health",
    } <= names


def test_the_model_and_its_hook_points(client: Client, model: Model) -> None:
    assert [each.name for each in client.models()] == ["fable"]
    info = model.info
    assert (info.family, info.n_layers, info.engine) == ("llama", 6, "transformers")
    points = {point.name: point for point in model.hook_points()}
    assert points[HOOK_POINT].width == info.d_model
    assert points[HOOK_POINT].module_path == "model.layers.3"
    assert points["blocks.0.attn.hook_pattern"].width == 0
    assert not points["unembed"].layer


def test_tokens_there_and_back(model: Model) -> None:
    tokens = model.tokenize("The déjà vu 🦊 ran.\nÆsop!")
    assert model.detokenize(tokens.ids[1:]) == "The déjà vu 🦊 ran.\nÆsop!"
    assert tokens.ids[0] == model.info.bos_token_id


def test_generation_and_scoring_agree(model: Model) -> None:
    result = model.generate(PROMPT, max_tokens=24, temperature=0.0, ignore_eos=True).result()
    assert result.finish_reason == "length" and len(result.token_ids) == 24
    assert result.text == model.detokenize(result.token_ids)
    score = model.score([*result.prompt, *result.token_ids], top_k=1)
    np.testing.assert_allclose(
        [token.logprob for token in result.tokens], score.logprobs[len(result.prompt) :], atol=1e-4
    )
    assert [top.token_ids[0] for top in score.top[len(result.prompt) :]] == result.token_ids


def test_generation_and_extraction_agree(model: Model) -> None:
    with model.generate(
        PROMPT,
        max_tokens=8,
        temperature=0.0,
        ignore_eos=True,
        readouts=[read_activations(HOOK_POINT), read_logit_lens("blocks.5.hook_resid_post", top_k=2)],
    ) as stream:
        of_prompt = stream.prompt_readouts[HOOK_POINT]
        tokens = list(stream)
    read = np.concatenate([of_prompt, [token.activations[HOOK_POINT] for token in tokens[1:]]])
    fed = [*stream.prompt, *stream.token_ids[:-1]]
    whole = model.activations(fed, hook_points=HOOK_POINT)
    np.testing.assert_allclose(read, whole[HOOK_POINT], atol=1e-5 * np.abs(read).max())
    lens = [token.logit_lens["blocks.5.hook_resid_post"].token_ids[0] for token in tokens]
    assert lens == stream.token_ids


def test_steering_is_arithmetic(model: Model, vectors: np.ndarray) -> None:
    edit = add_vector(HOOK_POINT, vectors[0], coefficient=-1.5, positions=at([2, 4]))
    plain = model.activations(PROMPT, hook_points=[HOOK_POINT, "blocks.2.hook_resid_post"])
    steered = model.activations(
        PROMPT, hook_points=[HOOK_POINT, "blocks.2.hook_resid_post"], interventions=[edit]
    )
    expected = plain[HOOK_POINT].copy()
    expected[[2, 4]] -= 1.5 * vectors[0]
    # Later positions see the edited ones through attention only above the block of the edit.
    np.testing.assert_allclose(steered[HOOK_POINT], expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(steered["blocks.2.hook_resid_post"], plain["blocks.2.hook_resid_post"])
    (receipt,) = steered.receipt
    assert (receipt.edit, receipt.hook_point, receipt.positions_applied) == ("add_vector", HOOK_POINT, 2)


def test_patching_one_prompt_into_another(model: Model) -> None:
    there = model.activations(PROMPT.replace("girl", "boy"), hook_points=HOOK_POINT)
    n_positions = len(there.token_ids)
    patch = replace(HOOK_POINT, there[HOOK_POINT], positions=range(n_positions))
    patched = model.score(PROMPT, interventions=[patch], top_k=5)
    meant = model.score(PROMPT.replace("girl", "boy"), top_k=5)
    assert len(patched.token_ids) == n_positions
    for ours, theirs in zip(patched.top[1:], meant.top[1:], strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def test_a_steered_generation_and_its_receipt(
    model: Model, vectors: np.ndarray, metric: Callable[[str], float]
) -> None:
    before = metric("glasshouse_interventions_total")
    edits = [
        add_vector(HOOK_POINT, vectors[1]),
        add_vector("blocks.4.hook_resid_post", vectors[2], positions=generated()),
    ]
    plain = model.generate(PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True).result()
    steered = model.generate(
        PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True, interventions=edits
    ).result()
    assert steered.token_ids != plain.token_ids
    n_fed = len(steered.prompt) + 11
    assert [receipt.positions_applied for receipt in steered.receipt] == [n_fed, 11]
    assert len({receipt.content_hash for receipt in steered.receipt}) == 2
    assert metric("glasshouse_interventions_total") == before + 2


def test_a_conversation(model: Model) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = model.render_chat(messages)
    result = model.generate(messages, max_tokens=6, temperature=0.0).result()
    assert result.prompt == rendered.token_ids
    assert result.text.strip()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_inputs_in_bulk(model: Model, dtype: str) -> None:
    inputs = [PROMPT[: 5 + 3 * index] for index in range(16)]
    points = [f"blocks.{layer}.hook_resid_post" for layer in range(6)]
    together = model.activations(inputs, hook_points=points, dtype=dtype)  # type: ignore[call-overload]
    for text, found in zip(inputs, together, strict=True):
        alone = model.activations(text, hook_points=points)
        assert found.token_ids == alone.token_ids
        for point in points:
            assert found[point].dtype.name == dtype
            tolerance = (1e-5 if dtype == "float32" else 1e-2) * np.abs(alone[point]).max()
            np.testing.assert_allclose(found[point].astype(np.float32), alone[point], atol=tolerance)


async def test_the_async_client_says_the_same(
    server: ServerProcess, model: Model, vectors: np.ndarray
) -> None:
    edits = [add_vector(HOOK_POINT, vectors[3])]
    async with AsyncClient(server.target) as client:
        theirs = await client.model()
        assert theirs.info == model.info
        async with theirs.generate(PROMPT, max_tokens=16, seed=9, interventions=edits) as stream:
            ids = [token.token_id async for token in stream]
        acts = await theirs.activations(PROMPT, hook_points=HOOK_POINT, interventions=edits)
        score = await theirs.score(PROMPT, interventions=edits)
    ours = model.generate(PROMPT, max_tokens=16, seed=9, interventions=edits).result()
    assert ids == ours.token_ids
    np.testing.assert_array_equal(
        acts[HOOK_POINT], model.activations(PROMPT, hook_points=HOOK_POINT, interventions=edits)[HOOK_POINT]
    )
    np.testing.assert_array_equal(score.logprobs, model.score(PROMPT, interventions=edits).logprobs)


def test_a_stop_string_is_never_shown(model: Model) -> None:
    plain = model.generate(PROMPT, max_tokens=40, temperature=0.0).result()
    word = plain.text.split()[5]
    stopped = model.generate(PROMPT, max_tokens=40, temperature=0.0, stop=[word]).result()
    assert stopped.finish_reason == "stop_string" and stopped.stop_string == word
    assert stopped.text == plain.text.partition(word)[0]


def test_cancelling_by_leaving_the_block(model: Model, metric: Callable[[str], float]) -> None:
    with model.generate(PROMPT, max_tokens=400, ignore_eos=True) as stream:
        next(stream)
    until(lambda: metric("glasshouse_active_requests") == 0, within_s=3)
