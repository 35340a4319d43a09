"""Python values -> AttributionService's request messages, by the rules of `glasshouse.client.builders`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from glasshouse.client import builders
from glasshouse.client.arrays import VectorLike, as_float32
from glasshouse.client.attribution import metrics
from glasshouse.client.attribution.graph import AttributionGraph
from glasshouse.client.attribution.metrics import Metric, TokenChoice, TokensLike, token_choice
from glasshouse.client.attribution.patches import PatchGrid, PatchGridLike, PatchNode, as_grids
from glasshouse.client.dictionaries.names import DictionaryLike, dictionary_name
from glasshouse.client.inputs import InputLike, as_input
from glasshouse.client.scalars import text, whole, wholes, word
from glasshouse.v1 import attribution_graphs_pb2 as stored_pb
from glasshouse.v1 import attribution_pb2 as pb
from glasshouse.v1 import inputs_pb2, metrics_pb2
from glasshouse.wire.tensors import pack

METHODS: Final = {
    "integrated_gradients": pb.GRADIENT_METHOD_INTEGRATED_GRADIENTS,
    "gradient_x_input": pb.GRADIENT_METHOD_GRADIENT_X_INPUT,
}
DIRECTIONS: Final = {"noise": pb.PATCH_DIRECTION_NOISE, "denoise": pb.PATCH_DIRECTION_DENOISE}
REPLACEMENTS: Final = {
    "interchange": pb.PATCH_REPLACEMENT_INTERCHANGE,
    "zero": pb.PATCH_REPLACEMENT_ZERO,
    "mean": pb.PATCH_REPLACEMENT_MEAN,
    "resample": pb.PATCH_REPLACEMENT_RESAMPLE,
}
MODES: Final = {
    "constrained": pb.FEATURE_INTERVENTION_MODE_CONSTRAINED,
    "frozen_attention": pb.FEATURE_INTERVENTION_MODE_FROZEN_ATTENTION,
    "open": pb.FEATURE_INTERVENTION_MODE_OPEN,
}
PATCHING: Final = ("atp", "atp*", "eap", "eap-ig")
BASELINES: Final = ("mean_embedding", "zeros")
_EAP_IG_STEPS: Final = 5


@dataclass(frozen=True)
class FeatureSetting:
    """See `feature_setting`."""

    layer: int
    feature: int
    position: int
    value: float


def feature_setting(layer: int, feature: int, position: int, value: float = 0.0) -> FeatureSetting:
    """A transcoder feature set to `value` at a position; 0 turns it off."""
    return FeatureSetting(layer, feature, position, value)


def given_input(value: InputLike, field: str) -> inputs_pb2.Input:
    """An input of the caller's, in any of its forms."""
    return builders.model_input(as_input(value, field), field)


def tokens(choice: TokenChoice, field: str) -> metrics_pb2.TokenChoice:
    """Chosen tokens."""
    return metrics_pb2.TokenChoice(
        token_ids=wholes(choice.token_ids, f"{field}.token_ids"),
        texts=[text(item, f"{field}.texts[{n}]") for n, item in enumerate(choice.texts)],
        top_k=whole(choice.top_k, f"{field}.top_k"),
    )


def metric(value: Metric, field: str = "metric") -> metrics_pb2.Metric:
    """A metric, by the table of its class."""
    make = _METRICS.get(type(value))
    if make is None:
        raise TypeError(f"{field} must be a metric such as logit_difference(...), not {value!r}")
    position = None if value.position is None else whole(value.position, f"{field}.position", bits=64)
    return metrics_pb2.Metric(position=position, **make(value, field))


def _logit_difference(value: metrics.LogitDifference, field: str) -> dict[str, Any]:
    at = f"{field}.logit_difference"
    return {
        "logit_difference": metrics_pb2.LogitDifference(
            targets=tokens(value.targets, f"{at}.targets"),
            foils=tokens(value.foils, f"{at}.foils"),
            before_soft_cap=value.before_soft_cap,
        )
    }


def _log_probability(value: metrics.LogProbability, field: str) -> dict[str, Any]:
    targets = tokens(value.targets, f"{field}.log_probability.targets")
    return {"log_probability": metrics_pb2.LogProbability(targets=targets)}


def _probability(value: metrics.Probability, field: str) -> dict[str, Any]:
    targets = tokens(value.targets, f"{field}.probability.targets")
    return {"probability": metrics_pb2.Probability(targets=targets)}


def _kl_divergence(value: metrics.KLDivergence, field: str) -> dict[str, Any]:
    at = f"{field}.kl_divergence.reference"
    reference = None if value.reference is None else builders.model_input(value.reference, at)
    return {"kl_divergence": metrics_pb2.KlDivergence(reference=reference)}


def _direction(value: metrics.DirectionValue, field: str) -> dict[str, Any]:
    return {
        "direction": metrics_pb2.DirectionValue(
            hook_point=text(value.hook_point, f"{field}.direction.hook_point"),
            vector=pack(value.vector),
            bias=value.bias,
        )
    }


def _feature(value: metrics.FeatureValue, field: str) -> dict[str, Any]:
    return {
        "feature": metrics_pb2.FeatureValue(
            dictionary=text(value.dictionary, f"{field}.feature.dictionary"),
            feature=whole(value.feature, f"{field}.feature.feature"),
            pre_activation=value.pre_activation,
        )
    }


def _probe(value: metrics.ProbeValue, field: str) -> dict[str, Any]:
    probe = text(value.probe, f"{field}.probe.probe")
    return {"probe": metrics_pb2.ProbeValue(probe=probe, label=text(value.label, f"{field}.probe.label"))}


_METRICS: Final[dict[type[Metric], Callable[[Any, str], dict[str, Any]]]] = {
    metrics.LogitDifference: _logit_difference,
    metrics.LogProbability: _log_probability,
    metrics.Probability: _probability,
    metrics.KLDivergence: _kl_divergence,
    metrics.DirectionValue: _direction,
    metrics.FeatureValue: _feature,
    metrics.ProbeValue: _probe,
}


def freeze(held: Sequence[str]) -> pb.Freeze:
    """What is to be held at its own values."""
    known = {"attention_patterns": "attention_patterns", "norm_scales": "norm_scales"}
    chosen = [held] if isinstance(held, str) else held
    return pb.Freeze(**{word(name, known, "freeze"): True for name in chosen})


def attribute_tokens(
    model: str,
    input: InputLike,
    value: Metric,
    *,
    hook_point: str,
    method: str,
    steps: int,
    baseline: InputLike | NDArray[Any] | None,
    freeze_: Sequence[str],
    by_element: bool,
) -> pb.AttributeTokensRequest:
    """`baseline`: None for the method's own, one of `BASELINES`, an input, or floating activations (d,) or (n_pos, d)."""
    request = pb.AttributeTokensRequest(
        model=model,
        input=given_input(input, "input"),
        metric=metric(value),
        hook_point=text(hook_point, "hook_point"),
        method=word(method, METHODS, "method"),
        steps=whole(steps, "steps"),
        freeze=freeze(freeze_),
        by_element=by_element,
    )
    if isinstance(baseline, str) and baseline in BASELINES:
        setattr(request, baseline, True)
    elif _is_floating(baseline):
        request.baseline_activations.CopyFrom(pack(_rows(baseline, "baseline_activations")))
    elif baseline is not None:
        other: Any = baseline
        request.baseline_input.CopyFrom(given_input(other, "baseline_input"))
    return request


def direct_attribution(
    model: str,
    input: InputLike,
    targets: TokensLike,
    foils: TokensLike,
    *,
    position: int | None,
    dictionaries: Sequence[DictionaryLike],
    top_features: int,
) -> pb.DirectAttributionRequest:
    """The parts of a logit."""
    return pb.DirectAttributionRequest(
        model=model,
        input=given_input(input, "input"),
        targets=tokens(token_choice(targets), "targets"),
        foils=tokens(token_choice(foils), "foils"),
        position=None if position is None else whole(position, "position", bits=64),
        dictionaries=names(dictionaries),
        top_features=whole(top_features, "top_features"),
    )


def patch_sweep(
    model: str,
    clean: InputLike,
    corrupt: InputLike | None,
    value: Metric,
    grids: PatchGridLike | Sequence[PatchGridLike],
    *,
    direction: str,
    replacement: str,
    others: Sequence[InputLike],
    seed: int,
    freeze_: Sequence[str],
    batch_size: int,
) -> pb.PatchSweepRequest:
    """A sweep over grids. `direction` counts with interchange alone."""
    interchange = replacement == "interchange"
    return pb.PatchSweepRequest(
        model=model,
        clean=given_input(clean, "clean"),
        corrupt=None if corrupt is None else given_input(corrupt, "corrupt"),
        others=[given_input(other, f"others[{n}]") for n, other in enumerate(others)],
        metric=metric(value),
        grids=[grid(item, f"grids[{n}]") for n, item in enumerate(as_grids(grids))],
        direction=word(direction, DIRECTIONS, "direction")
        if interchange or direction != "noise"
        else pb.PATCH_DIRECTION_UNSPECIFIED,
        replacement=word(replacement, REPLACEMENTS, "replacement"),
        seed=whole(seed, "seed", bits=64),
        freeze=freeze(freeze_),
        batch_size=whole(batch_size, "batch_size"),
    )


def mediate_effect(
    model: str,
    clean: InputLike,
    corrupt: InputLike,
    value: Metric,
    grids: PatchGridLike | Sequence[PatchGridLike],
    batch_size: int,
) -> pb.MediateEffectRequest:
    """Mediation over grids."""
    return pb.MediateEffectRequest(
        model=model,
        clean=given_input(clean, "clean"),
        corrupt=given_input(corrupt, "corrupt"),
        metric=metric(value),
        grids=[grid(item, f"grids[{n}]") for n, item in enumerate(as_grids(grids))],
        batch_size=whole(batch_size, "batch_size"),
    )


def path_patch(
    model: str,
    clean: InputLike,
    corrupt: InputLike,
    value: Metric,
    senders: Sequence[PatchNode],
    receivers: Sequence[PatchNode],
    *,
    direction: str,
    hold_mlps: bool,
) -> pb.PathPatchRequest:
    """Senders as receivers see them."""
    return pb.PathPatchRequest(
        model=model,
        clean=given_input(clean, "clean"),
        corrupt=given_input(corrupt, "corrupt"),
        metric=metric(value),
        senders=[node(item, f"senders[{n}]") for n, item in enumerate(senders)],
        receivers=[node(item, f"receivers[{n}]") for n, item in enumerate(receivers)],
        direction=word(direction, DIRECTIONS, "direction"),
        hold_mlps=hold_mlps,
    )


def attribution_patch(
    model: str,
    clean: InputLike,
    corrupt: InputLike,
    value: Metric,
    *,
    method: str,
    components: Sequence[str],
    steps: int | None,
    freeze_: Sequence[str],
    verify_top: int,
) -> pb.AttributionPatchRequest:
    """AtP, AtP*, EAP or EAP-IG."""
    word(method, dict.fromkeys(PATCHING), "method")
    request = pb.AttributionPatchRequest(
        model=model,
        clean=given_input(clean, "clean"),
        corrupt=given_input(corrupt, "corrupt"),
        metric=metric(value),
        verify_top=whole(verify_top, "verify_top"),
    )
    if method.startswith("atp"):
        listed = [components] if isinstance(components, str) else components
        request.nodes.CopyFrom(
            pb.NodePatching(
                components=[text(name, f"nodes.components[{n}]") for n, name in enumerate(listed)],
                qk_fix=method == "atp*",
                grad_drop=method == "atp*",
                freeze=freeze(freeze_),
            )
        )
    else:
        default = _EAP_IG_STEPS if method == "eap-ig" else 0
        request.edges.CopyFrom(
            pb.EdgePatching(steps=whole(default if steps is None else steps, "edges.steps"))
        )
    return request


def attribute_features(
    model: str,
    input: InputLike,
    value: Metric,
    *,
    dictionaries: Sequence[DictionaryLike],
    method: str,
    steps: int,
    baseline: InputLike | None,
) -> pb.AttributeFeaturesRequest:
    """Attribution to dictionaries' features."""
    return pb.AttributeFeaturesRequest(
        model=model,
        input=given_input(input, "input"),
        metric=metric(value),
        dictionaries=names(dictionaries),
        method=word(method, METHODS, "method"),
        steps=whole(steps, "steps"),
        baseline=None if baseline is None else given_input(baseline, "baseline"),
    )


def discover_circuit(
    model: str,
    clean: InputLike,
    corrupt: InputLike,
    *,
    threshold: float | None,
    target_edges: int | None,
    value: Metric | None,
) -> pb.DiscoverCircuitRequest:
    """A search."""
    request = pb.DiscoverCircuitRequest(
        model=model,
        clean=given_input(clean, "clean"),
        corrupt=given_input(corrupt, "corrupt"),
        metric=None if value is None else metric(value),
    )
    if threshold is not None and target_edges is not None:
        raise TypeError("give threshold or target_edges, not both")
    if threshold is not None:
        request.threshold = threshold
    if target_edges is not None:
        request.target_edges = whole(target_edges, "target_edges")
    return request


def attribution_graph(
    model: str,
    input: InputLike,
    *,
    transcoders: Sequence[DictionaryLike],
    targets: TokensLike | Mapping[str, tuple[float, VectorLike]],
    desired_logit_probability: float | None,
    max_logits: int,
    max_feature_nodes: int,
    include_first_position: bool,
    title: str,
) -> pb.CreateAttributionGraphRequest:
    """A trace. `targets`: tokens, or label -> (weight, vector)."""
    return pb.CreateAttributionGraphRequest(
        model=model,
        input=given_input(input, "input"),
        transcoders=names(transcoders),
        targets=_logit_targets(targets),
        desired_logit_probability=desired_logit_probability,
        max_logits=whole(max_logits, "max_logits"),
        max_feature_nodes=whole(max_feature_nodes, "max_feature_nodes"),
        include_first_position=include_first_position,
        title=text(title, "title"),
    )


def intervene_on_features(
    model: str,
    subject: AttributionGraph | InputLike,
    settings: Sequence[FeatureSetting],
    *,
    transcoders: Sequence[DictionaryLike],
    mode: str,
    layers: Sequence[int],
    top_logits: int,
    tokens_: TokensLike,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> pb.InterveneOnFeaturesRequest:
    """Settings on a graph's prompt, or on an input."""
    request = pb.InterveneOnFeaturesRequest(
        model=model,
        transcoders=names(transcoders),
        settings=[_setting(item, f"settings[{n}]") for n, item in enumerate(settings)],
        mode=word(mode, MODES, "mode"),
        layers=wholes(layers, "layers"),
        top_logits=whole(top_logits, "top_logits"),
        tokens=tokens(token_choice(tokens_), "tokens"),
    )
    if isinstance(subject, AttributionGraph):
        request.graph = subject.name
    else:
        request.input.CopyFrom(given_input(subject, "input"))
    if max_tokens:
        request.generate.CopyFrom(
            pb.SteeredGeneration(
                max_tokens=whole(max_tokens, "generate.max_tokens"),
                temperature=temperature,
                seed=whole(seed, "generate.seed", bits=64),
            )
        )
    return request


def feature_connections(
    model: str, layer: int, feature: int, *, top: int, transcoders: Sequence[DictionaryLike]
) -> pb.FeatureConnectionsRequest:
    """The weights of one feature."""
    return pb.FeatureConnectionsRequest(
        model=model,
        transcoders=names(transcoders),
        layer=whole(layer, "layer"),
        feature=whole(feature, "feature"),
        top=whole(top, "top"),
    )


def marks(graph: AttributionGraph) -> stored_pb.UpdateAttributionGraphRequest:
    """A graph's marks, to be kept with it."""
    return stored_pb.UpdateAttributionGraphRequest(
        name=graph.name,
        title=text(graph.info.title, "title"),
        annotations=stored_pb.GraphAnnotations(
            pinned=graph.pinned,
            supernodes=[
                stored_pb.Supernode(
                    label=text(group.label, f"supernodes[{n}].label"), node_ids=group.node_ids
                )
                for n, group in enumerate(graph.supernodes)
            ],
        ),
    )


def grid(value: PatchGrid, field: str) -> pb.PatchGrid:
    """A grid."""
    chosen = (
        {"dictionary": text(value.dictionary, f"{field}.dictionary")}
        if value.dictionary
        else {"component": text(value.component, f"{field}.component")}
    )
    return pb.PatchGrid(
        layers=wholes(value.layers, f"{field}.layers"),
        by_head=value.by_head,
        heads=wholes(value.heads, f"{field}.heads"),
        units=wholes(value.units, f"{field}.units"),
        features=wholes(value.features, f"{field}.features"),
        positions=builders.selector(value.positions, f"{field}.positions"),
        all_positions_at_once=value.all_positions_at_once,
        **chosen,
    )


def node(value: PatchNode, field: str) -> pb.PatchNode:
    """A single node."""
    if not isinstance(value, PatchNode):
        raise TypeError(f"{field} must be made by patch_node(...), not {value!r}")

    def number(name: str, bits: int = 32) -> int | None:
        given = getattr(value, name)
        return None if given is None else whole(given, f"{field}.{name}", bits)

    return pb.PatchNode(
        hook_point=text(value.hook_point, f"{field}.hook_point"),
        position=number("position", 64),
        head=number("head"),
        unit=number("unit"),
    )


def names(dictionaries: DictionaryLike | Iterable[DictionaryLike]) -> list[str]:
    """Dictionaries by name; one may be given as it is."""
    single = isinstance(dictionaries, str) or hasattr(dictionaries, "resource_name")
    listed: Any = [dictionaries] if single else dictionaries
    return [dictionary_name(item) for item in listed]


def _logit_targets(
    targets: TokensLike | Mapping[str, tuple[float, VectorLike]],
) -> list[stored_pb.LogitTarget]:
    if isinstance(targets, Mapping):
        return [
            stored_pb.LogitTarget(
                vector=pack(as_float32(vector, f"targets[{label!r}]")),
                label=text(label, "targets.label"),
                weight=weight,
            )
            for label, (weight, vector) in targets.items()
        ]
    chosen = token_choice(targets)
    if chosen.top_k:
        raise TypeError("targets are tokens; for the likeliest ones use max_logits")
    found = [stored_pb.LogitTarget(text=item) for item in chosen.texts]
    return found + [stored_pb.LogitTarget(token_id=whole(item, "targets")) for item in chosen.token_ids]


def _setting(value: FeatureSetting, field: str) -> pb.FeatureSetting:
    if not isinstance(value, FeatureSetting):
        raise TypeError(f"{field} must be made by feature_setting(...), not {value!r}")
    return pb.FeatureSetting(
        layer=whole(value.layer, f"{field}.layer"),
        feature=whole(value.feature, f"{field}.feature"),
        position=whole(value.position, f"{field}.position", bits=64),
        value=value.value,
    )


def _is_floating(value: Any) -> bool:
    if hasattr(value, "is_floating_point"):  # torch
        return bool(value.is_floating_point())
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)


def _rows(value: Any, field: str) -> NDArray[np.float32]:
    return as_float32(value, field)
