"""AttributeTokens, DirectAttribution, AttributeFeatures: what a number rests on, on one input."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import torch
from torch import Tensor

from glasshouse.server.attribution import direct, feature_attribution
from glasshouse.server.attribution.baselines import EMBED, average_input
from glasshouse.server.attribution.freezing import NOTHING_FROZEN, Freeze
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.tokens import Method, TokenAttribution, attribute_tokens
from glasshouse.server.dictionaries.store import HeldDictionary
from glasshouse.server.operations.attribution.lanes import Ticket
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.v1 import attribution_pb2 as pb
from glasshouse.wire import reasons

from .. import fields
from ..call import Call
from ..catalogue import ServedModel
from ..tensors import floats
from .answers import Arrays, announced, array, fed, freeze, held, naming, pieces, token_tensor
from .metrics import MetricReader
from .office import Done, Office, same_length

MOST_STEPS = 4096
MOST_DICTIONARIES = 64
MOST_FEATURES = 10_000

_METHODS: dict[int, Method] = {
    pb.GRADIENT_METHOD_UNSPECIFIED: "integrated_gradients",
    pb.GRADIENT_METHOD_INTEGRATED_GRADIENTS: "integrated_gradients",
    pb.GRADIENT_METHOD_GRADIENT_X_INPUT: "gradient_x_input",
}

_STARTS = {
    "mean_embedding": "that of an input of average tokens",
    "zeros": "zeros",
    "baseline_input": "that of the other input",
    "baseline_activations": "the activations given",
}


class InputAttribution:
    """Those three methods."""

    def __init__(self, office: Office) -> None:
        self._office = office

    async def attribute_tokens(
        self, request: pb.AttributeTokensRequest, call: Call
    ) -> AsyncIterator[pb.AttributeTokensResponse]:
        """Gradient x input or integrated gradients."""
        office = self._office
        model = office.catalogue.find(request.model, "model")
        reader = office.reader(model)
        tokens = await reader.prompt(request.input, request.HasField("input"), "input")
        method = gradient_method(request.method)
        steps = fields.whole(request.steps or 64, "steps", 1, MOST_STEPS)
        make = await MetricReader(model, reader, tokens, at_clean=method == "gradient_x_input").read(
            request.metric, request.HasField("metric")
        )
        other = None
        if request.HasField("baseline_input"):
            other = await reader.prompt(request.baseline_input, True, "baseline_input")
            same_length(tokens, other, "baseline_input")
        given = None
        if request.HasField("baseline_activations"):
            given = torch.from_numpy(floats(request.baseline_activations, True, "baseline_activations"))
        baseline = _baseline_of(request, method)
        frozen = freeze(request.freeze)
        call.accepted(len(tokens), ())
        n_gradients = steps if method == "integrated_gradients" else 1
        await office.affordable(model, n_rows=n_gradients + 3, n_tokens=len(tokens), gradients=True)

        def work(twin: GradientModel, ticket: Ticket) -> tuple[TokenAttribution, str]:
            name = request.hook_point or EMBED
            point = twin.table.resolve(name, field="hook_point")
            if not point.width or not point.writable:
                raise FailedPrecondition(
                    f"{point.name} holds attention maps or logits, which are no input of positions",
                    reason=reasons.HOOK_POINT_NOT_WRITABLE,
                    field="hook_point",
                    value=name,
                    remedy="use hook_embed or a point of vectors",
                )
            found = attribute_tokens(
                twin,
                token_tensor(tokens),
                make(twin),
                hook_point=point.name,
                method=method,
                steps=steps,
                baseline=_baseline(twin, baseline, point, tokens, other, given),
                freeze=frozen,
                batch_size=office.costs.batch_size(twin, 0, len(tokens), default=16),
                progress=ticket,
            )
            return found, point.name

        async for event in office.progressing(model, work):
            if not isinstance(event, Done):
                yield pb.AttributeTokensResponse(progress=event)
                continue
            found, name = event.result
            arrays = {"attributions": array(found.attributions)} if request.by_element else {}
            result = pb.TokenAttribution(
                input=fed(model, tokens),
                scores=found.scores.tolist(),
                value=found.value,
                baseline_value=found.baseline_value,
                residual=found.residual,
                hook_point=name,
                held_fixed=held(frozen, _statement(method, name, baseline)),
                tensors=announced(arrays),
            )
            yield pb.AttributeTokensResponse(attribution=result)
            for piece in pieces(arrays):
                yield pb.AttributeTokensResponse(tensor=piece)

    async def direct_attribution(
        self, request: pb.DirectAttributionRequest, call: Call
    ) -> AsyncIterator[pb.DirectAttributionResponse]:
        """Direct logit attribution."""
        office = self._office
        model = office.catalogue.find(request.model, "model")
        reader = office.reader(model)
        tokens = await reader.prompt(request.input, request.HasField("input"), "input")
        chooser = MetricReader(model, reader, tokens)
        position = chooser.position(request.position if request.HasField("position") else None, "")
        targets = chooser.tokens(request.targets, "targets")
        foils = chooser.tokens(request.foils, "foils", required=False)
        dictionaries = _dictionaries(model, request.dictionaries, required=False)
        most = fields.whole(request.top_features or 100, "top_features", 1, MOST_FEATURES)
        call.accepted(len(tokens), ())
        await office.affordable(model, n_rows=4, n_tokens=len(tokens), gradients=True)

        def work(twin: GradientModel, ticket: Ticket) -> tuple[pb.DirectAttributionResult, Arrays]:
            chosen, others = chooser.difference(twin, targets, foils, position)
            weights = {token: 1.0 / len(chosen) for token in chosen}
            weights |= {token: -1.0 / len(others) for token in others}
            prompt = token_tensor(tokens)
            found = direct.attribute_directly(twin, prompt, weights, position=position)
            result = pb.DirectAttributionResult(
                input=fed(model, tokens),
                position=position,
                targets=fed(model, chosen),
                foils=fed(model, others),
                logit=found.logit,
                constant=found.constant,
                remainder=found.remainder,
                contributions=[
                    pb.Contribution(hook_point=name, part=part) for name, part in found.contributions.items()
                ],
                held_fixed=held(
                    Freeze(norms=True),
                    "Only the direct path to the logit counts: nothing that a later layer makes of a contribution.",
                ),
            )
            for index, item in enumerate(dictionaries):
                ticket.check()
                with naming(f"dictionaries[{index}]"):
                    parts = direct.attribute_features_directly(
                        twin, prompt, found, item.dictionary, position=position
                    )
                result.features.append(_feature_parts(item, parts, most))
            arrays = {
                name: array(getattr(found, name)) for name in ("heads", "head_bias", "neurons", "neuron_bias")
            }
            result.tensors.extend(announced(arrays))
            return result, arrays

        result, arrays = await office.run(model, work)
        yield pb.DirectAttributionResponse(attribution=result)
        for piece in pieces(arrays):
            yield pb.DirectAttributionResponse(tensor=piece)

    async def attribute_features(
        self, request: pb.AttributeFeaturesRequest, call: Call
    ) -> AsyncIterator[pb.AttributeFeaturesResponse]:
        """Attribution to dictionary features."""
        office = self._office
        model = office.catalogue.find(request.model, "model")
        reader = office.reader(model)
        tokens = await reader.prompt(request.input, request.HasField("input"), "input")
        method = gradient_method(request.method)
        steps = fields.whole(request.steps or 10, "steps", 1, MOST_STEPS)
        steps = steps if method == "integrated_gradients" else 0
        make = await MetricReader(model, reader, tokens, at_clean=steps == 0).read(
            request.metric, request.HasField("metric")
        )
        baseline = None
        if request.HasField("baseline"):
            baseline = await reader.prompt(request.baseline, True, "baseline")
            same_length(tokens, baseline, "baseline")
        dictionaries = _dictionaries(model, request.dictionaries, required=True)
        call.accepted(len(tokens), ())
        await office.affordable(
            model,
            n_rows=max(steps, 1) * len(dictionaries),
            n_tokens=len(tokens),
            gradients=True,
            at_once=max(steps, 1),
        )

        def work(twin: GradientModel, ticket: Ticket) -> tuple[pb.FeatureAttributionResult, Arrays]:
            metric = make(twin)
            result = pb.FeatureAttributionResult(
                input=fed(model, tokens),
                held_fixed=held(
                    NOTHING_FROZEN,
                    "Features and error of one place move together; those of other places follow.",
                ),
            )
            arrays: dict[str, Arrays] = {}
            for index, item in enumerate(dictionaries):
                with naming(f"dictionaries[{index}]"):
                    found = feature_attribution.attribute_features(
                        twin,
                        token_tensor(tokens),
                        item.dictionary,
                        metric,
                        steps=steps,
                        baseline_T=None if baseline is None else token_tensor(baseline),
                    )
                ticket(index + 1, len(dictionaries))
                result.dictionaries.append(
                    pb.DictionaryAttribution(
                        dictionary=item.name,
                        hook_point=item.points_out[0].name,
                        value=found.value,
                        baseline_value=found.baseline_value,
                        residual=found.residual,
                    )
                )
                arrays[str(index)] = {
                    f"{index}.indptr": array(found.features.indptr.long()),
                    f"{index}.features": array(found.features.ids.int()),
                    f"{index}.attributions": array(found.features.values),
                    f"{index}.errors": array(found.errors),
                }
            together = {name: value for some in arrays.values() for name, value in some.items()}
            result.tensors.extend(announced(together))
            return result, together

        async for event in office.progressing(model, work):
            if not isinstance(event, Done):
                yield pb.AttributeFeaturesResponse(progress=event)
                continue
            result, arrays = event.result
            yield pb.AttributeFeaturesResponse(result=result)
            for piece in pieces(arrays):
                yield pb.AttributeFeaturesResponse(tensor=piece)


def gradient_method(number: int) -> Method:
    """How gradients are taken."""
    if number not in _METHODS:
        raise fields.out_of_range("method", number, "one of GradientMethod")
    return _METHODS[number]


def _statement(method: Method, hook_point: str, baseline: str) -> str:
    start = _STARTS[baseline]
    if method == "gradient_x_input":
        at_input = f"The gradient is that at the input itself, with respect to {hook_point} alone"
        return f"{at_input}, times what there is other than {start}."
    return f"Gradients are averaged as {hook_point} alone moves from {start} at every position."


def _baseline_of(request: pb.AttributeTokensRequest, method: Method) -> str:
    """The field of `baseline` that counts."""
    chosen = request.WhichOneof("baseline")
    if chosen is None or getattr(request, chosen) is False:
        return "zeros" if method == "gradient_x_input" else "mean_embedding"
    return str(chosen)


def _baseline(
    twin: GradientModel,
    chosen: str,
    hook_point: HookPoint,
    tokens: Sequence[int],
    other: Sequence[int] | None,
    given: Tensor | None,
) -> Tensor:
    """(T, D) or (D,)."""
    if given is not None:
        shapes = ((hook_point.width,), (len(tokens), hook_point.width))
        if tuple(given.shape) not in shapes:
            raise InvalidArgument(
                f"the baseline has shape {tuple(given.shape)}, {hook_point.name} takes {shapes[0]} or {shapes[1]}",
                reason=reasons.WRONG_WIDTH,
                field="baseline_activations",
                value=tuple(given.shape),
                remedy="give one vector, or one a position",
            )
        return given
    if other is not None:
        with torch.no_grad():
            return twin.forward(twin.tokens(other), read=[hook_point.name]).readings[hook_point.name][0]
    if chosen == "mean_embedding":
        return average_input(twin, twin.tokens(tokens), hook_point.name)
    return torch.zeros(hook_point.width)


def _dictionaries(model: ServedModel, names: Sequence[str], *, required: bool) -> list[HeldDictionary]:
    if required and not names:
        raise fields.required(
            "dictionaries", "whose features", "name at least one; ListDictionaries lists them"
        )
    if len(names) > MOST_DICTIONARIES:
        raise fields.out_of_range("dictionaries", f"a list of {len(names)}", f"at most {MOST_DICTIONARIES}")
    store = model.engine.dictionaries
    found = []
    for index, name in enumerate(names):
        field = f"dictionaries[{index}]"
        if not name:
            raise fields.required(field, "a dictionary", "name one; ListDictionaries lists them")
        found.append(store.get(name, field=field).attached(field))
    return found


def _feature_parts(item: HeldDictionary, parts: direct.FeatureParts, most: int) -> pb.FeatureContributions:
    return pb.FeatureContributions(
        dictionary=item.name,
        hook_point=item.points_out[0].name,
        features=parts.ids[:most].tolist(),
        parts=parts.parts[:most].tolist(),
        rest=float(parts.parts[most:].sum()),
        bias=parts.bias,
        error=parts.error,
        total=parts.total,
    )
