"""What attribution calls return: frozen dataclasses over numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.attribution.patches import PatchNode
from glasshouse.client.results import Tokens

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class HeldFixed:
    """What was held fixed while the answer was computed; `statement` says it in a sentence."""

    attention_patterns: bool
    norm_scales: bool
    mlp_outputs: bool
    statement: str

    def __str__(self) -> str:
        return self.statement


@dataclass(frozen=True)
class AttributionProgress:
    """How far a call has come, in gradients or passes."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class TokenAttribution:
    """What a metric rests on, position by position.

    scores: (n_pos,), one a token of `input`. `residual` = value - baseline_value - the sum of the scores.
    attributions: (n_pos, width) element by element, where asked for.
    """

    input: Tokens
    scores: NDArray[np.float64]
    value: float
    baseline_value: float
    residual: float
    hook_point: str
    held_fixed: HeldFixed
    attributions: FloatArray | None = field(default=None, repr=False)

    def top(self, n: int = 5) -> list[tuple[int, str, float]]:
        """(position, token, score) of the `n` largest magnitudes."""
        order = np.argsort(-np.abs(self.scores), kind="stable")[:n]
        return [(int(p), self.input.strings[p], float(self.scores[p])) for p in order]


@dataclass(frozen=True, kw_only=True)
class FeatureContributions:
    """The part of one place of the stream, split into a dictionary's features. features (n,) and parts (n,), strongest
    first; parts, `rest` (those not sent), `bias` and `error` sum to `total`.
    """

    dictionary: str
    hook_point: str
    features: NDArray[np.int32] = field(repr=False)
    parts: NDArray[np.float64] = field(repr=False)
    rest: float
    bias: float
    error: float
    total: float


@dataclass(frozen=True, kw_only=True)
class DirectAttribution:
    """The parts of a logit (mean of targets - mean of foils, before any soft cap) at `position`.

    `constant` and `contributions` (hook point -> part, in the order of the forward pass) sum to `logit`, but for
    `remainder`. heads: (n_layers, n_heads), neurons: (n_layers, d_mlp): with head_bias and neuron_bias, (n_layers,), they
    sum to their layer's hook_attn_out and hook_mlp_out.
    """

    input: Tokens
    position: int
    targets: Tokens
    foils: Tokens
    logit: float
    constant: float
    remainder: float
    contributions: Mapping[str, float]
    heads: FloatArray = field(repr=False)
    head_bias: FloatArray = field(repr=False)
    neurons: FloatArray = field(repr=False)
    neuron_bias: FloatArray = field(repr=False)
    features: list[FeatureContributions]
    held_fixed: HeldFixed

    def top_heads(self, n: int = 5) -> list[tuple[int, int, float]]:
        """(layer, head, part) of the `n` largest magnitudes."""
        return _top(self.heads, n)

    def top_neurons(self, n: int = 5) -> list[tuple[int, int, float]]:
        """(layer, neuron, part) of the `n` largest magnitudes."""
        return _top(self.neurons, n)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The best nodes (or edges, as (source, destination)) again, exactly; largest approximate magnitude first.
    `rank_correlation` is Spearman's, of the magnitudes.
    """

    nodes: list[PatchNode]
    edges: list[tuple[str, str]]
    approximate: NDArray[np.float64]
    exact: NDArray[np.float64]
    rank_correlation: float


@dataclass(frozen=True, kw_only=True)
class AttributionPatchResult:
    """Approximate effects of patching each node, or edge, of the clean input from the corrupt one.

    Nodes: `scores` maps a component to (n_layers, n_positions), or (n_layers, n_heads, n_positions); magnitudes rather
    than signed effects where `magnitudes`. Edges: `edge_scores` (n_sources, n_destinations), nan where there is no edge,
    labelled by `sources` and `destinations`.
    """

    method: str
    clean: Tokens
    corrupt: Tokens
    clean_value: float
    corrupt_value: float
    magnitudes: bool
    scores: Mapping[str, FloatArray] = field(repr=False)
    sources: list[str] = field(repr=False)
    destinations: list[str] = field(repr=False)
    edge_scores: FloatArray | None = field(repr=False)
    verification: Verification | None
    held_fixed: HeldFixed

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """(node or edge, score) of the `n` largest magnitudes."""
        if self.edge_scores is not None:
            magnitudes = np.nan_to_num(np.abs(self.edge_scores), nan=-1.0)
            order = np.argsort(-magnitudes, axis=None, kind="stable")[:n]
            rows, columns = np.unravel_index(order, magnitudes.shape)
            return [
                (f"{self.sources[r]}->{self.destinations[c]}", float(self.edge_scores[r, c]))
                for r, c in zip(rows, columns)
                if magnitudes[r, c] >= 0
            ]
        found = []
        for component, values in self.scores.items():
            for place in np.argsort(-np.abs(values), axis=None, kind="stable")[:n]:
                index = tuple(int(i) for i in np.unravel_index(place, values.shape))
                head = index[1] if values.ndim == 3 else None
                node = PatchNode(f"blocks.{index[0]}.{component}", index[-1], head)
                found.append((str(node), float(values[index])))
        return sorted(found, key=lambda pair: -abs(pair[1]))[:n]


@dataclass(frozen=True, kw_only=True)
class DictionaryAttribution:
    """What a metric rests on, by one dictionary's features.

    Entries (position, feature, attribution) as positions (n,), features (n,) and attributions (n,), positions
    ascending; errors: (n_pos,), what the dictionary misses. They sum to value - baseline_value, but for `residual`.
    """

    dictionary: str
    hook_point: str
    positions: NDArray[np.int64] = field(repr=False)
    features: NDArray[np.int32] = field(repr=False)
    attributions: FloatArray = field(repr=False)
    errors: FloatArray = field(repr=False)
    value: float
    baseline_value: float
    residual: float

    def top(self, n: int = 10) -> list[tuple[int, int, float]]:
        """(position, feature, attribution) of the `n` largest magnitudes."""
        order = np.argsort(-np.abs(self.attributions), kind="stable")[:n]
        return [(int(self.positions[i]), int(self.features[i]), float(self.attributions[i])) for i in order]

    def by_feature(self) -> dict[int, float]:
        """Feature -> sum over positions, the largest magnitude first."""
        ids, place = np.unique(self.features, return_inverse=True)
        sums = np.bincount(place, weights=self.attributions, minlength=len(ids))
        return {int(ids[i]): float(sums[i]) for i in np.argsort(-np.abs(sums), kind="stable")}


@dataclass(frozen=True, kw_only=True)
class FeatureAttribution:
    """One entry a dictionary, in the order asked."""

    input: Tokens
    dictionaries: list[DictionaryAttribution]
    held_fixed: HeldFixed


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """The edges that a behaviour needs, as (source, destination) labels such as ("a3.h1", "a4.h0.q").

    `faithfulness`: 1 where the circuit alone does it all. `completeness`: 1 where nothing is left without it.
    """

    name: str
    clean: Tokens
    corrupt: Tokens
    edges: list[tuple[str, str]]
    sources: list[str] = field(repr=False)
    destinations: list[str] = field(repr=False)
    n_edges_total: int
    threshold: float
    value: float
    clean_value: float
    corrupt_value: float
    complement_value: float
    faithfulness: float
    completeness: float
    n_passes: int
    seconds: float
    held_fixed: str

    @property
    def nodes(self) -> list[str]:
        """Components with an edge: heads as "a3.h1", MLPs as "m2", "embed" and "logits"; in the order of the model."""
        order = {label: n for n, label in enumerate([*self.sources, "logits"])}
        ends = {part for edge in self.edges for part in edge}
        named = {end.rsplit(".", 1)[0] if end[-2:] in (".q", ".k", ".v") else end for end in ends}
        return sorted(named, key=lambda label: order.get(label, len(order)))


@dataclass(frozen=True, kw_only=True)
class AttributionEstimate:
    """What an operation would take, beside what is allowed. `refusal`: why it would be refused; empty where not.
    `size`: nodes of a graph, or edges a search goes through. `seconds` and `passes` are expected, their upper bounds are
    what a search takes that keeps every edge; `memory_bytes` is an upper bound.
    """

    memory_bytes: int
    seconds: float
    passes: int
    active_features: int
    size: int
    memory_budget_bytes: int
    seconds_budget: float
    seconds_upper_bound: float
    passes_upper_bound: int
    refusal: str = ""


@dataclass(frozen=True)
class LogitChange:
    """A next token before and after. Logits before any soft cap; `measured` and `predicted` are changes of the demeaned
    logit, `predicted` (by direct effects) nan where nothing predicts it.
    """

    token_id: int
    token: str
    logit_before: float
    logit_after: float
    probability_before: float
    probability_after: float
    measured: float
    predicted: float


@dataclass(frozen=True, kw_only=True)
class FeatureIntervention:
    """What settings of features brought about.

    Of the n features reported: layers, features, positions (n,); before, after (n,) pre-activations without the encoder's
    bias; predicted (n,) their change by direct effects; activations_before, activations_after (n,).
    """

    input: Tokens
    logits: list[LogitChange]
    text_before: str
    text_after: str
    feature_correlation: float
    logit_correlation: float
    held_fixed: HeldFixed
    layers: NDArray[np.int32] = field(repr=False)
    features: NDArray[np.int32] = field(repr=False)
    positions: NDArray[np.int32] = field(repr=False)
    before: FloatArray = field(repr=False)
    after: FloatArray = field(repr=False)
    predicted: FloatArray = field(repr=False)
    activations_before: FloatArray = field(repr=False)
    activations_after: FloatArray = field(repr=False)


@dataclass(frozen=True)
class FeatureConnection:
    """The weight between the asked feature and `feature` of `layer`."""

    layer: int
    feature: int
    weight: float


@dataclass(frozen=True)
class FeatureConnections:
    """Largest magnitudes first."""

    incoming: list[FeatureConnection]
    outgoing: list[FeatureConnection]
    held_fixed: HeldFixed


def _top(table: NDArray[Any], n: int) -> list[tuple[int, int, float]]:
    order = np.argsort(-np.abs(table), axis=None, kind="stable")[:n]
    rows, columns = np.unravel_index(order, table.shape)
    return [(int(r), int(c), float(table[r, c])) for r, c in zip(rows, columns)]
