"""ProbeService: probes trained, imported, kept, and run over inputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

from google.longrunning import operations_pb2

from glasshouse.server.engines.probe_scoring import score_inputs
from glasshouse.server.operations.compute_directions import check_publication
from glasshouse.server.operations.examples import labelling
from glasshouse.server.operations.gathering import GatherOptions
from glasshouse.server.operations.manager import OperationManager, Progress
from glasshouse.server.operations.train_probe import ProbeRequest, TrainedOnModel, publish, train
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.fitting import FitOptions
from glasshouse.server.probes.library import ConceptLibrary, of_model, of_revision
from glasshouse.server.probes.saved import Origin, SavedProbe
from glasshouse.server.probes.served import ProbeFacts, ServedProbe
from glasshouse.server.probes.training import ProbeSpec
from glasshouse.server.registry.names import Kind
from glasshouse.server.registry.records import Provenance
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import probes_pb2 as pb
from glasshouse.wire import reasons
from glasshouse.wire.tensors import pack

from . import fields
from .call import Call
from .catalogue import Catalogue, ServedModel
from .concept_messages import hook_points, listed, named, pooling, publication
from .directions import only_examples, positive_number, share
from .example_messages import ExampleReader, read_positions
from .inputs import InputReader
from .interventions import interventions
from .operations import operation_message
from .probe_messages import CALIBRATIONS, KINDS, TASKS, calibration_of, layers_of, probe_message

_DEFAULT_RATES = (0.01, 0.05)
_MOST_LABELS = 256
_MOST_HIDDEN = 4096
_MOST_RATES = 20
T = TypeVar("T")


class ProbeServicer:
    """Serves `glasshouse.v1.ProbeService`."""

    def __init__(
        self, catalogue: Catalogue, limits: Limits, operations: OperationManager, library: ConceptLibrary
    ) -> None:
        self._catalogue = catalogue
        self._limits = limits
        self._operations = operations
        self._library = library

    async def TrainProbe(
        self, requests: AsyncIterator[pb.TrainProbeRequest], call: Call
    ) -> operations_pb2.Operation:
        """Starts a training."""
        first = await anext(aiter(requests), None)
        if first is None:
            raise fields.required("model", "a request", "send at least one message")
        model = self._catalogue.find(first.model, "model")
        limits = self._limits
        positions = read_positions(first.positions, first.HasField("positions"), "positions", limits)
        spec = _spec(first)
        options = GatherOptions(
            pooling=pooling(first.pooling),
            held_out_share=spec.held_out_share,
            seed=spec.options.seed,
            max_bytes=limits.max_readout_bytes,
        )
        task, names = _choice(first.task, TASKS, "task"), _labels(first.labels)
        each = _each(first.hook_point_use)
        points = _points(model, first.hook_points, limits)
        wanted = publication(first.publication, first.HasField("publication"), required=False)
        if wanted is not None:
            await asyncio.to_thread(
                check_publication, self._library, Kind.PROBE, model.engine.info.name, wanted
            )
        reader = ExampleReader(model, limits, positions)
        await reader.add(first.examples, ())
        async for more in requests:
            only_examples(more)
            await reader.add(more.examples, ())
        if not reader.examples:
            raise fields.required("examples", "what to learn from", "give labelled examples")
        prepared = ProbeRequest(
            hook_points=points,
            options=options,
            spec=spec,
            examples=tuple(reader.examples),
            labelling=labelling(reader.examples, task=task, names=names, positive=first.positive_label),
            each=each,
            positions=positions,
            publication=wanted,
            author=call.caller,
        )

        async def work(progress: Progress) -> TrainedOnModel:
            return await train(model.engine, self._library, prepared, progress)

        return operation_message(self._operations.submit("TrainProbe", work))

    async def CreateProbe(self, request: pb.CreateProbeRequest, call: Call) -> pb.CreateProbeResponse:
        """Publishes a probe trained elsewhere."""
        model = self._catalogue.find(request.model, "model")
        wanted = publication(request.publication, request.HasField("publication"), required=True)
        assert wanted is not None
        names = _labels(request.labels)
        if not names:
            raise fields.required("labels", "what it tells apart", "name its classes or labels")
        task = _choice(request.task, TASKS, "task") or (Task.BINARY if len(names) <= 2 else Task.MULTI_CLASS)
        fits = {Task.BINARY: len(names) == 2, Task.MULTI_CLASS: len(names) > 2, Task.MULTI_LABEL: True}
        if not fits[task]:
            raise fields.out_of_range("labels", f"a list of {len(names)}", f"a {task.value} task's labels")
        points = _points(model, request.hook_points, self._limits)
        facts = ProbeFacts(
            kind=_choice(request.kind, KINDS, "kind"),
            task=task,
            label_names=names,
            hook_points=tuple(point.name for point in points),
            widths=tuple(point.width for point in points),
            pooling=pooling(request.pooling),
            model_name=model.engine.info.name,
        )
        served = _imported(request, facts)
        positions = read_positions(
            request.positions, request.HasField("positions"), "positions", self._limits
        )
        kind = request.weights.WhichOneof("calibration") or "none"
        probe = SavedProbe(
            facts=facts,
            calibration=kind,
            positions=positions,
            served=served,
            origin=Origin(
                provenance=Provenance(
                    model_revision=model.engine.info.revision,
                    hook_points=facts.hook_points,
                    method="imported",
                    author=call.caller,
                )
            ),
        )
        published = await asyncio.to_thread(publish, self._library, probe, model.engine.info.name, wanted)
        return pb.CreateProbeResponse(probe=probe_message(published))

    async def GetProbe(self, request: pb.GetProbeRequest, call: Call) -> pb.GetProbeResponse:
        """One version."""
        _, reference = named(self._catalogue, request.name, Kind.PROBE)
        found = self._library.held(reference)
        if not isinstance(found, SavedProbe):
            found = await asyncio.to_thread(self._library.probe, reference)
        return pb.GetProbeResponse(probe=probe_message(found, with_weights=request.with_weights))

    async def ListProbes(self, request: pb.ListProbesRequest, call: Call) -> pb.ListProbesResponse:
        """A page of probes, without weights."""
        model = self._catalogue.find(request.model, "model")
        found, token = await asyncio.to_thread(
            listed,
            self._library,
            Kind.PROBE,
            model=model.engine.info.name,
            name_prefix=request.name_prefix,
            every_version=request.every_version,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListProbesResponse(
            probes=[probe_message(item) for item in found if isinstance(item, SavedProbe)],
            next_page_token=token,
        )

    async def DeleteProbe(self, request: pb.DeleteProbeRequest, call: Call) -> pb.DeleteProbeResponse:
        """Deletes a version, or every version."""
        _, reference = named(self._catalogue, request.name, Kind.PROBE)
        deleted = await asyncio.to_thread(self._library.delete, reference)
        return pb.DeleteProbeResponse(deleted=[str(record.reference) for record in deleted])

    async def ScoreProbe(
        self, request: pb.ScoreProbeRequest, call: Call
    ) -> AsyncIterator[pb.ScoreProbeResponse]:
        """Scores of inputs, each as it is done."""
        model, reference = named(self._catalogue, request.probe, Kind.PROBE, field="probe")
        of_model(reference, model=model.engine.info.name, field="probe")
        if not request.inputs:
            raise fields.required("inputs", "what to score", "send at least one input")
        found = self._library.held(reference)
        if not isinstance(found, SavedProbe):
            found = await asyncio.to_thread(self._library.probe, reference, field="probe")
        of_revision(found, model.engine.info.revision, field="probe")
        assert found.served is not None
        positions = (
            read_positions(request.positions, True, "positions", self._limits)
            if request.HasField("positions")
            else found.positions
        )
        edits = interventions(request.interventions, self._limits)
        inputs = await InputReader(model, self._limits).prompts(request.inputs, "inputs")
        source = score_inputs(
            model.engine,
            found.served,
            inputs,
            positions,
            edits,
            every_position=request.every_position,
            request_id=call.request_id,
        )
        n_tokens = 0
        async with aclosing(source) as scored:
            async for done in scored:
                tokens = inputs[done.index]
                call.accepted(len(tokens), () if n_tokens else [edit.edit.kind for edit in edits])
                call.read(done.scores.nbytes)
                n_tokens += len(tokens)
                yield pb.ScoreProbeResponse(
                    scored=pb.ScoredInput(
                        index=done.index,
                        token_ids=tokens,
                        tokens=model.strings.of(tokens),
                        positions=done.positions,
                        scores=pack(done.scores),
                    )
                )
        yield pb.ScoreProbeResponse(
            finished=pb.ScoringFinished(tokens=n_tokens, columns=found.facts.columns, probe=found.origin.name)
        )


def _spec(request: pb.TrainProbeRequest) -> ProbeSpec:
    rates = tuple(request.false_positive_rates) or _DEFAULT_RATES
    if len(rates) > _MOST_RATES:
        raise fields.out_of_range(
            "false_positive_rates", f"a list of {len(rates)}", f"at most {_MOST_RATES} rates"
        )
    for index, rate in enumerate(rates):
        if not 0.0 <= rate < 1.0:
            raise fields.out_of_range(f"false_positive_rates[{index}]", rate, "in [0, 1)")
    decay = request.weight_decay if request.HasField("weight_decay") else 0.01
    if fields.finite(decay, "weight_decay") < 0:
        raise fields.out_of_range("weight_decay", decay, "0 or more")
    return ProbeSpec(
        kind=_choice(request.kind, KINDS, "kind"),
        calibration=_choice(request.calibration, CALIBRATIONS, "calibration"),
        false_positive_rates=rates,
        held_out_share=share(request.held_out_share if request.HasField("held_out_share") else None),
        options=FitOptions(
            inverse_l2=positive_number(
                request.inverse_l2 if request.HasField("inverse_l2") else 1.0, "inverse_l2"
            ),
            hidden_width=fields.whole(request.hidden_width or 64, "hidden_width", 1, _MOST_HIDDEN),
            weight_decay=decay,
            seed=fields.whole(request.seed, "seed", 0, 2**32 - 1),
        ),
    )


def _imported(request: pb.CreateProbeRequest, facts: ProbeFacts) -> ServedProbe:
    """The probe of a request's numbers, of the shapes its facts ask for."""
    layers = layers_of(request.weights, "weights")
    n_columns = len(facts.columns)
    width = facts.width
    for index, layer in enumerate(layers):
        last = index == len(layers) - 1
        n_in, n_out = tuple(layer.weights.shape)
        wanted_out = n_columns if last else n_out
        if n_in != width or n_out != wanted_out or layer.biases.shape != (n_out,):
            raise InvalidArgument(
                f"weights.layers[{index}] has shapes {(n_in, n_out)} and {tuple(layer.biases.shape)}, "
                f"expected ({width}, {wanted_out}) and ({wanted_out},)",
                reason=reasons.WRONG_WIDTH,
                field=f"weights.layers[{index}]",
                value=f"{n_in} x {n_out}",
                remedy=f"it reads {' + '.join(facts.hook_points)}, {facts.width} wide, and has {n_columns} columns",
            )
        width = n_out
    return ServedProbe(
        facts=facts, layers=layers, calibration=calibration_of(request.weights, n_columns, "weights")
    )


def _labels(names: Sequence[str]) -> tuple[str, ...]:
    if len(names) > _MOST_LABELS:
        raise fields.out_of_range("labels", f"a list of {len(names)}", f"at most {_MOST_LABELS} labels")
    for index, name in enumerate(names):
        if not name.strip() or len(name) > 100 or name in names[:index]:
            raise fields.out_of_range(f"labels[{index}]", repr(name), "1 to 100 characters, each label once")
    return tuple(names)


def _points(model: ServedModel, names: Sequence[str], limits: Limits) -> tuple[HookPoint, ...]:
    if not names:
        raise fields.required(
            "hook_points", "what it reads", "name readable hook points; ListHookPoints lists them"
        )
    return hook_points(model, names, limits)


def _each(number: int) -> bool:
    if number not in pb.HookPointUse.values():
        raise fields.out_of_range("hook_point_use", number, "a known HookPointUse: together or best")
    return number == pb.HOOK_POINT_USE_BEST


def _choice(number: int, known: Mapping[int, T], field: str) -> T:
    if number not in known:
        raise fields.out_of_range(field, number, f"a known value of {field}")
    return known[number]
