"""What every stage of the tour is given, and how one fails."""

from __future__ import annotations

from dataclasses import dataclass

from glasshouse.client import Client, Model
from glasshouse.tour.screen import Screen
from glasshouse.tour.server_process import ServerProcess


class TourError(Exception):
    """Something on the tour is not as it should be."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """A tour under way."""

    screen: Screen
    server: ServerProcess
    client: Client
    model: Model

    @property
    def middle(self) -> str:
        """The residual stream after the middle block."""
        return f"blocks.{self.model.info.n_layers // 2}.hook_resid_post"


def expect(holds: bool, what: str) -> None:
    """Raises TourError where something does not hold."""
    if not holds:
        raise TourError(f"expected {what}")
