"""InterveneOnFeatures and FeatureConnections: a graph's claims tested, and weights without a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace

import torch

from glasshouse.server.attribution import connections
from glasshouse.server.attribution.attribution_graph import AttributionGraph
from glasshouse.server.attribution.feature_interventions import FeatureSetting, Mode
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.transcoders import Transcoders
from glasshouse.server.dictionaries.store import HeldDictionary
from glasshouse.server.operations.attribution import feature_effects
from glasshouse.server.operations.attribution.feature_effects import Effects, EffectsRequest
from glasshouse.server.operations.attribution.lanes import Ticket
from glasshouse.server.operations.attribution.transcoder_sets import transcoders
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.generation import GenerationRequest, NewToken, Sampling
from glasshouse.server.types.interventions import Intervention, SetFeatures
from glasshouse.server.types.selectors import NamedPositions, Selector
from glasshouse.v1 import attribution_pb2 as pb
from glasshouse.wire import reasons

from .. import fields, parameters
from ..call import Call
from ..catalogue import ServedModel
from .answers import announced, array, fed, naming, pieces
from .graphs import Graphs
from .metrics import MetricReader
from .office import Office

MOST_SETTINGS = 10_000
MOST_LOGITS = 100
MOST_CONNECTIONS = 1000

_MODES: dict[int, Mode] = {
    pb.FEATURE_INTERVENTION_MODE_UNSPECIFIED: "constrained",
    pb.FEATURE_INTERVENTION_MODE_CONSTRAINED: "constrained",
    pb.FEATURE_INTERVENTION_MODE_FROZEN_ATTENTION: "frozen_attention",
    pb.FEATURE_INTERVENTION_MODE_OPEN: "open",
}


class FeatureEffects:
    """Those two methods."""

    def __init__(self, office: Office, graphs: Graphs) -> None:
        self._office, self._graphs = office, graphs

    async def intervene(
        self, request: pb.InterveneOnFeaturesRequest, call: Call
    ) -> AsyncIterator[pb.InterveneOnFeaturesResponse]:
        """Sets features and measures."""
        office = self._office
        model, tokens, chosen, graph = await self._subject(request)
        if request.mode not in _MODES:
            raise fields.out_of_range("mode", request.mode, "one of FeatureInterventionMode")
        mode = _MODES[request.mode]
        settings = _settings(request, len(tokens))
        n_layers = model.engine.info.n_layers
        if request.layers and mode != "constrained":
            raise InvalidArgument(
                f"layers are those that are held, and {mode} holds no MLP",
                reason=reasons.FIELD_CONFLICT,
                field="layers",
                remedy="leave layers out, or use the constrained mode",
            )
        for index, layer in enumerate(request.layers):
            fields.whole(layer, f"layers[{index}]", 0, n_layers - 1)
        n_top = request.top_logits if request.HasField("top_logits") else 10
        fields.whole(n_top, "top_logits", 0, MOST_LOGITS)
        chooser = MetricReader(model, office.reader(model), tokens)
        named = chooser.tokens(request.tokens, "tokens", required=False)
        generate = self._generation(request, model, tokens)
        call.accepted(len(tokens), ())
        await office.affordable(model, n_rows=5, n_tokens=len(tokens), gradients=False)
        asked = EffectsRequest(
            tokens=tokens,
            dictionaries=[item.dictionary for item in chosen],
            settings=settings,
            mode=mode,
            layers=tuple(request.layers) or None,
            graph=graph,
        )

        def work(twin: GradientModel, ticket: Ticket) -> tuple[Effects, tuple[int, ...], Transcoders]:
            found = Transcoders(twin, asked.dictionaries)
            _check_features(found, settings)
            wanted = chooser.resolved(twin, named, len(tokens) - 1)
            return feature_effects.measure(twin, asked), wanted, found

        effects, wanted, found = await office.run(model, work)
        result = _result(model, tokens, effects, wanted, n_top, mode)
        if generate is not None:
            edits = _edits(settings, found, chosen, len(tokens) - 1)
            result.text_before, result.text_after = await asyncio.gather(
                _text(model, generate, ()), _text(model, generate, edits)
            )
        arrays = {
            "layers": array(effects.features.layers.int()),
            "features": array(effects.features.indices.int()),
            "positions": array(effects.features.positions.int()),
            "before": array(effects.before),
            "after": array(effects.after),
            "predicted": array(effects.predicted),
            "activations_before": array(effects.activations_before),
            "activations_after": array(effects.activations_after),
        }
        result.tensors.extend(announced(arrays))
        yield pb.InterveneOnFeaturesResponse(result=result)
        for piece in pieces(arrays):
            yield pb.InterveneOnFeaturesResponse(tensor=piece)

    async def connections(
        self, request: pb.FeatureConnectionsRequest, call: Call
    ) -> pb.FeatureConnectionsResponse:
        """The weights of one feature."""
        office = self._office
        model = office.catalogue.find(request.model, "model")
        chosen = transcoders(model.engine.dictionaries, request.transcoders, field="transcoders")
        await office.check_transcoders(model, chosen, "transcoders")
        top = fields.whole(request.top or 10, "top", 1, MOST_CONNECTIONS)
        fields.whole(request.layer, "layer", 0, model.engine.info.n_layers - 1)

        def work(
            twin: GradientModel, ticket: Ticket
        ) -> tuple[list[connections.Connection], list[connections.Connection]]:
            found = Transcoders(twin, [item.dictionary for item in chosen])
            into = connections.incoming(found, request.layer, request.feature, top=top)
            ticket.check()
            return into, connections.outgoing(found, request.layer, request.feature, top=top)

        into, out = await office.run(model, work)
        return pb.FeatureConnectionsResponse(
            incoming=_connections(into),
            outgoing=_connections(out),
            held_fixed=pb.HeldFixed(
                norm_scales=True,
                statement="No prompt is run: weights go through the residual stream at one position, every norm's scale "
                "taken as one; attention, and MLPs between the two, are left out.",
            ),
        )

    async def _subject(
        self, request: pb.InterveneOnFeaturesRequest
    ) -> tuple[ServedModel, tuple[int, ...], list[HeldDictionary], AttributionGraph | None]:
        """The model, the prompt's tokens, the transcoders, and the graph where one is named."""
        office = self._office
        if not request.graph:
            model = office.catalogue.find(request.model, "model")
            reader = office.reader(model)
            tokens = await reader.prompt(request.input, request.HasField("input"), "input")
            store = model.engine.dictionaries
            chosen = transcoders(store, request.transcoders, field="transcoders")
            await office.check_transcoders(model, chosen, "transcoders")
            return model, tokens, chosen, None
        for field, given in (
            ("input", request.HasField("input")),
            ("transcoders", bool(request.transcoders)),
        ):
            if given:
                raise InvalidArgument(
                    f"{field} is set, and the graph has its own",
                    reason=reasons.FIELD_CONFLICT,
                    field=field,
                    remedy=f"leave {field} out, or the graph",
                )
        with naming("graph"):
            stored, graph = await asyncio.to_thread(self._graphs.stored, request.graph)
        model = office.catalogue.find(request.model or stored.facts["model"], "model")
        if model.resource_name != stored.facts["model"]:
            raise InvalidArgument(
                f"the graph is one of {stored.facts['model']}, not of {model.resource_name}",
                reason=reasons.FIELD_CONFLICT,
                field="model",
                value=request.model,
                remedy="leave model out",
            )
        store = model.engine.dictionaries
        return (
            model,
            tuple(stored.facts["token_ids"]),
            transcoders(store, stored.facts["transcoders"], field="graph"),
            graph,
        )

    def _generation(
        self, request: pb.InterveneOnFeaturesRequest, model: ServedModel, tokens: tuple[int, ...]
    ) -> GenerationRequest | None:
        if not request.HasField("generate"):
            return None
        asked = request.generate
        if asked.max_tokens < 1:
            raise fields.out_of_range("generate.max_tokens", asked.max_tokens, "at least 1")
        limit = self._office.limits.max_tokens
        fields.count(asked.max_tokens, "generate.max_tokens", limit, "max_tokens", "tokens to generate")
        with naming("generate.max_tokens"):
            self._office.reader(model).check_fits(len(tokens), asked.max_tokens, "")
        temperature = fields.finite(asked.temperature, "generate.temperature")
        if not 0 <= temperature <= parameters.MAX_TEMPERATURE:
            bounds = f"from 0 to {parameters.MAX_TEMPERATURE:g}"
            raise fields.out_of_range("generate.temperature", temperature, bounds)
        sampling = Sampling(temperature=temperature, top_p=1.0, top_k=0, seed=asked.seed)
        return GenerationRequest(prompt=tokens, max_tokens=asked.max_tokens, sampling=sampling)


def _settings(request: pb.InterveneOnFeaturesRequest, n_tokens: int) -> list[FeatureSetting]:
    if not request.settings:
        raise fields.required("settings", "which features are set", "give layer, feature, position and value")
    if len(request.settings) > MOST_SETTINGS:
        raise fields.out_of_range(
            "settings", f"a list of {len(request.settings)}", f"at most {MOST_SETTINGS}"
        )
    seen: set[tuple[int, int, int]] = set()
    found = []
    for index, setting in enumerate(request.settings):
        field = f"settings[{index}]"
        fields.whole(setting.position, f"{field}.position", 0, n_tokens - 1)
        fields.finite(setting.value, f"{field}.value")
        key = (setting.layer, setting.feature, setting.position)
        if key in seen:
            raise InvalidArgument(
                f"{field} sets feature {setting.feature} of layer {setting.layer} at {setting.position} again",
                reason=reasons.FIELD_CONFLICT,
                field=field,
                remedy="set each feature once a position",
            )
        seen.add(key)
        found.append(
            FeatureSetting(
                layer=setting.layer, index=setting.feature, position=setting.position, value=setting.value
            )
        )
    return found


def _check_features(found: Transcoders, settings: Sequence[FeatureSetting]) -> None:
    for index, setting in enumerate(settings):
        if found.find(setting.layer, setting.index) is None:
            layers = ", ".join(map(str, sorted(found.reads)))
            size = found.n_features(setting.layer)
            raise InvalidArgument(
                f"there is no feature {setting.index} of layer {setting.layer}",
                reason=reasons.FEATURE_OUT_OF_RANGE,
                field=f"settings[{index}]",
                value=f"{setting.layer}/{setting.index}",
                remedy=f"use a feature from 0 to {size - 1}" if size else f"use a layer of {layers}",
            )


def _edits(
    settings: Sequence[FeatureSetting], found: Transcoders, chosen: Sequence[HeldDictionary], last: int
) -> tuple[Intervention, ...]:
    """The settings as the engine's own edits; those of the last position again at every new token."""
    grouped: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for setting in settings:
        place = found.find(setting.layer, setting.index)
        assert place is not None, "the measurement has refused unknown features"
        dictionary, flat = place
        grouped.setdefault((dictionary, setting.position), []).append((flat, setting.value))
    edits = []
    for (dictionary, position), pairs in grouped.items():
        edit = SetFeatures(
            dictionary=chosen[dictionary].name,
            features=tuple(feature for feature, _ in pairs),
            values=tuple(value for _, value in pairs),
        )
        edits.append(Intervention(hook_point="", edit=edit, positions=Selector(at=(position,))))
        if position == last:
            again = Selector(named=NamedPositions.GENERATED)
            edits.append(Intervention(hook_point="", edit=edit, positions=again))
    return tuple(edits)


async def _text(model: ServedModel, request: GenerationRequest, edits: tuple[Intervention, ...]) -> str:
    parts: list[str] = []
    async with aclosing(model.engine.generate(replace(request, interventions=edits))) as batches:
        async for batch in batches:
            parts.extend(event.text for event in batch if isinstance(event, NewToken))
    return "".join(parts)


def _result(
    model: ServedModel,
    tokens: Sequence[int],
    effects: Effects,
    wanted: Sequence[int],
    n_top: int,
    mode: Mode,
) -> pb.FeatureInterventionResult:
    cap = model.engine.info.final_logit_softcap
    logits = [effects.logits_before.double().cpu(), effects.logits_after.double().cpu()]
    capped = [raw if cap is None else cap * torch.tanh(raw / cap) for raw in logits]
    before, after = (torch.softmax(raw, dim=-1) for raw in capped)
    change = logits[1] - logits[0]
    moved = (change - change.mean()).numpy()
    predicted = effects.predicted_logits.double().cpu().numpy()
    top = torch.maximum(before, after).topk(min(n_top, len(before))).indices.tolist() if n_top else []
    ids = list(dict.fromkeys((*top, *wanted)))
    changes = [
        pb.LogitChange(
            token_id=token,
            token=model.strings.of([token])[0],
            logit_before=float(logits[0][token]),
            logit_after=float(logits[1][token]),
            probability_before=float(before[token]),
            probability_after=float(after[token]),
            measured=float(moved[token]),
            predicted=float(predicted[token]),
        )
        for token in ids
    ]
    measured = (effects.after - effects.before).double().cpu().numpy()
    return pb.FeatureInterventionResult(
        input=fed(model, tokens),
        logits=changes,
        feature_correlation=feature_effects.correlation(effects.predicted.double().cpu().numpy(), measured),
        logit_correlation=feature_effects.correlation(predicted[ids], moved[ids]),
        held_fixed=_held(mode),
    )


def _held(mode: Mode) -> pb.HeldFixed:
    statements = {
        "constrained": "Attention patterns, norm scales and what the MLPs of the held layers write are the prompt's "
        "own: what moves are direct effects.",
        "frozen_attention": "Attention patterns are the prompt's own; norms and MLPs respond.",
        "open": "Nothing was held fixed.",
    }
    return pb.HeldFixed(
        attention_patterns=mode != "open",
        norm_scales=mode == "constrained",
        mlp_outputs=mode == "constrained",
        statement=statements[mode],
    )


def _connections(found: Sequence[connections.Connection]) -> list[pb.FeatureConnection]:
    return [pb.FeatureConnection(layer=c.layer, feature=c.index, weight=c.weight) for c in found]
