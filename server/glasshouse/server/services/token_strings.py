"""Strings of tokens, looked up once each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glasshouse.server.models.tokenizer import TextCodec


# Tokens whose strings stand for the vocabulary's.
_SAMPLE = 4096


class TokenStrings:
    """A cache in front of a tokenizer; never larger than its vocabulary."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._known: dict[int, str] = {}
        self._mean_bytes: float | None = None

    def of(self, ids: Sequence[int]) -> list[str]:
        """The string of each token."""
        try:
            return list(map(self._known.__getitem__, ids))
        except KeyError:
            self._learn(ids)
            return list(map(self._known.__getitem__, ids))

    def mean_bytes(self, vocab_size: int) -> float:
        """Bytes of a token's string in UTF-8, on average over a sample of the vocabulary; looked up once."""
        if self._mean_bytes is None:
            sample = range(0, vocab_size, -(-vocab_size // _SAMPLE))
            self._mean_bytes = sum(len(string.encode()) for string in self.of(sample)) / len(sample)
        return self._mean_bytes

    def _learn(self, ids: Iterable[int]) -> None:
        missing = sorted(set(ids).difference(self._known))
        self._known.update(zip(missing, self._codec.token_strings(missing), strict=True))
