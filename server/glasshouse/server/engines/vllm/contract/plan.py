"""A request's edits and readouts, resolved: what the gateway packs into `SamplingParams.extra_args`.

Made from the same `PreparedIntervention` and `PreparedReadout` that the transformers engine runs, so both engines refuse,
resolve and count alike. Packed with msgpack into one `bytes` value: vLLM passes it on unread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

from glasshouse.server.interventions.edits import PreparedEdit, PreparedIntervention, Primitive
from glasshouse.server.interventions.features import PreparedFeatureEdit
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.selectors import ResolvedPositions

EditKind = Literal["add", "project", "rotate", "replace", "features"]
ReadoutKind = Literal["activations", "features", "lens"]

# Positions beyond any context.
FOREVER = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Clause:
    """Positions as ascending disjoint half-open ranges; excluded prompt positions are already taken out. From
    `n_prompt` on a token of `excluded_token_ids` is left out wherever it is fed.
    """

    ranges: tuple[tuple[int, int], ...]
    excluded_token_ids: tuple[int, ...] = ()
    n_prompt: int = 0


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


@dataclass(frozen=True, kw_only=True)
class ReadoutPlan:
    """One readout. Every position of the clause yields a row.

    kind "activations": the activation at `sites[0]` after its edits, as `dtype` ("float32", "bfloat16", "float16")
    kind "features":    `top_k` strongest, or `feature_ids`, of `dictionary` read at `sites`
    kind "lens":        the `top_k` likeliest tokens of unembed(final_norm(s)) at `sites[0]`
    """

    index: int
    kind: ReadoutKind
    clause: Clause
    sites: tuple[str, ...]
    dtype: str = "float32"
    top_k: int = 0
    dictionary: str = ""
    feature_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RequestPlan:
    """All that a worker does for one request. `tag` (uint31) is the gateway's own name for it and its only name in
    messages: vLLM suffixes request ids. Never reuse a tag that may still be running.
    """

    tag: int
    n_prompt: int
    edits: tuple[EditPlan, ...] = ()
    readouts: tuple[ReadoutPlan, ...] = ()

    @property
    def n_edits(self) -> int:
        """Slots it takes in the worker's edit table (feature edits take none)."""
        return sum(edit.kind != "features" for edit in self.edits)

    @property
    def n_vectors(self) -> int:
        """Rows it takes in the worker's vector table; resident vectors take none."""
        return sum(edit.n_vectors for edit in self.edits if not edit.vector_keys)

    @property
    def reads_prompt(self) -> bool:
        """Whether a position of the prompt is read: then vLLM must not take it from its prefix cache
        (`SamplingParams.skip_reading_prefix_cache`), for a cached position runs no layer.
        """
        return any(low < self.n_prompt for readout in self.readouts for low, _ in readout.clause.ranges)


def clause_of(positions: ResolvedPositions) -> Clause:
    """Resolved positions as ranges alone."""
    ranges: list[tuple[int, int]] = []
    for low, high in positions.ranges:
        start = low
        for gap in sorted(p for p in positions.excluded if low <= p < high):
            if gap > start:
                ranges.append((start, gap))
            start = gap + 1
        if high > start:
            ranges.append((start, high))
    return Clause(
        ranges=tuple(ranges),
        excluded_token_ids=tuple(sorted(positions.excluded_token_ids)),
        n_prompt=positions.n_prompt,
    )


def plan_request(
    tag: int,
    n_prompt: int,
    edits: Sequence[PreparedIntervention],
    readouts: Sequence[PreparedReadout],
    *,
    dictionary_keys: Mapping[str, str],
    vector_keys: Mapping[int, tuple[str, ...]] | None = None,
) -> RequestPlan:
    """The plan of a request that `engines.preparation` has checked.

    `dictionary_keys`: from a dictionary's name to the key it was loaded under. `vector_keys`: from an edit's index to the
    resident vectors that it uses instead of its own.
    """
    resident = vector_keys or {}
    return RequestPlan(
        tag=tag,
        n_prompt=n_prompt,
        edits=tuple(_edit(edit, dictionary_keys, resident.get(edit.index, ())) for edit in edits),
        readouts=tuple(_readout(readout, dictionary_keys) for readout in readouts),
    )


_KINDS: dict[Primitive, EditKind] = {
    Primitive.ADD: "add",
    Primitive.PROJECT: "project",
    Primitive.ROTATE: "rotate",
    Primitive.REPLACE: "replace",
}


def _edit(edit: PreparedIntervention, keys: Mapping[str, str], resident: tuple[str, ...]) -> EditPlan:
    clause = clause_of(edit.positions)
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
    )


def _readout(readout: PreparedReadout, keys: Mapping[str, str]) -> ReadoutPlan:
    clause = clause_of(readout.positions)
    sites = tuple(point.name for point in readout.points)
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
