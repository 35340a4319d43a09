"""One of fable's answers explained, from tokens to a circuit, and the explanation tested.

The question: after a story about a girl, why " she" and not " he"? The other input tells the same story of a boy.

1. Tokens: integrated gradients of the logit difference, from the other story to this one. They sum to its change.
2. Heads: what each writes straight into the difference, and what patching it from the other story takes away.
3. Features: the transcoder features whose edges in the attribution graph lead straight to " she".
4. Circuit: ACDC's edges, alone enough for the behaviour.
5. The test: those features turned off, everything else responding; and as many others that were active, as a control.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glasshouse.client import (
    AttributionGraph,
    Circuit,
    FeatureIntervention,
    GraphNode,
    Model,
    TokenAttribution,
    feature_setting,
    logit_difference,
    patch_grid,
)

CLEAN = "Once upon a time there was a girl named Lily. Lily was happy because"
CORRUPT = "Once upon a time there was a boy named Tom. Tom was happy because"
TARGET, FOIL = " she", " he"
N_FEATURES = 12
THRESHOLD = 0.05


@dataclass(frozen=True)
class Head:
    """A head: its direct part of the difference, and the effect of patching it."""

    layer: int
    head: int
    direct: float
    patched: float


@dataclass(frozen=True)
class Explanation:
    """What was found. `share_without`: how much of the difference is left with `features` off; `share_control`: with as
    many others off."""

    tokens: TokenAttribution
    heads: list[Head]
    graph: AttributionGraph
    features: list[GraphNode]
    circuit: Circuit
    tested: FeatureIntervention
    share_without: float
    share_control: float

    def lines(self) -> list[str]:
        """The explanation, a sentence each."""
        tokens = ", ".join(f"{token!r} {score:+.1f}" for _, token, score in self.tokens.top(3))
        heads = ", ".join(f"a{h.layer}.h{h.head} {h.patched:+.1f}" for h in self.heads[:3])
        features = ", ".join(f"{n.id} at {n.token!r}" for n in self.features[:3])
        return [
            f"The difference between {TARGET!r} and {FOIL!r} is {self.tokens.value:.2f}; of a boy it would be "
            f"{self.tokens.baseline_value:.2f}. Tokens: {tokens} (residual {self.tokens.residual:.4f}).",
            f"Heads, patched from the other story: {heads}.",
            f"Features that lead straight to {TARGET!r}: {features}; the graph explains "
            f"{self.graph.scores.replacement:.0%} of the way through features.",
            f"Circuit: {len(self.circuit.edges)} of {self.circuit.n_edges_total} edges, faithfulness "
            f"{self.circuit.faithfulness:.2f}, completeness {self.circuit.completeness:.2f}.",
            f"Test: without its {len(self.features)} features {self.share_without:.0%} of the difference is left, "
            f"without as many others {self.share_control:.0%}.",
        ]


def explain(model: Model) -> Explanation:
    """Steps 1 to 5 on fable."""
    metric = logit_difference(TARGET, FOIL)
    tokens = model.attribute_tokens(CLEAN, metric, baseline=CORRUPT, steps=128)
    graph = model.attribution_graph(CLEAN, targets=[TARGET, FOIL]).result(timeout=300)
    circuit = model.discover_circuit(CLEAN, CORRUPT, threshold=THRESHOLD).result(timeout=300)
    features, others = _features(graph)
    tested = _without(model, graph, features)
    return Explanation(
        tokens=tokens,
        heads=_heads(model),
        graph=graph,
        features=features,
        circuit=circuit,
        tested=tested,
        share_without=_share(tested),
        share_control=_share(_without(model, graph, others)),
    )


def _heads(model: Model) -> list[Head]:
    direct = model.direct_attribution(CLEAN, TARGET, FOIL).heads
    grid = patch_grid("attn.hook_z", by_head=True, all_positions_at_once=True)
    swept = model.patch_sweep(CLEAN, CORRUPT, metric=logit_difference(TARGET, FOIL), grids=grid).result()
    found = [
        Head(result.layer, result.column, float(direct[result.layer, result.column]), result.effect)
        for result in swept.grid.top(8)
        if result.column is not None
    ]
    return sorted(found, key=lambda head: head.patched)


def _features(graph: AttributionGraph) -> tuple[list[GraphNode], list[GraphNode]]:
    """Those with the largest share in the difference of the two logits, and as many others at the same layers that were
    active, drawn."""
    edges, first = graph.edges, graph.first_logit
    toward = np.zeros(graph.first_error, np.float64)
    for number, sign in ((first, 1.0), (first + 1, -1.0)):
        here = (edges.targets == number) & (edges.sources < graph.first_error)
        toward[edges.sources[here]] += sign * edges.weights[here]
    order = np.argsort(-toward)
    best = [graph.node(int(number)) for number in order[:N_FEATURES]]
    rest = np.random.default_rng(0).permutation(order[N_FEATURES:])
    others: list[GraphNode] = []
    for node in best:
        same = next(
            n for n in rest if graph.features.layers[n] == node.layer and n not in {o.number for o in others}
        )
        others.append(graph.node(int(same)))
    return best, others


def _without(model: Model, graph: AttributionGraph, nodes: list[GraphNode]) -> FeatureIntervention:
    settings = [feature_setting(node.layer, node.feature or 0, node.position, 0.0) for node in nodes]
    return model.intervene_on_features(graph, settings, mode="open", tokens=[TARGET, FOIL])


def _share(found: FeatureIntervention) -> float:
    """Of the difference, what is left."""
    by_token = {change.token: change for change in found.logits}
    target, foil = by_token[TARGET], by_token[FOIL]
    return (target.logit_after - foil.logit_after) / (target.logit_before - foil.logit_before)
