"""CreateAttributionGraph and stored graphs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from google.longrunning import operations_pb2

from glasshouse.server.attribution.attribution_graph import AttributionGraph
from glasshouse.server.attribution.influence import Pruning
from glasshouse.server.attribution.viewer import GraphCard, viewer_graph
from glasshouse.server.dictionaries.store import HeldDictionary
from glasshouse.server.operations.attribution import budget, graph_tracing
from glasshouse.server.operations.attribution.budget import Estimate
from glasshouse.server.operations.attribution.graph_tracing import AskedTarget, GraphRequest
from glasshouse.server.operations.attribution.lanes import Ticket
from glasshouse.server.operations.attribution.results import StoredResult
from glasshouse.server.operations.attribution.transcoder_sets import transcoders
from glasshouse.server.operations.manager import Progress
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.v1 import attribution_graphs_pb2 as stored_pb
from glasshouse.v1 import attribution_pb2 as pb
from glasshouse.wire import reasons
from glasshouse.wire.tensors import CHUNK_BYTES

from .. import fields
from ..call import Call
from ..catalogue import ServedModel
from ..pages import page
from ..tensors import vector
from .answers import Arrays, announced, array, pieces
from .metrics import MetricReader
from .office import Office
from .operations import of_collection, started, telling
from .results import estimate_message, graph_message

COLLECTION = "attributionGraphs/"
MOST_LOGITS = 1000
MOST_TARGETS = 1000
MOST_BATCH = 4096
MOST_INTERVAL = 1000
MOST_TITLE = 200
MOST_PINNED = 10_000
MOST_SUPERNODES = 1000
DEFAULT_FEATURES = 4096
NODE_THRESHOLD, EDGE_THRESHOLD = 0.8, 0.98


class Graphs:
    """Traces, and what they left."""

    def __init__(self, office: Office) -> None:
        self._office = office

    async def create(self, request: pb.CreateAttributionGraphRequest, call: Call) -> operations_pb2.Operation:
        """Starts a trace."""
        office = self._office
        model, asked, chosen = await self.read(request, call)
        estimate = await self.estimate(model, asked)
        self.check(estimate)
        title = request.title or self._title(model, asked.tokens)

        async def work(progress: Progress) -> StoredResult:
            def compute(ticket: Ticket) -> StoredResult:
                progress.phase = "tracing"
                ticket.beside(model.engine)
                twin = office.lanes.twins.of(model.engine)
                graph, seconds = graph_tracing.trace(twin, asked, ticket)
                progress.phase = "storing"
                facts = graph_tracing.graph_facts(
                    graph,
                    title=title,
                    model=model.resource_name,
                    names=[item.name for item in chosen],
                    strings=model.strings.of,
                    seconds=seconds,
                )
                return office.results.put("attributionGraphs", facts, graph_tracing.graph_tensors(graph))

            return await office.lanes.operations.run(compute, telling(progress))

        facts = estimate_message(estimate, office.settings)
        return started(office.operations.submit("CreateAttributionGraph", work, facts))

    @staticmethod
    def _title(model: ServedModel, tokens: Sequence[int]) -> str:
        """The prompt's beginning, without special tokens."""
        special = model.engine.info.special_token_ids
        return "".join(model.strings.of([token for token in tokens if token not in special]))[:MOST_TITLE]

    async def read(
        self, request: pb.CreateAttributionGraphRequest, call: Call
    ) -> tuple[ServedModel, GraphRequest, list[HeldDictionary]]:
        """A request, checked."""
        office = self._office
        model = office.catalogue.find(request.model, "model")
        reader = office.reader(model)
        tokens = await reader.prompt(request.input, request.HasField("input"), "input")
        chosen = transcoders(model.engine.dictionaries, request.transcoders, field="transcoders")
        await office.check_transcoders(model, chosen, "transcoders")
        targets = _targets(request.targets, model, MetricReader(model, reader, tokens))
        for name, is_set in (
            ("desired_logit_probability", request.HasField("desired_logit_probability")),
            ("max_logits", bool(request.max_logits)),
        ):
            if targets and is_set:
                raise InvalidArgument(
                    f"{name} chooses likely tokens, and targets are given",
                    reason=reasons.FIELD_CONFLICT,
                    field=name,
                    remedy="leave out one of them",
                )
        probability = 0.95
        if request.HasField("desired_logit_probability"):
            probability = share(request.desired_logit_probability, "desired_logit_probability")
        if len(request.title) > MOST_TITLE:
            raise fields.out_of_range("title", request.title, f"at most {MOST_TITLE} characters")
        call.accepted(len(tokens), ())
        asked = GraphRequest(
            tokens=tokens,
            dictionaries=[item.dictionary for item in chosen],
            targets=targets,
            desired_probability=probability,
            max_logits=fields.whole(request.max_logits or 10, "max_logits", 1, MOST_LOGITS),
            max_features=fields.whole(
                request.max_feature_nodes or DEFAULT_FEATURES, "max_feature_nodes", 1, 2**31 - 1
            ),
            batch_size=fields.whole(
                request.batch_size or graph_tracing.DEFAULT_BATCH, "batch_size", 1, MOST_BATCH
            ),
            update_interval=fields.whole(request.update_interval or 4, "update_interval", 1, MOST_INTERVAL),
            skip_first=not request.include_first_position,
        )
        return model, asked, chosen

    async def estimate(self, model: ServedModel, asked: GraphRequest) -> Estimate:
        """What a trace will take."""
        return await self._office.run(model, lambda twin, _: graph_tracing.estimate_graph(twin, asked))

    def check(self, estimate: Estimate) -> None:
        """Refuses a trace over the budget, or whose result would not fit on the disk."""
        budget.check(estimate, self._office.settings)
        self._office.results.check_room(estimate.stored_bytes)

    async def get(
        self, request: stored_pb.GetAttributionGraphRequest
    ) -> stored_pb.GetAttributionGraphResponse:
        """A stored graph."""
        return stored_pb.GetAttributionGraphResponse(graph=graph_message(self._find(request.name)))

    async def list(
        self, request: stored_pb.ListAttributionGraphsRequest
    ) -> stored_pb.ListAttributionGraphsResponse:
        """The stored graphs."""
        found, token = page(
            self._office.results.all("attributionGraphs"),
            page_size=request.page_size,
            page_token=request.page_token,
            default=50,
            most=1000,
        )
        return stored_pb.ListAttributionGraphsResponse(
            graphs=[graph_message(result) for result in found], next_page_token=token
        )

    async def update(
        self, request: stored_pb.UpdateAttributionGraphRequest
    ) -> stored_pb.UpdateAttributionGraphResponse:
        """Keeps a title, pinned nodes, supernodes."""
        facts = dict(self._find(request.name).facts)
        if request.HasField("title"):
            if not 0 < len(request.title) <= MOST_TITLE:
                raise fields.out_of_range("title", request.title, f"of 1 to {MOST_TITLE} characters")
            facts["title"] = request.title
        if request.HasField("annotations"):
            facts |= _annotations(request.annotations)
        result = await asyncio.to_thread(self._office.results.update, request.name, facts)
        return stored_pb.UpdateAttributionGraphResponse(graph=graph_message(result))

    async def delete(
        self, request: stored_pb.DeleteAttributionGraphRequest
    ) -> stored_pb.DeleteAttributionGraphResponse:
        """Deletes a stored graph."""
        self._office.results.delete(of_collection(request.name, COLLECTION))
        return stored_pb.DeleteAttributionGraphResponse()

    async def contents(
        self, request: stored_pb.ReadAttributionGraphRequest
    ) -> AsyncIterator[stored_pb.ReadAttributionGraphResponse]:
        """Nodes and edges, as arrays or as viewer JSON."""
        result = self._find(request.name)
        as_json = request.format == stored_pb.GRAPH_FORMAT_VIEWER_JSON
        if request.format not in stored_pb.GraphFormat.values():
            raise fields.out_of_range("format", request.format, "one of GraphFormat")
        node_threshold = edge_threshold = None
        if request.HasField("node_threshold") or as_json:
            given = request.node_threshold if request.HasField("node_threshold") else NODE_THRESHOLD
            node_threshold = share(given, "node_threshold")
        if request.HasField("edge_threshold") or as_json:
            given = request.edge_threshold if request.HasField("edge_threshold") else EDGE_THRESHOLD
            edge_threshold = share(given, "edge_threshold")
        graph = await asyncio.to_thread(self._load, result)
        pruning = None
        if node_threshold is not None or edge_threshold is not None:
            pruning = await asyncio.to_thread(
                graph.prune, node_threshold=node_threshold or 1.0, edge_threshold=edge_threshold or 1.0
            )
        contents = stored_pb.GraphContents(graph=graph_message(result))
        scores = await asyncio.to_thread(graph.scores, pruning)
        contents.scores.replacement, contents.scores.completeness = scores.replacement, scores.completeness
        if as_json:
            assert pruning is not None and node_threshold is not None and edge_threshold is not None
            text = await asyncio.to_thread(
                self._viewer_json, result, graph, pruning, node_threshold, edge_threshold
            )
            contents.text_bytes = len(text)
            yield stored_pb.ReadAttributionGraphResponse(contents=contents)
            for offset in range(0, len(text), CHUNK_BYTES):
                piece = stored_pb.GraphTextChunk(byte_offset=offset, data=text[offset : offset + CHUNK_BYTES])
                yield stored_pb.ReadAttributionGraphResponse(text=piece)
            return
        arrays = _arrays(graph, pruning)
        contents.tensors.extend(announced(arrays))
        yield stored_pb.ReadAttributionGraphResponse(contents=contents)
        for chunk in pieces(arrays):
            yield stored_pb.ReadAttributionGraphResponse(tensor=chunk)

    def stored(self, name: str) -> tuple[StoredResult, AttributionGraph]:
        """A stored graph, whole. Blocks."""
        result = self._find(name)
        return result, self._load(result)

    def _find(self, name: str) -> StoredResult:
        return self._office.results.get(of_collection(name, COLLECTION))

    def _load(self, result: StoredResult) -> AttributionGraph:
        return graph_tracing.stored_graph(result.facts, self._office.results.tensors(result.name))

    def _viewer_json(
        self,
        result: StoredResult,
        graph: AttributionGraph,
        pruning: Pruning,
        node_threshold: float,
        edge_threshold: float,
    ) -> bytes:
        facts = result.facts
        card = GraphCard(
            slug=result.name.removeprefix(COLLECTION),
            scan=facts["model"],
            prompt="".join(facts["tokens"]),
            prompt_tokens=tuple(facts["tokens"]),
            transcoders=tuple(facts["transcoders"]),
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
            info={"title": facts["title"], "held_fixed": graph_tracing.HELD_FIXED},
            pinned=tuple(facts["pinned"]),
            supernodes=tuple((group["label"], *group["node_ids"]) for group in facts["supernodes"]),
        )
        labels = {logit["token_id"]: logit["label"] for logit in facts["logits"]}
        labels |= dict(zip(facts["token_ids"], facts["tokens"], strict=True))
        found = viewer_graph(graph, pruning, card, lambda token: labels.get(token, str(token)))
        return json.dumps(found, ensure_ascii=False).encode()


def share(value: float, field: str) -> float:
    """A share of something: above 0, at most 1."""
    if not 0.0 < value <= 1.0:
        raise fields.out_of_range(field, value, "above 0 and at most 1")
    return value


def _arrays(graph: AttributionGraph, pruning: Pruning | None) -> Arrays:
    features = graph.features
    edges = graph.edges if pruning is None else graph.edges.select(pruning.edges)
    arrays = {
        "feature_layers": array(features.layers.int()),
        "feature_indices": array(features.indices.int()),
        "feature_positions": array(features.positions.int()),
        "feature_values": array(features.values),
        "edge_targets": array(edges.targets.int()),
        "edge_sources": array(edges.sources.int()),
        "edge_weights": array(edges.weights),
    }
    if pruning is not None:
        arrays |= {
            "nodes_kept": pruning.nodes.cpu().numpy(),
            "cumulative_influence": array(pruning.cumulative),
        }
    return arrays


def _targets(
    messages: Sequence[stored_pb.LogitTarget], model: ServedModel, reader: MetricReader
) -> list[AskedTarget]:
    if len(messages) > MOST_TARGETS:
        raise fields.out_of_range("targets", f"a list of {len(messages)}", f"at most {MOST_TARGETS}")
    found = []
    for index, message in enumerate(messages):
        field = f"targets[{index}]"
        weight = None
        if message.HasField("weight"):
            weight = fields.finite(message.weight, f"{field}.weight")
            if weight <= 0:
                raise fields.out_of_range(f"{field}.weight", weight, "above 0")
        kind = message.WhichOneof("target")
        if kind is None:
            raise fields.required(field, "what the graph ends in", "give token_id, text or vector")
        if kind == "vector":
            found.append(_vector_target(message, model, weight, field))
            continue
        if kind == "text":
            token = reader.token_of(message.text, f"{field}.text")
        else:
            token = message.token_id
            fields.whole(token, f"{field}.token_id", 0, model.engine.info.vocab_size - 1)
        label = message.label or model.strings.of([token])[0]
        found.append(AskedTarget(label=label, token_id=token, vector=None, weight=weight))
    named = [target.token_id for target in found if target.token_id is not None]
    if len(set(named)) < len(named):
        raise InvalidArgument(
            "targets names a token twice",
            reason=reasons.FIELD_CONFLICT,
            field="targets",
            remedy="name each once",
        )
    return found


def _vector_target(
    message: stored_pb.LogitTarget, model: ServedModel, weight: float | None, field: str
) -> AskedTarget:
    given = vector(message.vector, True, f"{field}.vector", nonzero=True)
    d_model = model.engine.info.d_model
    if len(given) != d_model:
        raise InvalidArgument(
            f"{field}.vector has {len(given)} elements, the model's stream {d_model}",
            reason=reasons.WRONG_WIDTH,
            field=f"{field}.vector",
            value=len(given),
            remedy=f"give {d_model} elements",
        )
    if not message.label:
        raise fields.required(f"{field}.label", "what a vector is called", "give a label")
    if weight is None:
        raise fields.required(f"{field}.weight", "how much a vector counts", "give a weight above 0")
    return AskedTarget(label=message.label, token_id=None, vector=torch.from_numpy(given), weight=weight)


def _annotations(message: stored_pb.GraphAnnotations) -> dict[str, Any]:
    if len(message.pinned) > MOST_PINNED:
        raise fields.out_of_range(
            "annotations.pinned", f"a list of {len(message.pinned)}", f"at most {MOST_PINNED}"
        )
    if len(message.supernodes) > MOST_SUPERNODES:
        raise fields.out_of_range(
            "annotations.supernodes", f"a list of {len(message.supernodes)}", f"at most {MOST_SUPERNODES}"
        )
    for index, group in enumerate(message.supernodes):
        field = f"annotations.supernodes[{index}]"
        if not group.label:
            raise fields.required(f"{field}.label", "what the nodes are called", "give a label")
        if not 0 < len(group.node_ids) <= MOST_PINNED:
            raise fields.out_of_range(
                f"{field}.node_ids", f"a list of {len(group.node_ids)}", f"of 1 to {MOST_PINNED}"
            )
    return {
        "pinned": list(message.pinned),
        "supernodes": [
            {"label": group.label, "node_ids": list(group.node_ids)} for group in message.supernodes
        ],
    }
