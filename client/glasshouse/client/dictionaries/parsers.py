"""DictionaryService's response messages -> results."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.dictionaries.names import model_name, short_name
from glasshouse.client.dictionaries.values import (
    DecoderNorms,
    DictionaryCheck,
    DictionaryEvaluation,
    DictionaryInfo,
    FeatureInfo,
    FeatureSummary,
    LogitEffects,
    NearestFeature,
)
from glasshouse.client.parsers import Page
from glasshouse.v1 import dictionaries_pb2, readouts_pb2
from glasshouse.wire.tensors import unpack


def dictionary_page(response: dictionaries_pb2.ListDictionariesResponse) -> Page[DictionaryInfo]:
    """A page of ListDictionaries."""
    return Page([dictionary(message) for message in response.dictionaries], response.next_page_token)


def got_dictionary(response: dictionaries_pb2.GetDictionaryResponse) -> DictionaryInfo:
    """The dictionary of GetDictionary."""
    return dictionary(response.dictionary)


def loaded(response: dictionaries_pb2.LoadDictionaryResponse) -> list[DictionaryInfo]:
    """The dictionaries of LoadDictionary."""
    return [dictionary(message) for message in response.dictionaries]


def dictionary(message: dictionaries_pb2.Dictionary) -> DictionaryInfo:
    """What is known of a dictionary."""
    norms, check = message.decoder_norms, message.check
    return DictionaryInfo(
        name=short_name(message.name),
        model=model_name(message.name),
        kind=message.kind,
        architecture=message.architecture,
        hook_points_in=list(message.hook_points_in),
        hook_points_out=list(message.hook_points_out),
        d_in=message.d_in,
        d_out=message.d_out,
        d_sae=message.d_sae,
        dtype=message.dtype,
        source_format=message.source_format,
        normalisation=message.normalisation,
        k=message.k,
        group_sizes=list(message.group_sizes),
        has_skip=message.has_skip,
        decoder_norms=DecoderNorms(min=norms.min, mean=norms.mean, max=norms.max),
        check=DictionaryCheck(l0=check.l0, fvu=check.fvu, positions=check.positions, warning=check.warning)
        if message.HasField("check")
        else None,
        size_bytes=message.size_bytes,
        notes=list(message.notes),
    )


def decoded(response: dictionaries_pb2.DecodeFeaturesResponse) -> NDArray[np.float32]:
    """(n, d_out) or (n, n_hook_points_out, d_out) of DecodeFeatures."""
    return unpack(response.activations)


def feature(response: dictionaries_pb2.GetFeatureResponse) -> FeatureInfo:
    """The feature of GetFeature."""
    return FeatureInfo(
        **_summary(response.feature),
        promoted=_effects(response.promoted) if response.HasField("promoted") else None,
        suppressed=_effects(response.suppressed) if response.HasField("suppressed") else None,
        nearest=[NearestFeature(near.index, near.cosine) for near in response.nearest],
    )


def feature_page(response: dictionaries_pb2.ListFeaturesResponse) -> Page[FeatureSummary]:
    """A page of ListFeatures."""
    items = [FeatureSummary(**_summary(message)) for message in response.features]
    return Page(items, response.next_page_token)


def evaluation(response: dictionaries_pb2.EvaluateDictionaryResponse) -> DictionaryEvaluation:
    """The result of EvaluateDictionary's operation."""
    return DictionaryEvaluation(
        metrics=dict(sorted(response.metrics.items())),
        tokens=response.tokens,
        density=unpack(response.density) if response.HasField("density") else None,
    )


def _summary(message: dictionaries_pb2.Feature) -> dict[str, Any]:
    return {
        "index": message.index,
        "decoder_norm": message.decoder_norm,
        "label": message.label,
        "density": message.density if message.HasField("density") else None,
    }


def _effects(message: readouts_pb2.TopTokens) -> LogitEffects:
    return LogitEffects(list(message.token_ids), list(message.tokens), list(message.logprobs))
