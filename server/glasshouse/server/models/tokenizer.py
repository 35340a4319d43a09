"""Text to token ids and back, and text as it streams.

`StreamDecoder` must put out, piece by piece, exactly what `TextCodec.decode` makes of all the ids at once,
at a cost per token that does not grow with the text:

- Byte-level BPE (GPT-2, Llama 3, Qwen, ...): a token is a run of bytes, so an incremental UTF-8 decoder is
  exact.
- Everything else: decode a bounded window, the last printed tokens plus the new one, and print what the new
  one added (the window matters: SentencePiece drops a leading space, WordPiece joins). Byte-fallback tokens
  such as ``<0xF0>`` are held until the run of them ends, because the decoder judges a run as a whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.wire import reasons

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "�"
_MAX_HELD_TOKENS = 8
_METASPACE = "▁"


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


class TextCodec:
    """A thin layer over a Hugging Face tokenizer; safe to share between threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder: dict[str, Any] = {}
        if self._backend is not None:
            # A tokenizer.json may carry the truncation and padding of its training: never ours.
            self._backend.no_truncation()
            self._backend.no_padding()
            if self._backend.decoder is not None:
                decoder = json.loads(self._backend.decoder.__getstate__())
        self.byte_level = _is_byte_level(decoder)
        self._metaspace = _METASPACE in json.dumps(decoder, ensure_ascii=False)
        self.byte_fallback = "ByteFallback" in json.dumps(decoder)
        self._bytes: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """The number of ids the tokenizer knows, added tokens included; a model may have more rows."""
        return len(self._tokenizer)

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with the BOS (and whatever else the tokenizer adds) by default."""
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens written out. Bytes that are no UTF-8 become U+FFFD."""
        if self.byte_level:
            return b"".join(self.token_bytes(token_id) for token_id in ids).decode("utf-8", errors="replace")
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """One readable piece per token, such as " the"; bytes of a split character show as ``<0xF0>``."""
        return [self._token_string(token_id) for token_id in ids]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token of a byte-level vocabulary; an id the tokenizer lacks has none."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            known = b"" if token is None else _bytes_of(token)
            self._bytes[token_id] = known
        return known

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling, markers included; empty for an id that it lacks."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return "" if token is None else str(token)

    def stream_decoder(self) -> StreamDecoder:
        """A new decoder for one generation."""
        return StreamDecoder(self)

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt text of `messages` ({"role", "content"}), by the model's own template, in HF's sandbox.

        The template writes the special tokens itself: encode the result with ``add_special_tokens=False``.
        """
        if not self.has_chat_template:
            raise FailedPrecondition(
                "This model's tokenizer has no chat template.",
                reason=reasons.NO_CHAT_TEMPLATE,
                field="messages",
                remedy="Send the prompt as text or as token ids.",
            )
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise InvalidArgument(
                f"The model's chat template refuses these messages: {error}",
                reason=reasons.MESSAGE_MALFORMED,
                field="messages",
                remedy="Check the roles and their order.",
            ) from error
        return str(text)

    def _token_string(self, token_id: int) -> str:
        if self.byte_level:
            return _readable(self.token_bytes(token_id))
        token = self.token(token_id)
        return token.replace(_METASPACE, " ") if self._metaspace else token


class StreamDecoder:
    """The text of a generation as its tokens arrive; see the module for how."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if codec.byte_level else None
        self._window: list[int] = []  # printed context, then what is held back
        self._n_printed = 0  # how many ids of the window are printed

    def push(self, token_id: int) -> str:
        """The text that became printable with this token: "" while a character is incomplete."""
        if self._utf8 is not None:
            return self._utf8.decode(self._codec.token_bytes(token_id))
        self._window.append(token_id)
        if self._codec.byte_fallback and _BYTE_TOKEN.fullmatch(self._codec.token(token_id)):
            return ""
        return self._print(final=False)

    def finish(self) -> str:
        """What was still held back. The decoder is spent afterwards."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        return self._print(final=True)

    def _print(self, *, final: bool) -> str:
        printed = self._codec.decode(self._window[: self._n_printed])
        text = self._codec.decode(self._window)
        n_held = len(self._window) - self._n_printed
        incomplete = text.endswith(_REPLACEMENT) and not self._codec.byte_fallback
        if incomplete and not final and n_held < _MAX_HELD_TOKENS:
            return ""
        piece = text[len(printed) :]
        # Only what was just printed stays as context, so the window is as long as one hold.
        self._window = self._window[self._n_printed :]
        self._n_printed = len(self._window)
        return piece


def _is_byte_level(decoder: Mapping[str, Any]) -> bool:
    if decoder.get("type") == "Sequence":
        inner = decoder.get("decoders", [])
        return len(inner) == 1 and _is_byte_level(inner[0])
    return decoder.get("type") == "ByteLevel"


def _bytes_of(token: str) -> bytes:
    table = _byte_of_char()
    try:
        return bytes(table[char] for char in token)
    except KeyError:  # an added token outside the byte alphabet stands for itself
        return token.encode("utf-8")


def _readable(raw: bytes) -> str:
    """UTF-8 text with every byte that is part of no whole character written as ``<0xNN>``."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = "".join(f"<0x{byte:02X}>" for byte in raw[error.start : error.end])
        return raw[: error.start].decode("utf-8") + bad + _readable(raw[error.end :])
