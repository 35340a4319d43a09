"""Metrics: protobuf to `attribution.metrics`. What needs the model to run is made where it may: in a lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import (
    DirectionValue,
    FeatureValue,
    KLDivergence,
    LogitDifference,
    LogProbability,
    Metric,
    Probability,
    ProbeValue,
)
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.v1 import metrics_pb2 as pb
from glasshouse.wire import reasons

from .. import fields
from ..catalogue import ServedModel
from ..inputs import InputReader
from ..tensors import vector

MOST_TOP_TOKENS = 100

MakeMetric = Callable[[GradientModel], Metric]
"""Makes a metric on a model; may run it."""


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Chosen tokens; `top_k` more are the likeliest of the clean input."""

    ids: tuple[int, ...]
    top_k: int
    field: str


class MetricReader:
    """Reads the metrics of one request. `clean`: its clean input's tokens. `at_clean`: whether the method takes the
    metric's gradient at the clean input alone.
    """

    def __init__(
        self, model: ServedModel, inputs: InputReader, clean: Sequence[int], *, at_clean: bool = False
    ) -> None:
        self._model, self._inputs, self._clean, self._at_clean = model, inputs, tuple(clean), at_clean

    async def read(self, message: pb.Metric, present: bool, field: str = "metric") -> MakeMetric:
        """The metric of a request."""
        kind = message.WhichOneof("number") if present else None
        if kind is None:
            raise fields.required(
                field,
                "what is to be explained",
                "choose one of logit_difference, log_probability, probability, kl_divergence, direction, feature, probe",
            )
        position = self.position(message.position if message.HasField("position") else None, field)
        at = f"{field}.{kind}"
        match kind:
            case "logit_difference":
                return self._logit_difference(message.logit_difference, position, at)
            case "log_probability":
                targets = self.tokens(message.log_probability.targets, f"{at}.targets")
                return lambda model: LogProbability(
                    position=position, targets=self.resolved(model, targets, position)
                )
            case "probability":
                some = self.tokens(message.probability.targets, f"{at}.targets")
                return lambda model: Probability(
                    position=position, targets=self.resolved(model, some, position)
                )
            case "kl_divergence":
                return await self._kl_divergence(message.kl_divergence, position, at)
            case "direction":
                return self._direction(message.direction, position, at)
            case "feature":
                return self._feature(message.feature, position, at)
            case _:
                return await self._probe(message.probe, position, at)

    def position(self, position: int | None, field: str) -> int:
        """A position of the clean input; the last where none is given."""
        n_tokens = len(self._clean)
        if position is None:
            return n_tokens - 1
        if not 0 <= position < n_tokens:
            raise InvalidArgument(
                f"position {position} is not one of the input's {n_tokens} tokens",
                reason=reasons.POSITION_UNREACHABLE,
                field=f"{field}.position" if field else "position",
                value=position,
                remedy=f"use a position from 0 to {n_tokens - 1}, or leave it out for the last",
            )
        return position

    def tokens(self, message: pb.TokenChoice, field: str, *, required: bool = True) -> TokenSet:
        """A choice of tokens, checked; none is an error where it is required."""
        ids = list(message.token_ids)
        self._inputs.check_ids(ids, f"{field}.token_ids")
        for index, text in enumerate(message.texts):
            ids.append(self.token_of(text, f"{field}.texts[{index}]"))
        if len(set(ids)) < len(ids):
            twice = next(token for token in ids if ids.count(token) > 1)
            raise InvalidArgument(
                f"token {twice} ({self._model.strings.of([twice])[0]!r}) is named twice",
                reason=reasons.FIELD_CONFLICT,
                field=field,
                value=twice,
                remedy="name each token once",
            )
        top_k = fields.whole(message.top_k, f"{field}.top_k", 0, MOST_TOP_TOKENS)
        if required and not ids and not top_k:
            raise fields.required(field, "at least one token", "give token_ids, texts or top_k")
        return TokenSet(ids=tuple(ids), top_k=top_k, field=field)

    def token_of(self, text: str, field: str) -> int:
        """The one token that a text is."""
        ids = self._model.engine.codec.encode(text, False)
        if len(ids) == 1:
            return ids[0]
        strings = ", ".join(repr(string) for string in self._model.strings.of(ids)[:8]) or "nothing"
        raise InvalidArgument(
            f"{text!r:.80} is {len(ids)} tokens: {strings}",
            reason=reasons.VALUE_MALFORMED,
            field=field,
            value=text,
            remedy="give a text of one token (mind the leading space), or token_ids",
            metadata={"token_ids": ", ".join(map(str, ids[:16]))},
        )

    def resolved(self, model: GradientModel, chosen: TokenSet, position: int) -> tuple[int, ...]:
        """Token ids, the likeliest of the clean input added."""
        if not chosen.top_k:
            return chosen.ids
        with torch.no_grad():
            logits = model.forward(model.tokens(self._clean)).logits(position)[0]
        top = logits.topk(min(chosen.top_k, logits.numel())).indices.tolist()
        return tuple(dict.fromkeys((*chosen.ids, *top)))

    def difference(
        self, model: GradientModel, targets: TokenSet, foils: TokenSet, position: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Targets and foils; a foil that is a target too is an error where it was named, else left out."""
        chosen, others = (self.resolved(model, some, position) for some in (targets, foils))
        both = set(chosen) & set(others)
        if both & set(targets.ids) & set(foils.ids):
            token = next(iter(both & set(targets.ids) & set(foils.ids)))
            raise InvalidArgument(
                f"token {token} ({self._model.strings.of([token])[0]!r}) is both a target and a foil",
                reason=reasons.FIELD_CONFLICT,
                field=foils.field,
                value=token,
                remedy="leave it out of one of them",
            )
        return chosen, tuple(token for token in others if token not in both)

    def _logit_difference(self, message: pb.LogitDifference, position: int, field: str) -> MakeMetric:
        targets = self.tokens(message.targets, f"{field}.targets")
        foils = self.tokens(message.foils, f"{field}.foils", required=False)

        def make(model: GradientModel) -> Metric:
            chosen, others = self.difference(model, targets, foils, position)
            return LogitDifference(
                position=position, targets=chosen, foils=others, capped=not message.before_soft_cap
            )

        return make

    async def _kl_divergence(self, message: pb.KlDivergence, position: int, field: str) -> MakeMetric:
        tokens = self._clean
        at = position
        if message.HasField("reference"):
            tokens = await self._inputs.prompt(message.reference, True, f"{field}.reference")
            at = len(tokens) - 1 if position == len(self._clean) - 1 else position
            if at >= len(tokens):
                raise InvalidArgument(
                    f"the reference has {len(tokens)} tokens, the metric is read at position {at}",
                    reason=reasons.POSITION_UNREACHABLE,
                    field=f"{field}.reference",
                    value=len(tokens),
                    remedy="give a longer reference, or an earlier position",
                )
        if self._at_clean and tokens == self._clean:
            raise InvalidArgument(
                "the KL divergence of the input from itself has gradient zero there: every attribution would be zero",
                reason=reasons.FIELD_REQUIRED,
                field=f"{field}.reference",
                remedy="give another input as the reference, or a method that patches or integrates",
            )

        def make(model: GradientModel) -> Metric:
            with torch.no_grad():
                reference = KLDivergence.reference_of(model.forward(model.tokens(tokens)), at)
            return KLDivergence(position=position, reference=reference[0])

        return make

    def _direction(self, message: pb.DirectionValue, position: int, field: str) -> MakeMetric:
        if not message.hook_point:
            raise fields.required(f"{field}.hook_point", "where to read", "name a hook point")
        array = vector(message.vector, message.HasField("vector"), f"{field}.vector", nonzero=True)
        bias = fields.finite(message.bias, f"{field}.bias")

        def make(model: GradientModel) -> Metric:
            point = model.table.resolve(message.hook_point, field=f"{field}.hook_point")
            if point.width != len(array):
                raise InvalidArgument(
                    f"the vector has {len(array)} elements, {point.name} has width {point.width}",
                    reason=reasons.WRONG_WIDTH,
                    field=f"{field}.vector" if point.width else f"{field}.hook_point",
                    value=len(array),
                    remedy=f"give {point.width} elements" if point.width else "choose a point of vectors",
                )
            direction = torch.from_numpy(array).to(model.loaded.device)
            return DirectionValue(position=position, hook_point=point.name, direction=direction, bias=bias)

        return make

    async def _probe(self, message: pb.ProbeValue, position: int, field: str) -> MakeMetric:
        if not message.probe:
            raise fields.required(f"{field}.probe", "whose score", "name a probe; ListProbes lists them")
        held = await self._model.engine.concepts.probe(message.probe, field=f"{field}.probe")
        held.probe.column(message.label, field=f"{field}.label")

        def make(model: GradientModel) -> Metric:
            for name in held.probe.facts.hook_points:
                model.table.resolve(name, field=f"{field}.probe")
            return ProbeValue(
                position=position, probe=held.probe.to(model.loaded.device), label=message.label
            )

        return make

    def _feature(self, message: pb.FeatureValue, position: int, field: str) -> MakeMetric:
        if not message.dictionary:
            raise fields.required(f"{field}.dictionary", "whose feature", "name a dictionary")
        at = f"{field}.dictionary"
        held = self._model.engine.dictionaries.get(message.dictionary, field=at).attached(at)
        dictionary, ids = held.dictionary, torch.tensor([message.feature])
        dictionary.check_feature_ids(ids, field=f"{field}.feature")
        if not message.pre_activation:
            return lambda model: FeatureValue(
                position=position, dictionary=dictionary, feature=message.feature
            )
        if len(held.points_in) != 1:
            raise InvalidArgument(
                f"dictionary {held.name} reads {len(held.points_in)} hook points",
                reason=reasons.FIELD_CONFLICT,
                field=f"{field}.pre_activation",
                value=held.name,
                remedy="use the activation, or a dictionary of one hook point",
            )
        name = held.points_in[0].name
        return lambda model: DirectionValue(
            position=position,
            hook_point=name,
            direction=dictionary.encoder_rows(ids.to(model.loaded.device))[0],
        )
