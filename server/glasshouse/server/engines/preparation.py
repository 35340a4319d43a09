"""A request checked against the model that will serve it, before anything runs.

Both engines use it: hook points are resolved, positions made absolute, vectors checked and moved to the device. What
comes out can be planned without further checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from glasshouse.server.dictionaries.store import DictionaryStore
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.interventions import edits, features
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.probes.concepts import HeldProbe
from glasshouse.server.probes.pooling import Pooling, RunningPool
from glasshouse.server.readouts import prepared
from glasshouse.server.readouts.prepared import PreparedReadout, ProbeReading
from glasshouse.server.types.conditions import (
    Condition,
    ConditionScope,
    ProbeColumn,
    ProbeOutput,
)
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from glasshouse.server.types.interventions import (
    FeatureEdit,
    Intervention,
    InterventionReceipt,
    ScaleFeatures,
    SetFeatures,
)
from glasshouse.server.types.models import ModelInfo
from glasshouse.server.types.readouts import (
    ReadActivations,
    ReadFeatures,
    ReadLogitLens,
    Readout,
    ReadProbe,
    WireDType,
)
from glasshouse.server.types.selectors import ResolvedPositions, Selector, resolve
from glasshouse.wire import reasons

from .aborting import AbortCondition
from .concepts import NO_CONCEPTS, Concepts, DeviceProbes, in_place
from .conditions import ConditionPreparation, EditConditions, aggregation_of, check_looks


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Checks requests against one model."""

    info: ModelInfo
    table: HookTable
    device: torch.device
    dictionaries: DictionaryStore
    max_readout_bytes: int
    # Whether the engine scores probes and conditions while the model runs.
    scores: bool = True

    @cached_property
    def probes(self) -> DeviceProbes:
        """Probes on the model's device."""
        return DeviceProbes(self.table, self.device)

    def check_tokens(self, token_ids: Sequence[int], *, max_tokens: int, field: str) -> None:
        """Raises `InvalidArgument` for an empty prompt, ids off the vocabulary, or more than the context holds."""
        if not token_ids:
            raise InvalidArgument(
                "the input holds no token",
                reason=reasons.EMPTY_INPUT,
                field=field,
                value="0 tokens",
                remedy="give at least one token",
            )
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.info.vocab_size:
            raise InvalidArgument(
                f"token id {low if low < 0 else high} is not in [0, {self.info.vocab_size})",
                reason=reasons.TOKEN_OUT_OF_RANGE,
                field=f"{field}.token_ids",
                value=low if low < 0 else high,
                remedy="use ids from Tokenize",
            )
        if len(token_ids) + max_tokens > self.info.context_length:
            total = len(token_ids) + max_tokens
            raise InvalidArgument(
                f"{len(token_ids)} prompt tokens and max_tokens {max_tokens} make {total}, "
                f"the context holds {self.info.context_length}",
                reason=reasons.CONTEXT_EXCEEDED,
                field="max_tokens" if max_tokens and len(token_ids) < self.info.context_length else field,
                value=total,
                remedy="shorten the prompt or lower max_tokens",
            )

    def edits(
        self,
        interventions: Sequence[Intervention],
        *,
        prompt: Sequence[int],
        n_fed: int,
        concepts: Concepts = NO_CONCEPTS,
    ) -> tuple[PreparedIntervention, ...]:
        """The interventions of a request that feeds at most `n_fed` positions, the first of them `prompt`; `concepts` are
        what they name.
        """
        ready: list[PreparedIntervention] = []
        conditions = EditConditions(self._conditions, concepts, len(prompt))
        for index, intervention in enumerate(interventions):
            field = f"interventions[{index}]"
            intervention, resources = in_place(intervention, concepts, self.table, field)
            positions = self._resolve(intervention.positions, prompt, n_fed, f"{field}.positions")
            edit = self._edit(intervention, index, positions, field)
            condition = intervention.condition
            if condition is not None:
                path = f"{field}.condition"
                self._check_scores(path, "conditions")
                looked_at = self._resolve(condition.positions, prompt, n_fed, f"{path}.positions")
                found = conditions.of(condition, looked_at, edit.hook_points, path)
                reached = found.reach(positions, f"{field}.positions")
                if reached is not positions:
                    edit = self._edit(intervention, index, reached, field)
                edit.under(found.prepared, found.identity)
                resources += found.resources
            edit.resources = resources
            conditions.written(edit)
            ready.append(edit)
        return tuple(ready)

    @property
    def _conditions(self) -> ConditionPreparation:
        return ConditionPreparation(
            table=self.table, device=self.device, dictionaries=self.dictionaries, probes=self.probes
        )

    def _edit(
        self, intervention: Intervention, index: int, positions: ResolvedPositions, field: str
    ) -> PreparedIntervention:
        if isinstance(intervention.edit, SetFeatures | ScaleFeatures):
            return self._feature_edit(intervention, intervention.edit, index, positions, field)
        return self._plain_edit(intervention, index, positions, field)

    def _plain_edit(
        self, intervention: Intervention, index: int, positions: ResolvedPositions, field: str
    ) -> PreparedIntervention:
        point = self.table.resolve(intervention.hook_point, field=f"{field}.hook_point")
        if not point.writable:
            raise FailedPrecondition(
                f"{point.name} cannot be edited",
                reason=reasons.HOOK_POINT_NOT_WRITABLE,
                field=f"{field}.hook_point",
                value=point.name,
                remedy="ListHookPoints says which points are writable",
            )
        return edits.prepare(
            intervention, index=index, point=point, positions=positions, device=self.device, field=field
        )

    def _feature_edit(
        self,
        intervention: Intervention,
        edit: FeatureEdit,
        index: int,
        positions: ResolvedPositions,
        field: str,
    ) -> PreparedIntervention:
        named = f"{field}.{edit.kind}.dictionary"
        held = self.dictionaries.get(edit.dictionary, field=named).live(named)
        return features.prepare(
            intervention,
            index=index,
            dictionary=held.dictionary,
            points_in=held.points_in,
            points_out=held.points_out,
            positions=positions,
            field=field,
        )

    def readouts(
        self,
        readouts: Sequence[Readout],
        *,
        prompt: Sequence[int],
        n_fed: int,
        concepts: Concepts = NO_CONCEPTS,
    ) -> tuple[PreparedReadout, ...]:
        """The readouts of a request that feeds at most `n_fed` positions, the first of them `prompt`; `concepts` are what
        they name.
        """
        ready: list[PreparedReadout] = []
        pools: dict[object, RunningPool] = {}
        for index, readout in enumerate(readouts):
            field = f"readouts[{index}]"
            positions = self._resolve(readout.positions, prompt, n_fed, f"{field}.positions")
            ready.append(self._readout(readout, index, positions, concepts, pools, field))
        return tuple(ready)

    def _readout(
        self,
        readout: Readout,
        index: int,
        positions: ResolvedPositions,
        concepts: Concepts,
        pools: dict[object, RunningPool],
        field: str,
    ) -> PreparedReadout:
        match readout:
            case ReadProbe():
                self._check_scores(f"{field}.probe", "probes")
                probe = concepts.probes[readout.probe]
                return self._reading(probe, readout.output, index, positions, pools, f"{field}.probe.probe")
            case ReadFeatures():
                named = f"{field}.features.dictionary"
                held = self.dictionaries.get(readout.dictionary, field=named).live(named)
                return prepared.prepare_features(
                    readout,
                    index=index,
                    dictionary=held.dictionary,
                    points=held.points_in,
                    positions=positions,
                    device=self.device,
                    field=field,
                )
            case ReadActivations() | ReadLogitLens():
                inner = "activations" if isinstance(readout, ReadActivations) else "logit_lens"
                return prepared.prepare(
                    readout,
                    index=index,
                    point=self.table.resolve(readout.hook_point, field=f"{field}.{inner}.hook_point"),
                    positions=positions,
                    vocab_size=self.info.vocab_size,
                    field=field,
                )

    def _reading(
        self,
        held: HeldProbe,
        output: ProbeOutput,
        index: int,
        positions: ResolvedPositions,
        pools: dict[object, RunningPool],
        field: str,
    ) -> PreparedReadout:
        """A probe's readout. Those of one request that pool the same share a pool of `pools`."""
        points = self.probes.points(held, field)
        pooling = held.probe.facts.pooling
        pool: RunningPool | None = None
        if pooling in (Pooling.MEAN, Pooling.MAX):
            same = (pooling, tuple(point.name for point in points), positions)
            pool = pools.setdefault(same, RunningPool(pooling))
        reading = ProbeReading(name=held.name, probe=self.probes.of(held), output=output, pool=pool)
        return PreparedReadout(index=index, points=points, positions=positions, reading=reading)

    def abort_when(
        self, abort_when: Sequence[Condition], *, prompt: Sequence[int], n_fed: int, concepts: Concepts
    ) -> tuple[AbortCondition, ...]:
        """What ends a generation before its time, each with a readout that the engine is to read too."""
        ready: list[AbortCondition] = []
        pools: dict[object, RunningPool] = {}
        for index, condition in enumerate(abort_when):
            field = f"abort_when[{index}]"
            measure = self._conditions.measure(condition, concepts, field)
            positions = self._resolve(condition.positions, prompt, n_fed, f"{field}.positions")
            if condition.scope is ConditionScope.PROMPT:
                positions = positions.limited(0, len(prompt))
            check_looks(condition, positions, field)
            own, column = -1 - index, 0
            if isinstance(condition.source, ProbeColumn):
                probe = concepts.probes[condition.source.probe]
                column = probe.probe.column(condition.source.label)
                readout = self._reading(probe, condition.source.output, own, positions, pools, field)
            else:
                feature = ReadFeatures(
                    dictionary=condition.source.dictionary, features=(condition.source.feature,)
                )
                readout = self._readout(feature, own, positions, concepts, pools, field)
            aggregation = aggregation_of(condition, measure.pooling)
            ready.append(AbortCondition(index, condition, aggregation, readout, column))
        return tuple(ready)

    def check_bytes(self, ready: Sequence[PreparedReadout], *, n_fed: int, field: str) -> None:
        """Raises `ResourceExhausted` where what is read at the `n_fed` positions is more than one request may take."""
        total = 0
        for readout in ready:
            n_positions = sum(min(high, n_fed) - low for low, high in readout.positions.ranges if low < n_fed)
            total += n_positions * _bytes_per_position(readout, n_fed)
        if total > self.max_readout_bytes:
            raise ResourceExhausted(
                f"the {field} come to as many as {total:,} bytes, a request may take {self.max_readout_bytes:,}",
                reason=reasons.LIMIT_EXCEEDED,
                field=field,
                value=total,
                remedy="read fewer positions or hook points; the operator sets limits.max_readout_bytes",
            )

    def extraction(
        self, hook_points: Sequence[str], positions: Selector, dtype: WireDType, *, prompt: Sequence[int]
    ) -> tuple[PreparedReadout, ...]:
        """One readout a hook point of an extraction over `prompt`."""
        ready = []
        for index, name in enumerate(hook_points):
            point = self.table.resolve(name, field=f"hook_points[{index}]")
            resolved = self._resolve(positions, prompt, len(prompt), "positions")
            wanted = ReadActivations(hook_point=name, dtype=dtype)
            ready.append(
                prepared.prepare(
                    wanted,
                    index=index,
                    point=point,
                    positions=resolved,
                    vocab_size=self.info.vocab_size,
                    field=f"hook_points[{index}]",
                )
            )
        return tuple(ready)

    def _check_scores(self, field: str, what: str) -> None:
        if not self.scores:
            raise FailedPrecondition(
                f"{field}: this engine does not serve {what}",
                reason=reasons.CAPABILITY_MISSING,
                field=field,
                value=what,
                remedy="serve the model with --engine transformers",
            )

    def _resolve(
        self, selector: Selector, prompt: Sequence[int], n_fed: int, field: str
    ) -> ResolvedPositions:
        return resolve(
            selector,
            prompt=prompt,
            n_fed=n_fed,
            bos_token_id=self.info.bos_token_id,
            special_token_ids=self.info.special_token_ids,
            field=field,
        )


def _bytes_per_position(readout: PreparedReadout, n_fed: int) -> int:
    if readout.lens_top_k:
        return 8 * readout.lens_top_k
    if readout.dictionary is not None:
        return 8 * (readout.top_k or (0 if readout.feature_ids is None else readout.feature_ids.numel()))
    if readout.reading is not None:
        return 4 * len(readout.reading.probe.facts.columns)
    size = 4 if readout.dtype == "float32" else 2
    return size * (
        readout.point.n_heads * n_fed if readout.point.kind == "attention" else readout.point.width
    )


def receipt(ready: Sequence[PreparedIntervention]) -> tuple[InterventionReceipt, ...]:
    """What was done.

    Raises:
        FailedPrecondition: an edit ran at fewer positions than its selector covered. Nothing is silently skipped.
    """
    for edit in ready:
        if edit.applied != edit.promised:
            raise FailedPrecondition(
                f"interventions[{edit.index}] was applied at {edit.applied} positions of {edit.promised}",
                reason=reasons.INTERVENTION_NOT_APPLIED,
                field=f"interventions[{edit.index}]",
                value=edit.kind,
                remedy="this is a defect of the engine: the tokens streamed before are not to be used",
            )
    return tuple(
        InterventionReceipt(
            index=edit.index,
            edit=edit.kind,
            hook_points=tuple(point.name for point in edit.hook_points),
            positions_applied=edit.applied,
            content_hash=edit.content_hash,
            positions_steered=edit.n_steered,
            resources=edit.resources,
        )
        for edit in ready
    )
