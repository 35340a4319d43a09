"""DictionaryService: dictionaries, their features, what they make of inputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing

import numpy as np
import torch
from google.longrunning import operations_pb2

from glasshouse.server.dictionaries.features import SparseFeatures
from glasshouse.server.dictionaries.sample_text import PASSAGES
from glasshouse.server.dictionaries.store import HeldDictionary
from glasshouse.server.engines import feature_reading
from glasshouse.server.engines.feature_reading import EncodedInput, Wanted
from glasshouse.server.monitors.room import MonitorRoom
from glasshouse.server.operations.evaluate_dictionary import DictionaryEvaluation, evaluate
from glasshouse.server.operations.manager import OperationManager, Progress
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.limits import Limits
from glasshouse.server.types.readouts import FeatureRows, TopTokens
from glasshouse.v1 import dictionaries_pb2 as pb
from glasshouse.wire import reasons

from . import fields
from .call import Call
from .catalogue import Catalogue, ServedModel
from .dictionary_messages import (
    decoded,
    dictionary_message,
    feature_message,
    row_messages,
    sparse_rows,
)
from .inputs import InputReader
from .interventions import interventions
from .operations import operation_message
from .pages import page
from .readouts import fill_top_tokens
from .selectors import selector
from .tensors import floats

_COLLECTION = "/dictionaries/"
_MAX_TOKENS = 16_384
_MOST_NEIGHBOURS = 100


class DictionaryServicer:
    """Serves `glasshouse.v1.DictionaryService`."""

    def __init__(
        self,
        catalogue: Catalogue,
        limits: Limits,
        operations: OperationManager,
        monitors: MonitorRoom | None = None,
        library: ConceptLibrary | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._library = library or ConceptLibrary()
        self._monitors = monitors
        self._limits = limits
        self._operations = operations

    async def ListDictionaries(
        self, request: pb.ListDictionariesRequest, call: Call
    ) -> pb.ListDictionariesResponse:
        """The dictionaries loaded, by name."""
        model = self._catalogue.find(request.model, "model")
        held, token = page(
            model.engine.dictionaries.all(),
            page_size=request.page_size,
            page_token=request.page_token,
            default=50,
            most=1000,
        )
        return pb.ListDictionariesResponse(
            dictionaries=[await dictionary_message(model, item) for item in held], next_page_token=token
        )

    async def GetDictionary(self, request: pb.GetDictionaryRequest, call: Call) -> pb.GetDictionaryResponse:
        """One dictionary."""
        model, held = self._find(request.name, "name")
        return pb.GetDictionaryResponse(dictionary=await dictionary_message(model, held))

    async def LoadDictionary(
        self, request: pb.LoadDictionaryRequest, call: Call
    ) -> pb.LoadDictionaryResponse:
        """Loads from the server's disk or a hub."""
        model = self._catalogue.find(request.model, "model")
        for field, value in (("dictionary", request.dictionary), ("path", request.path)):
            if not value:
                raise fields.required(field, "what to load", "give a name and a path on the server's disk")
        held = await model.engine.load_dictionary(request.dictionary, request.path)
        return pb.LoadDictionaryResponse(
            dictionaries=[await dictionary_message(model, item) for item in held]
        )

    async def UnloadDictionary(
        self, request: pb.UnloadDictionaryRequest, call: Call
    ) -> pb.UnloadDictionaryResponse:
        """Forgets a dictionary; requests that hold it finish. One that monitors use stays."""
        model, held = self._find(request.name, "name")
        if self._monitors is not None:
            self._monitors.in_force.check_unused(model.engine.info.name, held.name)
        model.engine.dictionaries.remove(held.name)
        return pb.UnloadDictionaryResponse()

    async def EncodeFeatures(
        self, request: pb.EncodeFeaturesRequest, call: Call
    ) -> AsyncIterator[pb.EncodeFeaturesResponse]:
        """Features of inputs, or of given activations."""
        model, held = self._find(request.dictionary, "dictionary")
        wanted = Wanted(
            top_k=fields.whole(request.top_k, "top_k", 0, 2**31 - 1), features=tuple(request.features)
        )
        feature_reading.check(held.dictionary, wanted)
        if request.HasField("activations") == bool(request.inputs):
            reason = reasons.FIELD_CONFLICT if request.inputs else reasons.FIELD_REQUIRED
            raise InvalidArgument(
                "give either inputs or activations",
                reason=reason,
                field="inputs",
                value=f"{len(request.inputs)} inputs",
                remedy="inputs for the model to read, or activations as they are",
            )
        source = (
            self._of_activations(model, held, request, wanted)
            if request.HasField("activations")
            else self._of_inputs(model, held, request, wanted, call)
        )
        n_rows = n_active = 0
        async with aclosing(source) as encoded:
            async for begin, piece in encoded:
                if begin is not None:
                    yield pb.EncodeFeaturesResponse(input=begin)
                for message in row_messages(piece):
                    yield message
                n_rows += len(piece.positions)
                n_active += int(np.count_nonzero(piece.rows.activations))
        yield pb.EncodeFeaturesResponse(
            finished=pb.EncodingFinished(positions=n_rows, mean_active=n_active / max(n_rows, 1))
        )

    async def _of_inputs(
        self,
        model: ServedModel,
        held: HeldDictionary,
        request: pb.EncodeFeaturesRequest,
        wanted: Wanted,
        call: Call,
    ) -> AsyncGenerator[tuple[pb.EncodedInput | None, EncodedInput], None]:
        positions = selector(request.positions, request.HasField("positions"), "positions", self._limits)
        edits = interventions(request.interventions, self._limits)
        inputs = await InputReader(model, self._limits).prompts(request.inputs, "inputs")
        source = feature_reading.encode_inputs(model.engine, held, inputs, positions, edits, wanted)
        async with aclosing(source) as encoded:
            async for done in encoded:
                tokens = inputs[done.index]
                call.accepted(len(tokens), [edit.edit.kind for edit in edits])
                begin = pb.EncodedInput(
                    index=done.index,
                    token_ids=tokens,
                    tokens=model.strings.of(tokens),
                    positions=done.positions,
                )
                yield begin, done

    async def _of_activations(
        self, model: ServedModel, held: HeldDictionary, request: pb.EncodeFeaturesRequest, wanted: Wanted
    ) -> AsyncGenerator[tuple[pb.EncodedInput | None, EncodedInput], None]:
        array = floats(request.activations, True, "activations")
        first = 0
        for x in feature_reading.given(held, array, "activations"):
            x = x.to(model.engine.info.device)
            rows = await asyncio.to_thread(feature_reading.encode_rows, held.dictionary, x, wanted)
            begin = pb.EncodedInput(index=0, positions=range(len(array))) if not first else None
            positions = tuple(range(first, first + x.shape[0]))
            yield begin, EncodedInput(index=0, positions=positions, rows=rows, first_row=first)
            first += x.shape[0]

    async def DecodeFeatures(
        self, request: pb.DecodeFeaturesRequest, call: Call
    ) -> pb.DecodeFeaturesResponse:
        """What features write."""
        model, held = self._find(request.dictionary, "dictionary")
        rows = sparse_rows(request, held)
        width = held.dictionary.facts.d_out * len(held.dictionary.facts.hook_points_out)
        n_bytes = (len(rows.indptr) - 1) * width * 4
        fields.count(n_bytes, "indptr", self._limits.max_message_bytes - 4096, "max_message_bytes", "bytes")
        output = await asyncio.to_thread(
            self._decode, held, rows, request.without_bias, model.engine.info.device
        )
        return decoded(output)

    @staticmethod
    @torch.inference_mode()
    def _decode(held: HeldDictionary, rows: FeatureRows, without_bias: bool, device: str) -> np.ndarray:
        d_sae = held.dictionary.facts.d_sae
        features = SparseFeatures(
            indptr=torch.from_numpy(rows.indptr).to(device),
            ids=torch.from_numpy(rows.ids).to(device),
            values=torch.from_numpy(rows.activations).to(device),
            d_sae=d_sae,
        )
        output = held.dictionary.decode(features)
        if without_bias:
            nothing = SparseFeatures(
                indptr=torch.zeros(2, dtype=torch.int64, device=device),
                ids=torch.zeros(0, dtype=torch.int32, device=device),
                values=torch.zeros(0, device=device),
                d_sae=d_sae,
            )
            output = output - held.dictionary.decode(nothing)
        host: np.ndarray = output.float().cpu().numpy()
        return host

    async def GetFeature(self, request: pb.GetFeatureRequest, call: Call) -> pb.GetFeatureResponse:
        """One feature."""
        model, held = self._find(request.dictionary, "dictionary")
        held.dictionary.check_feature_ids(torch.tensor([request.feature]), field="feature")
        n_tokens = request.n_tokens if request.HasField("n_tokens") else 10
        n_nearest = request.n_nearest if request.HasField("n_nearest") else 5
        fields.whole(
            n_tokens, "n_tokens", 0, min(self._limits.max_top_logprobs, model.engine.info.vocab_size)
        )
        fields.whole(n_nearest, "n_nearest", 0, _MOST_NEIGHBOURS)
        nearest = await asyncio.to_thread(
            feature_reading.nearest, held.dictionary, request.feature, n_nearest
        )
        label = (await self._names(model, held, [request.feature])).get(request.feature, "")
        response = pb.GetFeatureResponse(
            feature=feature_message(model, held, request.feature, label),
            nearest=[pb.NearestFeature(index=index, cosine=cosine) for index, cosine in nearest],
        )
        contributions = await asyncio.to_thread(_contributions, model, held, request.feature)
        if contributions is not None and n_tokens:
            order = np.argsort(contributions)
            for message, ids in (
                (response.promoted, order[::-1][:n_tokens]),
                (response.suppressed, order[:n_tokens]),
            ):
                fill_top_tokens(message, TopTokens(ids.astype(np.int32), contributions[ids]), model.strings)
        return response

    async def ListFeatures(self, request: pb.ListFeaturesRequest, call: Call) -> pb.ListFeaturesResponse:
        """Features in order."""
        model, held = self._find(request.dictionary, "dictionary")
        order = await asyncio.to_thread(_ordered, held, request.order)
        indices, token = page(
            order, page_size=request.page_size, page_token=request.page_token, default=100, most=1000
        )
        shown = [int(index) for index in indices]
        names = await self._names(model, held, shown)
        return pb.ListFeaturesResponse(
            features=[feature_message(model, held, index, names.get(index, "")) for index in shown],
            next_page_token=token,
        )

    async def EvaluateDictionary(
        self, request: pb.EvaluateDictionaryRequest, call: Call
    ) -> operations_pb2.Operation:
        """Starts an evaluation."""
        model, held = self._find(request.dictionary, "dictionary")
        limits = self._limits
        held.live("dictionary")
        most = request.max_tokens or _MAX_TOKENS
        fields.whole(most, "max_tokens", 2, limits.max_input_tokens_total)
        if request.inputs:
            inputs = await InputReader(model, limits).prompts(request.inputs, "inputs")
        else:
            context = model.engine.info.context_length
            inputs = tuple(tuple(model.engine.codec.encode(passage))[:context] for passage in PASSAGES)

        async def work(progress: Progress) -> DictionaryEvaluation:
            return await evaluate(model.engine, held, inputs, most, progress)

        operation = self._operations.submit("EvaluateDictionary", work)
        return operation_message(operation)

    async def _names(
        self, model: ServedModel, held: HeldDictionary, features: Sequence[int]
    ) -> Mapping[int, str]:
        """What somebody said that features stand for."""
        if not self._library.has_registry:
            return {}
        return await asyncio.to_thread(
            self._library.feature_names.of, model.engine.info.name, held.name, features
        )

    def _find(self, name: str, field: str) -> tuple[ServedModel, HeldDictionary]:
        """The dictionary of a resource name, `models/{model}/dictionaries/{dictionary}`, or of its last part."""
        if not name:
            raise fields.required(field, "a dictionary", "name one; ListDictionaries lists them")
        model_name, separator, short = name.partition(_COLLECTION)
        model = self._catalogue.find(model_name if separator else "", field)
        return model, model.engine.dictionaries.get(short if separator else name, field=field)


def _contributions(model: ServedModel, held: HeldDictionary, feature: int) -> np.ndarray | None:
    """Logit contributions (vocab,) of a feature's decoder row; of the last point it writes where it writes several. None
    where it does not write the residual stream.
    """
    if held.detached or held.points_out[-1].kind != "residual":
        return None
    rows = held.dictionary.decoder_rows(torch.tensor([feature])).cpu().numpy()
    direction = rows[0] if rows.ndim == 2 else rows[0, -1]
    contributions: np.ndarray = model.engine.token_contributions(direction[None].astype(np.float32))[0]
    return contributions


def _ordered(held: HeldDictionary, order: int) -> Sequence[int]:
    d_sae = held.dictionary.facts.d_sae
    if order == pb.FEATURE_ORDER_DECODER_NORM:
        by_norm: list[int] = torch.argsort(
            held.dictionary.decoder_norms, descending=True, stable=True
        ).tolist()
        return by_norm
    if order == pb.FEATURE_ORDER_DENSITY and held.check is not None:
        by_density: list[int] = np.argsort(-held.check.density, kind="stable").tolist()
        return by_density
    if order not in (pb.FEATURE_ORDER_UNSPECIFIED, pb.FEATURE_ORDER_INDEX, pb.FEATURE_ORDER_DENSITY):
        raise fields.out_of_range("order", order, "one of FeatureOrder")
    return range(d_sae)
