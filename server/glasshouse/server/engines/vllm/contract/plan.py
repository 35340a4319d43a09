"""A request's edits and readouts, resolved: what the gateway packs into `SamplingParams.extra_args`.

Made from the same `PreparedIntervention` and `PreparedReadout` that the transformers engine runs, so both engines refuse,
resolve and count alike. Packed with msgpack into one `bytes` value: vLLM passes it on unread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from glasshouse.server.interventions.conditions import (
    AffineScore,
    ColumnScore,
    FeatureScore,
    PreparedCondition,
    Switch,
)
from glasshouse.server.interventions.edits import PreparedEdit, PreparedIntervention, Primitive
from glasshouse.server.interventions.features import PreparedFeatureEdit
from glasshouse.server.probes.served import ServedProbe
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.conditions import ProbeOutput

from .clauses import Clause, clause_of
from .watches import FIRST_EDIT, SCORES, Steering, WatchPlan

EditKind = Literal["add", "project", "rotate", "replace", "features"]
ReadoutKind = Literal["activations", "features", "lens", "probe", "scores"]
ScoreKind = Literal["affine", "column", "feature"]

# Positions beyond any context.
FOREVER = 1 << 30


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """One edit, run after those before it in the request.

    kind "add":      s + (plain + scaled |s|) v, vectors (1, W)
    kind "project":  s with s.v clamped to [low, high], vectors (1, W) unit
    kind "rotate":   vectors (3, W): the plane's basis and the target
    kind "replace":  vectors (1, W), or one a position of the clause in ascending order
    kind "features": `feature_ids` of `dictionary` become factor f + offset; read at `sites_in`, written at `sites_out`

    `vectors`: float32 little-endian, row-major; empty where `vector_keys` names resident rows instead, one a row.
    """

    index: int
    kind: EditKind
    clause: Clause
    sites_out: tuple[str, ...]
    sites_in: tuple[str, ...] = ()
    preserve_norm: bool = False
    n_vectors: int = 0
    vectors: bytes = b""
    vector_keys: tuple[str, ...] = ()
    plain: float = 0.0
    scaled: float = 0.0
    low: float | None = None
    high: float | None = None
    dictionary: str = ""
    feature_ids: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()
    offsets: tuple[float, ...] = ()
    condition: int = -1
    # The watch of the request that it waits for, by index; -1: it is in force from the start.
    watch: int = -1


@dataclass(frozen=True, kw_only=True)
class ConditionPlan:
    """What edits apply under (`interventions.conditions`): `side` times the score is greater than `side` times `limit`. The
    clause is of the positions it looks at.

    kind "affine":  x . weights + bias; `weights` float32 little-endian, of the sites' widths together
    kind "column":  `column` of `probe`, its log-odds where `margin`
    kind "feature": `feature` of `dictionary`, which reads the sites; `source` where it reads one of several
    """

    kind: ScoreKind
    clause: Clause
    sites: tuple[str, ...]
    limit: float
    side: float
    scope: str
    aggregation: str
    lagged: bool = False
    # How a probe pools over positions: "mean", "max", or "" where it does not.
    pooling: str = ""
    weights: bytes = b""
    bias: float = 0.0
    probe: str = ""
    column: int = 0
    margin: bool = False
    dictionary: str = ""
    feature: int = 0
    source: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReadoutPlan:
    """One readout. Every position of the clause yields a row. `index`: its place in the request, negative for one that the
    server reads for itself.

    kind "activations": the activation at `sites` after its edits, side by side where there are several, as `dtype`
                        ("float32", "bfloat16", "float16")
    kind "features":    `top_k` strongest, or `feature_ids`, of `dictionary` read at `sites`
    kind "lens":        the `top_k` likeliest tokens of unembed(final_norm(s)) at `sites[0]`
    kind "probe":       the scores of `probe` at `sites`, its log-odds where `margin`
    kind "scores":      the scores of the plan's watches at `sites`; of every position once, when it first runs

    A probe that pools over positions is read as "activations": what counts is decided where the tokens are known to stay.
    """

    index: int
    kind: ReadoutKind
    clause: Clause
    sites: tuple[str, ...]
    dtype: str = "float32"
    top_k: int = 0
    dictionary: str = ""
    feature_ids: tuple[int, ...] = ()
    probe: str = ""
    margin: bool = False


@dataclass(frozen=True, kw_only=True)
class RequestPlan:
    """All that a worker does for one request. `tag` (uint31) is the gateway's own name for it and its only name in
    messages: vLLM suffixes request ids. Never reuse a tag that may still be running.
    """

    tag: int
    n_prompt: int
    edits: tuple[EditPlan, ...] = ()
    readouts: tuple[ReadoutPlan, ...] = ()
    # Edits name them by index.
    conditions: tuple[ConditionPlan, ...] = ()
    # The monitors that may steer it; edits name them by index too.
    watches: tuple[WatchPlan, ...] = ()

    @property
    def n_edits(self) -> int:
        """Slots it takes in the worker's edit table (feature edits, and requests with conditions, take none)."""
        return 0 if self.conditions else sum(edit.kind != "features" for edit in self.edits)

    @property
    def n_vectors(self) -> int:
        """Rows it takes in the worker's vector table; resident vectors take none."""
        if self.conditions:
            return 0
        return sum(edit.n_vectors for edit in self.edits if not edit.vector_keys)

    @property
    def reads_prompt(self) -> bool:
        """Whether a position of the prompt before its last is read, or looked at by a condition: then vLLM must not take it
        from its prefix cache (`SamplingParams.skip_reading_prefix_cache`), for a cached position runs no layer. The last is
        computed in any case.
        """
        clauses = [readout.clause for readout in self.readouts] + [each.clause for each in self.conditions]
        return any(low < self.n_prompt - 1 for clause in clauses for low, _ in clause.ranges)


def plan_request(
    tag: int,
    n_prompt: int,
    edits: Sequence[PreparedIntervention],
    readouts: Sequence[PreparedReadout],
    *,
    dictionary_keys: Mapping[str, str],
    vector_keys: Mapping[int, tuple[str, ...]] | None = None,
    probe_keys: Mapping[int, str] | None = None,
    steering: Steering | None = None,
) -> RequestPlan:
    """The plan of a request that `engines.preparation` has checked; `steering`: of the monitors that may steer it.

    `dictionary_keys`: from a dictionary's name to the key it was loaded under. `vector_keys`: from the `id` of an edit to
    the resident vectors that it uses instead of its own. `probe_keys`: from the `id` of a probe (as readouts and
    conditions hold it) to the key it was loaded under.
    """
    resident, probes = vector_keys or {}, probe_keys or {}
    conditions: dict[int, PreparedCondition] = {}
    for edit in edits:
        if edit.condition is not None:
            conditions.setdefault(id(edit.condition), edit.condition)
    places = {key: place for place, key in enumerate(conditions)}
    dormant: tuple[EditPlan, ...] = ()
    if steering is not None:
        waiting = [(watch, edit) for watch, own in enumerate(steering.edits) for edit in own]
        dormant = tuple(
            replace(
                _edit(edit, dictionary_keys, resident.get(id(edit), ()), places),
                index=FIRST_EDIT + place,
                watch=watch,
            )
            for place, (watch, edit) in enumerate(waiting)
        )
    own = tuple(_edit(edit, dictionary_keys, resident.get(id(edit), ()), places) for edit in edits)
    return RequestPlan(
        tag=tag,
        n_prompt=n_prompt,
        edits=own + dormant,
        readouts=tuple(_readout(readout, dictionary_keys, probes) for readout in readouts),
        conditions=tuple(_condition(each, dictionary_keys, probes) for each in conditions.values()),
        watches=() if steering is None else steering.plans(dictionary_keys, probes),
    )


def probes_of(
    edits: Sequence[PreparedIntervention],
    readouts: Sequence[PreparedReadout],
    steering: Steering | None = None,
) -> tuple[ServedProbe, ...]:
    """The probes that workers must hold for a request, each once."""
    found: dict[int, ServedProbe] = {}
    for probe in () if steering is None else steering.probes:
        found[id(probe)] = probe
    for edit in edits:
        if edit.condition is not None and isinstance(edit.condition.score, ColumnScore):
            found[id(edit.condition.score.probe)] = edit.condition.score.probe
    for readout in readouts:
        if readout.reading is not None and readout.reading.pool is None:
            found[id(readout.reading.probe)] = readout.reading.probe
    return tuple(found.values())


_KINDS: dict[Primitive, EditKind] = {
    Primitive.ADD: "add",
    Primitive.PROJECT: "project",
    Primitive.ROTATE: "rotate",
    Primitive.REPLACE: "replace",
}


def _edit(
    edit: PreparedIntervention,
    keys: Mapping[str, str],
    resident: tuple[str, ...],
    conditions: Mapping[int, int],
) -> EditPlan:
    clause = clause_of(edit.positions)
    condition = -1 if edit.condition is None else conditions[id(edit.condition)]
    if isinstance(edit, PreparedFeatureEdit):
        return EditPlan(
            index=edit.index,
            kind="features",
            clause=clause,
            sites_in=tuple(point.name for point in edit.points_in),
            sites_out=tuple(point.name for point in edit.points_out),
            preserve_norm=edit.preserve_norm,
            dictionary=keys[edit.dictionary.facts.name],
            feature_ids=edit.feature_ids,
            factors=edit.factors,
            offsets=edit.offsets,
            condition=condition,
        )
    assert isinstance(edit, PreparedEdit), f"{type(edit).__name__} has no plan"
    scalars = edit.scalars
    return EditPlan(
        index=edit.index,
        kind=_KINDS[edit.primitive],
        clause=clause,
        sites_out=(edit.point.name,),
        preserve_norm=edit.preserve_norm,
        n_vectors=edit.vectors.shape[0],
        vectors=b"" if resident else edit.vectors.cpu().numpy().astype("<f4").tobytes(),
        vector_keys=resident,
        plain=scalars.plain,
        scaled=scalars.scaled,
        low=None if np.isinf(scalars.low) else scalars.low,
        high=None if np.isinf(scalars.high) else scalars.high,
        condition=condition,
    )


def _condition(
    condition: PreparedCondition, keys: Mapping[str, str], probes: Mapping[int, str]
) -> ConditionPlan:
    plan = ConditionPlan(
        kind="affine",
        clause=clause_of(condition.positions),
        sites=tuple(point.name for point in condition.points),
        limit=condition.limit,
        side=condition.side,
        scope=condition.scope.value,
        aggregation=condition.aggregation.value,
        lagged=condition.lagged,
        pooling="" if condition.pool is None else condition.pool.pooling.value,
    )
    match condition.score:
        case AffineScore(weights=weights, bias=bias):
            return replace(plan, weights=weights.cpu().numpy().astype("<f4").tobytes(), bias=float(bias))
        case ColumnScore(probe=probe, column=column, output=output):
            return replace(
                plan,
                kind="column",
                probe=probes[id(probe)],
                column=column,
                margin=output is ProbeOutput.MARGIN,
            )
        case FeatureScore(dictionary=dictionary, feature=feature, source=source):
            return replace(
                plan, kind="feature", dictionary=keys[dictionary.facts.name], feature=feature, source=source
            )
        case Switch():
            raise AssertionError("a switch has no plan: the edits of watches wait for their ranges")


def _readout(readout: PreparedReadout, keys: Mapping[str, str], probes: Mapping[int, str]) -> ReadoutPlan:
    clause = clause_of(readout.positions)
    sites = tuple(point.name for point in readout.points)
    if readout.index == SCORES:
        return ReadoutPlan(index=SCORES, kind="scores", clause=clause, sites=sites)
    reading = readout.reading
    if reading is not None:
        plan = ReadoutPlan(index=readout.index, kind="activations", clause=clause, sites=sites)
        if reading.pool is not None:
            return plan
        margin = reading.output is ProbeOutput.MARGIN
        return replace(plan, kind="probe", probe=probes[id(reading.probe)], margin=margin)
    if readout.dictionary is not None:
        ids = () if readout.feature_ids is None else tuple(readout.feature_ids.tolist())
        return ReadoutPlan(
            index=readout.index,
            kind="features",
            clause=clause,
            sites=sites,
            top_k=readout.top_k,
            dictionary=keys[readout.dictionary.facts.name],
            feature_ids=ids,
        )
    if readout.lens_top_k:
        return ReadoutPlan(
            index=readout.index, kind="lens", clause=clause, sites=sites, top_k=readout.lens_top_k
        )
    return ReadoutPlan(
        index=readout.index, kind="activations", clause=clause, sites=sites, dtype=readout.dtype
    )


@dataclass(frozen=True)
class _Codec:
    encoder: Any = field(repr=False)
    decoder: Any = field(repr=False)


@cache
def _codec() -> _Codec:
    import msgspec

    return _Codec(msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(RequestPlan))


def pack_plan(plan: RequestPlan) -> bytes:
    """For `SamplingParams(extra_args={EXTRA_ARG: pack_plan(plan)})`."""
    packed: bytes = _codec().encoder.encode(plan)
    return packed


def unpack_plan(packed: bytes) -> RequestPlan:
    """The reverse. Raises msgspec's errors for anything that is not a plan."""
    plan: RequestPlan = _codec().decoder.decode(packed)
    return plan
