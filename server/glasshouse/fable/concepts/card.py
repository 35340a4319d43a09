"""The card of fable's directions and probes: what they are, and what was measured of them."""

from __future__ import annotations

from pathlib import Path

from glasshouse.server.probes import built_in
from glasshouse.server.probes.saved import SavedDirection, SavedProbe
from glasshouse.server.registry.names import Kind

_TEXT = """# fable's directions and probes

Made by `python -m glasshouse.fable.concepts.making` from the generator's labelled sets: learnt from their training half,
judged on their test half, at the last position of each text. `glasshouse serve` with the embedded model has them; they
are version 1 of their names and cannot be deleted.

## Directions

Difference in means after every layer; held-out AUROC with its interval.

| Name | Positive | Layer | AUROC | Interval | Accuracy | Effect size |
|---|---|---|---|---|---|---|
{directions}

The best layer of each is in bold: it is the one an edit elsewhere takes.

## Probes

Logistic, with Platt's calibration, at the layer that does best out of fold on the training half. Control: accuracy of a
probe of the same make on shuffled labels.

| Name | Labels | Layer | Lowest AUROC | Accuracy | Interval | ECE | Control |
|---|---|---|---|---|---|---|---|
{probes}
"""


def write_card(folder: Path) -> None:
    """Writes CARD.md beside what `folder` holds."""
    found = built_in.read(folder, "fable")
    directions = [
        row
        for (kind, name), item in sorted(found.items(), key=lambda pair: pair[0][1])
        if kind is Kind.DIRECTION and isinstance(item.saved, SavedDirection)
        for row in _direction_rows(name, item.saved)
    ]
    probes = [
        _probe_row(name, item.saved)
        for (kind, name), item in sorted(found.items(), key=lambda pair: pair[0][1])
        if kind is Kind.PROBE and isinstance(item.saved, SavedProbe)
    ]
    text = _TEXT.format(directions="\n".join(directions), probes="\n".join(probes))
    (folder / "CARD.md").write_text(text, encoding="utf-8")


def _direction_rows(name: str, direction: SavedDirection) -> list[str]:
    rows = []
    for at in direction.at:
        held = at.held_out
        assert held is not None, "fable's directions are judged"
        layer = at.hook_point.split(".")[1]
        shown = f"**{layer}**" if at.hook_point == direction.best else layer
        rows.append(
            f"| `{name}` | {direction.positive_label} | {shown} | {held.auroc.value:.3f} | "
            f"{held.auroc.low:.3f} to {held.auroc.high:.3f} | {held.accuracy.value:.3f} | {held.effect_size:.2f} |"
        )
    return rows


def _probe_row(name: str, probe: SavedProbe) -> str:
    report = probe.report
    assert report is not None, "fable's probes are judged"
    lowest = min(column.discrimination.auroc.value for column in report.columns)
    worst = max(column.ece for column in report.columns)
    layers = ", ".join(point.split(".")[1] for point in probe.facts.hook_points)
    return (
        f"| `{name}` | {', '.join(probe.facts.label_names)} | {layers} | {lowest:.3f} | {report.accuracy.value:.3f} | "
        f"{report.accuracy.low:.3f} to {report.accuracy.high:.3f} | {worst:.3f} | {report.control_accuracy.value:.3f} |"
    )
