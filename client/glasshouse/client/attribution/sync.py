"""Attribution with blocking calls: what `Model` and `Client` do of it. `aio` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.arrays import VectorLike
from glasshouse.client.attribution import builders, calls
from glasshouse.client.attribution.builders import FeatureSetting
from glasshouse.client.attribution.graph import AttributionGraph, GraphInfo
from glasshouse.client.attribution.metrics import Metric, TokensLike
from glasshouse.client.attribution.patches import Direction, Held, PatchGridLike, PatchNode, Replacement
from glasshouse.client.attribution.sweeps import Mediation, PatchResult, PatchSweepResult
from glasshouse.client.attribution.values import (
    AttributionEstimate,
    AttributionPatchResult,
    AttributionProgress,
    Circuit,
    DirectAttribution,
    FeatureAttribution,
    FeatureConnections,
    FeatureIntervention,
    TokenAttribution,
)
from glasshouse.client.dictionaries.names import DictionaryLike
from glasshouse.client.inputs import InputLike
from glasshouse.client.operations import OperationProgress
from glasshouse.client.sync_operation import Operation
from glasshouse.client.sync_transport import MessageStream, Transport

T = TypeVar("T")

OnProgress = Callable[[AttributionProgress], object]


class PatchSweep:
    """A sweep under way: iterate over its `PatchResult`s as they come, or take the `result()`.

    A context manager; leaving it ends what has not finished.
    """

    def __init__(self, call: calls.SweepCall, messages: MessageStream) -> None:
        self._state, self._messages = call.state, messages

    def __enter__(self) -> PatchSweep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[PatchResult]:
        while True:
            while self._state.pending:
                yield self._state.pending.popleft()
            if not self._read():
                return

    @property
    def progress(self) -> AttributionProgress:
        """Nodes done, and in all."""
        return AttributionProgress(self._state.n_done, self._state.n_nodes)

    def result(self) -> PatchSweepResult:
        """Waits for the end; every node, those iterated over before too."""
        while self._read():
            pass
        return self._state.result()

    def cancel(self) -> None:
        """Ends the sweep, here and at the server."""
        self._messages.cancel()

    def _read(self) -> bool:
        if self._state.finished:
            return False
        event = self._messages.read()
        if event is None:
            self._state.end()
            return False
        self._state.feed(event)
        return True


class GraphOperation(Operation[AttributionGraph]):
    """The tracing of an attribution graph: an `Operation` whose result is fetched with its nodes and edges."""

    def result(
        self,
        timeout: float | None = None,
        on_progress: Callable[[OperationProgress], object] | None = None,
    ) -> AttributionGraph:
        """Waits for the end, and fetches the graph. Raises as `Operation.result` does."""
        info: Any = super().result(timeout, on_progress)
        return read_graph(self._transport, calls.read_graph(info.name), None)


class ModelAttribution:
    """Attribution on one model."""

    _transport: Transport
    _name: str

    def attribute_tokens(
        self,
        input: InputLike,
        metric: Metric,
        *,
        hook_point: str = "hook_embed",
        method: Literal["integrated_gradients", "gradient_x_input"] = "integrated_gradients",
        steps: int = 64,
        baseline: InputLike | NDArray[Any] | None = None,
        freeze: Sequence[Held] = (),
        by_element: bool = False,
        progress: OnProgress | None = None,
        timeout: float | None = None,
    ) -> TokenAttribution:
        """Which positions a metric rests on, at the embeddings or any hook point of vectors.

        `baseline`: "mean_embedding" (an input of average tokens), "zeros", another input of as many tokens, or floating
        activations, (d,) or (n_pos, d). By default the first, from which integrated gradients converge, and zeros for
        gradient x input.
        """
        call = calls.attribute_tokens(
            self._name,
            input,
            metric,
            hook_point=hook_point,
            method=method,
            steps=steps,
            baseline=baseline,
            freeze_=freeze,
            by_element=by_element,
        )
        return self._result(call, progress, timeout)

    def direct_attribution(
        self,
        input: InputLike,
        targets: TokensLike,
        foils: TokensLike = (),
        *,
        position: int | None = None,
        dictionaries: DictionaryLike | Sequence[DictionaryLike] = (),
        top_features: int = 100,
        timeout: float | None = None,
    ) -> DirectAttribution:
        """What each layer, head, MLP, neuron and feature writes straight into a logit; the parts sum to it."""
        call = calls.direct_attribution(
            self._name,
            input,
            targets,
            foils,
            position=position,
            dictionaries=dictionaries,
            top_features=top_features,
        )
        return self._result(call, None, timeout)

    def patch_sweep(
        self,
        clean: InputLike,
        corrupt: InputLike | None = None,
        *,
        metric: Metric,
        grids: PatchGridLike | Sequence[PatchGridLike] = "hook_resid_pre",
        direction: Direction = "noise",
        replacement: Replacement = "interchange",
        others: Sequence[InputLike] = (),
        seed: int = 0,
        freeze: Sequence[Held] = (),
        batch_size: int = 0,
        timeout: float | None = None,
    ) -> PatchSweep:
        """The metric with one node after the other patched: iterate over it, or take its `result()`.

        "noise" patches the corrupt run's values into the clean run, "denoise" the other way round. Ablations by
        "zero", or by the "mean" or a "resample" of `others`, need no corrupt input.
        """
        call = calls.patch_sweep(
            self._name,
            clean,
            corrupt,
            metric,
            grids,
            direction=direction,
            replacement=replacement,
            others=others,
            seed=seed,
            freeze_=freeze,
            batch_size=batch_size,
        )
        return PatchSweep(call, self._transport.stream(call, timeout))

    def mediate_effect(
        self,
        clean: InputLike,
        corrupt: InputLike,
        *,
        metric: Metric,
        grids: PatchGridLike | Sequence[PatchGridLike] = "hook_resid_pre",
        batch_size: int = 0,
        timeout: float | None = None,
    ) -> Mediation:
        """Total, direct and indirect effect of the change from clean to corrupt, through each node."""
        call = calls.mediate_effect(self._name, clean, corrupt, metric, grids, batch_size)
        messages = self._transport.stream(call, timeout)
        try:
            while (event := messages.read()) is not None:
                call.state.feed(event)
        finally:
            messages.cancel()
        return call.state.mediation()

    def path_patch(
        self,
        clean: InputLike,
        corrupt: InputLike,
        *,
        metric: Metric,
        senders: Sequence[PatchNode],
        receivers: Sequence[PatchNode],
        direction: Direction = "noise",
        hold_mlps: bool = False,
        timeout: float | None = None,
    ) -> NDArray[np.float64]:
        """(n_senders,): the effect of each sender on the metric, as seen by `receivers` along direct paths alone."""
        call = calls.path_patch(
            self._name, clean, corrupt, metric, senders, receivers, direction=direction, hold_mlps=hold_mlps
        )
        return self._transport.unary(call, timeout)

    def attribution_patch(
        self,
        clean: InputLike,
        corrupt: InputLike,
        *,
        metric: Metric,
        method: Literal["atp", "atp*", "eap", "eap-ig"] = "atp",
        components: Sequence[str] = (),
        steps: int | None = None,
        freeze: Sequence[Held] = (),
        verify_top: int = 0,
        progress: OnProgress | None = None,
        timeout: float | None = None,
    ) -> AttributionPatchResult:
        """Every node's (AtP, AtP*) or edge's (EAP, EAP-IG) patch effect, approximated by gradients.

        The `verify_top` best are done again exactly. `components` are AtP's, `steps` those of EAP-IG (5).
        """
        call = calls.attribution_patch(
            self._name,
            clean,
            corrupt,
            metric,
            method=method,
            components=components,
            steps=steps,
            freeze_=freeze,
            verify_top=verify_top,
        )
        return self._result(call, progress, timeout)

    def attribute_features(
        self,
        input: InputLike,
        metric: Metric,
        *,
        dictionaries: DictionaryLike | Sequence[DictionaryLike],
        method: Literal["integrated_gradients", "gradient_x_input"] = "integrated_gradients",
        steps: int = 10,
        baseline: InputLike | None = None,
        progress: OnProgress | None = None,
        timeout: float | None = None,
    ) -> FeatureAttribution:
        """Which features of dictionaries a metric rests on, with what each dictionary misses."""
        call = calls.attribute_features(
            self._name,
            input,
            metric,
            dictionaries=dictionaries,
            method=method,
            steps=steps,
            baseline=baseline,
        )
        return self._result(call, progress, timeout)

    def discover_circuit(
        self,
        clean: InputLike,
        corrupt: InputLike,
        *,
        threshold: float | None = None,
        target_edges: int | None = None,
        metric: Metric | None = None,
        timeout: float | None = None,
    ) -> Operation[Circuit]:
        """Starts ACDC: the edges that the clean behaviour needs.

        Either the growth of the metric that dropping an edge may cost, or how many edges to keep. `metric` must grow
        with the departure from clean; by default the KL divergence.
        """
        request = builders.discover_circuit(
            self._name, clean, corrupt, threshold=threshold, target_edges=target_edges, value=metric
        )
        return Operation(self._transport, self._transport.unary(calls.discover_circuit(request), timeout))

    def estimate_circuit(
        self,
        clean: InputLike,
        corrupt: InputLike,
        *,
        threshold: float | None = None,
        target_edges: int | None = None,
        metric: Metric | None = None,
        timeout: float | None = None,
    ) -> AttributionEstimate:
        """What `discover_circuit` would take, without starting it."""
        request = builders.discover_circuit(
            self._name, clean, corrupt, threshold=threshold, target_edges=target_edges, value=metric
        )
        return self._transport.unary(calls.estimate(circuit=request), timeout)

    def attribution_graph(
        self,
        input: InputLike,
        *,
        transcoders: DictionaryLike | Sequence[DictionaryLike] = (),
        targets: TokensLike | Mapping[str, tuple[float, VectorLike]] = (),
        desired_logit_probability: float | None = None,
        max_logits: int = 0,
        max_feature_nodes: int = 0,
        include_first_position: bool = False,
        title: str = "",
        timeout: float | None = None,
    ) -> GraphOperation:
        """Starts tracing the attribution graph of the next token; its `result()` is the graph.

        `targets`: tokens, or label -> (weight, vector); by default the likeliest tokens that reach
        `desired_logit_probability` (0.95), at most `max_logits` (10). The `max_feature_nodes` (4,096) most
        influential features get nodes. `transcoders`: the model's own by default.
        """
        request = builders.attribution_graph(
            self._name,
            input,
            transcoders=transcoders,  # type: ignore[arg-type]
            targets=targets,
            desired_logit_probability=desired_logit_probability,
            max_logits=max_logits,
            max_feature_nodes=max_feature_nodes,
            include_first_position=include_first_position,
            title=title,
        )
        state: Any = self._transport.unary(calls.create_graph(request), timeout)
        return GraphOperation(self._transport, state)

    def estimate_attribution_graph(
        self,
        input: InputLike,
        *,
        transcoders: DictionaryLike | Sequence[DictionaryLike] = (),
        max_feature_nodes: int = 0,
        timeout: float | None = None,
    ) -> AttributionEstimate:
        """What `attribution_graph` would take, without starting it."""
        request = builders.attribution_graph(
            self._name,
            input,
            transcoders=transcoders,  # type: ignore[arg-type]
            targets=(),
            desired_logit_probability=None,
            max_logits=0,
            max_feature_nodes=max_feature_nodes,
            include_first_position=False,
            title="",
        )
        return self._transport.unary(calls.estimate(graph=request), timeout)

    def intervene_on_features(
        self,
        subject: AttributionGraph | InputLike,
        settings: Sequence[FeatureSetting],
        *,
        transcoders: DictionaryLike | Sequence[DictionaryLike] = (),
        mode: Literal["constrained", "frozen_attention", "open"] = "constrained",
        layers: Sequence[int] = (),
        top_logits: int = 10,
        tokens: TokensLike = (),
        max_tokens: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
        timeout: float | None = None,
    ) -> FeatureIntervention:
        """Sets features, and measures what happens beside what direct effects predict.

        `subject`: a graph, whose prompt is taken and whose edges predict, or an input. With `max_tokens` the model also
        goes on writing, without and with the settings.
        """
        call = calls.intervene_on_features(
            self._name,
            subject,
            settings,
            transcoders=transcoders,
            mode=mode,
            layers=layers,
            top_logits=top_logits,
            tokens_=tokens,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        return self._result(call, None, timeout)

    def feature_connections(
        self,
        layer: int,
        feature: int,
        *,
        top: int = 10,
        transcoders: DictionaryLike | Sequence[DictionaryLike] = (),
        timeout: float | None = None,
    ) -> FeatureConnections:
        """The strongest weights between a transcoder feature and those of other layers, whatever the prompt."""
        call = calls.feature_connections(self._name, layer, feature, top=top, transcoders=transcoders)
        return self._transport.unary(call, timeout)

    def _result(self, call: calls.ResultCall[T], progress: OnProgress | None, timeout: float | None) -> T:
        messages = self._transport.stream(call, timeout)
        try:
            while (event := messages.read()) is not None:
                if call.state.feed(event) and progress is not None:
                    progress(call.state.progress)
        finally:
            messages.cancel()
        return call.state.result()


class ClientAttribution:
    """Stored graphs and circuits."""

    _transport: Transport

    def attribution_graphs(self, *, timeout: float | None = None) -> list[GraphInfo]:
        """The stored attribution graphs, the newest first."""
        return list(self._transport.items(calls.list_graphs, timeout))

    def read_attribution_graph(
        self,
        name: str,
        *,
        node_threshold: float | None = None,
        edge_threshold: float | None = None,
        timeout: float | None = None,
    ) -> AttributionGraph:
        """A stored attribution graph with its nodes and edges; pruned by the server where a threshold is given."""
        return read_graph(self._transport, calls.read_graph(name, node_threshold, edge_threshold), timeout)

    def annotate_attribution_graph(
        self, graph: AttributionGraph, *, timeout: float | None = None
    ) -> GraphInfo:
        """Has the server keep a graph's title, pinned nodes and supernodes."""
        return self._transport.unary(calls.update_graph(graph), timeout)

    def delete_attribution_graph(self, name: str, *, timeout: float | None = None) -> None:
        """Deletes a stored attribution graph."""
        self._transport.unary(calls.delete_graph(name), timeout)

    def circuits(self, *, timeout: float | None = None) -> list[Circuit]:
        """The stored circuits, the newest first, without their edges."""
        return list(self._transport.items(calls.list_circuits, timeout))

    def circuit(self, name: str, *, timeout: float | None = None) -> Circuit:
        """A stored circuit."""
        return self._transport.unary(calls.get_circuit(name), timeout)

    def delete_circuit(self, name: str, *, timeout: float | None = None) -> None:
        """Deletes a stored circuit."""
        self._transport.unary(calls.delete_circuit(name), timeout)


def read_graph(transport: Transport, call: calls.GraphCall, timeout: float | None) -> AttributionGraph:
    """A stored graph, fetched."""
    messages = transport.stream(call, timeout)
    try:
        while (event := messages.read()) is not None:
            call.state.feed(event)
    finally:
        messages.cancel()
    return call.state.result()
