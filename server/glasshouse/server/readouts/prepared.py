"""A readout checked against its hook point."""

from __future__ import annotations

from dataclasses import dataclass

from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.readouts import ReadActivations, ReadLogitLens, Readout, WireDType
from glasshouse.server.types.selectors import ResolvedPositions
from glasshouse.wire import reasons


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedReadout:
    """A readout ready to plan: activations sent as `dtype`, or with `lens_top_k` > 0 the logit lens."""

    index: int
    point: HookPoint
    positions: ResolvedPositions
    dtype: WireDType = "float32"
    lens_top_k: int = 0


def prepare(
    readout: Readout, *, index: int, point: HookPoint, positions: ResolvedPositions, vocab_size: int, field: str
) -> PreparedReadout:
    """Checks `readout` against `point`. `field` is its path in the request.

    Raises:
        FailedPrecondition: the point cannot be read.
        InvalidArgument: a logit lens off the residual stream, or a top_k out of range.
    """
    if not point.readable:
        raise FailedPrecondition(
            f"{point.name} cannot be read",
            reason=reasons.HOOK_POINT_NOT_READABLE,
            field=field,
            value=point.name,
            remedy="ListHookPoints says which points are readable",
        )
    match readout:
        case ReadActivations():
            return PreparedReadout(index=index, point=point, positions=positions, dtype=readout.dtype)
        case ReadLogitLens():
            if ".hook_resid_" not in point.name:
                raise InvalidArgument(
                    f"a logit lens reads the residual stream, {point.name} is not part of it",
                    reason=reasons.VALUE_OUT_OF_RANGE,
                    field=f"{field}.logit_lens.hook_point",
                    value=point.name,
                    remedy="use a hook_resid_pre, hook_resid_mid or hook_resid_post",
                )
            if not 1 <= readout.top_k <= vocab_size:
                raise InvalidArgument(
                    f"top_k {readout.top_k} is not between 1 and the vocabulary size {vocab_size}",
                    reason=reasons.VALUE_OUT_OF_RANGE,
                    field=f"{field}.logit_lens.top_k",
                    value=readout.top_k,
                    remedy="ask for at least one token",
                )
            return PreparedReadout(index=index, point=point, positions=positions, lens_top_k=readout.top_k)
