"""AttributionService: each method handed to the part that serves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from google.longrunning import operations_pb2

from glasshouse.server.operations.attribution import budget
from glasshouse.server.operations.attribution.costs import Costs
from glasshouse.server.operations.attribution.lanes import Lanes
from glasshouse.server.operations.attribution.results import ResultStore
from glasshouse.server.operations.manager import OperationManager
from glasshouse.server.types.configuration import AttributionSettings
from glasshouse.server.types.errors import ServingError
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import attribution_graphs_pb2 as stored_pb
from glasshouse.v1 import attribution_pb2 as pb

from .. import fields
from ..call import Call
from ..catalogue import Catalogue
from .circuits import Circuits
from .feature_effects import FeatureEffects
from .graphs import Graphs
from .office import Office
from .patching import Patching
from .results import estimate_message
from .tokens import InputAttribution

_SWEEP_S = 60.0


class AttributionServicer:
    """Serves `glasshouse.v1.AttributionService`. Made within a running event loop; `stop` ends its threads."""

    def __init__(
        self,
        catalogue: Catalogue,
        limits: Limits,
        operations: OperationManager,
        settings: AttributionSettings,
    ) -> None:
        self._office = office = Office(
            catalogue=catalogue,
            limits=limits,
            settings=settings,
            operations=operations,
            lanes=Lanes(settings),
            results=ResultStore(settings),
            costs=Costs(settings),
        )
        self._inputs, self._patching = InputAttribution(office), Patching(office)
        self._graphs, self._circuits = Graphs(office), Circuits(office)
        self._effects = FeatureEffects(office, self._graphs)

        self._sweeping = asyncio.create_task(self._sweep())

    def stop(self) -> None:
        """Stops what is being computed; temporary results go."""
        self._sweeping.cancel()
        self._office.lanes.stop()
        self._office.results.close()

    async def _sweep(self) -> None:
        """Deletes what expires, whether or not anybody asks."""
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._office.settings.keep_s))
            await asyncio.to_thread(self._office.results.sweep)

    def AttributeTokens(
        self, request: pb.AttributeTokensRequest, call: Call
    ) -> AsyncIterator[pb.AttributeTokensResponse]:
        """Which positions a metric rests on."""
        return self._inputs.attribute_tokens(request, call)

    def DirectAttribution(
        self, request: pb.DirectAttributionRequest, call: Call
    ) -> AsyncIterator[pb.DirectAttributionResponse]:
        """What each part writes into a logit."""
        return self._inputs.direct_attribution(request, call)

    def AttributeFeatures(
        self, request: pb.AttributeFeaturesRequest, call: Call
    ) -> AsyncIterator[pb.AttributeFeaturesResponse]:
        """Which features a metric rests on."""
        return self._inputs.attribute_features(request, call)

    def PatchSweep(self, request: pb.PatchSweepRequest, call: Call) -> AsyncIterator[pb.PatchSweepResponse]:
        """Node after node patched."""
        return self._patching.patch_sweep(request, call)

    def MediateEffect(
        self, request: pb.MediateEffectRequest, call: Call
    ) -> AsyncIterator[pb.MediateEffectResponse]:
        """Total, direct and indirect effects."""
        return self._patching.mediate_effect(request, call)

    async def PathPatch(self, request: pb.PathPatchRequest, call: Call) -> pb.PathPatchResponse:
        """Effects along direct paths."""
        return await self._patching.path_patch(request, call)

    def AttributionPatch(
        self, request: pb.AttributionPatchRequest, call: Call
    ) -> AsyncIterator[pb.AttributionPatchResponse]:
        """Patch effects approximated by gradients."""
        return self._patching.attribution_patch(request, call)

    async def DiscoverCircuit(
        self, request: pb.DiscoverCircuitRequest, call: Call
    ) -> operations_pb2.Operation:
        """Starts ACDC."""
        return await self._circuits.discover(request, call)

    async def CreateAttributionGraph(
        self, request: pb.CreateAttributionGraphRequest, call: Call
    ) -> operations_pb2.Operation:
        """Starts a trace."""
        return await self._graphs.create(request, call)

    async def EstimateAttribution(
        self, request: pb.EstimateAttributionRequest, call: Call
    ) -> pb.EstimateAttributionResponse:
        """What an operation would take."""
        kind = request.WhichOneof("operation")
        if kind is None:
            raise fields.required("graph", "which operation", "set graph or circuit")
        try:
            if kind == "graph":
                model, asked, _ = await self._graphs.read(request.graph, call)
                estimate = await self._graphs.estimate(model, asked)
            else:
                model, wanted = await self._circuits.read(request.circuit, call)
                estimate = await self._circuits.estimate(model, wanted)
        except ServingError as error:
            if error.field:
                error.at(kind)
            raise
        settings = self._office.settings
        refusal = budget.refused(estimate, settings)
        return pb.EstimateAttributionResponse(
            estimate=estimate_message(estimate, settings), refusal="" if refusal is None else refusal.message
        )

    def InterveneOnFeatures(
        self, request: pb.InterveneOnFeaturesRequest, call: Call
    ) -> AsyncIterator[pb.InterveneOnFeaturesResponse]:
        """Features set to values."""
        return self._effects.intervene(request, call)

    async def FeatureConnections(
        self, request: pb.FeatureConnectionsRequest, call: Call
    ) -> pb.FeatureConnectionsResponse:
        """Weights between features."""
        return await self._effects.connections(request, call)

    async def GetAttributionGraph(
        self, request: stored_pb.GetAttributionGraphRequest, call: Call
    ) -> stored_pb.GetAttributionGraphResponse:
        """A stored graph."""
        return await self._graphs.get(request)

    async def ListAttributionGraphs(
        self, request: stored_pb.ListAttributionGraphsRequest, call: Call
    ) -> stored_pb.ListAttributionGraphsResponse:
        """The stored graphs."""
        return await self._graphs.list(request)

    async def UpdateAttributionGraph(
        self, request: stored_pb.UpdateAttributionGraphRequest, call: Call
    ) -> stored_pb.UpdateAttributionGraphResponse:
        """Keeps what people mark."""
        return await self._graphs.update(request)

    async def DeleteAttributionGraph(
        self, request: stored_pb.DeleteAttributionGraphRequest, call: Call
    ) -> stored_pb.DeleteAttributionGraphResponse:
        """Deletes a stored graph."""
        return await self._graphs.delete(request)

    def ReadAttributionGraph(
        self, request: stored_pb.ReadAttributionGraphRequest, call: Call
    ) -> AsyncIterator[stored_pb.ReadAttributionGraphResponse]:
        """A stored graph's nodes and edges."""
        return self._graphs.contents(request)

    async def GetCircuit(
        self, request: stored_pb.GetCircuitRequest, call: Call
    ) -> stored_pb.GetCircuitResponse:
        """A stored circuit."""
        return await self._circuits.get(request)

    async def ListCircuits(
        self, request: stored_pb.ListCircuitsRequest, call: Call
    ) -> stored_pb.ListCircuitsResponse:
        """The stored circuits."""
        return await self._circuits.list(request)

    async def DeleteCircuit(
        self, request: stored_pb.DeleteCircuitRequest, call: Call
    ) -> stored_pb.DeleteCircuitResponse:
        """Deletes a stored circuit."""
        return await self._circuits.delete(request)
