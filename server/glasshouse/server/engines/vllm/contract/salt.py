"""The prefix cache's salt: requests share cached keys only where every edit does the same at the same positions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.interventions.features import PreparedFeatureEdit

from .watches import Steering, WatchPlan


def cache_salt(
    edits: Sequence[PreparedIntervention],
    *,
    dictionary_keys: Mapping[str, str],
    epoch: int = 0,
    user_salt: str = "",
    steering: Steering | None = None,
    watches: Sequence[WatchPlan] = (),
) -> str | None:
    """For vLLM's `cache_salt`; None where nothing sets the request apart.

    Content hashes cover what is done, with which numbers, at which absolute positions. `epoch`: raised by the gateway
    whenever a worker reports NOT_APPLIED, for unedited keys and values may lie under the old salt.

    `watches`: those of `steering` as the plan has them. Where monitors may steer, what a cached position holds follows from
    the tokens, from them, and from where the prompt ends: it is never steered, what is generated may be.
    """
    if not edits and steering is None:
        return user_salt or None
    digest = hashlib.sha256(f"{epoch}\0{user_salt}\0".encode())
    every = [*edits]
    if steering is not None:
        digest.update(f"{steering.n_prompt}\0".encode())
        for watch, waiting in zip(watches, steering.edits, strict=True):
            digest.update(f"{watch!r}\0{len(waiting)}\0".encode())
            every += waiting
    for edit in every:
        points = ",".join(point.name for point in edit.hook_points)
        digest.update(f"{edit.content_hash}\0{points}\0".encode())
        if isinstance(edit, PreparedFeatureEdit):
            digest.update(f"{dictionary_keys[edit.dictionary.facts.name]}\0".encode())
    return f"glasshouse:{digest.hexdigest()}"
