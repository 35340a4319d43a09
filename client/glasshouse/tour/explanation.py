"""Why did it say "she"? One answer of fable's explained end to end: tokens, heads, a circuit, features, and the test of it.

1. Tokens and heads: integrated gradients from the same sentence about Tom; they sum to the change. Patching the stream
   shows where the name's meaning travels, patching heads which of them carry it.
2. Circuit: ACDC keeps the few edges without which the answer is lost.
3. Features: an attribution graph on the per-layer transcoders, for either sentence. Of the last position's features,
   those that speak for "she" in the one and for "he" in the other.
4. Test: the first turned off, the second on, and the model goes on writing. What the graph's edges predict is held
   against what happens, and the whole against a control: as many others, drawn from the same layers.

What is found is told by `explaining`, a stage of the tour, and in a sentence each by `Explanation.lines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glasshouse.client import (
    AttributionGraph,
    Circuit,
    FeatureIntervention,
    FeatureSetting,
    GraphNode,
    Model,
    SweepGrid,
    TokenAttribution,
    logit_difference,
    patch_grid,
)

ANNA, TOM = "Anna was tired, so", "Tom was tired, so"
SHE, HE = " she", " he"
THRESHOLD = 0.03
N_SET = 4
MAX_TOKENS = 12


@dataclass(frozen=True)
class Carriers:
    """Step 1. `stream` by layer and position, `heads` by layer and head: effects of patching Tom's in."""

    tokens: TokenAttribution
    stream: SweepGrid
    heads: SweepGrid

    @property
    def change(self) -> float:
        """Of the logit difference, from Tom's sentence to Anna's."""
        return self.tokens.value - self.tokens.baseline_value

    @property
    def strongest(self) -> list[str]:
        """The two heads that carry most, as "layer.head"."""
        return [f"{found.layer}.{found.column}" for found in self.heads.top(2)]

    @property
    def carried(self) -> float:
        """What those two carry together."""
        return sum(abs(found.effect) for found in self.heads.top(2))


@dataclass(frozen=True)
class Voices:
    """Step 3. The graphs, and the features that speak most for "she" in Anna's and for "he" in Tom's, each with how much
    more it writes into the one logit than into the other.
    """

    anna: AttributionGraph
    tom: AttributionGraph
    for_she: list[tuple[GraphNode, float]]
    for_he: list[tuple[GraphNode, float]]


@dataclass(frozen=True)
class Swap:
    """Step 4: the features swapped, and the control."""

    swapped: FeatureIntervention
    control: FeatureIntervention

    @property
    def left(self) -> float:
        """The share of the logit difference that the swap leaves."""
        return _share(self.swapped)

    @property
    def left_by_control(self) -> float:
        """The share that as many others leave."""
        return _share(self.control)

    @property
    def sentences(self) -> tuple[str, str]:
        """What the model writes before and after, to the end of the sentence."""
        before, after = (
            text.partition(".")[0] + "." for text in (self.swapped.text_before, self.swapped.text_after)
        )
        return before, after


@dataclass(frozen=True)
class Explanation:
    """All of it."""

    carriers: Carriers
    circuit: Circuit
    voices: Voices
    swap: Swap

    def lines(self) -> list[str]:
        """The explanation, a sentence each."""
        tokens, circuit, swap = self.carriers.tokens, self.circuit, self.swap
        top = ", ".join(f"{token!r} {score:+.1f}" for _, token, score in tokens.top(2))
        features = ", ".join(f"{node.id} {more:+.1f}" for node, more in self.voices.for_she)
        return [
            f"{SHE!r} is {tokens.value:+.1f} logits above {HE!r}, with Tom's name {tokens.baseline_value:+.1f}. "
            f"Tokens: {top} (residual {tokens.residual:.4f}).",
            f"Heads {' and '.join(self.carriers.strongest)} carry {self.carriers.carried:.1f} of it to the end.",
            f"Circuit: {len(circuit.edges)} of {circuit.n_edges_total} edges, faithfulness {circuit.faithfulness:.2f}, "
            f"completeness {circuit.completeness:.2f}.",
            f"Features that speak for {SHE!r}: {features}; features carry "
            f"{self.voices.anna.scores.replacement:.0%} of the graph's influence.",
            f"Test: with {N_SET} of them off and {N_SET} for {HE!r} on, {swap.left:.0%} of the difference is left; with as "
            f"many others {swap.left_by_control:.0%}.",
        ]


def explain(model: Model) -> Explanation:
    """Steps 1 to 4 on fable."""
    carriers, circuit, voices = find_carriers(model), find_circuit(model), find_voices(model)
    return Explanation(carriers, circuit, voices, swap_voices(model, voices))


def find_carriers(model: Model) -> Carriers:
    """Step 1."""
    metric = logit_difference(SHE, HE)
    tokens = model.attribute_tokens(ANNA, metric, baseline=TOM)
    by_head = patch_grid("attn.hook_z", by_head=True, all_positions_at_once=True)
    swept = model.patch_sweep(ANNA, TOM, metric=metric, grids=["hook_resid_pre", by_head]).result()
    stream, heads = swept.grids
    return Carriers(tokens, stream, heads)


def find_circuit(model: Model) -> Circuit:
    """Step 2."""
    return model.discover_circuit(ANNA, TOM, threshold=THRESHOLD).result()


def find_voices(model: Model) -> Voices:
    """Step 3."""
    anna, tom = (model.attribution_graph(text, targets=[SHE, HE]).result() for text in (ANNA, TOM))
    return Voices(anna, tom, speaking(anna)[:N_SET], speaking(tom)[::-1][:N_SET])


def swap_voices(model: Model, voices: Voices) -> Swap:
    """Step 4."""
    off, on = ([node for node, _ in some] for some in (voices.for_she, voices.for_he))
    others_off, others_on = _others(voices.anna, off), _others(voices.tom, on)
    return Swap(_set(model, off, on), _set(model, others_off, others_on))


def speaking(graph: AttributionGraph) -> list[tuple[GraphNode, float]]:
    """Features of the last position by how much more they write into the first target than into the second."""
    she, he = graph.first_logit, graph.first_logit + 1
    differences: dict[int, float] = {}
    for logit, sign in ((she, 1.0), (he, -1.0)):
        for node, weight in graph.incoming(logit, graph.n_nodes_total):
            if node.kind == "feature" and node.position == graph.n_positions - 1:
                differences[node.number] = differences.get(node.number, 0.0) + sign * weight
    numbers = sorted(differences, key=lambda number: -differences[number])
    return [(graph.node(number), differences[number]) for number in numbers]


def _others(graph: AttributionGraph, chosen: Sequence[GraphNode]) -> list[GraphNode]:
    """As many features active at the same layers and the same position, drawn from all that were not chosen."""
    draw, features = np.random.default_rng(0), graph.features
    left = [
        number
        for number in draw.permutation(len(features)).tolist()
        if features.positions[number] == graph.n_positions - 1 and graph.node(number) not in chosen
    ]
    found = []
    for node in chosen:
        number = next(number for number in left if features.layers[number] == node.layer)
        left.remove(number)
        found.append(graph.node(number))
    return found


def _set(model: Model, off: Sequence[GraphNode], on: Sequence[GraphNode]) -> FeatureIntervention:
    """What comes of Anna's sentence with some features off and others as active as they were in Tom's."""
    settings = [_setting(node, 0.0) for node in off]
    settings += [_setting(node, node.activation or 0.0) for node in on]
    return model.intervene_on_features(ANNA, settings, mode="open", tokens=[SHE, HE], max_tokens=MAX_TOKENS)


def _setting(node: GraphNode, value: float) -> FeatureSetting:
    return FeatureSetting(node.layer, node.feature or 0, node.position, value)


def _share(found: FeatureIntervention) -> float:
    """Of the difference, what is left."""
    by_token = {change.token: change for change in found.logits}
    she, he = by_token[SHE], by_token[HE]
    return (she.logit_after - he.logit_after) / (she.logit_before - he.logit_before)
