"""What a mistake gets: a typed error that says where, why, and what to do."""

from __future__ import annotations

from glasshouse.client import NotFoundError
from glasshouse.tour.guide import Guide, TourError, expect

MISTAKE = "blocks.3.hook_resid_pots"
MEANT = "blocks.3.hook_resid_post"


def show_a_mistake(guide: Guide) -> None:
    """A hook point's name with two letters swapped."""
    screen = guide.screen
    screen.stage("A mistake gets a typed error")
    screen.code(f"model.activations('Hello', hook_points={MISTAKE!r})")
    try:
        guide.model.activations("Hello", hook_points=MISTAKE)
    except NotFoundError as error:
        screen.table(
            ["NotFoundError", ""],
            [
                ("message", error.message),
                ("field", error.field),
                ("reason", error.reason),
                ("closest", ", ".join(error.closest)),
                ("remedy", error.remedy),
            ],
        )
        expect(MEANT in error.closest, f"{MEANT} among the closest names")
    else:
        raise TourError("expected NotFoundError")
