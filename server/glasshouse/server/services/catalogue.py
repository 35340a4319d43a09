"""The models served, by resource name, each with the engine behind it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from glasshouse.server.types.errors import NotFound
from glasshouse.wire import reasons

from . import fields
from .pacing import Tempo
from .token_strings import TokenStrings

if TYPE_CHECKING:
    from glasshouse.server.engines.engine import Engine

COLLECTION = "models/"
RESOURCE_TYPE = "glasshouse.v1.Model"


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model and what serves it."""

    engine: Engine
    strings: TokenStrings
    tempo: Tempo = field(default_factory=Tempo)

    @property
    def resource_name(self) -> str:
        """Format: `models/{model}`."""
        return COLLECTION + self.engine.info.name


class Catalogue:
    """Every model of this server. Names are unique."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._models = {
            engine.info.name: ServedModel(engine=engine, strings=TokenStrings(engine.codec))
            for engine in engines
        }
        assert len(self._models) == len(engines), "two models of one name"

    def all(self) -> list[ServedModel]:
        """The models, by name."""
        return [self._models[name] for name in sorted(self._models)]

    def find(self, name: str, field: str) -> ServedModel:
        """The model called `models/{name}` or `{name}`; the only one where `name` is empty.

        Raises:
            NotFound: no such model; the closest names are offered.
            InvalidArgument: no name, and several models to choose from.
        """
        if not name:
            if len(self._models) == 1:
                return next(iter(self._models.values()))
            raise fields.required(field, "this server has several models", f"name one of {self._names()}")
        short = name.removeprefix(COLLECTION)
        if short in self._models:
            return self._models[short]
        close = (
            difflib.get_close_matches(short[:200], self._models, n=3, cutoff=0.4) or sorted(self._models)[:3]
        )
        closest = tuple(COLLECTION + known for known in close)
        raise NotFound(
            f"there is no model {name!r:.200}; closest: {', '.join(closest)}",
            reason=reasons.MODEL_NOT_FOUND,
            resource_type=RESOURCE_TYPE,
            resource_name=name[:200],
            closest=closest,
            field=field,
            remedy="use one of the closest names, or ListModels",
        )

    def _names(self) -> str:
        return ", ".join(model.resource_name for model in self.all())
