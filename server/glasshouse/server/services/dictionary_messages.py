"""Dictionaries, features and rows as protobuf messages, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import torch

from glasshouse.server.dictionaries.store import HeldDictionary
from glasshouse.server.engines.feature_reading import EncodedInput
from glasshouse.server.operations.evaluate_dictionary import DictionaryEvaluation
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.readouts import FeatureRows
from glasshouse.v1 import dictionaries_pb2 as pb
from glasshouse.v1 import tensors_pb2
from glasshouse.wire import reasons
from glasshouse.wire.tensors import CHUNK_BYTES, TensorError, pack, unpack

from .catalogue import ServedModel
from .tensors import floats

# Bytes of an entry of a row: an int32 and a float32.
_ENTRY_BYTES = 8
# A larger density table is left out of an answer.
_MOST_DENSITY_BYTES = 2 << 20


def resource_name(model: ServedModel, held: HeldDictionary) -> str:
    """Format: `models/{model}/dictionaries/{dictionary}`."""
    return f"{model.resource_name}/dictionaries/{held.name}"


async def dictionary_message(model: ServedModel, held: HeldDictionary) -> pb.Dictionary:
    """A dictionary with what was measured of it. The norms read the whole decoder, once."""
    facts = held.dictionary.facts
    norms = await asyncio.to_thread(lambda: held.dictionary.decoder_norms)
    message = pb.Dictionary(
        name=resource_name(model, held),
        kind=facts.kind,
        architecture=facts.architecture,
        hook_points_in=facts.hook_points_in if held.detached else [point.name for point in held.points_in],
        hook_points_out=facts.hook_points_out if held.detached else [point.name for point in held.points_out],
        d_in=facts.d_in,
        d_out=facts.d_out,
        d_sae=facts.d_sae,
        dtype=facts.dtype,
        source_format=facts.source_format,
        normalisation=facts.normalisation,
        k=facts.k or 0,
        group_sizes=facts.group_sizes,
        has_skip=facts.has_skip,
        decoder_norms=pb.DecoderNorms(
            min=float(norms.min()), mean=float(norms.mean()), max=float(norms.max())
        ),
        size_bytes=held.size_bytes,
        notes=facts.notes,
    )
    if held.check is not None:
        message.check.CopyFrom(
            pb.DictionaryCheck(
                l0=held.check.l0,
                fvu=held.check.fvu,
                positions=held.check.positions,
                warning=held.check.warning,
            )
        )
    return message


def feature_message(model: ServedModel, held: HeldDictionary, index: int, label: str = "") -> pb.Feature:
    """A feature with its norm, its density and what it is called."""
    message = pb.Feature(
        name=f"{resource_name(model, held)}/features/{index}",
        index=index,
        decoder_norm=float(held.dictionary.decoder_norms[index]),
        label=label,
    )
    if held.check is not None:
        message.density = float(held.check.density[index])
    return message


def row_messages(encoded: EncodedInput) -> Iterator[pb.EncodeFeaturesResponse]:
    """The rows of an input in pieces of about 1 MiB."""
    rows = encoded.rows
    n_rows = len(rows.indptr) - 1
    first = 0
    while first < n_rows:
        most = int(rows.indptr[first]) + CHUNK_BYTES // _ENTRY_BYTES
        stop = max(first + 1, int(np.searchsorted(rows.indptr, most, side="right")) - 1)
        stop = min(stop, n_rows)
        low, high = int(rows.indptr[first]), int(rows.indptr[stop])
        yield pb.EncodeFeaturesResponse(
            rows=pb.EncodedRows(
                input=encoded.index,
                first_row=encoded.first_row + first,
                indptr=pack(rows.indptr[first : stop + 1] - rows.indptr[first]),
                feature_ids=pack(rows.ids[low:high]),
                activations=pack(rows.activations[low:high]),
            )
        )
        first = stop


def sparse_rows(request: pb.DecodeFeaturesRequest, held: HeldDictionary) -> FeatureRows:
    """The compressed sparse rows of a request, checked.

    Raises:
        InvalidArgument: arrays that do not make rows.
        NotFound: a feature index out of range.
    """
    indptr = _integers(request.indptr, request.HasField("indptr"), "indptr").astype(np.int64)
    ids = _integers(request.feature_ids, request.HasField("feature_ids"), "feature_ids").astype(np.int64)
    empty = request.HasField("activations") and not request.activations.data
    values = (
        np.zeros(0, np.float32)
        if empty
        else floats(request.activations, request.HasField("activations"), "activations")
    )
    fits = indptr.ndim == 1 and indptr.size >= 2 and indptr[0] == 0 and (np.diff(indptr) >= 0).all()
    if not (fits and ids.ndim == 1 and ids.shape == values.shape and indptr[-1] == ids.size):
        raise InvalidArgument(
            f"indptr {indptr.shape}, feature_ids {ids.shape} and activations {values.shape} make no sparse rows",
            reason=reasons.TENSOR_MALFORMED,
            field="indptr",
            value=indptr.shape,
            remedy="send indptr (n + 1,) from 0, ascending, ending at the length of feature_ids and activations",
        )
    held.dictionary.check_feature_ids(torch.from_numpy(ids), field="feature_ids")
    return FeatureRows(indptr, ids.astype(np.int32), values)


def _integers(message: tensors_pb2.Tensor, present: bool, field: str) -> np.ndarray:
    try:
        array = unpack(message) if present else np.zeros(0, np.int32)
    except TensorError as error:
        raise InvalidArgument(
            f"{field}: {error}",
            reason=reasons.TENSOR_MALFORMED,
            field=f"{field}.{error.field}",
            value=error.found,
            remedy=f"send {error.expected}",
        ) from error
    if not np.issubdtype(array.dtype, np.integer):
        raise InvalidArgument(
            f"{field} holds {array.dtype}",
            reason=reasons.TENSOR_MALFORMED,
            field=f"{field}.dtype",
            value=array.dtype,
            remedy="send I32 or I64",
        )
    return array


def decoded(output: np.ndarray) -> pb.DecodeFeaturesResponse:
    """What features write."""
    return pb.DecodeFeaturesResponse(activations=pack(np.ascontiguousarray(output)))


def evaluation_message(evaluation: DictionaryEvaluation) -> pb.EvaluateDictionaryResponse:
    """What an evaluation measured; figures with nothing to divide by (NaN) are sent as they are."""
    message = pb.EvaluateDictionaryResponse(metrics=evaluation.metrics, tokens=evaluation.tokens)
    if evaluation.density.nbytes <= _MOST_DENSITY_BYTES:
        message.density.CopyFrom(pack(evaluation.density))
    return message
