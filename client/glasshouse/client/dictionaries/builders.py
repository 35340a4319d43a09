"""Python values -> DictionaryService's request messages, by the rules of `glasshouse.client.builders`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from glasshouse.client import builders
from glasshouse.client.arrays import VectorLike, as_float32
from glasshouse.client.dictionaries.values import DictionaryInfo
from glasshouse.client.features import FeatureActivations, FeatureRows, FeaturesLike, indptr_of
from glasshouse.client.inputs import Input
from glasshouse.client.interventions import Intervention
from glasshouse.client.positions import PositionsLike, as_positions
from glasshouse.client.scalars import text, whole, wholes, word
from glasshouse.v1 import dictionaries_pb2
from glasshouse.wire.tensors import pack

DECODE_BYTES: Final = 2 << 20
"""What one DecodeFeatures may send or answer, well within gRPC's message limit."""

_ORDERS: Final = {
    "index": dictionaries_pb2.FEATURE_ORDER_INDEX,
    "decoder_norm": dictionaries_pb2.FEATURE_ORDER_DECODER_NORM,
    "density": dictionaries_pb2.FEATURE_ORDER_DENSITY,
}


def get_dictionary(model: str, name: str) -> dictionaries_pb2.GetDictionaryRequest:
    """`name`: short or resource name."""
    name = text(name, "name")
    full = name if name.startswith("models/") else f"{model}/dictionaries/{name}"
    return dictionaries_pb2.GetDictionaryRequest(name=full)


def load_dictionary(model: str, name: str, path: str) -> dictionaries_pb2.LoadDictionaryRequest:
    """`path` is the server's."""
    return dictionaries_pb2.LoadDictionaryRequest(
        model=model, dictionary=text(name, "dictionary"), path=text(path, "path")
    )


def encode(
    dictionary: str,
    inputs: Sequence[Input],
    *,
    activations: VectorLike | None,
    top_k: int,
    features: Sequence[int],
    positions: PositionsLike | None,
    interventions: Sequence[Intervention],
) -> dictionaries_pb2.EncodeFeaturesRequest:
    """Inputs, or activations (n, d_in) or (n, n_hook_points_in, d_in); the server refuses both and neither."""
    return dictionaries_pb2.EncodeFeaturesRequest(
        dictionary=dictionary,
        inputs=builders.model_inputs(inputs),
        activations=None if activations is None else pack(as_float32(activations, "activations")),
        top_k=whole(top_k, "top_k"),
        features=wholes(features, "features"),
        positions=builders.selector(as_positions(positions), "positions"),
        interventions=builders.edits(interventions),
    )


def decode(
    info: DictionaryInfo, features: FeaturesLike, bias: bool
) -> Iterator[dictionaries_pb2.DecodeFeaturesRequest]:
    """Requests that together decode every row, in order, each within DECODE_BYTES both ways."""
    lengths, ids, activations = _flat(features)
    row_bytes = 4 * info.d_out * max(len(info.hook_points_out), 1)
    # What would be on the wire once each row is sent and answered.
    sizes = np.cumsum([max(8 * length + 8, row_bytes) for length in lengths])
    start = entry = 0
    while start < len(lengths):
        spent = sizes[start - 1] if start else 0
        stop = max(int(np.searchsorted(sizes, spent + DECODE_BYTES, side="right")), start + 1)
        indptr = indptr_of(lengths[start:stop])
        here = slice(entry, entry + int(indptr[-1]))
        yield dictionaries_pb2.DecodeFeaturesRequest(
            dictionary=info.resource_name,
            indptr=pack(indptr),
            feature_ids=pack(ids[here]),
            activations=pack(activations[here]),
            without_bias=not bias,
        )
        start, entry = stop, here.stop


def get_feature(
    dictionary: str, feature: int, n_tokens: int, n_nearest: int
) -> dictionaries_pb2.GetFeatureRequest:
    """One feature."""
    return dictionaries_pb2.GetFeatureRequest(
        dictionary=dictionary,
        feature=whole(feature, "feature"),
        n_tokens=whole(n_tokens, "n_tokens"),
        n_nearest=whole(n_nearest, "n_nearest"),
    )


def list_features(
    dictionary: str, order: str, page_size: int, page_token: str
) -> dictionaries_pb2.ListFeaturesRequest:
    """A page of features."""
    return dictionaries_pb2.ListFeaturesRequest(
        dictionary=dictionary,
        order=word(order, _ORDERS, "order"),
        page_size=whole(page_size, "page_size"),
        page_token=page_token,
    )


def evaluate(
    dictionary: str, inputs: Sequence[Input], max_tokens: int
) -> dictionaries_pb2.EvaluateDictionaryRequest:
    """No inputs and no tokens: the server's own."""
    return dictionaries_pb2.EvaluateDictionaryRequest(
        dictionary=dictionary,
        inputs=builders.model_inputs(inputs),
        max_tokens=whole(max_tokens, "max_tokens", bits=64),
    )


def _flat(features: FeaturesLike) -> tuple[list[int], NDArray[np.int32], NDArray[np.float32]]:
    """Entries of each row, and all ids and activations."""
    if isinstance(features, FeatureRows):
        return np.diff(features.indptr).tolist(), features.ids, features.activations
    if isinstance(features, FeatureActivations):
        return [len(features)], features.ids, features.activations
    if isinstance(features, Mapping):
        ids = np.array(wholes(features, "feature_ids"), dtype=np.int32)
        return [len(features)], ids, as_float32(list(features.values()), "activations")
    raise TypeError(
        f"features must be what encode() gives, or a mapping from feature to activation, not {features!r}"
    )
