"""DiscoverCircuit and stored circuits."""

from __future__ import annotations

from google.longrunning import operations_pb2

from glasshouse.server.operations.attribution import budget, circuit_search
from glasshouse.server.operations.attribution.budget import Estimate
from glasshouse.server.operations.attribution.circuit_search import CircuitRequest
from glasshouse.server.operations.attribution.lanes import Ticket
from glasshouse.server.operations.attribution.results import StoredResult
from glasshouse.server.operations.manager import Progress
from glasshouse.v1 import attribution_graphs_pb2 as stored_pb
from glasshouse.v1 import attribution_pb2 as pb

from .. import fields
from ..call import Call
from ..catalogue import ServedModel
from ..pages import page
from .metrics import MetricReader
from .office import Office
from .operations import of_collection, started, telling
from .results import circuit_message, estimate_message

COLLECTION = "circuits/"


class Circuits:
    """Searches, and what they found."""

    def __init__(self, office: Office) -> None:
        self._office = office

    async def discover(self, request: pb.DiscoverCircuitRequest, call: Call) -> operations_pb2.Operation:
        """Starts a search."""
        office = self._office
        model, asked = await self.read(request, call)
        estimate = await self.estimate(model, asked)
        budget.check(estimate, office.settings)

        async def work(progress: Progress) -> StoredResult:
            def compute(ticket: Ticket) -> StoredResult:
                progress.phase = "searching edges"
                ticket.beside(model.engine)
                circuit, seconds = circuit_search.search(office.lanes.twins.of(model.engine), asked, ticket)
                progress.phase = "storing"
                facts = circuit_search.circuit_facts(
                    circuit, asked, model=model.resource_name, strings=model.strings.of, seconds=seconds
                )
                return office.results.put("circuits", facts, {})

            return await office.lanes.operations.run(compute, telling(progress))

        facts = estimate_message(estimate, office.settings)
        return started(office.operations.submit("DiscoverCircuit", work, facts))

    async def read(
        self, request: pb.DiscoverCircuitRequest, call: Call
    ) -> tuple[ServedModel, CircuitRequest]:
        """A request, checked."""
        office = self._office
        model = office.catalogue.find(request.model, "model")
        clean, corrupt = await office.pair(model, request, call)
        metric = None
        if request.HasField("metric"):
            metric = await MetricReader(model, office.reader(model), clean).read(request.metric, True)
        threshold = target = None
        match request.WhichOneof("size"):
            case "threshold":
                threshold = fields.finite(request.threshold, "threshold")
                if threshold <= 0:
                    raise fields.out_of_range("threshold", threshold, "above 0, such as 0.01")
            case "target_edges":
                target = fields.whole(request.target_edges, "target_edges", 1, 2**31 - 1)
            case _:
                raise fields.required("threshold", "when to stop", "give threshold or target_edges")
        asked = CircuitRequest(
            clean=clean, corrupt=corrupt, metric=metric, threshold=threshold, target_edges=target
        )
        return model, asked

    async def estimate(self, model: ServedModel, asked: CircuitRequest) -> Estimate:
        """What a search will take."""
        return await self._office.run(model, lambda twin, _: circuit_search.estimate_circuit(twin, asked))

    async def get(self, request: stored_pb.GetCircuitRequest) -> stored_pb.GetCircuitResponse:
        """A stored circuit."""
        name = of_collection(request.name, COLLECTION)
        return stored_pb.GetCircuitResponse(circuit=circuit_message(self._office.results.get(name)))

    async def list(self, request: stored_pb.ListCircuitsRequest) -> stored_pb.ListCircuitsResponse:
        """The stored circuits."""
        found, token = page(
            self._office.results.all("circuits"),
            page_size=request.page_size,
            page_token=request.page_token,
            default=50,
            most=1000,
        )
        return stored_pb.ListCircuitsResponse(
            circuits=[circuit_message(result, edges=False) for result in found], next_page_token=token
        )

    async def delete(self, request: stored_pb.DeleteCircuitRequest) -> stored_pb.DeleteCircuitResponse:
        """Deletes a stored circuit."""
        self._office.results.delete(of_collection(request.name, COLLECTION))
        return stored_pb.DeleteCircuitResponse()
