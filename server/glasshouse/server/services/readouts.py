"""Readouts: what is asked for, protobuf to types; what was seen, types to protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.limits import Limits
from glasshouse.server.types.readouts import (
    FeatureActivations,
    ProbeScores,
    ReadActivations,
    ReadFeatures,
    ReadLogitLens,
    Readout,
    ReadoutValue,
    ReadProbe,
    TopTokens,
    WireDType,
)
from glasshouse.server.types.selectors import Selector
from glasshouse.v1 import generation_pb2 as generation_pb
from glasshouse.v1 import readouts_pb2 as pb
from glasshouse.v1 import tensors_pb2 as tensors_pb
from glasshouse.wire import reasons

from . import fields, tensors
from .conditions import probe_output
from .selectors import selector
from .token_strings import TokenStrings

DEFAULT_LENS_TOP_K = 5
MAX_TOP_K = 100
DEFAULT_FEATURES_TOP_K = 8
MAX_FEATURES_TOP_K = 1024
# Bytes of an entry of top tokens, an id and a log-probability, and of one of features, an id and an activation.
ENTRY_BYTES = 8
SCORE_BYTES = 4

_DTYPES: dict[int, WireDType] = {
    tensors_pb.DTYPE_UNSPECIFIED: "float32",
    tensors_pb.DTYPE_F32: "float32",
    tensors_pb.DTYPE_BF16: "bfloat16",
    tensors_pb.DTYPE_F16: "float16",
}


def wire_dtype(number: int, field: str) -> WireDType:
    """The element type that a request asks for; float32 where it does not say."""
    if number not in _DTYPES:
        raise fields.out_of_range(field, number, "DTYPE_F32, DTYPE_BF16 or DTYPE_F16")
    return _DTYPES[number]


def readouts(messages: Sequence[pb.Readout], limits: Limits) -> tuple[Readout, ...]:
    """The readouts of a request, in order."""
    fields.count(len(messages), "readouts", limits.max_readouts, "max_readouts", "readouts")
    return tuple(_readout(message, f"readouts[{index}]", limits) for index, message in enumerate(messages))


def _readout(message: pb.Readout, field: str, limits: Limits) -> Readout:
    positions = selector(message.positions, message.HasField("positions"), f"{field}.positions", limits)
    match message.WhichOneof("what"):
        case "activations":
            path = f"{field}.activations"
            return ReadActivations(
                hook_point=_hook_point(message.activations.hook_point, path),
                positions=positions,
                dtype=wire_dtype(message.activations.dtype, f"{path}.dtype"),
            )
        case "logit_lens":
            path = f"{field}.logit_lens"
            lens = message.logit_lens
            top_k = lens.top_k if lens.HasField("top_k") else DEFAULT_LENS_TOP_K
            fields.whole(top_k, f"{path}.top_k", 1, MAX_TOP_K)
            return ReadLogitLens(
                hook_point=_hook_point(lens.hook_point, path), top_k=top_k, positions=positions
            )
        case "features":
            return _read_features(message.features, positions, f"{field}.features")
        case "probe":
            probe, path = message.probe, f"{field}.probe"
            if not probe.probe:
                raise fields.required(f"{path}.probe", "whose scores", "name a probe; ListProbes lists them")
            output = probe_output(probe.output, f"{path}.output")
            return ReadProbe(probe=probe.probe, output=output, positions=positions)
        case None:
            choices = "activations, logit_lens, features, probe"
            raise fields.required(field, "what to read", f"set one of {choices}")
        case other:
            raise fields.not_served(f"{field}.{other}", other)


def _read_features(message: pb.ReadFeatures, positions: Selector, field: str) -> ReadFeatures:
    if not message.dictionary:
        raise fields.required(f"{field}.dictionary", "whose features", "name a dictionary that is loaded")
    if message.features and message.HasField("top_k"):
        raise InvalidArgument(
            f"{field} sets both features and top_k",
            reason=reasons.FIELD_CONFLICT,
            field=f"{field}.top_k",
            value=message.top_k,
            remedy="name the features to read, or ask for the strongest",
        )
    top_k = 0
    if not message.features:
        top_k = message.top_k if message.HasField("top_k") else DEFAULT_FEATURES_TOP_K
        fields.whole(top_k, f"{field}.top_k", 1, MAX_FEATURES_TOP_K)
    return ReadFeatures(
        dictionary=message.dictionary, top_k=top_k, features=tuple(message.features), positions=positions
    )


def _hook_point(name: str, field: str) -> str:
    if not name:
        raise fields.required(
            f"{field}.hook_point", "where to read", "name a readable hook point; ListHookPoints lists them"
        )
    return name


def fill_top_tokens(message: pb.TopTokens, top: TopTokens, strings: TokenStrings) -> int:
    """Writes top tokens into `message`; returns the bytes of ids and log-probabilities."""
    ids = top.token_ids.tolist()
    message.token_ids.extend(ids)
    message.logprobs.extend(top.logprobs.tolist())
    message.tokens.extend(strings.of(ids))
    return ENTRY_BYTES * len(ids)


def fill_values(
    message: generation_pb.GeneratedToken, values: Mapping[int, ReadoutValue], strings: TokenStrings
) -> int:
    """Writes what was read at one position into a token's message; returns the bytes of the values."""
    n_bytes = 0
    add = message.readouts.add
    for index, value in values.items():
        entry = add(readout=index)
        if isinstance(value, TopTokens):
            n_bytes += fill_top_tokens(entry.logit_lens, value, strings)
        elif isinstance(value, FeatureActivations):
            entry.features.feature_ids.extend(value.ids.tolist())
            entry.features.activations.extend(value.activations.tolist())
            n_bytes += ENTRY_BYTES * len(value.ids)
        elif isinstance(value, ProbeScores):
            entry.probe.scores.extend(value.scores.tolist())
            n_bytes += SCORE_BYTES * len(value.scores)
        else:
            n_bytes += tensors.fill(entry.activations, value)
    return n_bytes
