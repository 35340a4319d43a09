"""`Dictionary`: one loaded dictionary, with blocking calls. `aio` is its twin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.arrays import VectorLike
from glasshouse.client.concepts import calls as concept_calls
from glasshouse.client.concepts.builders import publication
from glasshouse.client.concepts.values import FeatureLabel, FeatureLabelsInfo
from glasshouse.client.dictionaries import calls
from glasshouse.client.dictionaries.values import (
    DictionaryEvaluation,
    DictionaryInfo,
    FeatureInfo,
    FeatureOrder,
    FeatureSummary,
)
from glasshouse.client.features import EncodedFeatures, FeaturesLike
from glasshouse.client.inputs import InputLike
from glasshouse.client.interventions import Intervention
from glasshouse.client.positions import PositionsLike
from glasshouse.client.sync_operation import Operation
from glasshouse.client.sync_transport import Transport


class Dictionary:
    """A loaded dictionary. Made by `model.dictionary(name)`; goes wherever a dictionary is asked for."""

    def __init__(self, transport: Transport, info: DictionaryInfo) -> None:
        self.info = info
        self._transport = transport

    def __repr__(self) -> str:
        return f"Dictionary({self.info.name!r}, {self.info.kind}, d_sae={self.info.d_sae})"

    @property
    def name(self) -> str:
        """Its short name, under which readouts of it are found."""
        return self.info.name

    @property
    def resource_name(self) -> str:
        """`models/{model}/dictionaries/{name}`."""
        return self.info.resource_name

    @overload
    def encode(  # type: ignore[overload-overlap]
        self,
        input: InputLike | None = None,
        *,
        activations: VectorLike | None = None,
        top_k: int = 0,
        features: SupportsIndex | Sequence[SupportsIndex] = (),
        positions: PositionsLike | None = None,
        interventions: Sequence[Intervention] = (),
        timeout: float | None = None,
    ) -> EncodedFeatures: ...

    @overload
    def encode(
        self,
        input: Sequence[InputLike],
        *,
        activations: None = None,
        top_k: int = 0,
        features: SupportsIndex | Sequence[SupportsIndex] = (),
        positions: PositionsLike | None = None,
        interventions: Sequence[Intervention] = (),
        timeout: float | None = None,
    ) -> list[EncodedFeatures]: ...

    def encode(
        self,
        input: InputLike | Sequence[InputLike] | None = None,
        *,
        activations: VectorLike | None = None,
        top_k: int = 0,
        features: SupportsIndex | Sequence[SupportsIndex] = (),
        positions: PositionsLike | None = None,
        interventions: Sequence[Intervention] = (),
        timeout: float | None = None,
    ) -> EncodedFeatures | list[EncodedFeatures]:
        """The features of one input, of a list of inputs, or of `activations`.

        Every active feature, the `top_k` strongest a position, or those `features` everywhere, zeros included.
        activations: (n, d_in), or (n, n_hook_points_in, d_in) where the dictionary reads several hook points.
        """
        call = calls.encode(
            self.info,
            input,
            features,
            activations=activations,
            top_k=top_k,
            positions=positions,
            interventions=interventions,
        )
        messages = self._transport.stream(call, timeout)
        try:
            while (event := messages.read()) is not None:
                call.state.feed(event)
        finally:
            messages.cancel()
        found: EncodedFeatures | list[EncodedFeatures] = call.result()
        return found

    def decode(
        self, features: FeaturesLike, *, bias: bool = True, timeout: float | None = None
    ) -> NDArray[np.float32]:
        """What features write: (n, d_out) float32, or (n, n_hook_points_out, d_out) where they write several hook
        points; without the first axis for one position's features or a mapping such as ``{742: 1.0}``.

        Without the `bias`, one feature's is its decoder row times its activation.
        """
        call = calls.decode(self.info, features, bias)
        return call.result([self._transport.unary(part, timeout) for part in call.calls])

    def feature(
        self, index: int, *, n_tokens: int = 10, n_nearest: int = 5, timeout: float | None = None
    ) -> FeatureInfo:
        """One feature: what it promotes and suppresses, and its nearest by decoder cosine."""
        call = calls.get_feature(self.resource_name, index, n_tokens, n_nearest)
        return self._transport.unary(call, timeout)

    def features(
        self, *, order: FeatureOrder = "index", page_size: int = 100, timeout: float | None = None
    ) -> Iterator[FeatureSummary]:
        """The features in order, a page fetched at a time as they are used up."""
        pages = partial(calls.list_features, self.resource_name, order, page_size)
        return self._transport.items(pages, timeout)

    def evaluate(
        self,
        inputs: Sequence[InputLike] | None = None,
        *,
        max_tokens: int = 0,
        timeout: float | None = None,
    ) -> Operation[DictionaryEvaluation]:
        """Starts measuring the dictionary, with the model spliced, over `inputs` or the server's built-in text; at
        most `max_tokens` tokens (0: the server's default)."""
        call = calls.evaluate(self.resource_name, inputs, max_tokens)
        return Operation(self._transport, self._transport.unary(call, timeout))

    def publish_labels(
        self,
        name: str,
        labels: Mapping[int, str] | Sequence[FeatureLabel],
        *,
        method: str = "",
        version: int | None = None,
        next_version: bool = False,
        description: str = "",
        timeout: float | None = None,
    ) -> FeatureLabelsInfo:
        """Publishes what features stand for as a set called `name`; `method` says how that was found. The set that was
        published last is what `feature()` and `features()` show."""
        call = concept_calls.create_feature_labels(
            self.resource_name,
            labels,
            method=method,
            published=publication(name, version, next_version, description),
        )
        return self._transport.unary(call, timeout)

    def label_sets(self, *, timeout: float | None = None) -> list[FeatureLabelsInfo]:
        """The sets of labels there are for its features, the latest version of each."""
        pages = partial(concept_calls.list_feature_labels, self.resource_name)
        return list(self._transport.items(pages, timeout))

    def labels(
        self, name: str, *, features: Sequence[int] = (), timeout: float | None = None
    ) -> list[FeatureLabel]:
        """The labels of a set, or those of some features."""
        model = f"models/{self.info.model}"
        pages = partial(concept_calls.get_feature_labels, model, name, tuple(features))
        return list(self._transport.items(pages, timeout))

    def unload(self, *, timeout: float | None = None) -> None:
        """Unloads it; requests that use it finish. Needs the admin role."""
        self._transport.unary(calls.unload_dictionary(self.resource_name), timeout)
