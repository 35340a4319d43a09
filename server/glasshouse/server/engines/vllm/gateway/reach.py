"""The hook points that workers reach: the others are served as neither read nor edited."""

from __future__ import annotations

from dataclasses import replace

from glasshouse.server.models.loaded import LoadedModel

_UNREACHED = "not reached by the vllm engine"


def with_reach(outlined: LoadedModel, sites: frozenset[str]) -> LoadedModel:
    """The model with only `sites` to be read and edited."""
    taps = tuple(
        tap
        if tap.point.name in sites
        else replace(tap, point=replace(tap.point, readable=False, writable=False, note=_UNREACHED))
        for tap in outlined.family.taps
    )
    return replace(outlined, family=replace(outlined.family, taps=taps))
