"""An attribution graph in the client's hands: pruned, ranked, marked, kept, exported.

Nodes are numbered [features | errors, layer-major: l * T + p | tokens | logits], and keep their numbers when the graph is
pruned. An edge's weight is the direct effect of its source on its target's pre-activation, or on the demeaned logit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.attribution import pruning
from glasshouse.client.attribution.pruning import Edges, GraphScores, Mask

if TYPE_CHECKING:
    import networkx

NodeKind = Literal["feature", "error", "token", "logit"]
NODE_THRESHOLD, EDGE_THRESHOLD = 0.8, 0.98


@dataclass(frozen=True)
class GraphLogit:
    """What a graph ends in. `weight`: the token's probability, or the caller's. `token_id` None: a caller's vector."""

    label: str
    weight: float
    token_id: int | None = None


@dataclass(frozen=True)
class Supernode:
    """Nodes that belong together, by their viewer ids such as "3_742_5" ({layer}_{feature}_{position})."""

    label: str
    node_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GraphInfo:
    """What is known of a graph. `name`: under which the server stores it, until `expires`."""

    name: str
    model: str
    title: str
    token_ids: list[int] = field(repr=False)
    tokens: list[str]
    transcoders: list[str]
    n_layers: int
    n_features: int
    n_active_features: int
    n_edges: int
    logits: list[GraphLogit]
    scores: GraphScores
    pinned: list[str] = field(default_factory=list, repr=False)
    supernodes: list[Supernode] = field(default_factory=list, repr=False)
    size_bytes: int = 0
    created: datetime | None = None
    expires: datetime | None = None
    seconds: float = 0.0
    held_fixed: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class GraphNode:
    """A node. `number`: its index in the graph's arrays; `id`: the viewer's. `feature`, `activation`: of features.
    `token`: the one at its position, or of a logit its own. `influence`: the cumulative share of influence at its
    rank, small is important; None for tokens and logits. `weight`: of a logit.
    """

    number: int
    id: str
    kind: NodeKind
    layer: int
    position: int
    token: str
    feature: int | None = None
    activation: float | None = None
    influence: float | None = None
    weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class GraphFeatures:
    """The n features with a node: layers, indices, positions (n,) int32; activations (n,) float32."""

    layers: NDArray[np.int32]
    indices: NDArray[np.int32]
    positions: NDArray[np.int32]
    activations: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.layers)


class AttributionGraph:
    """A traced graph. `supernodes` and `pinned` are yours to change; they stay through pruning and saving.

    `edges`: those left. `kept`: (n_nodes,) which nodes are. `thresholds`: (node, edge) of the pruning that made this
    one, or None.
    """

    def __init__(
        self,
        info: GraphInfo,
        features: GraphFeatures,
        edges: Edges,
        *,
        kept: Mask | None = None,
        cumulative: NDArray[np.float32] | None = None,
        thresholds: tuple[float, float] | None = None,
    ) -> None:
        self.info = info
        self.features = features
        self.edges = edges
        self.thresholds = thresholds
        self.kept: Mask = np.ones(self.n_nodes_total, dtype=np.bool_) if kept is None else kept
        self._given_cumulative = cumulative
        self.supernodes: list[Supernode] = list(info.supernodes)
        self.pinned: list[str] = list(info.pinned)

    def __repr__(self) -> str:
        return (
            f"AttributionGraph({self.info.title!r}, {self.n_nodes} nodes, {len(self.edges)} edges, "
            f"replacement={self.scores.replacement:.2f}, completeness={self.scores.completeness:.2f})"
        )

    def __len__(self) -> int:
        return self.n_nodes

    @property
    def name(self) -> str:
        """Under which the server stores it."""
        return self.info.name

    @property
    def tokens(self) -> list[str]:
        """The prompt's."""
        return self.info.tokens

    @property
    def logits(self) -> list[GraphLogit]:
        """What it ends in."""
        return self.info.logits

    @property
    def n_positions(self) -> int:
        """Tokens of the prompt."""
        return len(self.info.token_ids)

    @property
    def first_error(self) -> int:
        """Number of the first error node, and of features."""
        return len(self.features)

    @property
    def first_token(self) -> int:
        """Number of the first token node."""
        return self.first_error + self.info.n_layers * self.n_positions

    @property
    def first_logit(self) -> int:
        """Number of the first logit node."""
        return self.first_token + self.n_positions

    @property
    def n_nodes_total(self) -> int:
        """Nodes of the whole graph."""
        return self.first_logit + len(self.info.logits)

    @property
    def n_nodes(self) -> int:
        """Nodes that are left."""
        return int(self.kept.sum())

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """(n_nodes_total,): the logits' weights, zero elsewhere."""
        w = np.zeros(self.n_nodes_total, np.float32)
        w[self.first_logit :] = [logit.weight for logit in self.info.logits]
        return w

    @cached_property
    def scores(self) -> GraphScores:
        """Of what is left."""
        return pruning.graph_scores(
            self.edges, self.weights, is_token=self._mask("token"), is_error=self._mask("error")
        )

    @cached_property
    def cumulative_influence(self) -> NDArray[np.float32]:
        """(n_nodes_total,): the share of influence at each node's rank in the whole graph; small is important."""
        if self._given_cumulative is not None:
            return self._given_cumulative
        return pruning.cumulative_influence(self.edges, self.weights)

    def prune(
        self, node_threshold: float = NODE_THRESHOLD, edge_threshold: float = EDGE_THRESHOLD
    ) -> AttributionGraph:
        """The nodes and edges that carry these shares of the influence; this graph stays as it is.

        Raises ValueError for a threshold outside (0, 1].
        """
        for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{name} is {value}: give a share above 0 and at most 1")
        found = pruning.prune(
            self.edges,
            self.weights,
            is_feature=self._mask("feature"),
            is_error=self._mask("error"),
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
        )
        return self.select(
            found.nodes & self.kept, found.edges, found.cumulative, (node_threshold, edge_threshold)
        )

    def select(
        self,
        nodes: Mask,
        edges: Mask,
        cumulative: NDArray[np.float32] | None = None,
        thresholds: tuple[float, float] | None = None,
    ) -> AttributionGraph:
        """The graph of these nodes (n_nodes_total,) and edges (E,)."""
        chosen = AttributionGraph(
            self.info,
            self.features,
            self.edges.select(edges),
            kept=nodes,
            cumulative=self.cumulative_influence if cumulative is None else cumulative,
            thresholds=thresholds,
        )
        chosen.supernodes, chosen.pinned = list(self.supernodes), list(self.pinned)
        return chosen

    def kind(self, number: int) -> NodeKind:
        """What a node is."""
        if number < self.first_error:
            return "feature"
        if number < self.first_token:
            return "error"
        return "token" if number < self.first_logit else "logit"

    def node(self, number: int) -> GraphNode:
        """A node by its number."""
        kind, n_positions, info = self.kind(number), self.n_positions, self.info
        if kind == "feature":
            layer = int(self.features.layers[number])
            index, position = int(self.features.indices[number]), int(self.features.positions[number])
            return GraphNode(
                number=number,
                id=f"{layer}_{index}_{position}",
                kind=kind,
                layer=layer,
                position=position,
                token=info.tokens[position],
                feature=index,
                activation=float(self.features.activations[number]),
                influence=float(self.cumulative_influence[number]),
            )
        if kind == "error":
            layer, position = divmod(number - self.first_error, n_positions)
            return GraphNode(
                number=number,
                id=f"0_{layer}_{position}",
                kind=kind,
                layer=layer,
                position=position,
                token=info.tokens[position],
                influence=float(self.cumulative_influence[number]),
            )
        if kind == "token":
            position = number - self.first_token
            return GraphNode(
                number=number,
                id=f"E_{info.token_ids[position]}_{position}",
                kind=kind,
                layer=-1,
                position=position,
                token=info.tokens[position],
            )
        place = number - self.first_logit
        logit = info.logits[place]
        token = -1 - place if logit.token_id is None else logit.token_id
        return GraphNode(
            number=number,
            id=f"{info.n_layers + 1}_{token}_{n_positions - 1}",
            kind=kind,
            layer=info.n_layers + 1,
            position=n_positions - 1,
            token=logit.label,
            weight=logit.weight,
        )

    @property
    def nodes(self) -> Iterator[GraphNode]:
        """Those left, in order of their numbers."""
        return (self.node(int(number)) for number in np.flatnonzero(self.kept))

    def top_features(self, n: int = 10) -> list[GraphNode]:
        """The `n` most influential features left."""
        numbers = np.flatnonzero(self.kept[: self.first_error])
        order = np.argsort(self.cumulative_influence[numbers], kind="stable")
        return [self.node(int(number)) for number in numbers[order[:n]]]

    def incoming(self, node: GraphNode | int, n: int = 10) -> list[tuple[GraphNode, float]]:
        """(source, weight) of the `n` strongest edges into a node."""
        return self._strongest(self.edges.targets, self.edges.sources, node, n)

    def outgoing(self, node: GraphNode | int, n: int = 10) -> list[tuple[GraphNode, float]]:
        """(target, weight) of the `n` strongest edges out of a node."""
        return self._strongest(self.edges.sources, self.edges.targets, node, n)

    def add_supernode(self, label: str, nodes: Iterable[GraphNode | str]) -> Supernode:
        """Groups nodes, by themselves or by their viewer ids."""
        made = Supernode(label, tuple(node if isinstance(node, str) else node.id for node in nodes))
        self.supernodes.append(made)
        return made

    def to_networkx(self) -> networkx.DiGraph[int]:
        """Nodes by number with their facts as attributes; edges from source to target with `weight`.

        Raises ImportError where networkx is not installed.
        """
        try:
            import networkx
        except ImportError as error:
            raise ImportError("networkx is not installed; run: pip install networkx") from error
        graph: networkx.DiGraph[int] = networkx.DiGraph(
            title=self.info.title, prompt="".join(self.info.tokens), name=self.info.name
        )
        for node in self.nodes:
            graph.add_node(node.number, **{k: v for k, v in vars(node).items() if k != "number"})
        graph.add_weighted_edges_from(
            zip(self.edges.sources.tolist(), self.edges.targets.tolist(), self.edges.weights.tolist())
        )
        return graph

    def to_viewer(self) -> dict[str, Any]:
        """The graph as the JSON object that existing graph viewers read; pruned by the defaults unless it was before."""
        from glasshouse.client.attribution.viewer import viewer_graph

        return viewer_graph(self if self.thresholds is not None else self.prune())

    def to_json(self) -> str:
        """`to_viewer` as text."""
        import json

        return json.dumps(self.to_viewer(), ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Writes everything to one file: ``.json`` in the viewers' form, anything else as numpy's ``.npz``."""
        from glasshouse.client.attribution import graph_files

        path = Path(path)
        if path.suffix == ".json":
            path.write_text(self.to_json(), encoding="utf-8")
        else:
            graph_files.write(self, path)

    @staticmethod
    def load(path: str | Path) -> AttributionGraph:
        """What `save` wrote as ``.npz``. Raises ValueError for anything else."""
        from glasshouse.client.attribution import graph_files

        return graph_files.read(Path(path))

    def annotated(self) -> GraphInfo:
        """The info with this graph's own marks."""
        return replace(self.info, pinned=list(self.pinned), supernodes=list(self.supernodes))

    def _mask(self, kind: NodeKind) -> Mask:
        starts = {
            "feature": (0, self.first_error),
            "error": (self.first_error, self.first_token),
            "token": (self.first_token, self.first_logit),
            "logit": (self.first_logit, self.n_nodes_total),
        }
        mask = np.zeros(self.n_nodes_total, dtype=np.bool_)
        mask[slice(*starts[kind])] = True
        return mask

    def _strongest(
        self, own: NDArray[np.int32], others: NDArray[np.int32], node: GraphNode | int, n: int
    ) -> list[tuple[GraphNode, float]]:
        number = node if isinstance(node, int) else node.number
        mine = np.flatnonzero(own == number)
        order = mine[np.argsort(-np.abs(self.edges.weights[mine]), kind="stable")[:n]]
        return [(self.node(int(others[i])), float(self.edges.weights[i])) for i in order]


def edges_of(arrays: Mapping[str, NDArray[Any]]) -> Edges:
    """The edges among arrays as the server names them."""
    return Edges(
        arrays["edge_targets"].astype(np.int32, copy=False),
        arrays["edge_sources"].astype(np.int32, copy=False),
        arrays["edge_weights"].astype(np.float32, copy=False),
    )


def features_of(arrays: Mapping[str, NDArray[Any]]) -> GraphFeatures:
    """The features among arrays as the server names them."""
    return GraphFeatures(
        layers=arrays["feature_layers"].astype(np.int32, copy=False),
        indices=arrays["feature_indices"].astype(np.int32, copy=False),
        positions=arrays["feature_positions"].astype(np.int32, copy=False),
        activations=arrays["feature_values"].astype(np.float32, copy=False),
    )
