"""DictionaryService of a fake server: requests in, responses out, no transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from google.longrunning import operations_pb2
from numpy.typing import NDArray

from glasshouse.client.testing.failures import invalid, refused
from glasshouse.client.testing.fake_dictionary import D_SAE, WIDTH, FakeDictionary
from glasshouse.client.testing.fake_edits import read_at
from glasshouse.client.testing.fake_model import FakeModel, select
from glasshouse.client.testing.fake_operations import FakeOperations
from glasshouse.client.testing.fake_services import PAGE
from glasshouse.v1 import dictionaries_pb2
from glasshouse.v1.tensors_pb2 import DTYPE_F32
from glasshouse.wire import reasons
from glasshouse.wire.tensors import pack, unpack

_ROWS = 2  # Rows a piece: few, so that every client puts pieces together.


class FakeDictionaryServices:
    """What each method answers."""

    def __init__(self, model: Callable[..., FakeModel], operations: FakeOperations) -> None:
        self._model_of = model
        self._operations = operations

    def list_dictionaries(
        self, request: dictionaries_pb2.ListDictionariesRequest
    ) -> dictionaries_pb2.ListDictionariesResponse:
        """A page of dictionaries."""
        model = self._model_of(request.model)
        page, token = _page(sorted(model.dictionaries), request.page_token, PAGE)
        infos = [model.dictionaries[name].info(model.name) for name in page]
        return dictionaries_pb2.ListDictionariesResponse(dictionaries=infos, next_page_token=token)

    def get_dictionary(
        self, request: dictionaries_pb2.GetDictionaryRequest
    ) -> dictionaries_pb2.GetDictionaryResponse:
        """One dictionary."""
        model, dictionary = self._find(request.name, "name")
        return dictionaries_pb2.GetDictionaryResponse(dictionary=dictionary.info(model.name))

    def load_dictionary(
        self, request: dictionaries_pb2.LoadDictionaryRequest
    ) -> dictionaries_pb2.LoadDictionaryResponse:
        """A path that ends in a digit is a dictionary of that layer; "nowhere" is not there."""
        model = self._model_of(request.model)
        if not request.path[-1:].isdigit():
            message = f"nothing at {request.path!r}"
            raise refused("NOT_FOUND", message, reason=reasons.RESOURCE_NOT_FOUND, field="path")
        made = model.dictionaries[request.dictionary] = FakeDictionary(
            request.dictionary, int(request.path[-1])
        )
        return dictionaries_pb2.LoadDictionaryResponse(dictionaries=[made.info(model.name)])

    def unload_dictionary(
        self, request: dictionaries_pb2.UnloadDictionaryRequest
    ) -> dictionaries_pb2.UnloadDictionaryResponse:
        """It is no longer there."""
        model, dictionary = self._find(request.name, "name")
        del model.dictionaries[dictionary.name]
        return dictionaries_pb2.UnloadDictionaryResponse()

    def encode_features(
        self, request: dictionaries_pb2.EncodeFeaturesRequest
    ) -> Iterator[dictionaries_pb2.EncodeFeaturesResponse]:
        """Inputs in reverse order, which a client must not mind."""
        model, dictionary = self._find(request.dictionary, "dictionary")
        dictionary.check_features(request.features, "features")
        if bool(request.inputs) == request.HasField("activations"):
            raise invalid("inputs", "exactly one of inputs and activations", reasons.FIELD_CONFLICT)
        if request.features and request.top_k:
            raise invalid("top_k", "not together with features", reasons.FIELD_CONFLICT)
        response = dictionaries_pb2.EncodeFeaturesResponse
        n_rows = n_entries = 0
        for header, rows in self._inputs(model, dictionary, request):
            yield response(input=header)
            chosen = dictionary.chosen(rows, request.top_k, request.features)
            for start in range(0, len(chosen), _ROWS):
                piece = chosen[start : start + _ROWS]
                ids = np.array([i for row in piece for i in row.feature_ids], dtype=np.int32)
                values = np.array([v for row in piece for v in row.activations], dtype=np.float32)
                indptr = np.cumsum([0, *(len(row.feature_ids) for row in piece)])
                yield response(
                    rows=dictionaries_pb2.EncodedRows(
                        input=header.index,
                        first_row=start,
                        indptr=pack(indptr.astype(np.int64)),
                        feature_ids=pack(ids),
                        activations=pack(values),
                    )
                )
                n_entries += len(ids)
            n_rows += len(chosen)
        mean_active = n_entries / max(n_rows, 1)
        yield response(finished=dictionaries_pb2.EncodingFinished(positions=n_rows, mean_active=mean_active))

    def decode_features(
        self, request: dictionaries_pb2.DecodeFeaturesRequest
    ) -> dictionaries_pb2.DecodeFeaturesResponse:
        """What features write."""
        _, dictionary = self._find(request.dictionary, "dictionary")
        indptr, ids = unpack(request.indptr), unpack(request.feature_ids)
        dictionary.check_features(ids.tolist(), "feature_ids")
        rows = np.zeros((len(indptr) - 1, D_SAE), dtype=np.float32)
        np.add.at(rows, (np.repeat(np.arange(len(rows)), np.diff(indptr)), ids), unpack(request.activations))
        written = dictionary.decode(rows, not request.without_bias)
        return dictionaries_pb2.DecodeFeaturesResponse(activations=pack(written))

    def get_feature(self, request: dictionaries_pb2.GetFeatureRequest) -> dictionaries_pb2.GetFeatureResponse:
        """One feature."""
        model, dictionary = self._find(request.dictionary, "dictionary")
        dictionary.check_features([request.feature], "feature")
        n_tokens = request.n_tokens if request.HasField("n_tokens") else 10
        n_nearest = request.n_nearest if request.HasField("n_nearest") else 5
        salt = str(request.feature).encode()
        return dictionaries_pb2.GetFeatureResponse(
            feature=dictionary.feature(model.name, request.feature),
            promoted=model.top_tokens([0], n_tokens, salt),
            suppressed=model.top_tokens([1], n_tokens, salt),
            nearest=dictionary.nearest(request.feature, n_nearest),
        )

    def list_features(
        self, request: dictionaries_pb2.ListFeaturesRequest
    ) -> dictionaries_pb2.ListFeaturesResponse:
        """A page of features."""
        model, dictionary = self._find(request.dictionary, "dictionary")
        down = request.order in (
            dictionaries_pb2.FEATURE_ORDER_DENSITY,
            dictionaries_pb2.FEATURE_ORDER_DECODER_NORM,
        )
        indices = list(range(D_SAE))[:: -1 if down else 1]
        page, token = _page(indices, request.page_token, request.page_size or 100)
        features = [dictionary.feature(model.name, index) for index in page]
        return dictionaries_pb2.ListFeaturesResponse(features=features, next_page_token=token)

    def evaluate_dictionary(
        self, request: dictionaries_pb2.EvaluateDictionaryRequest
    ) -> operations_pb2.Operation:
        """An operation whose figures mean nothing."""
        model, _ = self._find(request.dictionary, "dictionary")
        total = sum(len(model.token_ids(value, f"inputs[{n}]")) for n, value in enumerate(request.inputs))
        total = min(total or 16384, request.max_tokens or 16384)
        response = dictionaries_pb2.EvaluateDictionaryResponse(
            metrics={"l0": 6.5, "explained_variance": 0.875, "fvu": 0.125, "ce_loss_score": 0.96875},
            tokens=total,
            density=pack(np.linspace(0, 0.5, D_SAE, dtype=np.float32)),
        )
        return self._operations.start(total, response)

    def _find(self, name: str, field: str) -> tuple[FakeModel, FakeDictionary]:
        full = name.startswith("models/")
        model = self._model_of(name.partition("/dictionaries/")[0] if full else "", field)
        return model, model.dictionary(name, field)

    def _inputs(
        self, model: FakeModel, dictionary: FakeDictionary, request: dictionaries_pb2.EncodeFeaturesRequest
    ) -> Iterator[tuple[dictionaries_pb2.EncodedInput, NDArray[np.float32]]]:
        """Each input's header and the (n_pos, width) activations to encode."""
        if request.HasField("activations"):
            rows = unpack(request.activations)
            if rows.ndim != 2 or rows.shape[1] != WIDTH:
                raise invalid("activations", f"shape {rows.shape}, not (n, {WIDTH})", reasons.WRONG_WIDTH)
            yield dictionaries_pb2.EncodedInput(index=0, positions=range(len(rows))), rows
            return
        for n, edit in enumerate(request.interventions):
            model.check_edit(edit, f"interventions[{n}]")
        selector = request.positions if request.HasField("positions") else None
        for index, value in reversed(list(enumerate(request.inputs))):
            ids = model.token_ids(value, f"inputs[{index}]")
            positions = select(selector, ids, len(ids))
            header = dictionaries_pb2.EncodedInput(
                index=index, token_ids=ids, tokens=model.strings(ids), positions=positions
            )
            rows = read_at(
                model, dictionary.hook_point, ids, positions, request.interventions, len(ids), DTYPE_F32
            )
            yield header, rows


def _page(items: Sequence[Any], token: str, size: int) -> tuple[Sequence[Any], str]:
    start = int(token or 0)
    return items[start : start + size], str(start + size) if start + size < len(items) else ""
