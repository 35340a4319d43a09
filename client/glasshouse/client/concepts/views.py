"""What a handle shows of a direction or probe: shared by the sync and the async handles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.concepts.values import (
    DirectionAt,
    DirectionInfo,
    Discrimination,
    ProbeInfo,
    ProbeReport,
    not_published,
)

Info = TypeVar("Info", bound=DirectionInfo | ProbeInfo)


class _View(Generic[Info]):
    """The facts of what may be published under a name. `_KIND`: what it is called."""

    _KIND: ClassVar[str]

    def __init__(self, transport: Any, info: Info) -> None:
        self.info: Info = info
        self._transport = transport

    def __repr__(self) -> str:
        name = f"{self.info.name}@{self.info.version}" if self.info.name else "(not published)"
        return f"{type(self).__name__}({name!r}, {self._about()})"

    def _about(self) -> str:
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Its short name, under which readouts of a probe are found; empty where it was not published."""
        return self.info.name

    @property
    def resource_name(self) -> str:
        """`models/{model}/directions|probes/{name}@{version}`; empty where it was not published."""
        return self.info.resource_name

    def _published(self) -> str:
        if not self.resource_name:
            raise not_published(self._KIND)
        return self.resource_name


class DirectionView(_View[DirectionInfo]):
    """A direction's facts."""

    _KIND = "direction"

    def _about(self) -> str:
        return f"{self.info.method}, best at {self.best_hook_point}"

    @property
    def at(self) -> Mapping[str, DirectionAt]:
        """The direction at each hook point, in the order asked for."""
        return self.info.at

    @property
    def best_hook_point(self) -> str:
        """Where it tells the classes apart best."""
        return self.info.best_hook_point

    @property
    def vector(self) -> NDArray[np.float32]:
        """(width,) float32 at the best hook point."""
        vector = self.info.best.vector
        assert vector is not None, "a handle has its vectors"
        return vector

    @property
    def held_out(self) -> Discrimination | None:
        """Held-out figures at the best hook point; None where no examples judged it."""
        return self.info.best.held_out

    def plot(self, path: str | Path) -> None:
        """Draws the held-out figures by layer as a picture: PNG, SVG or PDF by the file's ending.

        Raises ImportError, with what to install, where matplotlib is not there.
        """
        from glasshouse.client.concepts.plot import plot_direction

        plot_direction(self.info, Path(path))


class ProbeView(_View[ProbeInfo]):
    """A probe's facts."""

    _KIND = "probe"

    def _about(self) -> str:
        return f"{self.info.kind}, {'/'.join(self.info.labels)}"

    @property
    def report(self) -> ProbeReport | None:
        """Its quality; None where it was trained elsewhere."""
        return self.info.report
