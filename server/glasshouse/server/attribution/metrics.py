"""What is being explained: one number a row, read off a pass.

Every metric names its position (the index of the token fed in; -1 is the last). Logits are after the final
soft cap unless `capped` is False, which is the metric that direct attribution and graphs decompose.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.gradient_model import Pass
from glasshouse.server.dictionaries.dictionary import Dictionary, stacked
from glasshouse.server.probes.served import ServedProbe


@dataclass(frozen=True, kw_only=True)
class Metric(ABC):
    """One number a row of a pass."""

    position: int = -1

    @property
    def reads(self) -> tuple[str, ...]:
        """Hook points that the pass must have read."""
        return ()

    @abstractmethod
    def __call__(self, run: Pass) -> Tensor:
        """(B,) float32, differentiable."""


@dataclass(frozen=True, kw_only=True)
class LogitDifference(Metric):
    """mean logit of `targets` minus mean logit of `foils`; without foils the plain logit."""

    targets: tuple[int, ...]
    foils: tuple[int, ...] = ()
    capped: bool = True

    def __call__(self, run: Pass) -> Tensor:
        logits = run.logits(self.position, capped=self.capped)
        value = logits[:, list(self.targets)].mean(-1)
        return value - logits[:, list(self.foils)].mean(-1) if self.foils else value


@dataclass(frozen=True, kw_only=True)
class LogProbability(Metric):
    """log of the probability that the next token is one of `targets`, natural logarithm."""

    targets: tuple[int, ...]

    def __call__(self, run: Pass) -> Tensor:
        logprobs = torch.log_softmax(run.logits(self.position), dim=-1)
        return torch.logsumexp(logprobs[:, list(self.targets)], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Probability(Metric):
    """Probability that the next token is one of `targets`."""

    targets: tuple[int, ...]

    def __call__(self, run: Pass) -> Tensor:
        return torch.softmax(run.logits(self.position), dim=-1)[:, list(self.targets)].sum(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class KLDivergence(Metric):
    """KL(reference || run) in nats; `reference` are log-probabilities (V,) or (B, V), see `reference_of`."""

    reference: Tensor

    def __call__(self, run: Pass) -> Tensor:
        logprobs = torch.log_softmax(run.logits(self.position), dim=-1)
        return (self.reference.exp() * (self.reference - logprobs)).sum(-1)

    @staticmethod
    def reference_of(run: Pass, position: int = -1) -> Tensor:
        """(B, V) log-probabilities of a pass to compare others with."""
        return torch.log_softmax(run.logits(position), dim=-1).detach()


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectionValue(Metric):
    """activation . direction + bias at a hook point."""

    hook_point: str
    direction: Tensor
    bias: float = 0.0

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.hook_point,)

    def __call__(self, run: Pass) -> Tensor:
        return run.readings[self.hook_point][:, self.position] @ self.direction + self.bias


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureValue(Metric):
    """The activation of one feature (flat id) of a dictionary.

    It is differentiated as a line: zero where the feature does not fire, thresholds held where it does.
    """

    dictionary: Dictionary
    feature: int

    @property
    def reads(self) -> tuple[str, ...]:
        return self.dictionary.facts.hook_points_in

    def __call__(self, run: Pass) -> Tensor:
        x = stacked([run.readings[name][:, self.position] for name in self.reads])
        return self.dictionary.feature_values(x, torch.tensor([self.feature], device=x.device))[:, 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeValue(Metric):
    """A probe's log-odds of one label, before calibration, on the activation at the position itself.

    A probe that pools over positions was fitted on their pool: here it scores one position.
    """

    probe: ServedProbe
    label: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        return self.probe.facts.hook_points

    def __call__(self, run: Pass) -> Tensor:
        x = self.probe.join({name: run.readings[name][:, self.position] for name in self.reads})
        return self.probe.margins(x)[:, self.probe.column(self.label)].float()
