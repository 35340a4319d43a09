"""PatchSweep, MediateEffect, PathPatch, AttributionPatch: what changes when a node or an edge is patched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from time import perf_counter

import torch
from torch import Tensor

from glasshouse.server.attribution.attribution_patching import (
    ATP_COMPONENTS,
    NodeScores,
    attribution_patch,
    verify,
)
from glasshouse.server.attribution.edge_attribution import attribute_edges
from glasshouse.server.attribution.edge_verification import verify_edges
from glasshouse.server.attribution.freezing import NOTHING_FROZEN, Freeze
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import Metric
from glasshouse.server.attribution.nodes import Node
from glasshouse.server.attribution.path_patching import path_patch
from glasshouse.server.attribution.sweeps import PatchResult, Replacement, patch_sweep
from glasshouse.server.attribution.wiring import Wiring
from glasshouse.server.operations.attribution.lanes import Ticket
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.v1 import attribution_pb2 as pb
from glasshouse.wire import reasons

from .. import fields
from ..call import Call
from ..catalogue import ServedModel
from ..inputs import InputReader
from .answers import Arrays, announced, array, fed, freeze, held, pieces, token_tensor
from .grids import GridReader, Sweep, single_nodes
from .metrics import MetricReader
from .office import Done, Office, same_length

MOST_BATCH = 1024
MOST_OTHERS = 1024
MOST_NODES = 1024
MOST_VERIFIED = 10_000
MOST_STEPS = 1024
_SWEEP_BATCH = 32

_REPLACEMENTS: dict[int, Replacement] = {
    pb.PATCH_REPLACEMENT_UNSPECIFIED: "interchange",
    pb.PATCH_REPLACEMENT_INTERCHANGE: "interchange",
    pb.PATCH_REPLACEMENT_ZERO: "zero",
    pb.PATCH_REPLACEMENT_MEAN: "mean",
    pb.PATCH_REPLACEMENT_RESAMPLE: "resample",
}
_TAKEN = {
    "interchange": "Each node takes its value on the other input; all that runs after it responds.",
    "zero": "Each node is set to zero; all that runs after it responds.",
    "mean": "Each node is set to its mean over the other inputs; all that runs after it responds.",
    "resample": "Each node takes its value on one of the other inputs; all that runs after it responds.",
}


class Patching:
    """Those four methods."""

    def __init__(self, office: Office) -> None:
        self._office = office

    async def patch_sweep(
        self, request: pb.PatchSweepRequest, call: Call
    ) -> AsyncIterator[pb.PatchSweepResponse]:
        """Node after node patched."""
        office = self._office
        model = office.catalogue.find(request.model, "model")
        reader = office.reader(model)
        if request.replacement not in _REPLACEMENTS:
            raise fields.out_of_range("replacement", request.replacement, "one of PatchReplacement")
        how = _REPLACEMENTS[request.replacement]
        clean = await reader.prompt(request.clean, request.HasField("clean"), "clean")
        corrupt, others = await _others(request, how, reader, clean)
        denoise = _denoises(request.direction)
        if denoise and corrupt is None:
            raise InvalidArgument(
                f"a {how} patch has one base, the clean input",
                reason=reasons.FIELD_CONFLICT,
                field="direction",
                remedy="leave direction out, or interchange with a corrupt input",
            )
        make = await MetricReader(model, reader, clean).read(request.metric, request.HasField("metric"))
        grids = GridReader(model, office.limits, request.grids, clean)
        frozen = freeze(request.freeze)
        asked = fields.whole(request.batch_size, "batch_size", 0, MOST_BATCH)
        call.accepted(len(clean) + len(corrupt or ()), ())
        base = corrupt if denoise and corrupt is not None else clean
        sources = others if others else [clean if denoise else corrupt] if corrupt is not None else []

        def prepare(twin: GradientModel, ticket: Ticket) -> tuple[Sweep, Metric, float, float | None]:
            sweep = grids.sweep(twin, [tokens for tokens in sources if tokens is not None] or [])
            metric = make(twin)
            clean_value = _value(twin, clean, metric, frozen)
            corrupt_value = None if corrupt is None else _value(twin, corrupt, metric, frozen)
            return sweep, metric, clean_value, corrupt_value

        sweep, metric, clean_value, corrupt_value = await office.run(model, prepare)
        n_nodes = len(sweep.nodes)
        await office.affordable(model, n_rows=n_nodes, n_tokens=len(clean), gradients=False, operation=True)
        base_value = corrupt_value if denoise and corrupt_value is not None else clean_value
        yield pb.PatchSweepResponse(
            started=_started(
                model,
                clean,
                corrupt,
                clean_value,
                corrupt_value,
                base_value,
                sweep,
                held(frozen, _TAKEN[how]),
            )
        )
        other_tensor = None
        if sources:
            other_tensor = torch.tensor([list(tokens) for tokens in sources if tokens is not None])

        def work(twin: GradientModel, ticket: Ticket) -> Iterator[list[PatchResult]]:
            return patch_sweep(
                twin,
                token_tensor(base),
                sweep.nodes,
                metric,
                replacement=how,
                others=other_tensor,
                seed=request.seed,
                freeze=frozen,
                dictionaries=sweep.dictionaries,
                batch_size=office.costs.batch_size(twin, asked, len(clean), default=_SWEEP_BATCH),
                progress=ticket,
            )

        started, first = perf_counter(), 0
        async for batch in office.iterate(model, work):
            values = [result.value for result in batch]
            yield pb.PatchSweepResponse(values=pb.SweepValues(first_node=first, values=values))
            first += len(batch)
        yield pb.PatchSweepResponse(
            finished=pb.SweepFinished(n_nodes=n_nodes, seconds=perf_counter() - started)
        )

    async def mediate_effect(
        self, request: pb.MediateEffectRequest, call: Call
    ) -> AsyncIterator[pb.MediateEffectResponse]:
        """Total, direct, indirect."""
        office = self._office
        model = office.catalogue.find(request.model, "model")
        clean, corrupt = await office.pair(model, request, call)
        make = await MetricReader(model, office.reader(model), clean).read(
            request.metric, request.HasField("metric")
        )
        grids = GridReader(model, office.limits, request.grids, clean)
        asked = fields.whole(request.batch_size, "batch_size", 0, MOST_BATCH)

        def prepare(twin: GradientModel, ticket: Ticket) -> tuple[Sweep, Metric, float, float]:
            metric = make(twin)
            values = [_value(twin, tokens, metric, NOTHING_FROZEN) for tokens in (clean, corrupt)]
            return grids.sweep(twin, [corrupt]), metric, values[0], values[1]

        sweep, metric, clean_value, corrupt_value = await office.run(model, prepare)
        n_nodes = len(sweep.nodes)
        await office.affordable(
            model, n_rows=2 * n_nodes, n_tokens=len(clean), gradients=False, operation=True
        )
        statement = held(
            NOTHING_FROZEN,
            "The node alone is held at its value on the other input; all that runs after it responds.",
        )
        yield pb.MediateEffectResponse(
            started=_started(model, clean, corrupt, clean_value, corrupt_value, clean_value, sweep, statement)
        )

        def work(
            twin: GradientModel, ticket: Ticket
        ) -> Iterator[tuple[list[PatchResult], list[PatchResult]]]:
            through, around = (
                patch_sweep(
                    twin,
                    token_tensor(base),
                    sweep.nodes,
                    metric,
                    others=token_tensor(other),
                    dictionaries=sweep.dictionaries,
                    batch_size=office.costs.batch_size(twin, asked, len(clean), default=_SWEEP_BATCH),
                    progress=ticket,
                )
                for base, other in ((clean, corrupt), (corrupt, clean))
            )
            return zip(through, around, strict=True)

        started, first = perf_counter(), 0
        async for noised, denoised in office.iterate(model, work):
            yield pb.MediateEffectResponse(
                values=pb.MediationValues(
                    first_node=first,
                    total=corrupt_value - clean_value,
                    direct=[result.value - clean_value for result in denoised],
                    indirect=[result.value - clean_value for result in noised],
                )
            )
            first += len(noised)
        yield pb.MediateEffectResponse(
            finished=pb.SweepFinished(n_nodes=n_nodes, seconds=perf_counter() - started)
        )

    async def path_patch(self, request: pb.PathPatchRequest, call: Call) -> pb.PathPatchResponse:
        """Senders as seen by receivers alone."""
        office = self._office
        model = office.catalogue.find(request.model, "model")
        clean, corrupt = await office.pair(model, request, call)
        make = await MetricReader(model, office.reader(model), clean).read(
            request.metric, request.HasField("metric")
        )
        senders = single_nodes(request.senders, len(clean), "senders", MOST_NODES)
        receivers = single_nodes(request.receivers, len(clean), "receivers", MOST_NODES)
        base, other = (corrupt, clean) if _denoises(request.direction) else (clean, corrupt)
        await office.affordable(model, n_rows=4 * len(request.senders), n_tokens=len(clean), gradients=False)

        def work(twin: GradientModel, ticket: Ticket) -> tuple[float, list[float]]:
            metric, ends = make(twin), receivers(twin)
            starts = senders(twin)
            _check_order(twin, starts, ends)
            values = []
            for done, sender in enumerate(starts, start=1):
                found = path_patch(
                    twin,
                    token_tensor(base),
                    token_tensor(other),
                    sender,
                    ends,
                    metric,
                    hold_mlps=request.hold_mlps,
                )
                values.append(found.value)
                ticket(done, len(starts))
            return _value(twin, base, metric, NOTHING_FROZEN), values

        base_value, values = await office.run(model, work)
        return pb.PathPatchResponse(
            clean=fed(model, clean),
            corrupt=fed(model, corrupt),
            base_value=base_value,
            values=values,
            held_fixed=_held_on_paths(request.hold_mlps),
        )

    async def attribution_patch(
        self, request: pb.AttributionPatchRequest, call: Call
    ) -> AsyncIterator[pb.AttributionPatchResponse]:
        """AtP, AtP*, EAP, EAP-IG."""
        office = self._office
        model = office.catalogue.find(request.model, "model")
        clean, corrupt = await office.pair(model, request, call)
        kind = request.WhichOneof("scored")
        if kind is None:
            raise fields.required("nodes", "what is scored", "set nodes or edges")
        steps = fields.whole(request.edges.steps, "edges.steps", 0, MOST_STEPS)
        verified = fields.whole(request.verify_top, "verify_top", 0, MOST_VERIFIED)
        make = await MetricReader(
            model, office.reader(model), clean, at_clean=kind == "nodes" or steps == 0
        ).read(request.metric, request.HasField("metric"))
        n_layers = model.engine.info.n_layers
        n_passes = (n_layers + 2 if request.nodes.grad_drop or request.nodes.qk_fix else 2) + steps
        await office.affordable(model, n_rows=n_passes + verified, n_tokens=len(clean), gradients=True)

        def work(twin: GradientModel, ticket: Ticket) -> tuple[pb.AttributionPatchResult, Arrays]:
            metric = make(twin)
            result = pb.AttributionPatchResult(
                clean=fed(model, clean),
                corrupt=fed(model, corrupt),
                clean_value=_value(twin, clean, metric, NOTHING_FROZEN),
                corrupt_value=_value(twin, corrupt, metric, NOTHING_FROZEN),
            )
            ticket.check()
            score = _score_nodes if kind == "nodes" else _score_edges
            batch_size = office.costs.batch_size(twin, 0, len(clean), default=_SWEEP_BATCH)
            arrays = score(
                twin, request, token_tensor(clean), token_tensor(corrupt), metric, batch_size, ticket, result
            )
            result.tensors.extend(announced(arrays))
            return result, arrays

        async for event in office.progressing(model, work):
            if not isinstance(event, Done):
                yield pb.AttributionPatchResponse(progress=event)
                continue
            result, arrays = event.result
            yield pb.AttributionPatchResponse(result=result)
            for piece in pieces(arrays):
                yield pb.AttributionPatchResponse(tensor=piece)


async def _others(
    request: pb.PatchSweepRequest, how: Replacement, reader: InputReader, clean: Sequence[int]
) -> tuple[tuple[int, ...] | None, list[tuple[int, ...]]]:
    """The corrupt input, or the others; which ones the replacement needs."""
    needs_corrupt, needs_others = how == "interchange", how in ("mean", "resample")
    for field, given, needed in (
        ("corrupt", request.HasField("corrupt"), needs_corrupt),
        ("others", bool(request.others), needs_others),
    ):
        if given and not needed:
            raise InvalidArgument(
                f"{field} is set, and a {how} patch takes nothing from it",
                reason=reasons.FIELD_CONFLICT,
                field=field,
                value=how,
                remedy=f"leave {field} out, or choose another replacement",
            )
        if needed and not given:
            raise fields.required(field, f"a {how} patch takes activations from it", f"give {field}")
    if needs_corrupt:
        corrupt = await reader.prompt(request.corrupt, True, "corrupt")
        same_length(clean, corrupt, "corrupt")
        return corrupt, []
    if not needs_others:
        return None, []
    if len(request.others) > MOST_OTHERS:
        raise fields.out_of_range("others", f"a list of {len(request.others)}", f"at most {MOST_OTHERS}")
    others = list(await reader.prompts(request.others, "others"))
    for index, tokens in enumerate(others):
        same_length(clean if how == "resample" else others[0], tokens, f"others[{index}]")
    return None, others


def _denoises(direction: int) -> bool:
    if direction not in (
        pb.PATCH_DIRECTION_UNSPECIFIED,
        pb.PATCH_DIRECTION_NOISE,
        pb.PATCH_DIRECTION_DENOISE,
    ):
        raise fields.out_of_range("direction", direction, "one of PatchDirection")
    return direction == pb.PATCH_DIRECTION_DENOISE


@torch.no_grad()
def _value(twin: GradientModel, tokens: Sequence[int], metric: Metric, frozen: Freeze) -> float:
    run = twin.forward(twin.tokens(tokens), read=metric.reads, freeze=frozen)
    return float(metric(run)[0])


def _started(
    model: ServedModel,
    clean: Sequence[int],
    corrupt: Sequence[int] | None,
    clean_value: float,
    corrupt_value: float | None,
    base_value: float,
    sweep: Sweep,
    held_fixed: pb.HeldFixed,
) -> pb.SweepStarted:
    return pb.SweepStarted(
        clean=fed(model, clean),
        corrupt=None if corrupt is None else fed(model, corrupt),
        clean_value=clean_value,
        corrupt_value=corrupt_value,
        base_value=base_value,
        grids=sweep.axes,
        n_nodes=len(sweep.nodes),
        held_fixed=held_fixed,
    )


def _check_order(twin: GradientModel, senders: Sequence[Node], receivers: Sequence[Node]) -> None:
    order = twin.table.position
    latest = max(senders, key=lambda node: order(node.hook_point))
    for index, receiver in enumerate(receivers):
        if order(receiver.hook_point) <= order(latest.hook_point):
            raise InvalidArgument(
                f"{receiver.hook_point} does not run after the sender {latest.hook_point}",
                reason=reasons.VALUE_OUT_OF_RANGE,
                field=f"receivers[{index}].hook_point",
                value=receiver.hook_point,
                remedy="give receivers that run after every sender",
            )


def _held_on_paths(hold_mlps: bool) -> pb.HeldFixed:
    mlps = "MLPs are held too." if hold_mlps else "MLPs pass on what reaches them."
    return pb.HeldFixed(
        mlp_outputs=hold_mlps,
        statement="Between senders and receivers every other attention head is held at its value on the base run. "
        f"{mlps} After the receivers nothing is held.",
    )


def _score_nodes(
    twin: GradientModel,
    request: pb.AttributionPatchRequest,
    clean: Tensor,
    corrupt: Tensor,
    metric: Metric,
    batch_size: int,
    ticket: Ticket,
    result: pb.AttributionPatchResult,
) -> Arrays:
    asked = request.nodes
    components = tuple(asked.components) or ATP_COMPONENTS
    for index, component in enumerate(components):
        twin.table.resolve(f"blocks.0.{component}", field=f"nodes.components[{index}]")
    frozen = freeze(asked.freeze)
    scores: NodeScores = attribution_patch(
        twin,
        clean,
        corrupt,
        metric,
        components=components,
        qk_fix=asked.qk_fix,
        grad_drop=asked.grad_drop,
        freeze=frozen,
    )
    ticket(1, 2)
    names = {
        (False, False): "atp",
        (True, False): "atp+qk",
        (False, True): "atp+graddrop",
        (True, True): "atp*",
    }
    result.method = names[asked.qk_fix, asked.grad_drop]
    result.magnitudes = scores.magnitudes
    result.held_fixed.CopyFrom(
        held(frozen, "Effects are to first order around the clean input, each node moved alone.")
    )
    if request.verify_top:
        found = verify(twin, clean, corrupt, metric, scores, top=request.verify_top, batch_size=batch_size)
        result.verification.CopyFrom(
            pb.Verification(
                nodes=[_node_message(node) for node in found.nodes],
                approximate=found.approximate,
                exact=found.exact,
                rank_correlation=found.rank_correlation,
            )
        )
    return {component: array(values) for component, values in scores.scores.items()}


def _score_edges(
    twin: GradientModel,
    request: pb.AttributionPatchRequest,
    clean: Tensor,
    corrupt: Tensor,
    metric: Metric,
    batch_size: int,
    ticket: Ticket,
    result: pb.AttributionPatchResult,
) -> Arrays:
    wiring = Wiring(twin)
    steps = request.edges.steps
    scores = attribute_edges(twin, clean, corrupt, metric, steps=steps, wiring=wiring, progress=ticket)
    result.method = "eap-ig" if steps else "eap"
    result.sources.extend(map(str, scores.sources))
    result.destinations.extend(map(str, scores.destinations))
    around = "on the way between the inputs' embeddings" if steps else "around the clean input"
    result.held_fixed.CopyFrom(
        held(NOTHING_FROZEN, f"Effects are to first order {around}, each edge moved alone.")
    )
    if request.verify_top:
        found = verify_edges(wiring, clean, corrupt, metric, scores, top=request.verify_top, progress=ticket)
        rows = {source: row for row, source in enumerate(wiring.sources)}
        result.verification.CopyFrom(
            pb.Verification(
                sources=[rows[source] for source, _ in found.edges],
                destinations=[wiring.columns[end] for _, end in found.edges],
                approximate=found.approximate,
                exact=found.exact,
                rank_correlation=found.rank_correlation,
            )
        )
    return {"scores": array(scores.scores), "valid": scores.valid.cpu().numpy()}


def _node_message(node: Node) -> pb.PatchNode:
    return pb.PatchNode(hook_point=node.hook_point, position=node.position, head=node.head, unit=node.unit)
