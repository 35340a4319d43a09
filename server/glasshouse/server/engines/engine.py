"""The one interface of an engine: what services call, whatever runs the model.

Requests come validated only as far as their own fields go; the engine checks them against its model (hook points,
widths, positions, context) before anything runs, and raises `ServingError`s that name the field. Every method may be
called from one event loop by many tasks at once. Leaving an iterator (`aclosing`, cancellation, garbage) cancels the
request: its place is free within one step.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from glasshouse.server.dictionaries.store import DictionaryStore, HeldDictionary
from glasshouse.server.engines.watching import RequestWatch
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.models.tokenizer import TextCodec
from glasshouse.server.probes.concepts import ConceptShelf, ConceptStore
from glasshouse.server.readouts.score_columns import ColumnSource
from glasshouse.server.types.conditions import FeatureColumn, ProbeColumn
from glasshouse.server.types.errors import FailedPrecondition, NotFound
from glasshouse.server.types.generation import (
    ExtractedInput,
    ExtractionRequest,
    GenerationEvent,
    GenerationRequest,
    ScoreRequest,
    ScoreResult,
)
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.interventions import FloatArray, Intervention
from glasshouse.server.types.models import ModelInfo
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True)
class EngineCounts:
    """What an engine with workers of its own counts: edit slots in use now, and since the start steps in which workers ran
    edits or readouts, bytes of their reports, tokens that waited for one, and requests that a worker failed.
    """

    edit_slots: int = 0
    hooked_steps: int = 0
    report_bytes: int = 0
    joins_late: int = 0
    captures_failed: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """A reading of the engine, for metrics and for deciding on admission."""

    running: int
    queued: int
    healthy: bool
    reason: str = ""
    counts: EngineCounts = EngineCounts()


class Engine(ABC):
    """An engine serving one model."""

    _concepts: ConceptStore | None = None

    @property
    @abstractmethod
    def info(self) -> ModelInfo:
        """Facts of the model."""

    @property
    @abstractmethod
    def codec(self) -> TextCodec:
        """Its tokenizer."""

    @property
    @abstractmethod
    def hook_points(self) -> Sequence[HookPoint]:
        """Its hook points, in the order of the forward pass."""

    def hook_point(self, name: str, *, field: str = "hook_point") -> HookPoint:
        """The hook point that `name` means: its canonical name or its module path. Raises `NotFound`."""
        for point in self.hook_points:
            if name in (point.name, point.module_path):
                return point
        closest = tuple(difflib.get_close_matches(name, [point.name for point in self.hook_points], n=3))
        raise NotFound(
            f"this model has no hook point {name!r:.200}",
            reason=reasons.HOOK_POINT_NOT_FOUND,
            resource_type="HookPoint",
            resource_name=name[:200],
            closest=closest,
            field=field,
            remedy="ListHookPoints lists those it has",
        )

    @property
    @abstractmethod
    def dictionaries(self) -> DictionaryStore:
        """The dictionaries that requests may name."""

    @property
    def concepts(self) -> ConceptStore:
        """The directions and probes that requests may name."""
        if self._concepts is None:
            self._concepts = ConceptShelf(self.info.name)
        return self._concepts

    def use_concepts(self, store: ConceptStore) -> None:
        """From now on requests find their directions and probes in `store`. Until then there are none."""
        self._concepts = store

    @property
    def hooks_everything(self) -> bool:
        """Whether every hook point of the model's family can be had here. Where not, a dictionary of one that cannot serves
        passes with gradients alone.
        """
        return True

    @abstractmethod
    def token_contributions(self, directions: FloatArray) -> FloatArray:
        """What directions (n, d_model) in the residual stream add to the logits, (n, vocab) float32: through the final
        norm's gain and the unembedding, the norm's scale (which depends on the rest of the stream) left out, uncapped.

        Raises:
            FailedPrecondition: the model's final norm is not known.
        """

    @abstractmethod
    async def load_dictionary(self, name: str, path: str) -> Sequence[HeldDictionary]:
        """Loads what lies at `path` as `name`, measured and fitted to the model (see `engines.dictionaries`)."""

    def gradient_twin(self) -> LoadedModel:
        """The model with hooks and attention of its own, sharing the weights that are served where they are float32:
        what runs passes with gradients without touching generation. Made by the first call, which may take long;
        safe from any thread.

        Raises:
            FailedPrecondition: this engine, or this model, has no gradients.
        """
        raise FailedPrecondition(
            f"the {self.info.engine} engine of {self.info.name} has no gradients, which attribution needs",
            reason=reasons.CAPABILITY_MISSING,
            field="model",
            value=self.info.name,
            remedy="serve the model with --engine transformers",
        )

    @abstractmethod
    async def start(self) -> None:
        """Gets ready to serve; returns when it is."""

    @abstractmethod
    async def stop(self) -> None:
        """Stops at once: what still runs ends with Unavailable. Draining before is the transport's business."""

    @abstractmethod
    def status(self) -> EngineStatus:
        """The engine now."""

    async def score_source(self, column: ProbeColumn | FeatureColumn, *, field: str) -> ColumnSource:
        """What scores `column` for watches on requests.

        Raises:
            NotFound: no such probe, dictionary or feature.
            FailedPrecondition: it cannot be watched on this model, or this engine watches nothing.
        """
        raise self._watches_nothing(field)

    async def steering(
        self, interventions: Sequence[Intervention], *, field: str
    ) -> tuple[Intervention, ...]:
        """`interventions` as a watch may steer with them; raises what keeps them from being applied."""
        raise self._watches_nothing(field)

    def _watches_nothing(self, field: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"the {self.info.engine} engine runs no monitors",
            reason=reasons.CAPABILITY_MISSING,
            field=field,
            value=self.info.engine,
            remedy="serve the model with --engine transformers",
        )

    @abstractmethod
    def generate(
        self, request: GenerationRequest, watch: RequestWatch | None = None
    ) -> AsyncGenerator[Sequence[GenerationEvent], None]:
        """Events in order: Prefilled, NewToken..., Finished. They come in batches: several at once where the stream
        is busy or its reader is behind. `watch`: what looks at it, and may steer or end it.
        """

    @abstractmethod
    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Teacher-forced log-probabilities."""

    @abstractmethod
    def extract(self, request: ExtractionRequest) -> AsyncGenerator[ExtractedInput, None]:
        """Each input as it is done, in any order; the next is computed only while the reader keeps up."""
