"""Which split a combination belongs to.

Nothing is held out by chance at sampling time. A combination (a name with a place, a country with a
sentence frame, ...) is hashed, and the hash alone decides its split, so the training corpus can be
regenerated at any size and in any order without ever containing a combination that the evaluation asks
about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Literal

Split = Literal["train", "validation", "labelled"]

SPLITS: tuple[Split, ...] = ("train", "validation", "labelled")
_BUCKETS = 10


@cache
def split_of(*parts: str) -> Split:
    """The split of one combination: of ten buckets one is validation, one labelled, the others training."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % _BUCKETS
    if bucket == 0:
        return "validation"
    if bucket == 1:
        return "labelled"
    return "train"


@cache
def allowed(options: tuple[str, ...], split: Split, *key: str) -> tuple[str, ...]:
    """Those `options` whose combination with `key` falls into `split`; may be empty."""
    return tuple(option for option in options if split_of(*key, option) == split)


def allowed_indices(frames: Sequence[str], split: Split, *key: str) -> tuple[int, ...]:
    """Indices of the frames whose combination with `key` falls into `split`; keyed by the frame's text."""
    return tuple(index for index, frame in enumerate(frames) if split_of(*key, frame) == split)
