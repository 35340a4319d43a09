"""The same calls through both clients give the same results and the same errors."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from glasshouse.client import (
    Activations,
    AsyncClient,
    AsyncDictionary,
    AsyncDirection,
    AsyncGraphOperation,
    AsyncMonitor,
    AsyncOperation,
    AsyncPatchSweep,
    AsyncProbe,
    Client,
    Dictionary,
    Direction,
    GlasshouseError,
    GraphOperation,
    Monitor,
    Operation,
    PatchSweep,
    Probe,
    ablate_feature,
    add_vector,
    aio,
    at,
    prompt,
    read_activations,
    read_features,
    read_logit_lens,
    set_feature,
    sync,
)
from glasshouse.client.concepts.views import DirectionView, ProbeView
from glasshouse.client.testing import FakeServer

HOOK = "blocks.0.hook_resid_post"
ATTENTION = "blocks.0.attn.hook_pattern"
EDIT = add_vector(HOOK, [1.0] * 8, 2.0, positions=at([1]))
CHAT = [{"role": "user", "content": "hi"}]

CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "models": lambda client, model: client.models(),
    "model": lambda client, model: client.model("models/fake"),
    "hook_points": lambda client, model: model.hook_points(),
    "tokenize": lambda client, model: model.tokenize("hé", add_special_tokens=False),
    "tokenize chat": lambda client, model: model.tokenize(CHAT),
    "detokenize": lambda client, model: model.detokenize([104, 105]),
    "render_chat": lambda client, model: model.render_chat(CHAT, add_generation_prompt=False),
    "score": lambda client, model: model.score("abc", top_k=2, interventions=[EDIT]),
    "activations": lambda client, model: model.activations(
        [1, 2, 3], hook_points=[HOOK, ATTENTION], positions=slice(1, None), interventions=[EDIT]
    ),
    "activations of many": lambda client, model: model.activations(
        ["a", "bc", [7]], hook_points=HOOK, dtype="bfloat16"
    ),
    "generate": lambda client, model: model.generate(
        "abc",
        max_tokens=6,
        seed=3,
        stop=["zz"],
        logprobs=2,
        interventions=[EDIT],
        readouts=[read_activations(HOOK), read_logit_lens(HOOK, 2, prompt())],
    ).result(),
    "dictionaries": lambda client, model: model.dictionaries(),
    "dictionary": lambda client, model: model.dictionary("resid-post-1"),
    "load_dictionary": lambda client, model: model.load_dictionary("new", "folder/layer0"),
    "generate with features": lambda client, model: model.generate(
        "abc",
        max_tokens=3,
        seed=3,
        interventions=[set_feature("resid-post-1", [3, 4], 2.0), ablate_feature("resid-post-0", 1)],
        readouts=[read_features("resid-post-1", top_k=3), read_features("resid-post-1", features=[0, 3])],
    ).result(),
    "compute_directions": lambda client, model: _result(
        model.compute_directions({"no": ["a", "b"], "yes": ["c", "d"]}, hook_points=HOOK)
    ),
    "no such direction": lambda client, model: model.direction("nope"),
    "create_direction": lambda client, model: model.create_direction("raw", {"nope": [1.0] * 8}),
    "train_probe": lambda client, model: _result(
        model.train_probe([("a", "x"), ("b", "y")], hook_points=[HOOK], best=True)
    ),
    "directions": lambda client, model: model.directions(),
    "probes": lambda client, model: model.probes(prefix="m"),
    "no such probe": lambda client, model: model.probe("nope"),
    "one class only": lambda client, model: model.train_probe([("a", "x")], hook_points=HOOK),
    "not examples": lambda client, model: model.train_probe(["a"], hook_points=HOOK),
    "no such dictionary": lambda client, model: model.dictionary("resid-post"),
    "no such model": lambda client, model: client.model("nope"),
    "no such hook point": lambda client, model: model.activations("a", hook_points="nope"),
    "bad width": lambda client, model: model.score("a", interventions=[add_vector(HOOK, [1.0])]),
    "no tokens": lambda client, model: model.generate("a", max_tokens=0).result(),
    "deadline": lambda client, model: model.generate("a", max_tokens=50, timeout=1e-6).result(),
}


DICTIONARY_CALLS: dict[str, Callable[[Any], Any]] = {
    "encode": lambda sae: sae.encode("hé", top_k=3, positions=slice(1, None)),
    "encode many": lambda sae: sae.encode(["a", [7, 8], "bc"], features=[3, 1]),
    "encode activations": lambda sae: sae.encode(activations=np.ones((3, 8))),
    "decode": lambda sae: sae.decode({3: 1.0, 5: 2.0}, bias=False),
    "feature": lambda sae: sae.feature(3, n_tokens=2),
    "unload": lambda sae: sae.unload(),
    "encode nothing": lambda sae: sae.encode(),
    "no such feature": lambda sae: sae.feature(24),
}


PROBE_CALLS: dict[str, Callable[[Any], Any]] = {
    "score": lambda probe: probe.score("hello"),
    "score many": lambda probe: probe.score(
        ["a", [7, 8], "bc"], every_position=True, positions=slice(1, None)
    ),
    "delete": lambda probe: probe.delete(),
    "score nothing": lambda probe: probe.score([]),
}


def _result(operation: Any) -> Any:
    """The result of an operation, or what awaits to it."""
    if not inspect.isawaitable(operation):
        return operation.result()

    async def wait() -> Any:
        return await (await operation).result()

    return wait()


def plain(value: Any) -> Any:
    """A result as something that compares: arrays by their bits, request ids and clocks left out."""
    if isinstance(value, Exception):
        return type(value), plain({key: v for key, v in vars(value).items() if key != "request_id"})
    if isinstance(value, Activations):
        return plain([dict(value), value.token_ids, value.tokens, value.positions, value.receipt])
    if isinstance(value, (Dictionary, AsyncDictionary, DirectionView, ProbeView)):
        return plain(value.info)
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, (sync.Model, aio.AsyncModel)):
        return plain(value.info)
    if dataclasses.is_dataclass(value):
        return [(field.name, plain(getattr(value, field.name))) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if key != "request_id"}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
async def test_same_call_same_outcome(call: Callable[[Any, Any], Any]) -> None:
    with FakeServer(chunk_bytes=48) as server:
        outcomes = []
        with Client(server.target) as client:
            model = client.model()
            try:
                outcomes.append(call(client, model))
            except GlasshouseError as error:
                outcomes.append(error)
        async with AsyncClient(server.target) as async_client:
            async_model = await async_client.model()
            try:
                outcomes.append(await call(async_client, async_model))
            except GlasshouseError as error:
                outcomes.append(error)
    assert plain(outcomes[0]) == plain(outcomes[1])


@pytest.mark.parametrize("call", DICTIONARY_CALLS.values(), ids=list(DICTIONARY_CALLS))
async def test_same_call_same_outcome_on_a_dictionary(call: Callable[[Any], Any]) -> None:
    outcomes = []
    for _ in range(2):
        with FakeServer() as server:
            try:
                if not outcomes:
                    with Client(server.target) as client:
                        outcomes.append(call(client.model().dictionary("resid-post-1")))
                else:
                    async with AsyncClient(server.target) as async_client:
                        model = await async_client.model()
                        outcomes.append(await call(await model.dictionary("resid-post-1")))
            except GlasshouseError as error:
                outcomes.append(error)
    assert plain(outcomes[0]) == plain(outcomes[1])


@pytest.mark.parametrize("call", PROBE_CALLS.values(), ids=list(PROBE_CALLS))
async def test_same_call_same_outcome_on_a_probe(call: Callable[[Any], Any]) -> None:
    outcomes = []
    examples = {"no": ["a", "b"], "yes": ["c", "d"]}
    for _ in range(2):
        with FakeServer() as server:
            try:
                if not outcomes:
                    with Client(server.target) as client:
                        operation = client.model().train_probe(examples, hook_points=HOOK, name="p")
                        outcomes.append(call(operation.result()))
                else:
                    async with AsyncClient(server.target) as async_client:
                        model = await async_client.model()
                        started = await model.train_probe(examples, hook_points=HOOK, name="p")
                        outcomes.append(await call(await started.result()))
            except GlasshouseError as error:
                outcomes.append(error)
    assert plain(outcomes[0]) == plain(outcomes[1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (sync.Client, aio.AsyncClient),
        (sync.Model, aio.AsyncModel),
        (Dictionary, AsyncDictionary),
        (Operation, AsyncOperation),
        (Direction, AsyncDirection),
        (Probe, AsyncProbe),
        (Monitor, AsyncMonitor),
        (sync.GenerationStream, aio.AsyncGenerationStream),
        (PatchSweep, AsyncPatchSweep),
        (GraphOperation, AsyncGraphOperation),
    ],
)
def test_same_names_and_parameters(one: type, other: type) -> None:
    def public(cls: type) -> dict[str, Any]:
        return {name: value for name, value in inspect.getmembers(cls) if not name.startswith("_")}

    assert public(one).keys() == public(other).keys()
    for name, value in public(one).items():
        if inspect.isfunction(value):
            twin = inspect.signature(public(other)[name])
            assert list(inspect.signature(value).parameters.values()) == list(twin.parameters.values()), name
    mine, theirs = (inspect.signature(cls.__init__).parameters for cls in (one, other))
    assert list(mine) == list(theirs)


async def test_iter_activations_yields_each_input_as_it_completes(server: FakeServer) -> None:
    """The fake answers in reverse order, so order must come from the index."""
    with Client(server.target) as client:
        found = list(client.model().iter_activations(["a", "bb", "ccc"], hook_points=HOOK))
    async with AsyncClient(server.target) as client_:
        model = await client_.model()
        twin = [pair async for pair in model.iter_activations(["a", "bb", "ccc"], hook_points=HOOK)]
    assert [index for index, _ in found] == [index for index, _ in twin] == [2, 1, 0]
    assert [len(acts.token_ids) for _, acts in found] == [4, 3, 2]
