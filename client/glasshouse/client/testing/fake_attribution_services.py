"""AttributionService of a fake server: answers of the right shape that mean nothing and are the same every time.

A metric is a checksum of its input's tokens; a score is a sine of its place. Scores of tokens sum to the change of the
metric, the parts of a logit to the logit, so that what holds of a server's answers holds of these. A graph has one
feature a layer and position, each fed by its token, feeding the next layer's and the logit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from google.longrunning import operations_pb2
from numpy.typing import NDArray

from glasshouse.client.testing.failures import invalid, refused
from glasshouse.client.testing.fake_model import D_MODEL, N_HEADS, N_LAYERS, FakeModel
from glasshouse.client.testing.fake_operations import FakeOperations
from glasshouse.v1 import attribution_graphs_pb2 as stored_pb
from glasshouse.v1 import attribution_pb2 as pb
from glasshouse.v1 import metrics_pb2, tensors_pb2
from glasshouse.wire import reasons
from glasshouse.wire.tensors import chunks, wire_dtype

_HELD = pb.HeldFixed(statement="Nothing was held fixed. Nothing was computed either: this server is a fake.")
_SECONDS = 0.01


class FakeAttributionServices:
    """Attribution of the fake models. Graphs and circuits are kept until they are deleted."""

    def __init__(self, model: Callable[..., FakeModel], operations: FakeOperations) -> None:
        self._model_of = model
        self._operations = operations
        self._graphs: dict[str, tuple[stored_pb.AttributionGraph, dict[str, NDArray[Any]]]] = {}
        self._circuits: dict[str, stored_pb.Circuit] = {}

    # -- one input -----------------------------------------------------------------------------------------------

    def attribute_tokens(self, request: pb.AttributeTokensRequest) -> Iterator[pb.AttributeTokensResponse]:
        """Scores that sum to the change of the value, which is 0 at any baseline but an input."""
        model, ids = self._input(request)
        _metric(model, request.metric, ids)
        value, baseline_value = _number(ids), 0.0
        if request.HasField("baseline_input"):
            other = model.token_ids(request.baseline_input, "baseline_input")
            _same_length(ids, other, "baseline_input")
            baseline_value = _number(other)
        scores = _parts(value - baseline_value, len(ids))
        arrays = {}
        if request.by_element:
            arrays["attributions"] = np.repeat(scores[:, None] / D_MODEL, D_MODEL, axis=1).astype(np.float32)
        steps = request.steps or 64
        yield pb.AttributeTokensResponse(progress=pb.AttributionProgress(done=steps, total=steps))
        yield pb.AttributeTokensResponse(
            attribution=pb.TokenAttribution(
                input=_fed(model, ids),
                scores=scores,
                value=value,
                baseline_value=baseline_value,
                hook_point=request.hook_point or "hook_embed",
                held_fixed=_HELD,
                tensors=_announced(arrays),
            )
        )
        for piece in _pieces(arrays):
            yield pb.AttributeTokensResponse(tensor=piece)

    def direct_attribution(
        self, request: pb.DirectAttributionRequest
    ) -> Iterator[pb.DirectAttributionResponse]:
        """Parts that sum to the logit."""
        model, ids = self._input(request)
        logit = _number(ids)
        names = [
            "hook_embed",
            *(f"blocks.{n}.hook_{part}_out" for n in range(N_LAYERS) for part in ("attn", "mlp")),
        ]
        parts = _parts(logit, len(names))
        attention, mlps = parts[1::2], parts[2::2]
        arrays = {
            "heads": np.repeat(attention[:, None] / N_HEADS, N_HEADS, axis=1).astype(np.float32),
            "head_bias": np.zeros(N_LAYERS, np.float32),
            "neurons": np.repeat(mlps[:, None] / 4, 4, axis=1).astype(np.float32),
            "neuron_bias": np.zeros(N_LAYERS, np.float32),
        }
        result = pb.DirectAttributionResult(
            input=_fed(model, ids),
            position=request.position if request.HasField("position") else len(ids) - 1,
            targets=_fed(model, _tokens(model, request.targets, "targets")),
            foils=_fed(model, _tokens(model, request.foils, "foils", required=False)),
            logit=logit,
            contributions=[pb.Contribution(hook_point=n, part=part) for n, part in zip(names, parts)],
            held_fixed=_HELD,
            tensors=_announced(arrays),
        )
        for n, name in enumerate(request.dictionaries):
            held = model.dictionary(name, f"dictionaries[{n}]")
            result.features.append(
                pb.FeatureContributions(
                    dictionary=held.name, hook_point=held.hook_point, features=[0], parts=[1.0], total=1.0
                )
            )
        yield pb.DirectAttributionResponse(attribution=result)
        for piece in _pieces(arrays):
            yield pb.DirectAttributionResponse(tensor=piece)

    def attribute_features(
        self, request: pb.AttributeFeaturesRequest
    ) -> Iterator[pb.AttributeFeaturesResponse]:
        """One feature a position, and no error."""
        model, ids = self._input(request)
        _metric(model, request.metric, ids)
        value, n = _number(ids), len(ids)
        result = pb.FeatureAttributionResult(input=_fed(model, ids), held_fixed=_HELD)
        arrays: dict[str, NDArray[Any]] = {}
        for index, name in enumerate(request.dictionaries):
            held = model.dictionary(name, f"dictionaries[{index}]")
            result.dictionaries.append(
                pb.DictionaryAttribution(dictionary=held.name, hook_point=held.hook_point, value=value)
            )
            arrays |= {
                f"{index}.indptr": np.arange(n + 1, dtype=np.int64),
                f"{index}.features": np.array([token % 8 for token in ids], np.int32),
                f"{index}.attributions": _parts(value, n).astype(np.float32),
                f"{index}.errors": np.zeros(n, np.float32),
            }
        result.tensors.extend(_announced(arrays))
        yield pb.AttributeFeaturesResponse(result=result)
        for piece in _pieces(arrays):
            yield pb.AttributeFeaturesResponse(tensor=piece)

    # -- two inputs ----------------------------------------------------------------------------------------------

    def patch_sweep(self, request: pb.PatchSweepRequest) -> Iterator[pb.PatchSweepResponse]:
        """A value a node, layer by layer."""
        model = self._model_of(request.model)
        clean = model.token_ids(request.clean, "clean")
        corrupt = model.token_ids(request.corrupt, "corrupt") if request.HasField("corrupt") else None
        _metric(model, request.metric, clean)
        started, sizes = _started(model, clean, corrupt, request.grids)
        if request.direction == pb.PATCH_DIRECTION_DENOISE:
            started.base_value = started.corrupt_value
        yield pb.PatchSweepResponse(started=started)
        first = 0
        for size in sizes:
            yield pb.PatchSweepResponse(
                values=pb.SweepValues(first_node=first, values=started.base_value + _sines(first, size))
            )
            first += size
        yield pb.PatchSweepResponse(finished=pb.SweepFinished(n_nodes=first, seconds=_SECONDS))

    def mediate_effect(self, request: pb.MediateEffectRequest) -> Iterator[pb.MediateEffectResponse]:
        """Direct and indirect effects that sum to the total."""
        model, clean, corrupt = self._pair(request)
        started, sizes = _started(model, clean, corrupt, request.grids)
        total = started.corrupt_value - started.clean_value
        yield pb.MediateEffectResponse(started=started)
        first = 0
        for size in sizes:
            through = _sines(first, size)
            yield pb.MediateEffectResponse(
                values=pb.MediationValues(
                    first_node=first, total=total, direct=total - through, indirect=through
                )
            )
            first += size
        yield pb.MediateEffectResponse(finished=pb.SweepFinished(n_nodes=first, seconds=_SECONDS))

    def path_patch(self, request: pb.PathPatchRequest) -> pb.PathPatchResponse:
        """An effect a sender."""
        model, clean, corrupt = self._pair(request)
        base = _number(clean)
        return pb.PathPatchResponse(
            clean=_fed(model, clean),
            corrupt=_fed(model, corrupt),
            base_value=base,
            values=base + _sines(0, len(request.senders)),
            held_fixed=_HELD,
        )

    def attribution_patch(self, request: pb.AttributionPatchRequest) -> Iterator[pb.AttributionPatchResponse]:
        """A score a node, or an edge."""
        model, clean, corrupt = self._pair(request)
        result = pb.AttributionPatchResult(
            clean=_fed(model, clean),
            corrupt=_fed(model, corrupt),
            clean_value=_number(clean),
            corrupt_value=_number(corrupt),
            held_fixed=_HELD,
        )
        arrays: dict[str, NDArray[Any]]
        if request.WhichOneof("scored") == "edges":
            result.method = "eap-ig" if request.edges.steps else "eap"
            result.sources.extend(SOURCES)
            result.destinations.extend(DESTINATIONS)
            shape = (len(SOURCES), len(DESTINATIONS))
            valid = np.triu(np.ones(shape, np.bool_))
            arrays = {"scores": _sines(0, valid.size).reshape(shape).astype(np.float32), "valid": valid}
        else:
            result.method = "atp*" if request.nodes.qk_fix and request.nodes.grad_drop else "atp"
            result.magnitudes = request.nodes.grad_drop
            shape = (N_LAYERS, len(clean))
            arrays = {
                name: _sines(n, N_LAYERS * len(clean)).reshape(shape).astype(np.float32)
                for n, name in enumerate(request.nodes.components or ["hook_mlp_out"])
            }
        result.tensors.extend(_announced(arrays))
        yield pb.AttributionPatchResponse(result=result)
        for piece in _pieces(arrays):
            yield pb.AttributionPatchResponse(tensor=piece)

    # -- operations ----------------------------------------------------------------------------------------------

    def discover_circuit(self, request: pb.DiscoverCircuitRequest) -> operations_pb2.Operation:
        """The embedding to the first head to the logits."""
        model, clean, corrupt = self._pair(request, metric=False)
        circuit = stored_pb.Circuit(
            name=f"circuits/{len(self._circuits) + 1}",
            model=f"models/{model.name}",
            clean_token_ids=clean,
            clean_tokens=model.strings(clean),
            corrupt_token_ids=corrupt,
            corrupt_tokens=model.strings(corrupt),
            sources=SOURCES,
            destinations=DESTINATIONS,
            edge_sources=[1, 0],
            edge_destinations=[len(DESTINATIONS) - 1, 0],
            n_edges_total=len(SOURCES) * len(DESTINATIONS),
            threshold=request.threshold,
            corrupt_value=1.0,
            complement_value=1.0,
            faithfulness=1.0,
            completeness=1.0,
            held_fixed=_HELD.statement,
        )
        self._circuits[circuit.name] = circuit
        return self._operations.start(circuit.n_edges_total, circuit, _tracing)

    def create_graph(self, request: pb.CreateAttributionGraphRequest) -> operations_pb2.Operation:
        """A chain of features a position."""
        model, ids = self._input(request)
        graph, arrays = _graph(model, ids, request.title, f"attributionGraphs/{len(self._graphs) + 1}")
        self._graphs[graph.name] = (graph, arrays)
        return self._operations.start(graph.n_features, graph, _tracing)

    def estimate(self, request: pb.EstimateAttributionRequest) -> pb.EstimateAttributionResponse:
        """Next to nothing."""
        kind = request.WhichOneof("operation")
        if kind is None:
            raise invalid("graph", "no operation", reasons.FIELD_REQUIRED)
        return pb.EstimateAttributionResponse(
            estimate=pb.AttributionEstimate(
                memory_bytes=1 << 20, seconds=_SECONDS, passes=8, size=8, memory_budget_bytes=1 << 30,
                seconds_budget=60.0, seconds_upper_bound=_SECONDS, passes_upper_bound=8,
            )
        )  # fmt: skip

    # -- features ------------------------------------------------------------------------------------------------

    def intervene(self, request: pb.InterveneOnFeaturesRequest) -> Iterator[pb.InterveneOnFeaturesResponse]:
        """What is predicted happens."""
        model = self._model_of(request.model)
        if request.graph:
            ids = list(self._graph(request.graph)[0].token_ids)
        else:
            ids = model.token_ids(request.input)
        if not request.settings:
            raise invalid("settings", "no setting", reasons.FIELD_REQUIRED)
        n = len(request.settings)
        moved = np.array([setting.value for setting in request.settings], np.float32)
        arrays: dict[str, NDArray[Any]] = {
            "layers": np.array([setting.layer for setting in request.settings], np.int32),
            "features": np.array([setting.feature for setting in request.settings], np.int32),
            "positions": np.array([setting.position for setting in request.settings], np.int32),
            "before": np.zeros(n, np.float32),
            "after": moved,
            "predicted": moved,
            "activations_before": np.zeros(n, np.float32),
            "activations_after": moved,
        }
        tokens = _tokens(model, request.tokens, "tokens", required=False) or [ids[-1]]
        result = pb.FeatureInterventionResult(
            input=_fed(model, ids),
            logits=[
                pb.LogitChange(
                    token_id=token, token=model.strings([token])[0], logit_after=1.0, probability_before=0.25,
                    probability_after=0.5, measured=1.0, predicted=1.0,
                )
                for token in tokens
            ],
            feature_correlation=1.0,
            logit_correlation=1.0,
            held_fixed=_HELD,
            tensors=_announced(arrays),
        )  # fmt: skip
        if request.HasField("generate"):
            result.text_before, result.text_after = "before", "after"
        yield pb.InterveneOnFeaturesResponse(result=result)
        for piece in _pieces(arrays):
            yield pb.InterveneOnFeaturesResponse(tensor=piece)

    def connections(self, request: pb.FeatureConnectionsRequest) -> pb.FeatureConnectionsResponse:
        """The same feature of the layer before, and of the one after."""

        def beside(layer: int) -> list[pb.FeatureConnection]:
            there = 0 <= layer < N_LAYERS
            return [pb.FeatureConnection(layer=layer, feature=request.feature, weight=1.0)] if there else []

        return pb.FeatureConnectionsResponse(
            incoming=beside(request.layer - 1), outgoing=beside(request.layer + 1), held_fixed=_HELD
        )

    # -- what is stored ------------------------------------------------------------------------------------------

    def get_graph(
        self, request: stored_pb.GetAttributionGraphRequest
    ) -> stored_pb.GetAttributionGraphResponse:
        """One graph."""
        return stored_pb.GetAttributionGraphResponse(graph=self._graph(request.name)[0])

    def list_graphs(
        self, request: stored_pb.ListAttributionGraphsRequest
    ) -> stored_pb.ListAttributionGraphsResponse:
        """All graphs, the newest first."""
        return stored_pb.ListAttributionGraphsResponse(
            graphs=[graph for graph, _ in reversed(self._graphs.values())]
        )

    def update_graph(
        self, request: stored_pb.UpdateAttributionGraphRequest
    ) -> stored_pb.UpdateAttributionGraphResponse:
        """Its marks."""
        graph, _ = self._graph(request.name)
        if request.HasField("title"):
            graph.title = request.title
        if request.HasField("annotations"):
            del graph.pinned[:], graph.supernodes[:]
            graph.pinned.extend(request.annotations.pinned)
            graph.supernodes.extend(request.annotations.supernodes)
        return stored_pb.UpdateAttributionGraphResponse(graph=graph)

    def delete_graph(
        self, request: stored_pb.DeleteAttributionGraphRequest
    ) -> stored_pb.DeleteAttributionGraphResponse:
        """It is no longer there."""
        self._graph(request.name)
        del self._graphs[request.name]
        return stored_pb.DeleteAttributionGraphResponse()

    def read_graph(
        self, request: stored_pb.ReadAttributionGraphRequest
    ) -> Iterator[stored_pb.ReadAttributionGraphResponse]:
        """Its arrays; nothing of it is pruned."""
        graph, arrays = self._graph(request.name)
        if request.HasField("node_threshold") or request.HasField("edge_threshold"):
            n_nodes = (
                len(arrays["feature_layers"]) + (N_LAYERS + 1) * len(graph.token_ids) + len(graph.logits)
            )
            arrays = arrays | {
                "nodes_kept": np.ones(n_nodes, np.bool_),
                "cumulative_influence": np.linspace(0, 1, n_nodes, dtype=np.float32),
            }
        contents = stored_pb.GraphContents(graph=graph, tensors=_announced(arrays), scores=graph.scores)
        yield stored_pb.ReadAttributionGraphResponse(contents=contents)
        for piece in _pieces(arrays):
            yield stored_pb.ReadAttributionGraphResponse(tensor=piece)

    def get_circuit(self, request: stored_pb.GetCircuitRequest) -> stored_pb.GetCircuitResponse:
        """One circuit."""
        return stored_pb.GetCircuitResponse(circuit=self._circuit(request.name))

    def list_circuits(self, request: stored_pb.ListCircuitsRequest) -> stored_pb.ListCircuitsResponse:
        """All circuits, the newest first, without edges."""
        found = []
        for circuit in reversed(self._circuits.values()):
            bare = stored_pb.Circuit()
            bare.CopyFrom(circuit)
            for field in ("sources", "destinations", "edge_sources", "edge_destinations"):
                bare.ClearField(field)
            found.append(bare)
        return stored_pb.ListCircuitsResponse(circuits=found)

    def delete_circuit(self, request: stored_pb.DeleteCircuitRequest) -> stored_pb.DeleteCircuitResponse:
        """It is no longer there."""
        self._circuit(request.name)
        del self._circuits[request.name]
        return stored_pb.DeleteCircuitResponse()

    def _input(self, request: Any) -> tuple[FakeModel, list[int]]:
        model = self._model_of(request.model)
        return model, model.token_ids(request.input)

    def _pair(self, request: Any, metric: bool = True) -> tuple[FakeModel, list[int], list[int]]:
        model = self._model_of(request.model)
        clean, corrupt = model.token_ids(request.clean, "clean"), model.token_ids(request.corrupt, "corrupt")
        _same_length(clean, corrupt)
        if metric:
            _metric(model, request.metric, clean)
        return model, clean, corrupt

    def _graph(self, name: str) -> tuple[stored_pb.AttributionGraph, dict[str, NDArray[Any]]]:
        if name not in self._graphs:
            raise _missing(name)
        return self._graphs[name]

    def _circuit(self, name: str) -> stored_pb.Circuit:
        if name not in self._circuits:
            raise _missing(name)
        return self._circuits[name]


SOURCES = ["embed", *(f"a{layer}.h{head}" for layer in range(N_LAYERS) for head in range(N_HEADS))]
DESTINATIONS = [*(f"a{layer}.h{head}.q" for layer in range(N_LAYERS) for head in range(N_HEADS)), "logits"]


def _missing(name: str) -> Exception:
    return refused(
        "NOT_FOUND", f"there is no {name!r}", reason=reasons.RESOURCE_NOT_FOUND, field="name", value=name
    )


def _same_length(clean: Sequence[int], other: Sequence[int], field: str = "corrupt") -> None:
    if len(clean) != len(other):
        message = f"the inputs have {len(clean)} and {len(other)} tokens"
        raise invalid(field, message, reasons.VALUE_OUT_OF_RANGE, "Give inputs of equal length")


def _metric(model: FakeModel, metric: metrics_pb2.Metric, ids: Sequence[int]) -> None:
    """Refuses a metric that says nothing, or is read where there is no token."""
    kind = metric.WhichOneof("number")
    if kind is None:
        raise invalid("metric", "no metric", reasons.FIELD_REQUIRED)
    number = getattr(metric, kind)
    if kind in ("logit_difference", "log_probability", "probability"):
        _tokens(model, number.targets, f"metric.{kind}.targets")
    if metric.HasField("position") and not 0 <= metric.position < len(ids):
        raise invalid("metric.position", f"no position {metric.position}", reasons.POSITION_UNREACHABLE)


def _tokens(
    model: FakeModel, choice: metrics_pb2.TokenChoice, field: str, required: bool = True
) -> list[int]:
    """Chosen tokens: of text, one character each."""
    found = list(choice.token_ids)
    for n, text in enumerate(choice.texts):
        ids = list(text.encode())
        if len(ids) != 1:
            message = f"{text!r} is {len(ids)} tokens"
            raise invalid(f"{field}.texts[{n}]", message, reasons.VALUE_MALFORMED, "Give one token")
        found += ids
    found += range(97, 97 + choice.top_k)
    if required and not found:
        raise invalid(field, "no token", reasons.FIELD_REQUIRED)
    return found


def _graph(
    model: FakeModel, ids: list[int], title: str, name: str
) -> tuple[stored_pb.AttributionGraph, dict[str, NDArray[Any]]]:
    n, n_features = len(ids), N_LAYERS * len(ids)
    layers = np.repeat(np.arange(N_LAYERS, dtype=np.int32), n)
    positions = np.tile(np.arange(n, dtype=np.int32), N_LAYERS)
    first_token = n_features + N_LAYERS * n
    logit = first_token + n
    targets = [*range(n), *range(n, n_features), logit]
    sources = [*range(first_token, logit), *range(n_features - n), n_features - 1]
    graph = stored_pb.AttributionGraph(
        name=name,
        model=f"models/{model.name}",
        title=title or model.text(ids),
        token_ids=ids,
        tokens=model.strings(ids),
        transcoders=["fake"],
        n_layers=N_LAYERS,
        n_features=n_features,
        n_active_features=n_features,
        n_edges=len(targets),
        logits=[stored_pb.GraphLogit(label="a", weight=1.0, token_id=97)],
        scores=stored_pb.GraphScores(replacement=1.0, completeness=1.0),
        held_fixed=_HELD.statement,
    )
    return graph, {
        "feature_layers": layers,
        "feature_indices": np.array([ids[p] % 8 for p in positions], np.int32),
        "feature_positions": positions,
        "feature_values": np.ones(n_features, np.float32),
        "edge_targets": np.array(targets, np.int32),
        "edge_sources": np.array(sources, np.int32),
        "edge_weights": np.ones(len(targets), np.float32),
    }


def _started(
    model: FakeModel, clean: list[int], corrupt: list[int] | None, grids: Sequence[pb.PatchGrid]
) -> tuple[pb.SweepStarted, list[int]]:
    """What a sweep begins with, and the nodes of each layer of each grid."""
    if not grids:
        raise invalid("grids", "no grid", reasons.FIELD_REQUIRED)
    if corrupt is not None:
        _same_length(clean, corrupt)
    axes, sizes = [], []
    for grid in grids:
        layers = list(grid.layers) or list(range(N_LAYERS))
        heads = list(grid.heads) or (list(range(N_HEADS)) if grid.by_head else [])
        columns = heads or list(grid.units) or list(grid.features)
        kind = "head" if heads else "unit" if grid.units else "feature" if grid.dictionary else ""
        positions = [] if grid.all_positions_at_once else list(range(len(clean)))
        axes.append(
            pb.SweepAxes(
                component=grid.component or grid.dictionary,
                column_kind=kind,
                layers=layers,
                columns=columns,
                positions=positions,
            )
        )
        sizes += [max(len(columns), 1) * max(len(positions), 1)] * len(layers)
    value = _number(clean)
    started = pb.SweepStarted(
        clean=_fed(model, clean),
        clean_value=value,
        base_value=value,
        grids=axes,
        n_nodes=sum(sizes),
        held_fixed=_HELD,
    )
    if corrupt is not None:
        started.corrupt.CopyFrom(_fed(model, corrupt))
        started.corrupt_value = _number(corrupt)
    return started, sizes


def _tracing(phase: str, fraction: float, done: int, total: int) -> Any:
    return pb.AttributionMetadata(phase=phase, fraction=fraction, done=done, total=total)


def _fed(model: FakeModel, ids: Sequence[int]) -> pb.FedTokens:
    return pb.FedTokens(token_ids=ids, tokens=model.strings(ids))


def _number(ids: Sequence[int]) -> float:
    return zlib.crc32(np.asarray(ids, dtype="<i4").tobytes()) % 4096 / 512


def _sines(first: int, n: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.sin(np.arange(first, first + n, dtype=np.float64) + 1.0)
    return found


def _parts(whole: float, n: int) -> NDArray[np.float64]:
    """n numbers that sum to `whole`."""
    parts = _sines(0, n)
    parts += (whole - parts.sum()) / max(n, 1)
    return parts


def _announced(arrays: dict[str, NDArray[Any]]) -> list[tensors_pb2.NamedTensor]:
    return [
        tensors_pb2.NamedTensor(name=name, dtype=wire_dtype(value.dtype), shape=value.shape)
        for name, value in arrays.items()
    ]


def _pieces(arrays: dict[str, NDArray[Any]]) -> Iterator[tensors_pb2.NamedTensorChunk]:
    for name, value in arrays.items():
        for piece in chunks(value):
            yield tensors_pb2.NamedTensorChunk(name=name, piece=piece)
