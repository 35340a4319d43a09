"""Strings of tokens, looked up once each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glasshouse.server.models.tokenizer import TextCodec


class TokenStrings:
    """A cache in front of a tokenizer; never larger than its vocabulary."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._known: dict[int, str] = {}

    def of(self, ids: Sequence[int]) -> list[str]:
        """The string of each token."""
        try:
            return list(map(self._known.__getitem__, ids))
        except KeyError:
            self._learn(ids)
            return list(map(self._known.__getitem__, ids))

    def _learn(self, ids: Iterable[int]) -> None:
        missing = sorted(set(ids).difference(self._known))
        self._known.update(zip(missing, self._codec.token_strings(missing), strict=True))
