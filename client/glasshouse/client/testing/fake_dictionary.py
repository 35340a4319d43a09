"""A sparse autoencoder that means nothing and is the same every time.

f = ReLU(x W_enc - 1/2), read and written at the end of a block; the reconstruction is f W_dec.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.testing.failures import refused
from glasshouse.v1 import dictionaries_pb2, readouts_pb2
from glasshouse.wire import reasons

WIDTH, D_SAE = 8, 24


class FakeDictionary:
    """A dictionary of `FakeModel`, on `blocks.{layer}.hook_resid_post`."""

    def __init__(self, name: str, layer: int) -> None:
        self.name = name
        self.hook_point = f"blocks.{layer}.hook_resid_post"
        rows = np.random.default_rng(layer).normal(size=(D_SAE, WIDTH))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        self.W_enc: NDArray[np.float32] = rows.T.astype(np.float32)
        self.W_dec: NDArray[np.float32] = (rows / 2).astype(np.float32)
        self.b_dec: NDArray[np.float32] = np.full(WIDTH, 0.25, dtype=np.float32)

    def encode(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, d_sae) features of (n, width) activations."""
        # In float64, so that the same row gives the same bits whatever is beside it.
        before = x.astype(np.float64) @ self.W_enc.astype(np.float64) - 0.5
        return np.maximum(before, 0).astype(np.float32)

    def decode(self, features: NDArray[np.float32], bias: bool) -> NDArray[np.float32]:
        """(n, width) from (n, d_sae)."""
        return (features @ self.W_dec + self.b_dec * bias).astype(np.float32)

    def with_features(
        self, x: NDArray[np.float32], features: Sequence[int], numbers: Sequence[float], *, scale: bool
    ) -> NDArray[np.float32]:
        """(n, width) activations with features set, or scaled, to a number each or one for all; error kept."""
        before = self.encode(x)[:, list(features)]
        after = before * np.asarray(numbers) if scale else np.broadcast_to(np.asarray(numbers), before.shape)
        return (x + (after - before) @ self.W_dec[list(features)]).astype(np.float32)

    def check_features(self, features: Iterable[int], field: str) -> None:
        """Refuses features it does not have."""
        for index, feature in enumerate(features):
            if not 0 <= feature < D_SAE:
                raise refused(
                    "NOT_FOUND",
                    f"{self.name} has no feature {feature}: it has {D_SAE}",
                    reason=reasons.FEATURE_OUT_OF_RANGE,
                    field=f"{field}[{index}]",
                    value=str(feature),
                    remedy=f"Use a feature from 0 to {D_SAE - 1}",
                )

    def chosen(
        self, x: NDArray[np.float32], top_k: int, features: Sequence[int]
    ) -> list[readouts_pb2.FeatureActivations]:
        """What is asked for of each of (n, width) activations: named features, the strongest, or every active."""
        rows = []
        for row in self.encode(x):
            if features:
                ids = np.array(features)
            else:
                ids = np.flatnonzero(row)
                ids = ids[np.argsort(-row[ids], kind="stable")][:top_k] if top_k else ids
            rows.append(readouts_pb2.FeatureActivations(feature_ids=ids.tolist(), activations=row[ids]))
        return rows

    def info(self, model: str) -> dictionaries_pb2.Dictionary:
        """Its entry in the list of dictionaries."""
        return dictionaries_pb2.Dictionary(
            name=f"models/{model}/dictionaries/{self.name}",
            kind="sae",
            architecture="standard",
            hook_points_in=[self.hook_point],
            hook_points_out=[self.hook_point],
            d_in=WIDTH,
            d_out=WIDTH,
            d_sae=D_SAE,
            dtype="float32",
            source_format="fake",
            normalisation="none",
            decoder_norms=dictionaries_pb2.DecoderNorms(min=0.5, mean=0.5, max=0.5),
            check=dictionaries_pb2.DictionaryCheck(l0=6.5, fvu=0.125, positions=64),
            size_bytes=self.W_enc.nbytes + self.W_dec.nbytes,
            notes=["It means nothing."],
        )

    def feature(self, model: str, index: int) -> dictionaries_pb2.Feature:
        """One feature's entry."""
        return dictionaries_pb2.Feature(
            name=f"models/{model}/dictionaries/{self.name}/features/{index}",
            index=index,
            decoder_norm=float(np.linalg.norm(self.W_dec[index])),
            label="a vowel" if index == 3 else "",
            density=(index + 1) / (2 * D_SAE),
        )

    def nearest(self, index: int, n: int) -> list[dictionaries_pb2.NearestFeature]:
        """The features nearest to one by decoder cosine."""
        rows = self.W_dec / np.linalg.norm(self.W_dec, axis=1, keepdims=True)
        cosines = rows @ rows[index]
        order = [int(i) for i in np.argsort(-cosines, kind="stable") if i != index]
        return [dictionaries_pb2.NearestFeature(index=i, cosine=cosines[i]) for i in order[:n]]
