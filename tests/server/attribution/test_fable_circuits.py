"""Two behaviours of fable, each found by ACDC, EAP-IG and attribution graphs, and destroyed by taking out what was found.

- *gender*: "Tom was tired after the walk, so" -> " he" rather than " she"; the other input has a name of the other gender.
- *capital*: "The capital of Norway is called" -> " Oslo" rather than any other capital; the other input has another
  country.

Accuracy is among the candidates: chance is one over their number. Edges are taken out by what they carry on the other
input, features by setting them to zero. What is taken out at random is as much of the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from glasshouse import fable
from glasshouse.server.attribution.attribution_graph import AttributionGraph, LogitTarget, trace_graph
from glasshouse.server.attribution.attribution_patching import attribution_patch, verify
from glasshouse.server.attribution.circuits import Circuit, discover_circuit
from glasshouse.server.attribution.edge_attribution import attribute_edges
from glasshouse.server.attribution.edge_patching import forward_with_edges
from glasshouse.server.attribution.feature_interventions import FeatureSetting, intervene
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.local_model import LocalModel, logit_vectors
from glasshouse.server.attribution.metrics import KLDivergence, LogitDifference
from glasshouse.server.attribution.transcoders import Transcoders
from glasshouse.server.attribution.wiring import Wiring
from glasshouse.server.dictionaries.open import open_dictionary
from glasshouse.server.models.loading import load_model

BOYS = ["Adam", "Ben", "Charlie", "Colin", "Felix", "Finn", "Hans", "Isaac", "Oscar", "Tom"]
GIRLS = ["Alice", "Celia", "Ella", "Eva", "Fiona", "Hannah", "Jenny", "Laura", "Lily", "Megan"]
CAPITALS = {
    "Hungary": "Budapest",
    "Norway": "Oslo",
    "Finland": "Helsinki",
    "Senegal": "Dakar",
    "Indonesia": "Jakarta",
    "Nigeria": "Abuja",
    "Thailand": "Bangkok",
    "Egypt": "Cairo",
    "Ghana": "Accra",
    "Iran": "Tehran",
    "Iceland": "Reykjavik",
    "France": "Paris",
}
N_FOUND_ON = 6
N_DRAWS = 40
THRESHOLD = 0.02


@dataclass(frozen=True, kw_only=True, eq=False)
class Behaviour:
    """clean, corrupt: (N, T). candidates: token ids; right: (N,) places among them."""

    name: str
    clean: Tensor
    corrupt: Tensor
    candidates: list[int]
    right: Tensor

    @property
    def chance(self) -> float:
        return 1 / len(self.candidates)

    def accuracy(self, logits_NV: Tensor, rows: slice = slice(None)) -> float:
        return float((logits_NV[:, self.candidates].argmax(1) == self.right[rows]).float().mean())


@pytest.fixture(scope="module")
def model() -> GradientModel:
    torch.set_num_threads(1)
    return GradientModel(load_model(fable.model_path(), dtype="float32", device="cpu", name="fable"))


@pytest.fixture(scope="module")
def transcoders(model: GradientModel) -> Transcoders:
    names = [f"transcoder-{layer}" for layer in range(model.n_layers)]
    return Transcoders(model, [open_dictionary(name, fable.dictionary_path(name)) for name in names])


@pytest.fixture(scope="module", params=["gender", "capital"])
def behaviour(request: pytest.FixtureRequest, model: GradientModel) -> Behaviour:
    encode = model.loaded.tokenizer.encode

    def rows(template: str, words: list[str]) -> Tensor:
        return torch.tensor([encode(template.format(word)) for word in words])

    def word(text: str) -> int:
        (token,) = encode(" " + text)[1:]
        return int(token)

    if request.param == "gender":
        template = "{} was tired after the walk, so"
        clean = [name for pair in zip(BOYS, GIRLS) for name in pair]
        corrupt = [name for pair in zip(GIRLS, BOYS) for name in pair]
        candidates, right = [word("he"), word("she")], [int(name in GIRLS) for name in clean]
    else:
        template, clean = "The capital of {} is called", list(CAPITALS)
        corrupt = clean[1:] + clean[:1]
        candidates, right = [word(CAPITALS[country]) for country in clean], list(range(len(clean)))
    return Behaviour(
        name=str(request.param),
        clean=rows(template, clean),
        corrupt=rows(template, corrupt),
        candidates=candidates,
        right=torch.tensor(right),
    )


@pytest.fixture(scope="module")
def circuit(model: GradientModel, behaviour: Behaviour) -> Circuit:
    found_on = slice(0, N_FOUND_ON)
    return discover_circuit(
        model, behaviour.clean[found_on], behaviour.corrupt[found_on], threshold=THRESHOLD
    )


@pytest.fixture(scope="module")
def graphs(
    model: GradientModel, transcoders: Transcoders, behaviour: Behaviour
) -> list[tuple[LocalModel, AttributionGraph, Tensor]]:
    """Of the first prompts: the local model, the graph of the right answer against the others, the features kept."""
    found = []
    for row in range(N_FOUND_ON):
        right = int(behaviour.right[row])
        foils = [c for i, c in enumerate(behaviour.candidates) if i != right]
        vector = logit_vectors(model, [behaviour.candidates[right]])[0] - logit_vectors(model, foils).mean(0)
        target = [LogitTarget(label="right - others", weight=1.0, vector=vector)]
        tokens = behaviour.clean[row]
        graph = trace_graph(model, transcoders, tokens, logits=target, max_features=10**9)
        kept = graph.prune().nodes[: graph.first_error].nonzero().squeeze(1)
        found.append((LocalModel(model, transcoders, tokens), graph, kept))
    return found


@torch.no_grad()
def without_edges(model: GradientModel, behaviour: Behaviour, wiring: Wiring, edges: Tensor) -> float:
    """Accuracy on every prompt with these edges carrying what they carry on the other input."""
    theirs = wiring.contributions(model.forward(behaviour.corrupt, read=wiring.written).readings)
    mask = (edges & wiring.valid).float()
    return behaviour.accuracy(forward_with_edges(wiring, behaviour.clean, theirs, mask).logits())


def random_edges(wiring: Wiring, n: int, seed: int) -> Tensor:
    valid = wiring.valid.flatten().nonzero().squeeze(1)
    chosen = valid[torch.randperm(len(valid), generator=torch.Generator().manual_seed(seed))[:n]]
    edges = torch.zeros(wiring.valid.numel(), dtype=torch.bool)
    edges[chosen] = True
    return edges.view_as(wiring.valid)


def eap_ig_edges(model: GradientModel, behaviour: Behaviour, n: int) -> Tensor:
    clean, corrupt = behaviour.clean[:N_FOUND_ON], behaviour.corrupt[:N_FOUND_ON]
    metric = KLDivergence(reference=KLDivergence.reference_of(model.forward(clean)))
    found = attribute_edges(model, clean, corrupt, metric, steps=8)
    best = found.scores.abs().masked_fill(~found.valid, -1.0).flatten().topk(n).indices
    edges = torch.zeros(found.valid.numel(), dtype=torch.bool)
    edges[best] = True
    return edges.view_as(found.valid)


def test_the_model_can_do_it(model: GradientModel, behaviour: Behaviour) -> None:
    assert behaviour.accuracy(model.forward(behaviour.clean).logits()) == 1.0


def test_acdc(model: GradientModel, behaviour: Behaviour, circuit: Circuit) -> None:
    wiring, n = circuit.wiring, len(circuit.edges)
    destroyed = without_edges(model, behaviour, wiring, circuit.kept)
    alone = without_edges(model, behaviour, wiring, ~circuit.kept)
    spared = [
        without_edges(model, behaviour, wiring, random_edges(wiring, n, seed)) for seed in range(N_DRAWS)
    ]
    print(behaviour.name, n, destroyed, alone, min(spared), circuit.faithfulness, circuit.completeness)
    assert n < int(wiring.valid.sum()) / 20
    assert circuit.faithfulness > 0.9 and circuit.completeness > 0.9
    assert destroyed < behaviour.chance + 0.1
    assert alone > 0.75  # on names and countries it was not found on too
    assert sum(spared) / N_DRAWS > 0.95


def test_eap_ig(model: GradientModel, behaviour: Behaviour, circuit: Circuit) -> None:
    n = len(circuit.edges)
    edges = eap_ig_edges(model, behaviour, n)
    overlap = int((edges & circuit.kept).sum()) / n
    print(behaviour.name, "EAP-IG's edges that ACDC keeps", overlap)
    assert without_edges(model, behaviour, circuit.wiring, edges) < behaviour.chance + 0.1
    assert overlap > 0.5


def test_the_graph(behaviour: Behaviour, graphs: list[tuple[LocalModel, AttributionGraph, Tensor]]) -> None:
    generator = torch.Generator().manual_seed(0)
    right, spared, n_kept = 0.0, [], 0
    for row, (local, graph, kept) in enumerate(graphs):

        def without(places: Tensor, local: LocalModel = local, graph: AttributionGraph = graph) -> Tensor:
            some = graph.features.select(places)
            settings = [
                FeatureSetting(layer=layer, position=position, index=index, value=0.0)
                for layer, position, index in zip(
                    some.layers.tolist(), some.positions.tolist(), some.indices.tolist()
                )
            ]
            return intervene(local, settings, mode="open").logits[None]

        here = slice(row, row + 1)
        n_kept += len(kept)
        assert len(kept) < len(graph.features) / 5
        right += behaviour.accuracy(without(kept), here)
        for _ in range(N_DRAWS // len(graphs)):
            drawn = torch.randperm(len(graph.features), generator=generator)[: len(kept)]
            spared.append(behaviour.accuracy(without(drawn), here))
    print(behaviour.name, "features", n_kept / len(graphs), right / len(graphs), sum(spared) / len(spared))
    assert right / len(graphs) < behaviour.chance + 0.1
    assert sum(spared) / len(spared) > 0.95


def test_all_three_agree_on_the_mlps(
    model: GradientModel,
    behaviour: Behaviour,
    circuit: Circuit,
    graphs: list[tuple[LocalModel, AttributionGraph, Tensor]],
) -> None:
    """Edges have no positions and graphs no heads: what they share is which MLPs matter."""
    edges = eap_ig_edges(model, behaviour, len(circuit.edges))
    sources = circuit.wiring.sources
    mlps = [
        {s.layer for s, used in zip(sources, each.any(1).tolist()) if used and s.kind == "mlp"}
        for each in (circuit.kept, edges)
    ]
    weight = torch.zeros(model.n_layers)
    for _, graph, kept in graphs:
        influence = graph.edges.influence(graph.weights)
        weight.index_add_(0, graph.features.layers[kept], influence[kept] / len(graphs))
    best = set(weight.topk(len(mlps[0])).indices.tolist())
    print(behaviour.name, "MLPs: ACDC", mlps[0], "EAP-IG", mlps[1], "graph", best, weight.tolist())
    for other in (mlps[1], best):
        assert len(mlps[0] & other) / len(mlps[0] | other) >= 0.6


def test_attribution_patching_ranks_heads_as_patching_does(
    model: GradientModel, behaviour: Behaviour
) -> None:
    """Every head's z and MLP at every position, of one pair: AtP beside exact patches."""
    clean, corrupt = behaviour.clean[0], behaviour.corrupt[0]
    right = int(behaviour.right[0])
    foils = tuple(c for i, c in enumerate(behaviour.candidates) if i != right)
    metric = LogitDifference(targets=(behaviour.candidates[right],), foils=foils)
    components = ["attn.hook_z", "hook_mlp_out"]
    scores = attribution_patch(model, clean, corrupt, metric, components=components)
    found = verify(model, clean, corrupt, metric, scores, top=100)
    print(behaviour.name, "AtP, rank correlation of the 100 largest", found.rank_correlation)
    assert found.rank_correlation > 0.8
