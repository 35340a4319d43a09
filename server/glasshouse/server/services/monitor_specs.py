"""What a monitor is: protobuf to types and back. The texts that drift is measured against are scored elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from glasshouse.server.monitors.spec import (
    WATCHED_POSITIONS,
    DriftSpec,
    EventKind,
    MonitorFilter,
    MonitorSpec,
    WebhookSpec,
)
from glasshouse.server.probes.aggregation import Aggregation, Rule
from glasshouse.server.probes.drift import ScoreHistogram
from glasshouse.server.types.conditions import FeatureColumn, MonitorAction, ProbeColumn, ProbeOutput
from glasshouse.server.types.errors import InvalidArgument, ServingError
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import conditions_pb2, inputs_pb2
from glasshouse.v1 import monitors_pb2 as pb
from glasshouse.wire import reasons

from . import fields
from .conditions import probe_output
from .intervention_messages import intervention_message, selector_message
from .interventions import interventions
from .selectors import selector

_AGGREGATIONS = {
    pb.AGGREGATION_KIND_UNSPECIFIED: Aggregation.MAX,
    pb.AGGREGATION_KIND_MAX: Aggregation.MAX,
    pb.AGGREGATION_KIND_MEAN: Aggregation.MEAN,
    pb.AGGREGATION_KIND_EXPONENTIAL: Aggregation.EXPONENTIAL,
    pb.AGGREGATION_KIND_FRACTION_ABOVE: Aggregation.FRACTION_ABOVE,
}
_AGGREGATION_NUMBERS = {kind: number for number, kind in _AGGREGATIONS.items()}
_ACTIONS = {
    conditions_pb2.MONITOR_ACTION_UNSPECIFIED: MonitorAction.OBSERVE,
    conditions_pb2.MONITOR_ACTION_OBSERVE: MonitorAction.OBSERVE,
    conditions_pb2.MONITOR_ACTION_FLAG: MonitorAction.FLAG,
    conditions_pb2.MONITOR_ACTION_STEER: MonitorAction.STEER,
    conditions_pb2.MONITOR_ACTION_ABORT: MonitorAction.ABORT,
}
ACTION_NUMBERS = {action: number for number, action in _ACTIONS.items()}
_KINDS = {
    pb.MONITOR_EVENT_KIND_RAISED: EventKind.RAISED,
    pb.MONITOR_EVENT_KIND_CLEARED: EventKind.CLEARED,
    pb.MONITOR_EVENT_KIND_DRIFT: EventKind.DRIFT,
    pb.MONITOR_EVENT_KIND_DRIFT_CLEARED: EventKind.DRIFT_CLEARED,
}
KIND_NUMBERS = {kind: number for number, kind in _KINDS.items()}
_OUTPUTS = {
    ProbeOutput.SCORE: conditions_pb2.PROBE_OUTPUT_SCORE,
    ProbeOutput.MARGIN: conditions_pb2.PROBE_OUTPUT_MARGIN,
}

FIELDS = frozenset(field.name for field in pb.MonitorSpec.DESCRIPTOR.fields) - {"probe", "feature"} | {
    "score"
}


@dataclass(frozen=True, kw_only=True)
class DriftWish:
    """Drift as it is asked for: `inputs` to be scored, or the histogram in `settings`."""

    inputs: tuple[inputs_pb2.Input, ...]
    settings: DriftSpec


def spec_from(message: pb.MonitorSpec, limits: Limits) -> tuple[MonitorSpec, DriftWish | None]:
    """The monitor of a request, without its drift, and the drift that is wished for."""
    try:
        spec = _spec(message, limits)
        wish = _drift(message.drift) if message.HasField("drift") else None
    except ServingError as error:
        raise error.at("spec") from None
    return spec, wish


def event_kinds(numbers: list[int], field: str) -> tuple[EventKind, ...]:
    """The kinds of events that are asked for."""
    for index, number in enumerate(numbers):
        if number not in _KINDS:
            raise fields.out_of_range(
                f"{field}[{index}]",
                number,
                "a known MonitorEventKind: raised, cleared, drift or drift_cleared",
            )
    return tuple(dict.fromkeys(_KINDS[pb.MonitorEventKind.ValueType(number)] for number in numbers))


def _spec(message: pb.MonitorSpec, limits: Limits) -> MonitorSpec:
    if message.action not in _ACTIONS:
        raise fields.out_of_range(
            "action", message.action, "a known MonitorAction: observe, flag, steer or abort"
        )
    edits = interventions(message.interventions, limits)
    return MonitorSpec(
        source=_source(message),
        rule=_rule(message),
        positions=selector(message.positions, True, "positions", limits)
        if message.HasField("positions")
        else WATCHED_POSITIONS,
        filter=MonitorFilter(
            keys=tuple(dict.fromkeys(message.filter.keys)),
            labels=dict(message.filter.labels),
            sampling_rate=message.filter.sampling_rate if message.filter.HasField("sampling_rate") else 1.0,
        ),
        action=_ACTIONS[message.action],
        interventions=edits,
        steer_while_on=message.steer_while_on,
        webhook=_webhook(message.webhook) if message.HasField("webhook") else None,
        include_text=message.include_text,
        enabled=message.enabled if message.HasField("enabled") else True,
        description=message.description,
    )


def _source(message: pb.MonitorSpec) -> ProbeColumn | FeatureColumn:
    match message.WhichOneof("score"):
        case "probe":
            if not message.probe.probe:
                raise fields.required("probe.probe", "whose score", "name a probe; ListProbes lists them")
            return ProbeColumn(
                probe=message.probe.probe,
                label=message.probe.label,
                output=probe_output(message.probe.output, "probe.output"),
            )
        case "feature":
            if not message.feature.dictionary:
                raise fields.required(
                    "feature.dictionary", "whose feature", "name a dictionary that is loaded"
                )
            return FeatureColumn(dictionary=message.feature.dictionary, feature=message.feature.feature)
        case _:
            raise fields.required("score", "whose score, a probe's or a feature's", "set probe or feature")


def _rule(message: pb.MonitorSpec) -> Rule:
    aggregation, threshold = message.aggregation, message.threshold
    if aggregation.kind not in _AGGREGATIONS:
        raise fields.out_of_range(
            "aggregation.kind",
            aggregation.kind,
            "a known AggregationKind: max, mean, exponential or fraction_above",
        )
    kind = _AGGREGATIONS[aggregation.kind]
    for name, given, belongs in (
        ("weight", aggregation.HasField("weight"), Aggregation.EXPONENTIAL),
        ("level", aggregation.HasField("level"), Aggregation.FRACTION_ABOVE),
    ):
        if given and kind is not belongs:
            raise InvalidArgument(
                f"aggregation.{name} belongs to {belongs.value}, this is {kind.value}",
                reason=reasons.FIELD_CONFLICT,
                field=f"aggregation.{name}",
                value=getattr(aggregation, name),
                remedy=f"leave it out, or aggregate by {belongs.value}",
            )
    if not threshold.HasField("on_above"):
        raise fields.required(
            "threshold.on_above", "when the monitor goes on", "set threshold.on_above to a score"
        )
    return Rule(
        aggregation=kind,
        on_above=threshold.on_above,
        off_below=threshold.off_below if threshold.HasField("off_below") else None,
        weight=aggregation.weight if aggregation.HasField("weight") else 0.2,
        level=aggregation.level if aggregation.HasField("level") else 0.5,
        min_tokens=threshold.min_tokens if threshold.HasField("min_tokens") else 1,
    )


def _webhook(message: pb.Webhook) -> WebhookSpec:
    for name, what in (("url", "where events are posted"), ("secret", "the name of a secret to sign with")):
        if not getattr(message, name):
            raise fields.required(f"webhook.{name}", what, "set it, or leave the webhook out")
    return WebhookSpec(
        url=message.url, secret=message.secret, kinds=event_kinds(list(message.kinds), "webhook.kinds")
    )


def _drift(message: pb.DriftSettings) -> DriftWish:
    given = message.HasField("calibration")
    if given == bool(message.calibration_inputs):
        raise InvalidArgument(
            "drift is measured against calibration inputs or a histogram",
            reason=reasons.FIELD_CONFLICT if given else reasons.FIELD_REQUIRED,
            field="drift.calibration_inputs",
            remedy="send one of the two: texts like the traffic to be expected, or their scores' histogram",
        )
    histogram = ScoreHistogram(edges=(), counts=(1,))
    if given:
        body = {"edges": list(message.calibration.edges), "counts": list(message.calibration.counts)}
        try:
            histogram = ScoreHistogram.from_json(body)
        except ServingError as error:
            error.field = "drift.calibration"
            raise
    default = DriftSpec(calibration=histogram)
    most = message.max_population_stability_index
    return DriftWish(
        inputs=tuple(message.calibration_inputs),
        settings=DriftSpec(
            calibration=histogram,
            max_population_stability_index=(
                most
                if message.HasField("max_population_stability_index")
                else default.max_population_stability_index
            ),
            max_ks_statistic=(
                message.max_ks_statistic if message.HasField("max_ks_statistic") else default.max_ks_statistic
            ),
            half_life=message.half_life if message.HasField("half_life") else default.half_life,
            min_scores=message.min_scores if message.HasField("min_scores") else default.min_scores,
        ),
    )


def spec_message(spec: MonitorSpec) -> pb.MonitorSpec:
    """A monitor as a message: everything that has a default says it."""
    message = pb.MonitorSpec(
        positions=selector_message(spec.positions),
        filter=pb.MonitorFilter(
            keys=spec.filter.keys, labels=dict(spec.filter.labels), sampling_rate=spec.filter.sampling_rate
        ),
        aggregation=pb.MonitorAggregation(kind=_AGGREGATION_NUMBERS[spec.rule.aggregation]),
        threshold=pb.MonitorThreshold(
            on_above=spec.rule.on_above,
            off_below=spec.rule.on_above if spec.rule.off_below is None else spec.rule.off_below,
            min_tokens=spec.rule.min_tokens,
        ),
        action=ACTION_NUMBERS[spec.action],
        interventions=[intervention_message(edit) for edit in spec.interventions],
        steer_while_on=spec.steer_while_on,
        include_text=spec.include_text,
        enabled=spec.enabled,
        description=spec.description,
    )
    if spec.rule.off_below is None:
        message.threshold.ClearField("off_below")
    if spec.rule.aggregation is Aggregation.EXPONENTIAL:
        message.aggregation.weight = spec.rule.weight
    if spec.rule.aggregation is Aggregation.FRACTION_ABOVE:
        message.aggregation.level = spec.rule.level
    source = spec.source
    if isinstance(source, ProbeColumn):
        message.probe.CopyFrom(
            conditions_pb2.ProbeColumn(probe=source.probe, label=source.label, output=_OUTPUTS[source.output])
        )
    else:
        message.feature.CopyFrom(
            conditions_pb2.FeatureColumn(dictionary=source.dictionary, feature=source.feature)
        )
    if spec.drift is not None:
        drift = spec.drift
        message.drift.CopyFrom(
            pb.DriftSettings(
                calibration=pb.ScoreHistogram(edges=drift.calibration.edges, counts=drift.calibration.counts),
                max_population_stability_index=drift.max_population_stability_index,
                max_ks_statistic=drift.max_ks_statistic,
                half_life=drift.half_life,
                min_scores=drift.min_scores,
            )
        )
    if spec.webhook is not None:
        message.webhook.CopyFrom(
            pb.Webhook(
                url=spec.webhook.url,
                secret=spec.webhook.secret,
                kinds=[KIND_NUMBERS[kind] for kind in spec.webhook.kinds],
            )
        )
    return message
