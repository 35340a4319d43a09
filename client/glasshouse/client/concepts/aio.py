"""`AsyncDirection`, `AsyncProbe`, and a model's methods that make and find them, awaited. `sync` is its twin."""

# A timeout here is a gRPC deadline, which the server sees too: asyncio.timeout would not tell it.
# ruff: noqa: ASYNC109

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import overload

from glasshouse.client.aio_operation import AsyncOperation
from glasshouse.client.aio_transport import AsyncTransport
from glasshouse.client.arrays import VectorLike
from glasshouse.client.concepts import builders, calls
from glasshouse.client.concepts.examples import ExamplesLike, PairsLike
from glasshouse.client.concepts.values import (
    Calibration,
    DirectionInfo,
    DirectionMethod,
    Pooling,
    ProbeInfo,
    ProbeKind,
    ProbeScores,
    ProbeTask,
    ProbeWeights,
)
from glasshouse.client.concepts.views import DirectionView, ProbeView
from glasshouse.client.dictionaries.names import DictionaryLike
from glasshouse.client.inputs import InputLike
from glasshouse.client.interventions import Intervention
from glasshouse.client.positions import PositionsLike


class AsyncDirection(DirectionView):
    """`Direction` for asyncio: the same names and arguments, awaited."""

    _transport: AsyncTransport

    async def delete(self, *, timeout: float | None = None) -> None:
        """Deletes this version. Needs the admin role; refused while a monitor uses it."""
        await self._transport.unary(calls.delete_direction(self._published()), timeout)


class AsyncProbe(ProbeView):
    """`Probe` for asyncio: the same names and arguments, awaited."""

    _transport: AsyncTransport

    @overload
    async def score(  # type: ignore[overload-overlap]
        self,
        input: InputLike,
        *,
        positions: PositionsLike | None = None,
        every_position: bool = False,
        interventions: Sequence[Intervention] = (),
        timeout: float | None = None,
    ) -> ProbeScores: ...

    @overload
    async def score(
        self,
        input: Sequence[InputLike],
        *,
        positions: PositionsLike | None = None,
        every_position: bool = False,
        interventions: Sequence[Intervention] = (),
        timeout: float | None = None,
    ) -> list[ProbeScores]: ...

    async def score(
        self,
        input: InputLike | Sequence[InputLike],
        *,
        positions: PositionsLike | None = None,
        every_position: bool = False,
        interventions: Sequence[Intervention] = (),
        timeout: float | None = None,
    ) -> ProbeScores | list[ProbeScores]:
        """Scores one input, or a list of inputs. `every_position`: a row at every position, over what came up to it, as a
        generation reads it; a token-pooled probe always gives one."""
        call = calls.score_probe(
            self._published(),
            input,
            positions=positions,
            every_position=every_position,
            interventions=interventions,
        )
        messages = self._transport.stream(call, timeout)
        try:
            while (event := await messages.read()) is not None:
                call.state.feed(event)
        finally:
            messages.cancel()
        return call.result()

    async def delete(self, *, timeout: float | None = None) -> None:
        """Deletes this version. Needs the admin role; refused while a monitor uses it."""
        await self._transport.unary(calls.delete_probe(self._published()), timeout)


class AsyncConceptMethods:
    """What an `AsyncModel` does with directions and probes."""

    _transport: AsyncTransport
    _name: str

    async def directions(
        self, *, prefix: str = "", every_version: bool = False, timeout: float | None = None
    ) -> list[DirectionInfo]:
        """The directions there are, without vectors: those that come with the model, then those published."""
        pages = partial(calls.list_directions, self._name, prefix, every_version)
        return [item async for item in self._transport.items(pages, timeout)]

    async def direction(self, name: str, *, timeout: float | None = None) -> AsyncDirection:
        """One direction: `name` for its latest version, or `name@version`."""
        return AsyncDirection(
            self._transport, await self._transport.unary(calls.get_direction(self._name, name), timeout)
        )

    async def compute_directions(
        self,
        examples: ExamplesLike | None = None,
        *,
        pairs: PairsLike | None = None,
        method: DirectionMethod | None = None,
        hook_points: str | Sequence[str] | None = None,
        positions: PositionsLike | None = None,
        pooling: Pooling = "last",
        positive: str | None = None,
        held_out_share: float = 0.25,
        inverse_l2: float = 1.0,
        n_clusters: int = 2,
        seed: int = 0,
        feature: tuple[DictionaryLike, int] | None = None,
        vectors: Mapping[str, VectorLike] | None = None,
        name: str | None = None,
        version: int | None = None,
        next_version: bool = False,
        description: str = "",
        best_only: bool = False,
        timeout: float | None = None,
    ) -> AsyncOperation[AsyncDirection]:
        """Starts computing the direction between two labels, or of pairs, at each of `hook_points` (default: the residual
        stream after every layer), judged on held-out examples.

        `method`: difference in means of labelled examples and CAA of pairs unless said; with `feature`, a dictionary's
        decoder row, or `vectors` by hook point, examples only judge. `positive` is the label that is the concept. With
        `name` the result is published: as version 1, as `version`, or with `next_version` as whatever comes next.
        """
        call = calls.compute_directions(
            self._name,
            examples,
            partial(AsyncDirection, self._transport),
            pairs=pairs,
            method=method,
            hook_points=hook_points,
            positions=positions,
            pooling=pooling,
            positive=positive,
            held_out_share=held_out_share,
            inverse_l2=inverse_l2,
            n_clusters=n_clusters,
            seed=seed,
            feature=feature,
            vectors=vectors,
            published=builders.publication(name, version, next_version, description),
            best_only=best_only,
        )
        return AsyncOperation(self._transport, await self._transport.upload(call, timeout))

    async def create_direction(
        self,
        name: str,
        vectors: Mapping[str, VectorLike] | None = None,
        *,
        feature: tuple[DictionaryLike, int] | None = None,
        positive: str | None = None,
        version: int | None = None,
        next_version: bool = False,
        description: str = "",
        timeout: float | None = None,
    ) -> AsyncDirection:
        """Publishes vectors by hook point, or the decoder row of a dictionary's `feature`, under a name."""
        call = calls.create_direction(
            self._name,
            vectors=vectors,
            feature=feature,
            positive=positive,
            published=builders.publication(name, version, next_version, description),
        )
        return await self.direction(await self._transport.unary(call, timeout), timeout=timeout)

    async def probes(
        self, *, prefix: str = "", every_version: bool = False, timeout: float | None = None
    ) -> list[ProbeInfo]:
        """The probes there are: those that come with the model, then those published."""
        pages = partial(calls.list_probes, self._name, prefix, every_version)
        return [item async for item in self._transport.items(pages, timeout)]

    async def probe(
        self, name: str, *, with_weights: bool = False, timeout: float | None = None
    ) -> AsyncProbe:
        """One probe: `name` for its latest version, or `name@version`."""
        call = calls.get_probe(self._name, name, with_weights)
        return AsyncProbe(self._transport, await self._transport.unary(call, timeout))

    async def train_probe(
        self,
        examples: ExamplesLike,
        *,
        hook_points: str | Sequence[str],
        kind: ProbeKind = "logistic",
        task: ProbeTask | None = None,
        labels: Sequence[str] = (),
        positive: str | None = None,
        best: bool = False,
        positions: PositionsLike | None = None,
        pooling: Pooling = "last",
        calibration: Calibration = "platt",
        false_positive_rates: Sequence[float] = (0.01, 0.05),
        held_out_share: float = 0.25,
        inverse_l2: float = 1.0,
        hidden_width: int = 64,
        weight_decay: float = 0.01,
        seed: int = 0,
        name: str | None = None,
        version: int | None = None,
        next_version: bool = False,
        description: str = "",
        timeout: float | None = None,
    ) -> AsyncOperation[AsyncProbe]:
        """Starts training a probe that tells labels apart, calibrated, with thresholds at `false_positive_rates`.

        One probe reads all `hook_points` side by side, or with `best` one is trained at each and the best kept. With
        `name` it is published, which scoring and reading it needs: as version 1, as `version`, or with `next_version`
        as whatever comes next.
        """
        call = calls.train_probe(
            self._name,
            examples,
            partial(AsyncProbe, self._transport),
            hook_points=hook_points,
            kind=kind,
            task=task,
            labels=labels,
            positive=positive,
            best=best,
            positions=positions,
            pooling=pooling,
            calibration=calibration,
            false_positive_rates=false_positive_rates,
            held_out_share=held_out_share,
            inverse_l2=inverse_l2,
            hidden_width=hidden_width,
            weight_decay=weight_decay,
            seed=seed,
            published=builders.publication(name, version, next_version, description),
        )
        return AsyncOperation(self._transport, await self._transport.upload(call, timeout))

    async def create_probe(
        self,
        name: str,
        weights: ProbeWeights,
        *,
        labels: Sequence[str],
        hook_points: str | Sequence[str],
        kind: ProbeKind = "logistic",
        task: ProbeTask | None = None,
        pooling: Pooling = "last",
        positions: PositionsLike | None = None,
        version: int | None = None,
        next_version: bool = False,
        description: str = "",
        timeout: float | None = None,
    ) -> AsyncProbe:
        """Publishes a probe trained elsewhere; of two `labels` the negative one first."""
        call = calls.create_probe(
            self._name,
            weights=weights,
            labels=labels,
            hook_points=hook_points,
            kind=kind,
            task=task,
            pooling=pooling,
            positions=positions,
            published=builders.publication(name, version, next_version, description),
        )
        return AsyncProbe(self._transport, await self._transport.unary(call, timeout))
