"""Which transcoders stand in for a model's MLPs: those a request names, or the ones that are loaded.

Without names: per-layer transcoders, where those loaded are at most one a layer and cover as many layers as any
cross-layer transcoder; else the one cross-layer transcoder. Several to choose from is an error that lists them.
"""

from __future__ import annotations

from collections.abc import Sequence

from glasshouse.server.dictionaries.store import DictionaryStore, HeldDictionary
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.wire import reasons

_PER_LAYER, _CROSS_LAYER = "transcoder", "cross_layer_transcoder"


def transcoders(store: DictionaryStore, names: Sequence[str], *, field: str) -> list[HeldDictionary]:
    """Those of `names`, or the model's own. Whether they fit together is `Transcoders`' to check.

    Raises:
        NotFound: no such dictionary.
        FailedPrecondition: none is loaded, or several sets are.
    """
    if names:
        if len(set(names)) < len(names):
            raise InvalidArgument(
                f"{field} names a dictionary twice",
                reason=reasons.FIELD_CONFLICT,
                field=field,
                value=", ".join(names),
                remedy="name each once",
            )
        return [
            store.get(name, field=f"{field}[{n}]").attached(f"{field}[{n}]") for n, name in enumerate(names)
        ]
    held = [item for item in store.all() if not item.detached]
    per_layer = [item for item in held if item.dictionary.facts.kind == _PER_LAYER]
    cross_layer = [item for item in held if item.dictionary.facts.kind == _CROSS_LAYER]
    layers = [item.points_in[0].layer for item in per_layer]
    if per_layer and len(set(layers)) == len(layers):
        return per_layer
    if len(cross_layer) == 1:
        return cross_layer
    if not per_layer and not cross_layer:
        raise FailedPrecondition(
            "the model has no transcoders, which an attribution graph needs",
            reason=reasons.CAPABILITY_MISSING,
            field=field,
            remedy="load per-layer transcoders or a cross-layer transcoder with LoadDictionary",
        )
    raise FailedPrecondition(
        "several sets of transcoders are loaded",
        reason=reasons.FIELD_REQUIRED,
        field=field,
        value=", ".join(item.name for item in (*per_layer, *cross_layer)),
        remedy="name the transcoders of one set",
    )
