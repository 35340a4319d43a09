"""A readout checked against its hook point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.probes.pooling import RunningPool
from glasshouse.server.probes.served import ServedProbe
from glasshouse.server.types.conditions import ProbeOutput
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.readouts import ReadActivations, ReadFeatures, ReadLogitLens, WireDType
from glasshouse.server.types.selectors import ResolvedPositions
from glasshouse.wire import reasons


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbeReading:
    """How a probe is read: `probe` in float32 on the model's device, `name` the resource name of its version. `pool` is the
    request's own, where the probe pools over positions and one position is not all it sees.
    """

    name: str
    probe: ServedProbe
    output: ProbeOutput
    pool: RunningPool | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedReadout:
    """A readout ready to plan: activations sent as `dtype`; with `lens_top_k` > 0 the logit lens; with a `dictionary` its
    `top_k` strongest features or those of `feature_ids` (int64 (n,)); with a `reading` the scores of its probe. Read at
    `points`, which are several for a dictionary or probe that reads several hook points.

    `index`: its place in the request; negative for one that the server reads for itself.
    """

    index: int
    points: tuple[HookPoint, ...]
    positions: ResolvedPositions
    dtype: WireDType = "float32"
    lens_top_k: int = 0
    dictionary: Dictionary | None = None
    top_k: int = 0
    feature_ids: Tensor | None = None
    reading: ProbeReading | None = None

    @property
    def point(self) -> HookPoint:
        """The (first) hook point it reads."""
        return self.points[0]

    @property
    def is_plain(self) -> bool:
        """Whether the captured activation itself is the value."""
        return not self.lens_top_k and self.dictionary is None and self.reading is None


def prepare(
    readout: ReadActivations | ReadLogitLens,
    *,
    index: int,
    point: HookPoint,
    positions: ResolvedPositions,
    vocab_size: int,
    field: str,
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
            return PreparedReadout(index=index, points=(point,), positions=positions, dtype=readout.dtype)
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
            return PreparedReadout(
                index=index, points=(point,), positions=positions, lens_top_k=readout.top_k
            )


# More than any reader looks at; bounds what one position can carry.
MAX_TOP_K = 1024


def prepare_features(
    readout: ReadFeatures,
    *,
    index: int,
    dictionary: Dictionary,
    points: tuple[HookPoint, ...],
    positions: ResolvedPositions,
    device: torch.device,
    field: str,
) -> PreparedReadout:
    """Checks a feature readout. `points` are the dictionary's input hook points; `field` its path in the request.

    Raises:
        InvalidArgument: both or neither of top_k and features, or a top_k out of range.
        NotFound: a feature index out of range.
    """
    if bool(readout.top_k) == bool(readout.features):
        raise InvalidArgument(
            "give either top_k or features",
            reason=reasons.FIELD_CONFLICT if readout.top_k else reasons.FIELD_REQUIRED,
            field=f"{field}.features.top_k",
            value=readout.top_k,
            remedy="top_k for the strongest, features for named ones",
        )
    if not 0 <= readout.top_k <= MAX_TOP_K:
        raise InvalidArgument(
            f"top_k {readout.top_k} is not between 1 and {MAX_TOP_K}",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field=f"{field}.features.top_k",
            value=readout.top_k,
            remedy="ask for fewer features, or use EncodeFeatures",
        )
    ids = torch.tensor(readout.features, dtype=torch.int64)
    dictionary.check_feature_ids(ids, field=f"{field}.features.features")
    return PreparedReadout(
        index=index,
        points=points,
        positions=positions,
        dictionary=dictionary,
        top_k=readout.top_k,
        feature_ids=ids.to(device) if readout.features else None,
    )
