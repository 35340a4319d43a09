"""Attribution graphs in the viewer's JSON: one of fable's, traced here, and large ones made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from glasshouse.fable import dictionary_path, model_path
from glasshouse.server.attribution.attribution_graph import AttributionGraph, trace_graph
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.transcoders import Transcoders
from glasshouse.server.attribution.viewer import GraphCard, viewer_graph
from glasshouse.server.dictionaries.open import open_dictionary
from glasshouse.server.models.loading import load_model


class Traced:
    """fable's graph of a prompt, and what the server makes of it at any thresholds."""

    def __init__(self, prompt: str) -> None:
        torch.set_num_threads(1)
        loaded = load_model(model_path(), dtype="float32", device="cpu")
        model, self._tokenizer, self.prompt = GradientModel(loaded), loaded.tokenizer, prompt
        names = [f"transcoder-{layer}" for layer in range(model.n_layers)]
        transcoders = Transcoders(model, [open_dictionary(name, dictionary_path(name)) for name in names])
        self.ids = self._tokenizer.encode(prompt)
        self.graph: AttributionGraph = trace_graph(model, transcoders, torch.tensor([self.ids]))

    def json(self, node_threshold: float, edge_threshold: float, **marks: Any) -> dict[str, Any]:
        """The graph pruned by the server, as the viewer's JSON."""
        pruning = self.graph.prune(node_threshold=node_threshold, edge_threshold=edge_threshold)
        card = GraphCard(
            slug="fable",
            scan="fable",
            prompt=self.prompt,
            prompt_tokens=tuple(self._tokenizer.decode([token]) for token in self.ids),
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
            **marks,
        )
        return viewer_graph(self.graph, pruning, card, lambda token: self._tokenizer.decode([token]))


def made_up(
    n_nodes: int = 2_400, n_positions: int = 40, n_layers: int = 12, inputs: int = 40
) -> dict[str, Any]:
    """A graph of so many features, each with so many inputs, in no model."""
    random = np.random.default_rng(0)
    words = [f" word{position}" for position in range(n_positions)]
    nodes = [_node(f"E_{p}_{p}", "embedding", "E", p) for p in range(n_positions)]
    layers = np.sort(random.integers(0, n_layers, n_nodes))
    positions = np.sort(random.integers(1, n_positions, n_nodes))[random.permutation(n_nodes)]
    for index, (layer, position) in enumerate(zip(layers.tolist(), positions.tolist())):
        nodes.append(
            _node(f"{layer}_{index}_{position}", "cross layer transcoder", str(layer), position)
            | {"influence": None, "activation": float(random.random())}
        )
    first_logit = len(nodes)
    for token, probability in enumerate((0.6, 0.3, 0.1)):
        nodes.append(
            _node(f"{n_layers + 1}_{token}_{n_positions - 1}", "logit", str(n_layers + 1), n_positions - 1)
            | {"token_prob": probability, "clerp": f"Output ' say{token}' (p={probability:.3f})"}
        )
    ranks = np.concatenate([np.full(n_positions, -1), layers, np.full(3, n_layers)])
    links = []
    for target in range(n_positions, len(nodes)):
        earlier = np.flatnonzero(ranks < ranks[target])
        many = len(earlier) if target >= first_logit else min(inputs, len(earlier))
        for source in random.choice(earlier, many, replace=False).tolist():
            weight = float(random.standard_normal() * random.random() ** 4)
            links.append(
                {"source": nodes[source]["node_id"], "target": nodes[target]["node_id"], "weight": weight}
            )
    metadata = {
        "slug": "made-up",
        "scan": "none",
        "prompt": "".join(words),
        "prompt_tokens": words,
        "schema_version": 1,
    }
    return {"metadata": metadata, "qParams": {}, "nodes": nodes, "links": links}


def _node(node_id: str, kind: str, layer: str, position: int) -> dict[str, Any]:
    return {
        "node_id": node_id, "feature": 0, "layer": layer, "ctx_idx": position, "feature_type": kind,
        "token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": f"{node_id}-0",
        "clerp": "", "influence": None, "activation": None,
    }  # fmt: skip
