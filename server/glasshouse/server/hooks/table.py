"""The hook points of one loaded model, and what a name that a caller wrote means on it."""

from __future__ import annotations

import difflib
import re

from glasshouse.server.models.families.spec import TapSite
from glasshouse.server.models.families.table import BLOCK_POINTS, MODEL_POINTS
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument, NotFound, ServingError
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.wire import reasons

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=$|[.:])")


class HookTable:
    """Names to taps. `points` are in the order of the forward pass."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._family = loaded.family
        taps = loaded.family.taps
        self.points: tuple[HookPoint, ...] = tuple(tap.point for tap in taps)
        self._taps: dict[str, TapSite] = {tap.point.name: tap for tap in taps}
        self._order: dict[str, int] = {name: index for index, name in enumerate(self._taps)}
        self._names: dict[str, HookPoint] = {}
        for tap in taps:
            for alias in (tap.point.module_path, *tap.aliases):
                self._names.setdefault(alias, tap.point)
        self._names.update({point.name: point for point in self.points})

    def resolve(self, name: str, *, field: str = "hook_point") -> HookPoint:
        """The point that `name` means: canonical, an alias, or a Hugging Face module path.

        Raises NotFound for no such name, InvalidArgument for a layer the model lacks, FailedPrecondition
        for a point that other architectures have and this one does not.
        """
        point = self._names.get(name)
        if point is None:
            raise self._refusal(name, field)
        return point

    def tap(self, name: str) -> TapSite:
        """The tap of a resolved point, by its canonical name."""
        return self._taps[name]

    def position(self, name: str) -> int:
        """Where in the forward pass a point stands: smaller is earlier."""
        return self._order[name]

    def _refusal(self, name: str, field: str) -> ServingError:
        n_layers = self.loaded.n_layers
        block = _BLOCK.fullmatch(name)
        bare = block[2] if block else name
        known = bare in BLOCK_POINTS if block else bare in MODEL_POINTS
        if known and not self.points:
            return self._absent(
                name,
                field,
                f"{self._family.name} models are served without hook points",
                "a supported family",
            )
        if bare in self._family.absent:
            return self._absent(name, field, self._family.absent[bare], "")
        number = _NUMBER.search(name)
        if number is not None and int(number[0]) >= n_layers:
            first = name[: number.start()] + "0" + name[number.end() :]
            if first in self._names:
                return InvalidArgument(
                    f"Layer {number[0]} of {name!r} is out of range: "
                    f"this model has layers 0 to {n_layers - 1}.",
                    reason=reasons.LAYER_OUT_OF_RANGE,
                    field=field,
                    value=name,
                    remedy=f"Use a layer from 0 to {n_layers - 1}.",
                    metadata={"n_layers": str(n_layers)},
                )
        closest = tuple(difflib.get_close_matches(name, self._names, n=3, cutoff=0.6))
        hint = f" Closest: {', '.join(closest)}." if closest else ""
        return NotFound(
            f"This model has no hook point {name!r}.{hint}",
            reason=reasons.HOOK_POINT_NOT_FOUND,
            resource_type="HookPoint",
            resource_name=name,
            closest=closest,
            field=field,
            remedy="List the model's hook points for the names it has.",
        )

    def _absent(self, name: str, field: str, why: str, use: str) -> FailedPrecondition:
        why, _, instead = why.partition(": use ")
        instead = instead or use
        return FailedPrecondition(
            f"A {self._family.name} model has no hook point {name!r}: {why}.",
            reason=reasons.HOOK_POINT_ABSENT,
            field=field,
            value=name,
            remedy=f"Use {instead}." if instead else "List the model's hook points for the names it has.",
            metadata={"architecture": self._family.name},
        )
