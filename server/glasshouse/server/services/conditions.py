"""Conditions: protobuf to types; what ended a generation, back."""

from __future__ import annotations

from collections.abc import Sequence

from glasshouse.server.types.conditions import (
    Abort,
    Condition,
    ConditionScope,
    FeatureColumn,
    MonitorAction,
    MonitorFlag,
    ProbeColumn,
    ProbeOutput,
    PromptAggregation,
)
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import conditions_pb2 as pb
from glasshouse.wire import reasons

from . import fields
from .selectors import selector

MAX_ABORT_CONDITIONS = 16

# Trailing metadata of a response that monitors flagged. Clients drop calls whose trailers pass 8 KiB.
FLAG_KEY = "glasshouse-monitor-flag"
MAX_FLAG_TRAILERS = 16

_OUTPUTS = {
    pb.PROBE_OUTPUT_UNSPECIFIED: ProbeOutput.SCORE,
    pb.PROBE_OUTPUT_SCORE: ProbeOutput.SCORE,
    pb.PROBE_OUTPUT_MARGIN: ProbeOutput.MARGIN,
}
_SCOPES = {
    pb.CONDITION_SCOPE_UNSPECIFIED: ConditionScope.POSITION,
    pb.CONDITION_SCOPE_POSITION: ConditionScope.POSITION,
    pb.CONDITION_SCOPE_PROMPT: ConditionScope.PROMPT,
    pb.CONDITION_SCOPE_LATCHED: ConditionScope.LATCHED,
}
_AGGREGATIONS = {
    pb.PROMPT_AGGREGATION_UNSPECIFIED: None,
    pb.PROMPT_AGGREGATION_MAX: PromptAggregation.MAX,
    pb.PROMPT_AGGREGATION_MEAN: PromptAggregation.MEAN,
    pb.PROMPT_AGGREGATION_LAST: PromptAggregation.LAST,
}
_ACTIONS = {
    MonitorAction.OBSERVE: pb.MONITOR_ACTION_OBSERVE,
    MonitorAction.FLAG: pb.MONITOR_ACTION_FLAG,
    MonitorAction.STEER: pb.MONITOR_ACTION_STEER,
    MonitorAction.ABORT: pb.MONITOR_ACTION_ABORT,
}


def abort_conditions(messages: Sequence[pb.Condition], limits: Limits) -> tuple[Condition, ...]:
    """A request's `abort_when`, in order."""
    if len(messages) > MAX_ABORT_CONDITIONS:
        raise fields.out_of_range(
            "abort_when", f"a list of {len(messages)}", f"at most {MAX_ABORT_CONDITIONS} conditions"
        )
    return tuple(condition(m, f"abort_when[{i}]", limits) for i, m in enumerate(messages))


def condition(message: pb.Condition, field: str, limits: Limits) -> Condition:
    """One condition. Whether the probe or the feature exists is for the engine to say."""
    scope = _SCOPES.get(message.scope)
    if scope is None:
        raise fields.out_of_range(
            f"{field}.scope", message.scope, "a known ConditionScope: position, prompt or latched"
        )
    if message.prompt_aggregation not in _AGGREGATIONS:
        raise fields.out_of_range(
            f"{field}.prompt_aggregation",
            message.prompt_aggregation,
            "a known PromptAggregation: max, mean or last",
        )
    aggregation = _AGGREGATIONS[message.prompt_aggregation]
    if aggregation is not None and scope is not ConditionScope.PROMPT:
        raise InvalidArgument(
            f"{field}.prompt_aggregation is {aggregation.value}, the scope is {scope.value}",
            reason=reasons.FIELD_CONFLICT,
            field=f"{field}.prompt_aggregation",
            value=aggregation.value,
            remedy="leave it out, or ask over the prompt",
        )
    source = _source(message, field)
    above, below = _threshold(message, source, field)
    return Condition(
        source=source,
        above=above,
        below=below,
        scope=scope,
        aggregation=aggregation,
        positions=selector(message.positions, message.HasField("positions"), f"{field}.positions", limits),
    )


def probe_output(number: int, field: str) -> ProbeOutput:
    """What a probe's scores are asked for as."""
    if number not in _OUTPUTS:
        raise fields.out_of_range(field, number, "a known ProbeOutput: score or margin")
    return _OUTPUTS[pb.ProbeOutput.ValueType(number)]


def _source(message: pb.Condition, field: str) -> ProbeColumn | FeatureColumn:
    match message.WhichOneof("source"):
        case "probe":
            probe = message.probe
            if not probe.probe:
                raise fields.required(
                    f"{field}.probe.probe", "whose score", "name a probe; ListProbes lists them"
                )
            return ProbeColumn(
                probe=probe.probe,
                label=probe.label,
                output=probe_output(probe.output, f"{field}.probe.output"),
            )
        case "feature":
            if not message.feature.dictionary:
                raise fields.required(
                    f"{field}.feature.dictionary", "whose feature", "name a dictionary that is loaded"
                )
            return FeatureColumn(dictionary=message.feature.dictionary, feature=message.feature.feature)
        case _:
            raise fields.required(field, "whose score, a probe's or a feature's", "set probe or feature")


def _threshold(
    message: pb.Condition, source: ProbeColumn | FeatureColumn, field: str
) -> tuple[float | None, float | None]:
    side = message.WhichOneof("threshold")
    if side is None:
        raise fields.required(f"{field}.above", "the threshold, above or below", "set above or below")
    value = fields.finite(message.above if side == "above" else message.below, f"{field}.{side}")
    if isinstance(source, ProbeColumn) and source.output is ProbeOutput.SCORE and not 0.0 <= value <= 1.0:
        raise fields.out_of_range(
            f"{field}.{side}", value, "a probability from 0 to 1, or ask for the probe's margin"
        )
    return (value, None) if side == "above" else (None, value)


def abort_message(abort: Abort) -> pb.Abort:
    """What ended a generation."""
    message = pb.Abort(position=abort.position, score=abort.score, threshold=abort.threshold)
    if abort.condition is None:
        message.monitor = abort.monitor
    else:
        message.condition = abort.condition
    return message


def flag_trailers(flags: Sequence[MonitorFlag]) -> list[tuple[str, str]]:
    """Trailing metadata that says the same as `flags` to whoever does not read the stream: an entry a flag."""
    return [
        (FLAG_KEY, f"{flag.monitor}; action={flag.action.value}; position={flag.position}")
        for flag in flags[:MAX_FLAG_TRAILERS]
    ]


def flag_messages(flags: Sequence[MonitorFlag]) -> list[pb.MonitorFlag]:
    """The monitors that passed their threshold."""
    return [
        pb.MonitorFlag(
            monitor=flag.monitor,
            position=flag.position,
            score=flag.score,
            threshold=flag.threshold,
            action=_ACTIONS[flag.action],
        )
        for flag in flags
    ]
