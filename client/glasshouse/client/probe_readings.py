"""Scores of a probe as numpy: at one position, and over several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ProbeReading:
    """A probe's scores at one position: pairs (label, score). scores: (n_labels,) float32."""

    labels: Sequence[str]
    scores: NDArray[np.float32]

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter(zip(self.labels, self.scores.tolist()))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, label: str) -> float:
        """The score of one label. Raises KeyError."""
        return float(self.scores[_column(self.labels, label)])

    def __float__(self) -> float:
        """The score of a probe with one label. Raises TypeError where there are several."""
        if len(self.labels) != 1:
            raise TypeError(f"there is one score a label: {', '.join(self.labels)}")
        return float(self.scores[0])

    @property
    def label(self) -> str:
        """The label with the highest score."""
        return self.labels[int(self.scores.argmax())]

    def __repr__(self) -> str:
        return f"ProbeReading({', '.join(f'{label}: {score:.4g}' for label, score in self)})"


@dataclass(frozen=True, eq=False, repr=False)
class ProbeReadings:
    """A probe's scores at several positions: (n_positions, n_labels) float32; row i belongs to `positions[i]`. `probe` is
    the version that was read, `models/{model}/probes/{probe}@{version}`.
    """

    probe: str
    labels: Sequence[str]
    positions: list[int]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[tuple[int, ProbeReading]]:
        """Positions with their scores."""
        return ((p, ProbeReading(self.labels, row)) for p, row in zip(self.positions, self.scores))

    def __getitem__(self, label: str) -> NDArray[np.float32]:
        """The scores (n_positions,) of one label. Raises KeyError."""
        return self.scores[:, _column(self.labels, label)]

    def at(self, position: int) -> ProbeReading:
        """The scores at one position. Raises KeyError where it was not read."""
        if position not in self.positions:
            raise KeyError(position)
        return ProbeReading(self.labels, self.scores[self.positions.index(position)])

    def joined(self, other: ProbeReadings) -> ProbeReadings:
        """These and those of `other`, by position; at one in both, these."""
        rows = dict(zip(other.positions, other.scores)) | dict(zip(self.positions, self.scores))
        ordered = sorted(rows)
        scores = np.stack([rows[position] for position in ordered]) if ordered else self.scores
        return ProbeReadings(self.probe, self.labels, ordered, scores)

    def __repr__(self) -> str:
        return f"ProbeReadings({self.probe!r}, {len(self)} positions of {', '.join(self.labels)})"


def _column(labels: Sequence[str], label: str) -> int:
    try:
        return list(labels).index(label)
    except ValueError:
        raise KeyError(f"{label!r} is not one of {', '.join(labels)}") from None
