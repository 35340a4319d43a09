"""Loading a dictionary into an engine: opened, fitted to the model, measured, then known by its name.

1. Its bytes are set aside in the budget before anything is read.
2. Its hook points must be the model's, with the widths it expects.
3. Its weights must be finite.
4. It is run on built-in text: mean active features and fraction of variance unexplained. A dictionary that reads the wrong
   tap gives absurd figures there; it is loaded with a loud warning, for the figures are the reader's to judge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import numpy as np
import structlog
import torch

from glasshouse.server.dictionaries import sanity
from glasshouse.server.dictionaries.dictionary import Dictionary, DictionaryFacts, stacked
from glasshouse.server.dictionaries.open import estimate_bytes, open_dictionaries
from glasshouse.server.dictionaries.sample_text import PASSAGES
from glasshouse.server.dictionaries.store import DictionaryCheck, HeldDictionary
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.types.errors import FailedPrecondition, ServingError
from glasshouse.server.types.generation import ExtractionRequest
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.readouts import Array
from glasshouse.server.types.selectors import NamedPositions, Selector
from glasshouse.wire import reasons

from .engine import Engine

# How the loaders name the hook points of a crosscoder over several models: `model[0]:...`.
_OF_SEVERAL_MODELS = "model["

# A load is measured on at least so many positions, and on no more than take this many products.
_FEWEST_POSITIONS = 64
_MOST_PRODUCTS = 100_000_000_000

_log = structlog.get_logger(__name__)


async def load(
    engine: Engine, table: HookTable, name: str, path: str, sample: Sample | None = None
) -> list[HeldDictionary]:
    """Loads what lies at `path` as `name` (a set: `name`/part each) into the engine's store. Loads that follow one another
    may share a `sample`.

    Raises:
        InvalidArgument: a malformed name.
        NotFound: no such path.
        FailedPrecondition: a name in use, a malformed or unfitting dictionary.
        ResourceExhausted: over the budget.
    """
    store = engine.dictionaries
    sample = sample or Sample(engine)
    store.reserve(name, await asyncio.to_thread(estimate_bytes, path))
    try:
        opened = await asyncio.to_thread(open_dictionaries, name, path)
        held = []
        for dictionary in opened:
            held.append(await _fit(sample, table, dictionary, path, len(opened)))
    finally:
        store.release(name)
    for item in held:
        store.add(item)
    return held


async def _fit(
    sample: Sample, table: HookTable, dictionary: Dictionary, path: str, n_parts: int
) -> HeldDictionary:
    facts = dictionary.facts
    size_bytes = (await asyncio.to_thread(estimate_bytes, path)) // n_parts
    detached = _detached(facts)
    if detached:
        return HeldDictionary(
            name=facts.name,
            path=path,
            dictionary=dictionary,
            points_in=(),
            points_out=(),
            size_bytes=size_bytes,
            detached=detached,
        )
    unreached = _unreached(sample.engine, table, facts)
    hooked = not unreached
    points_in = _points(table, facts.name, facts.hook_points_in, facts.d_in, writing=False, hooked=hooked)
    points_out = _points(table, facts.name, facts.hook_points_out, facts.d_out, writing=True, hooked=hooked)
    bad = await asyncio.to_thread(dictionary.first_not_finite)
    if bad:
        raise FailedPrecondition(
            f"dictionary {facts.name}: weight {bad} is not finite",
            reason=reasons.DICTIONARY_MALFORMED,
            field="path",
            value=path,
            remedy="load an undamaged file",
        )
    device = sample.engine.info.device
    if device != "cpu":
        dictionary = await asyncio.to_thread(dictionary.to, device)
    check = None if unreached else await measure(sample, dictionary, points_in, points_out)
    if check is None:
        _log.warning("dictionary_not_reached", dictionary=facts.name, why=unreached)
    elif check.warning:
        _log.warning(
            "dictionary_looks_wrong", dictionary=facts.name, l0=check.l0, fvu=check.fvu, why=check.warning
        )
    else:
        _log.info("dictionary_loaded", dictionary=facts.name, l0=round(check.l0, 1), fvu=round(check.fvu, 3))
    return HeldDictionary(
        name=facts.name,
        path=path,
        dictionary=dictionary,
        points_in=points_in,
        points_out=points_out,
        size_bytes=size_bytes,
        check=check,
        unreached=unreached,
    )


def _detached(facts: DictionaryFacts) -> str:
    """Why a dictionary cannot run on this model's own activations, or ""."""
    names = (*facts.hook_points_in, *facts.hook_points_out)
    if any(name.startswith(_OF_SEVERAL_MODELS) for name in names):
        return "reads the activations of several models, of which this server runs one"
    return ""


def _unreached(engine: Engine, table: HookTable, facts: DictionaryFacts) -> str:
    """Why the engine does not reach its hook points, or ""."""
    if engine.hooks_everything:
        return ""
    for name in (*facts.hook_points_in, *facts.hook_points_out):
        try:
            point = table.resolve(name, field="path")
        except ServingError:
            return ""  # refused with its own words where its points are fitted
        if not point.readable:
            return f"is for {point.name}, which the {engine.info.engine} engine does not reach"
    return ""


def _points(
    table: HookTable, dictionary: str, names: Sequence[str], width: int, *, writing: bool, hooked: bool
) -> tuple[HookPoint, ...]:
    points = []
    for name in names:
        try:
            point = table.resolve(name, field="path")
        except ServingError as error:
            raise FailedPrecondition(
                f"dictionary {dictionary} is for a hook point that this model lacks: {error.message}",
                reason=reasons.DICTIONARY_MISMATCH,
                field="path",
                value=name,
                remedy="load it with the model it was trained on, or name the point: PATH?hook_point=...",
            ) from error
        if point.width != width:
            raise FailedPrecondition(
                f"dictionary {dictionary} has width {width} at {point.name}, the model {point.width}",
                reason=reasons.DICTIONARY_MISMATCH,
                field="path",
                value=width,
                remedy="load it with the model it was trained on",
            )
        if hooked and not (point.writable if writing else point.readable):
            raise FailedPrecondition(
                f"dictionary {dictionary} is for {point.name}, which cannot be {'edited' if writing else 'read'}",
                reason=reasons.DICTIONARY_MISMATCH,
                field="path",
                value=point.name,
                remedy="ListHookPoints says what can",
            )
        points.append(point)
    return tuple(points)


class Sample:
    """The activations of built-in text, captured once at each hook point that is asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._captured: dict[str, torch.Tensor] = {}

    async def at(self, points: Sequence[HookPoint]) -> list[torch.Tensor]:
        """(N, width) float32 of each point, special tokens left out."""
        missing = [point.name for point in points if point.name not in self._captured]
        if missing:
            await self._capture(list(dict.fromkeys(missing)))
        return [self._captured[point.name] for point in points]

    async def _capture(self, names: Sequence[str]) -> None:
        engine = self.engine
        request = ExtractionRequest(
            inputs=tuple(
                tuple(engine.codec.encode(passage))[: engine.info.context_length] for passage in PASSAGES
            ),
            hook_points=tuple(names),
            positions=Selector(named=NamedPositions.ALL, exclude_special=True),
        )
        found: dict[int, tuple[Array, ...]] = {}
        async with aclosing(engine.extract(request)) as results:
            async for done in results:
                found[done.index] = done.activations
        for place, name in enumerate(names):
            arrays = [found[index][place] for index in range(len(PASSAGES))]
            self._captured[name] = torch.from_numpy(np.concatenate(arrays))


async def measure(
    sample: Sample,
    dictionary: Dictionary,
    points_in: Sequence[HookPoint],
    points_out: Sequence[HookPoint],
) -> DictionaryCheck:
    """Runs a dictionary on built-in text: on all of it, or on as much as a large one encodes in about a second."""
    x, y = stacked(await sample.at(points_in)), stacked(await sample.at(points_out))
    facts = dictionary.facts
    most = max(_FEWEST_POSITIONS, _MOST_PRODUCTS // (facts.d_in * facts.d_sae))
    device = sample.engine.info.device
    return await asyncio.to_thread(_check, dictionary, x[:most].to(device), y[:most].to(device))


def _check(dictionary: Dictionary, x: torch.Tensor, y: torch.Tensor) -> DictionaryCheck:
    verdict = sanity.check(dictionary, x, y)
    features = dictionary.encode(x)
    counts = torch.bincount(features.ids.long(), minlength=dictionary.facts.d_sae)
    return DictionaryCheck(
        l0=verdict.l0,
        fvu=verdict.fvu,
        positions=x.shape[0],
        density=(counts.float() / max(x.shape[0], 1)).cpu().numpy(),
        warning=verdict.warning,
    )
