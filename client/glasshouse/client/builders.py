"""Python values -> request messages. Pure functions; what they refuse, they refuse before anything is sent.

Only what the wire cannot carry is refused here (numbers beyond their bits, text that is not Unicode, unknown
words). Whether a value makes sense is the server's to say: it alone knows the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from glasshouse.client.conditions import Condition
from glasshouse.client.inputs import ChatMessage, Input
from glasshouse.client.interventions import (
    AblateDirection,
    AddVector,
    CapProjection,
    Intervention,
    Replace,
    Rotate,
    ScaleFeatures,
    SetFeatures,
    Vector,
)
from glasshouse.client.positions import Positions, PositionsLike, as_positions
from glasshouse.client.readouts import ReadActivations, ReadFeatures, ReadLogitLens, Readout, ReadProbe
from glasshouse.client.scalars import text, whole, wholes, word
from glasshouse.v1 import (
    activations_pb2,
    conditions_pb2,
    generation_pb2,
    inputs_pb2,
    interventions_pb2,
    models_pb2,
    readouts_pb2,
)
from glasshouse.v1.tensors_pb2 import DType
from glasshouse.wire.tensors import pack

_NAMED: Final = {
    "all": inputs_pb2.NAMED_POSITIONS_ALL,
    "prompt": inputs_pb2.NAMED_POSITIONS_PROMPT,
    "generated": inputs_pb2.NAMED_POSITIONS_GENERATED,
    "last": inputs_pb2.NAMED_POSITIONS_LAST,
}
_SCALES: Final = {
    "plain": interventions_pb2.ADD_SCALE_PLAIN,
    "norm": interventions_pb2.ADD_SCALE_NORM,
}
_OUTPUTS: Final = {
    "score": conditions_pb2.PROBE_OUTPUT_SCORE,
    "margin": conditions_pb2.PROBE_OUTPUT_MARGIN,
}
_SCOPES: Final = {
    "position": conditions_pb2.CONDITION_SCOPE_POSITION,
    "prompt": conditions_pb2.CONDITION_SCOPE_PROMPT,
    "latched": conditions_pb2.CONDITION_SCOPE_LATCHED,
}
_AGGREGATES: Final = {
    "max": conditions_pb2.PROMPT_AGGREGATION_MAX,
    "mean": conditions_pb2.PROMPT_AGGREGATION_MEAN,
    "last": conditions_pb2.PROMPT_AGGREGATION_LAST,
}
_DTYPES: Final = {
    "float32": DType.DTYPE_F32,
    "bfloat16": DType.DTYPE_BF16,
    "float16": DType.DTYPE_F16,
}


def get_model(name: str | None) -> models_pb2.GetModelRequest:
    """`name`: short or resource name; None for the only model served."""
    return models_pb2.GetModelRequest(name=text(name or "", "name"))


def tokenize(model: str, value: Input, add_special_tokens: bool) -> models_pb2.TokenizeRequest:
    """Text, token ids or a conversation to tokens."""
    return models_pb2.TokenizeRequest(model=model, input=model_input(value, "input", add_special_tokens))


def detokenize(model: str, ids: Iterable[int]) -> models_pb2.DetokenizeRequest:
    """Token ids to text."""
    return models_pb2.DetokenizeRequest(model=model, token_ids=wholes(ids, "token_ids"))


def render_chat(
    model: str, messages: Sequence[ChatMessage], add_generation_prompt: bool
) -> models_pb2.RenderChatRequest:
    """A conversation to text."""
    return models_pb2.RenderChatRequest(
        model=model,
        messages=_messages(messages, "messages"),
        add_generation_prompt=add_generation_prompt,
    )


def generate(
    model: str,
    prompt: Input,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    logprobs: int = 0,
    interventions: Sequence[Intervention] = (),
    readouts: Sequence[Readout] = (),
    abort_when: Condition | Sequence[Condition] = (),
    labels: Mapping[str, str] | None = None,
    allow_text_in_events: bool = False,
) -> generation_pb2.GenerateRequest:
    """One generation. A single stop string may be given as it is."""
    stops = [stop] if isinstance(stop, str) else stop
    sampling = generation_pb2.SamplingParameters(
        temperature=temperature,
        top_p=top_p,
        top_k=whole(top_k, "sampling.top_k"),
        seed=None if seed is None else whole(seed, "sampling.seed", bits=64),
    )
    return generation_pb2.GenerateRequest(
        model=model,
        input=model_input(prompt, "input"),
        max_tokens=whole(max_tokens, "max_tokens"),
        sampling=sampling,
        stop=[text(each, f"stop[{n}]") for n, each in enumerate(stops)],
        stop_token_ids=wholes(stop_token_ids, "stop_token_ids"),
        ignore_eos=ignore_eos,
        top_logprobs=whole(logprobs, "top_logprobs"),
        interventions=edits(interventions),
        readouts=_readouts(readouts),
        abort_when=abort_conditions(abort_when),
        labels=request_labels(labels or {}),
        allow_text_in_events=allow_text_in_events,
    )


def score(
    model: str, value: Input, *, interventions: Sequence[Intervention] = (), top_k: int = 0
) -> generation_pb2.ScoreRequest:
    """Teacher-forced log-probabilities of one sequence."""
    return generation_pb2.ScoreRequest(
        model=model,
        input=model_input(value, "input"),
        interventions=edits(interventions),
        top_k=whole(top_k, "top_k"),
    )


def extract_activations(
    model: str,
    inputs: Sequence[Input],
    *,
    hook_points: str | Sequence[str],
    positions: PositionsLike | None = None,
    interventions: Sequence[Intervention] = (),
    dtype: str = "float32",
) -> activations_pb2.ExtractActivationsRequest:
    """Many hook points over many inputs. A single hook point may be given as it is."""
    names = [hook_points] if isinstance(hook_points, str) else hook_points
    return activations_pb2.ExtractActivationsRequest(
        model=model,
        inputs=model_inputs(inputs),
        hook_points=[text(name, f"hook_points[{n}]") for n, name in enumerate(names)],
        positions=selector(as_positions(positions), "positions"),
        dtype=word(dtype, _DTYPES, "dtype"),
        interventions=edits(interventions),
    )


def request_labels(values: Mapping[str, str]) -> dict[str, str]:
    """A request's labels."""
    return {text(name, "labels"): text(value, f"labels.{name}") for name, value in values.items()}


def model_input(value: Input, field: str, add_special_tokens: bool = True) -> inputs_pb2.Input:
    """One input; `field` is its path in the request."""
    if isinstance(value, str):
        return inputs_pb2.Input(text=text(value, f"{field}.text"), add_special_tokens=add_special_tokens)
    if value and isinstance(value[0], ChatMessage):
        return inputs_pb2.Input(messages=_messages(value, f"{field}.messages"))
    try:
        return inputs_pb2.Input(token_ids=value)  # type: ignore[arg-type]
    except ValueError:  # Slow, but it names the one that is wrong.
        return inputs_pb2.Input(token_ids=wholes(value, f"{field}.token_ids"))


def model_inputs(values: Sequence[Input]) -> list[inputs_pb2.Input]:
    """Inputs, the request's field `inputs`."""
    return [model_input(value, f"inputs[{n}]") for n, value in enumerate(values)]


def edits(values: Sequence[Intervention]) -> list[interventions_pb2.Intervention]:
    """Interventions, the request's field of that name."""
    return [intervention(value, f"interventions[{n}]") for n, value in enumerate(values)]


def selector(positions: Positions | None, field: str) -> inputs_pb2.PositionSelector | None:
    """A selector; None stays absent, which means all."""
    if positions is None:
        return None
    message = inputs_pb2.PositionSelector(
        exclude_bos=positions.exclude_bos, exclude_special=positions.exclude_special
    )
    if positions.named is not None:
        message.named = _NAMED[positions.named]
    elif positions.listed is not None:
        listed = wholes(positions.listed, f"{field}.at.positions", bits=64)
        message.at.CopyFrom(inputs_pb2.PositionList(positions=listed))
    else:
        stop = positions.stop
        message.span.CopyFrom(
            inputs_pb2.PositionSpan(
                start=whole(positions.start or 0, f"{field}.span.start", 64),
                stop=None if stop is None else whole(stop, f"{field}.span.stop", 64),
            )
        )
    return message


def intervention(value: Intervention, field: str) -> interventions_pb2.Intervention:
    """One edit, by the table of its class."""
    edit = _EDITS.get(type(value))
    if edit is None:
        raise TypeError(f"{field} must be an intervention such as add_vector(...), not {value!r}")
    return interventions_pb2.Intervention(
        hook_point=text(value.hook_point, f"{field}.hook_point"),
        positions=selector(value.positions, f"{field}.positions"),
        preserve_norm=value.preserve_norm,
        condition=None if value.condition is None else condition(value.condition, f"{field}.condition"),
        **edit(value, field),
    )


def abort_conditions(value: Condition | Sequence[Condition]) -> list[conditions_pb2.Condition]:
    """Conditions, the request's field `abort_when`. A single one may be given as it is."""
    listed = [value] if isinstance(value, Condition) else value
    return [condition(each, f"abort_when[{n}]") for n, each in enumerate(listed)]


def condition(value: Condition, field: str) -> conditions_pb2.Condition:
    """One condition."""
    if not isinstance(value, Condition):
        raise TypeError(f"{field} must be a condition such as when(probe, above=0.9), not {value!r}")
    message = conditions_pb2.Condition(
        scope=word(value.over, _SCOPES, f"{field}.scope"),
        positions=selector(value.positions, f"{field}.positions"),
    )
    if value.above is not None:
        message.above = value.above
    elif value.below is not None:
        message.below = value.below
    if value.aggregate is not None:
        message.prompt_aggregation = word(value.aggregate, _AGGREGATES, f"{field}.prompt_aggregation")
    if value.dictionary:
        message.feature.dictionary = text(value.dictionary, f"{field}.feature.dictionary")
        message.feature.feature = whole(value.feature, f"{field}.feature.feature")
    else:
        message.probe.probe = text(value.probe, f"{field}.probe.probe")
        message.probe.label = text(value.label, f"{field}.probe.label")
        message.probe.output = word(value.output, _OUTPUTS, f"{field}.probe.output")
    return message


def _direction(
    value: Vector | str, field: str, part: str = "vector", name: str = "direction"
) -> dict[str, Any]:
    """An array under `part`, or a direction's name under `name`."""
    return {name: text(value, f"{field}.{name}")} if isinstance(value, str) else {part: pack(value)}


def _add_vector(value: AddVector, field: str) -> dict[str, Any]:
    scale = word(value.scale, _SCALES, f"{field}.add_vector.scale")
    return {
        "add_vector": interventions_pb2.AddVector(
            **_direction(value.vector, f"{field}.add_vector"), coefficient=value.coefficient, scale=scale
        )
    }


def _ablate_direction(value: AblateDirection, field: str) -> dict[str, Any]:
    return {
        "ablate_direction": interventions_pb2.AblateDirection(
            **_direction(value.vector, f"{field}.ablate_direction")
        )
    }


def _cap_projection(value: CapProjection, field: str) -> dict[str, Any]:
    return {
        "cap_projection": interventions_pb2.CapProjection(
            **_direction(value.vector, f"{field}.cap_projection"), max=value.max, min=value.min
        )
    }


def _rotate(value: Rotate, field: str) -> dict[str, Any]:
    return {
        "rotate": interventions_pb2.RotateActivation(
            **_direction(value.first, f"{field}.rotate", "first", "first_direction"),
            **_direction(value.second, f"{field}.rotate", "second", "second_direction"),
            angle_radians=value.angle_radians,
        )
    }


def _replace(value: Replace, field: str) -> dict[str, Any]:
    return {"replace": interventions_pb2.ReplaceActivations(activations=pack(value.activations))}


def _set_features(value: SetFeatures, field: str) -> dict[str, Any]:
    return {
        "set_features": interventions_pb2.SetFeatures(
            dictionary=text(value.dictionary, f"{field}.set_features.dictionary"),
            features=wholes(value.features, f"{field}.set_features.features"),
            values=value.values,
        )
    }


def _scale_features(value: ScaleFeatures, field: str) -> dict[str, Any]:
    return {
        "scale_features": interventions_pb2.ScaleFeatures(
            dictionary=text(value.dictionary, f"{field}.scale_features.dictionary"),
            features=wholes(value.features, f"{field}.scale_features.features"),
            factors=value.factors,
        )
    }


_EDITS: Final[dict[type[Intervention], Callable[[Any, str], dict[str, Any]]]] = {
    AddVector: _add_vector,
    AblateDirection: _ablate_direction,
    CapProjection: _cap_projection,
    Rotate: _rotate,
    Replace: _replace,
    SetFeatures: _set_features,
    ScaleFeatures: _scale_features,
}


def _readouts(values: Sequence[Readout]) -> list[readouts_pb2.Readout]:
    messages = [readout(value, f"readouts[{n}]") for n, value in enumerate(values)]
    probes: dict[str, tuple[str, str]] = {}
    for value in values:
        if isinstance(value, ReadProbe):
            read = (value.probe, value.output)
            if probes.setdefault(value.name, read) != read:
                raise ValueError(
                    f"two readouts go by {value.name!r}: give one another name, read_probe(..., name=...)"
                )
    return messages


def readout(value: Readout, field: str) -> readouts_pb2.Readout:
    """One readout, by the table of its class."""
    what = _READOUTS.get(type(value))
    if what is None:
        raise TypeError(f"{field} must be a readout such as read_activations(...), not {value!r}")
    return readouts_pb2.Readout(
        positions=selector(value.positions, f"{field}.positions"), **what(value, field)
    )


def _read_activations(value: ReadActivations, field: str) -> dict[str, Any]:
    hook_point = text(value.hook_point, f"{field}.activations.hook_point")
    dtype = word(value.dtype, _DTYPES, f"{field}.activations.dtype")
    return {"activations": readouts_pb2.ReadActivations(hook_point=hook_point, dtype=dtype)}


def _read_logit_lens(value: ReadLogitLens, field: str) -> dict[str, Any]:
    hook_point = text(value.hook_point, f"{field}.logit_lens.hook_point")
    top_k = whole(value.top_k, f"{field}.logit_lens.top_k")
    return {"logit_lens": readouts_pb2.ReadLogitLens(hook_point=hook_point, top_k=top_k)}


def _read_features(value: ReadFeatures, field: str) -> dict[str, Any]:
    return {
        "features": readouts_pb2.ReadFeatures(
            dictionary=text(value.dictionary, f"{field}.features.dictionary"),
            top_k=None if value.top_k is None else whole(value.top_k, f"{field}.features.top_k"),
            features=wholes(value.features, f"{field}.features.features"),
        )
    }


def _read_probe(value: ReadProbe, field: str) -> dict[str, Any]:
    output = word(value.output, _OUTPUTS, f"{field}.probe.output")
    return {"probe": readouts_pb2.ReadProbe(probe=text(value.probe, f"{field}.probe.probe"), output=output)}


_READOUTS: Final[dict[type[Readout], Callable[[Any, str], dict[str, Any]]]] = {
    ReadActivations: _read_activations,
    ReadLogitLens: _read_logit_lens,
    ReadFeatures: _read_features,
    ReadProbe: _read_probe,
}


def _messages(messages: Sequence[Any], field: str) -> list[inputs_pb2.ChatMessage]:
    return [
        inputs_pb2.ChatMessage(
            role=text(message.role, f"{field}[{n}].role"),
            content=text(message.content, f"{field}[{n}].content"),
        )
        for n, message in enumerate(messages)
    ]
