"""DictionaryService through a real server over the real engine on fable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.longrunning import operations_pb2

from glasshouse import fable
from glasshouse.server.dictionaries.formats.glasshouse import Recipe, save_dictionary
from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.models.loading import load_model
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import dictionaries_pb2 as pb
from glasshouse.v1 import dictionaries_pb2_grpc, generation_pb2
from glasshouse.wire.tensors import pack, unpack

from ..serving import Served, events_of, refusal, serving

D_SAE = 96
AT = "blocks.2.hook_resid_post"
TEXT = "Once upon a time there was a little girl named Lily."


@pytest.fixture(scope="module")
def fable_model() -> Any:
    torch.set_num_threads(2)
    return load_model(fable.model_path(), dtype="float32", device="cpu", name="fable")


def random_tensors(d: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "W_enc": torch.randn(d, D_SAE, generator=generator) / d**0.5,
        "W_dec": torch.randn(D_SAE, d, generator=generator) / d**0.5,
        "b_enc": torch.randn(D_SAE, generator=generator) * 0.1,
        "b_dec": torch.randn(d, generator=generator) * 0.1,
    }


def stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The native layout keeps the encoder feature by feature."""
    return tensors | {"W_enc": tensors["W_enc"].T}


def wide(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Four times the features."""
    return {
        "W_enc": tensors["W_enc"].repeat(1, 4),
        "W_dec": tensors["W_dec"].repeat(4, 1),
        "b_enc": tensors["b_enc"].repeat(4),
        "b_dec": tensors["b_dec"],
    }


def save(folder: Path, d: int, *, at: str = AT, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    save_dictionary(
        Recipe(
            kind="sae",
            architecture="standard",
            hook_points_in=(at,),
            hook_points_out=(at,),
            tensors=stored(tensors or random_tensors(d)),
        ),
        folder,
    )
    return folder


@dataclass
class Glass:
    """A server with one dictionary, "random", loaded through the RPC."""

    served: Served
    stub: Any
    path: Path
    tensors: dict[str, torch.Tensor]
    engine: TransformersEngine


@asynccontextmanager
async def glass(model: Any, tmp_path: Path, limits: Limits | None = None) -> AsyncIterator[Glass]:
    engine = TransformersEngine(model, limits=limits or Limits())
    await engine.start()
    path = save(tmp_path / "random", model.d_model)
    try:
        async with serving(engine) as served:  # type: ignore[arg-type]
            stub = dictionaries_pb2_grpc.DictionaryServiceStub(served.channel)
            await stub.LoadDictionary(pb.LoadDictionaryRequest(dictionary="random", path=str(path)))
            yield Glass(served, stub, path, random_tensors(model.d_model), engine)
    finally:
        await engine.stop()


def features(tensors: dict[str, torch.Tensor], x: np.ndarray) -> np.ndarray:
    """relu(x W + b) in float64."""
    h = x.astype(np.float64) @ tensors["W_enc"].double().numpy() + tensors["b_enc"].double().numpy()
    return np.maximum(h, 0.0)


async def test_a_dictionary_is_described_and_measured(fable_model: Any, tmp_path: Path) -> None:
    async with glass(fable_model, tmp_path) as g:
        (listed,) = (await g.stub.ListDictionaries(pb.ListDictionariesRequest())).dictionaries
        got = (await g.stub.GetDictionary(pb.GetDictionaryRequest(name=listed.name))).dictionary
        assert got == listed
        assert got.name == "models/fable/dictionaries/random"
        assert (got.kind, got.architecture, got.d_in, got.d_sae) == (
            "sae",
            "standard",
            fable_model.d_model,
            D_SAE,
        )
        assert list(got.hook_points_in) == list(got.hook_points_out) == [AT]
        norms = g.tensors["W_dec"].norm(dim=1)
        assert got.decoder_norms.max == pytest.approx(float(norms.max()), rel=1e-5)
        # Random weights reconstruct nothing: the load says so.
        assert got.check.fvu > 0.9
        assert got.check.warning
        assert got.check.l0 > 10
        assert got.size_bytes > 0
        with_norm = [
            (f.index, f.decoder_norm)
            for f in (
                await g.stub.ListFeatures(
                    pb.ListFeaturesRequest(
                        dictionary="random", order=pb.FEATURE_ORDER_DECODER_NORM, page_size=D_SAE
                    )
                )
            ).features
        ]
        assert [index for index, _ in with_norm] == norms.argsort(descending=True).tolist()
        first = await g.stub.ListFeatures(pb.ListFeaturesRequest(dictionary="random", page_size=60))
        second = await g.stub.ListFeatures(
            pb.ListFeaturesRequest(dictionary="random", page_size=60, page_token=first.next_page_token)
        )
        assert [f.index for f in (*first.features, *second.features)] == list(range(D_SAE))
        assert not second.next_page_token


async def test_encode_then_decode(fable_model: Any, tmp_path: Path) -> None:
    async with glass(fable_model, tmp_path) as g:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((5000, fable_model.d_model)).astype(np.float32)
        expected = features(g.tensors, x)
        events = await events_of(
            g.stub.EncodeFeatures(pb.EncodeFeaturesRequest(dictionary="random", activations=pack(x)))
        )
        assert events[0].WhichOneof("event") == "input"
        rows = [e.rows for e in events if e.WhichOneof("event") == "rows"]
        assert len(rows) > 1
        assert max(event.ByteSize() for event in events) < 1.2 * 2**20
        dense = np.zeros_like(expected)
        for piece in rows:
            indptr, ids, values = unpack(piece.indptr), unpack(piece.feature_ids), unpack(piece.activations)
            for row in range(len(indptr) - 1):
                at = slice(indptr[row], indptr[row + 1])
                dense[piece.first_row + row, ids[at]] = values[at]
        np.testing.assert_allclose(dense, expected, atol=1e-4)
        assert events[-1].finished.positions == 5000
        few = rows[0]
        decoded = await g.stub.DecodeFeatures(
            pb.DecodeFeaturesRequest(
                dictionary="random",
                indptr=pack(unpack(few.indptr)[:11]),
                feature_ids=pack(unpack(few.feature_ids)[: unpack(few.indptr)[10]]),
                activations=pack(unpack(few.activations)[: unpack(few.indptr)[10]]),
            )
        )
        W_dec, b_dec = g.tensors["W_dec"].double().numpy(), g.tensors["b_dec"].double().numpy()
        np.testing.assert_allclose(unpack(decoded.activations), expected[:10] @ W_dec + b_dec, atol=1e-4)


async def test_features_of_inputs_are_those_of_their_activations(fable_model: Any, tmp_path: Path) -> None:
    async with glass(fable_model, tmp_path) as g:
        request = pb.EncodeFeaturesRequest(
            dictionary="random", inputs=[{"text": TEXT}, {"text": "The cats"}], top_k=4
        )
        events = await events_of(g.stub.EncodeFeatures(request))
        begun = {e.input.index: e.input for e in events if e.WhichOneof("event") == "input"}
        rows = {e.rows.input: e.rows for e in events if e.WhichOneof("event") == "rows"}
        assert sorted(begun) == sorted(rows) == [0, 1]
        ids = fable_model.tokenizer.encode(TEXT)
        assert list(begun[0].token_ids) == ids
        from glasshouse.server.types.generation import ExtractionRequest

        request_ids = ExtractionRequest(inputs=(tuple(ids),), hook_points=(AT,))
        (done,) = [item async for item in g.engine.extract(request_ids)]
        expected = features(g.tensors, done.activations[0])
        indptr, found, values = (
            unpack(t) for t in (rows[0].indptr, rows[0].feature_ids, rows[0].activations)
        )
        for position, row in enumerate(expected):
            at = slice(indptr[position], indptr[position + 1])
            np.testing.assert_allclose(values[at], np.sort(row)[::-1][:4], atol=1e-4)
            np.testing.assert_allclose(row[found[at]], values[at], atol=1e-4)


async def test_a_feature_promotes_what_its_direction_promotes(fable_model: Any, tmp_path: Path) -> None:
    async with glass(fable_model, tmp_path) as g:
        got = await g.stub.GetFeature(
            pb.GetFeatureRequest(dictionary="random", feature=7, n_tokens=5, n_nearest=3)
        )
        W_dec = g.tensors["W_dec"].double()
        model = fable_model.model
        gained = W_dec[7] * model.model.norm.weight.double()
        logits = model.lm_head.weight.double() @ gained
        best = logits.topk(5)
        assert list(got.promoted.token_ids) == best.indices.tolist()
        np.testing.assert_allclose(got.promoted.logprobs, best.values.numpy(), rtol=1e-4)
        assert list(got.suppressed.token_ids) == (-logits).topk(5).indices.tolist()
        unit = W_dec / W_dec.norm(dim=1, keepdim=True)
        cosines = unit @ unit[7]
        cosines[7] = -2
        nearest = cosines.topk(3)
        assert [n.index for n in got.nearest] == nearest.indices.tolist()
        np.testing.assert_allclose([n.cosine for n in got.nearest], nearest.values.numpy(), atol=1e-5)
        assert got.feature.decoder_norm == pytest.approx(float(W_dec[7].norm()), rel=1e-5)


async def test_an_evaluation_is_an_operation(fable_model: Any, tmp_path: Path) -> None:
    async with glass(fable_model, tmp_path) as g:
        operations = Operations(g.served.channel)
        started = await g.stub.EvaluateDictionary(
            pb.EvaluateDictionaryRequest(dictionary="random", inputs=[{"text": TEXT}], max_tokens=64)
        )
        done = await operations.wait(started.name)
        assert done.done
        progress = pb.EvaluateDictionaryMetadata()
        assert done.metadata.Unpack(progress)
        assert (progress.phase, progress.fraction) == ("done", 1.0)
        result = pb.EvaluateDictionaryResponse()
        assert done.response.Unpack(result)
        # The same by hand: activations, reconstruction, and the model's loss with it spliced in.
        ids = fable_model.tokenizer.encode(TEXT)
        from ...oracles.plain_hooks import Oracle

        oracle = Oracle()
        clean, captures = oracle.forward(ids, capture=[AT])
        x = captures[AT].double().numpy()[1:]
        f = features(g.tensors, x)
        reconstruction = f @ g.tensors["W_dec"].double().numpy() + g.tensors["b_dec"].double().numpy()
        assert result.tokens == len(ids) - 1
        assert result.metrics["l0"] == pytest.approx((f > 0).sum(axis=1).mean())
        assert result.metrics["mse"] == pytest.approx(
            ((x - reconstruction) ** 2).sum(axis=1).mean(), rel=1e-4
        )
        rows = iter([torch.from_numpy(row).float() for row in reconstruction])
        spliced, _ = oracle.forward(ids, [(AT, lambda p: p > 0, lambda s: next(rows))])
        zeroed, _ = oracle.forward(ids, [(AT, lambda p: True, torch.zeros_like)])
        targets = torch.tensor(ids[1:])[:, None]
        ce = [float(-t[:-1].gather(-1, targets).mean()) for t in (clean, spliced, zeroed)]
        assert result.metrics["ce_clean"] == pytest.approx(ce[0], abs=1e-4)
        assert result.metrics["ce_spliced"] == pytest.approx(ce[1], abs=1e-3)
        assert result.metrics["ce_zero"] == pytest.approx(ce[2], abs=1e-3)
        assert result.metrics["ce_loss_score"] == pytest.approx((ce[2] - ce[1]) / (ce[2] - ce[0]), abs=1e-3)
        kl = float((clean[:-1].exp() * (clean[:-1] - spliced[:-1])).sum(-1).mean())
        assert result.metrics["kl"] == pytest.approx(kl, abs=1e-3)
        assert unpack(result.density).shape == (D_SAE,)


async def test_an_operation_is_cancelled_and_forgotten(fable_model: Any, tmp_path: Path) -> None:
    async with glass(fable_model, tmp_path) as g:
        operations = Operations(g.served.channel)
        long = pb.EvaluateDictionaryRequest(
            dictionary="random", inputs=[{"text": TEXT}] * 2000, max_tokens=60_000
        )
        started = await g.stub.EvaluateDictionary(long)
        assert not started.done
        await operations.cancel(started.name)
        ended = await operations.wait(started.name)
        assert ended.done
        assert ended.error.code == grpc.StatusCode.CANCELLED.value[0]
        await operations.delete(started.name)
        gone = await refusal(lambda: operations.get(started.name))
        assert (gone.code, gone.reason, gone.field) == ("NOT_FOUND", "RESOURCE_NOT_FOUND", "name")


async def test_unloading_leaves_the_requests_that_use_it(fable_model: Any, tmp_path: Path) -> None:
    async with glass(fable_model, tmp_path) as g:
        steer = {"set_features": {"dictionary": "random", "features": [3], "values": [4.0]}}
        ask = generation_pb2.GenerateRequest(
            input={"text": TEXT},
            max_tokens=150,
            ignore_eos=True,
            interventions=[steer],
            readouts=[{"features": {"dictionary": "random", "top_k": 2}}],
        )
        running = asyncio.create_task(events_of(g.served.generation.Generate(ask)))
        await asyncio.sleep(0.1)
        await g.stub.UnloadDictionary(pb.UnloadDictionaryRequest(name="random"))
        missing = await refusal(lambda: g.served.generation.Generate(ask))
        assert (missing.code, missing.reason) == ("NOT_FOUND", "DICTIONARY_NOT_FOUND")
        assert missing.field == "interventions[0].set_features.dictionary"
        events = await running
        tokens = [t for e in events if e.WhichOneof("event") == "tokens" for t in e.tokens.tokens]
        assert len(tokens) == 150
        assert all(len(token.readouts[0].features.feature_ids) == 2 for token in tokens)
        again = await g.stub.LoadDictionary(pb.LoadDictionaryRequest(dictionary="random", path=str(g.path)))
        assert again.dictionaries[0].d_sae == D_SAE


async def test_refusals(fable_model: Any, tmp_path: Path) -> None:
    d = fable_model.d_model
    nan = random_tensors(d)
    nan["W_dec"][3, 3] = float("nan")
    narrow = random_tensors(d - 1)
    bad = {
        "nan": save(tmp_path / "nan", d, tensors=nan),
        "narrow": save(tmp_path / "narrow", d - 1, tensors=narrow),
        "elsewhere": save(tmp_path / "elsewhere", d, at="blocks.40.hook_resid_post"),
        "missing": tmp_path / "nothing-here",
    }
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "ae.pt").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    (hostile / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    async with glass(fable_model, tmp_path, Limits(max_dictionary_bytes=500_000)) as g:

        async def load(name: str, path: Path) -> tuple[str, str]:
            request = pb.LoadDictionaryRequest(dictionary=name, path=str(path))
            refused = await refusal(lambda: g.stub.LoadDictionary(request))
            return refused.code, refused.reason

        assert await load("nan", bad["nan"]) == ("FAILED_PRECONDITION", "DICTIONARY_MALFORMED")
        assert await load("narrow", bad["narrow"]) == ("FAILED_PRECONDITION", "DICTIONARY_MISMATCH")
        assert await load("elsewhere", bad["elsewhere"]) == ("FAILED_PRECONDITION", "DICTIONARY_MISMATCH")
        assert (await load("missing", bad["missing"]))[0] in {"NOT_FOUND", "FAILED_PRECONDITION"}
        assert await load("hostile", hostile) == ("FAILED_PRECONDITION", "DICTIONARY_MALFORMED")
        assert (await load("random", g.path))[0] == "FAILED_PRECONDITION"
        assert (await load("not a name!", g.path))[0] == "INVALID_ARGUMENT"
        big = save(tmp_path / "big", d, tensors=wide(random_tensors(d)))
        assert await load("big", big) == ("RESOURCE_EXHAUSTED", "MEMORY_BUDGET")
        for request, reason, field in (
            (pb.EncodeFeaturesRequest(dictionary="random"), "FIELD_REQUIRED", "inputs"),
            (
                pb.EncodeFeaturesRequest(dictionary="random", inputs=[{"text": "a"}], top_k=-1),
                "VALUE_OUT_OF_RANGE",
                "top_k",
            ),
            (
                pb.EncodeFeaturesRequest(dictionary="random", inputs=[{"text": "a"}], features=[D_SAE]),
                "FEATURE_OUT_OF_RANGE",
                "features",
            ),
            (
                pb.EncodeFeaturesRequest(dictionary="random", activations=pack(np.ones((2, 3), np.float32))),
                "WRONG_WIDTH",
                "activations",
            ),
            (
                pb.EncodeFeaturesRequest(dictionary="radnom", inputs=[{"text": "a"}]),
                "DICTIONARY_NOT_FOUND",
                "dictionary",
            ),
        ):
            refused = await refusal(lambda request=request: g.stub.EncodeFeatures(request))  # type: ignore[misc]
            assert (refused.reason, refused.field) == (reason, field)


async def test_a_crosscoder_over_two_models_encodes_given_activations(
    fable_model: Any, tmp_path: Path
) -> None:
    """Model diffing: what one server cannot run it still encodes, and says so elsewhere."""
    generator = torch.Generator().manual_seed(0)
    d = 24
    tensors = {
        "W_enc": torch.randn(D_SAE, 2, d, generator=generator),
        "W_dec": torch.randn(D_SAE, 2, d, generator=generator),
        "b_enc": torch.randn(D_SAE, generator=generator),
        "b_dec": torch.randn(2, d, generator=generator),
    }
    points = ("model[0]:blocks.2.hook_resid_post", "model[1]:blocks.2.hook_resid_post")
    recipe = Recipe(
        kind="crosscoder",
        architecture="standard",
        hook_points_in=points,
        hook_points_out=points,
        tensors=tensors,
    )
    save_dictionary(recipe, tmp_path / "diff")
    async with glass(fable_model, tmp_path) as g:
        loaded = await g.stub.LoadDictionary(
            pb.LoadDictionaryRequest(dictionary="diff", path=str(tmp_path / "diff"))
        )
        assert tuple(loaded.dictionaries[0].hook_points_in) == points
        x = np.random.default_rng(0).standard_normal((5, 2, d)).astype(np.float32)
        request = pb.EncodeFeaturesRequest(
            dictionary="diff", activations=pack(x), features=list(range(D_SAE))
        )
        events = await events_of(g.stub.EncodeFeatures(request))
        values = unpack(events[1].rows.activations).reshape(5, D_SAE)
        h = np.einsum("nsd,fsd->nf", x.astype(np.float64), tensors["W_enc"].double().numpy())
        np.testing.assert_allclose(values, np.maximum(h + tensors["b_enc"].numpy(), 0), rtol=1e-4, atol=1e-4)
        of_text = pb.EncodeFeaturesRequest(dictionary="diff", inputs=[{"text": TEXT}])
        refused = await refusal(lambda: g.stub.EncodeFeatures(of_text))
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "CAPABILITY_MISSING")
        asked = generation_pb2.GenerateRequest(
            input={"text": TEXT}, max_tokens=2, readouts=[{"features": {"dictionary": "diff", "top_k": 2}}]
        )
        refused = await refusal(lambda: g.served.generation.Generate(asked))
        assert (refused.code, refused.field) == ("FAILED_PRECONDITION", "readouts[0].features.dictionary")


def test_no_pickle_was_run() -> None:
    assert not Path("owned").exists()


class Operations:
    """google.longrunning.Operations by hand."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        def method(name: str, response: Any) -> Any:
            return channel.unary_unary(
                f"/google.longrunning.Operations/{name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=response.FromString,
            )

        from google.protobuf import empty_pb2

        self._get = method("GetOperation", operations_pb2.Operation)
        self._wait = method("WaitOperation", operations_pb2.Operation)
        self._cancel = method("CancelOperation", empty_pb2.Empty)
        self._delete = method("DeleteOperation", empty_pb2.Empty)

    def get(self, name: str) -> Any:
        return self._get(operations_pb2.GetOperationRequest(name=name))

    def wait(self, name: str) -> Any:
        return self._wait(operations_pb2.WaitOperationRequest(name=name))

    def cancel(self, name: str) -> Any:
        return self._cancel(operations_pb2.CancelOperationRequest(name=name))

    def delete(self, name: str) -> Any:
        return self._delete(operations_pb2.DeleteOperationRequest(name=name))
