"""What the model reads: text, token ids or a conversation, as the token ids that are fed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from glasshouse.server.types.errors import InvalidArgument, ServingError
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import inputs_pb2 as pb
from glasshouse.wire import reasons

from . import fields
from .catalogue import ServedModel

Form = Literal["text", "token_ids", "messages"]

# Text up to this long is tokenized on the event loop: it takes less time than handing it to a thread.
_INLINE_BYTES = 2048


class InputReader:
    """Turns inputs into token ids for one model, within the server's limits."""

    def __init__(self, model: ServedModel, limits: Limits) -> None:
        self._codec = model.engine.codec
        self._info = model.engine.info
        self._limits = limits

    async def prompt(self, message: pb.Input, present: bool, field: str) -> tuple[int, ...]:
        """The tokens of one input, at least one, no more than the context holds."""
        if _is_small((message,)):
            return self._prompt(message, present, field)
        return await asyncio.to_thread(self._prompt, message, present, field)

    def prompt_now(self, message: pb.Input, present: bool, field: str) -> tuple[int, ...]:
        """As `prompt`, for callers that are off the event loop already."""
        return self._prompt(message, present, field)

    async def prompts(self, messages: Sequence[pb.Input], field: str) -> tuple[tuple[int, ...], ...]:
        """The tokens of many inputs."""
        limits = self._limits
        fields.count(len(messages), field, limits.max_inputs, "max_inputs", "inputs")
        if _is_small(messages):
            return self._prompts(messages, field)
        return await asyncio.to_thread(self._prompts, messages, field)

    async def tokens(self, message: pb.Input, present: bool, field: str) -> list[int]:
        """The tokens of an input that need not be fed: it may be empty, or longer than the context."""
        if _is_small((message,)):
            return self._tokens(message, self._form(message, present, field), field)
        return await asyncio.to_thread(self._tokens, message, self._form(message, present, field), field)

    async def chat(
        self, messages: Sequence[pb.ChatMessage], field: str, *, answer: bool
    ) -> tuple[str, list[int]]:
        """A conversation as text and as tokens; with `answer`, up to where the assistant begins to speak."""
        # The first rendering imports and compiles the template: always off the loop.
        return await asyncio.to_thread(self._chat, messages, field, answer)

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Refuses ids outside the vocabulary, naming the first."""
        vocab_size = self._info.vocab_size
        if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
            return
        at = next(index for index, token in enumerate(ids) if not 0 <= token < vocab_size)
        raise InvalidArgument(
            f"{field}[{at}] is {ids[at]}, not in [0, {vocab_size})",
            reason=reasons.TOKEN_OUT_OF_RANGE,
            field=f"{field}[{at}]",
            value=ids[at],
            remedy=f"use token ids from 0 to {vocab_size - 1}; Tokenize gives them",
            metadata={"vocab_size": str(vocab_size)},
        )

    def check_fits(self, n_prompt: int, max_tokens: int, field: str) -> None:
        """Refuses a prompt that, with what is to be generated, exceeds the context."""
        context = self._info.context_length
        total = n_prompt + max_tokens
        if total <= context:
            return
        path = "max_tokens" if max_tokens and n_prompt < context else field
        sizes = f"{n_prompt} prompt tokens"
        remedy = "shorten the input"
        if max_tokens:
            sizes += f" and max_tokens {max_tokens} make {total} tokens"
            remedy = "shorten the prompt or lower max_tokens"
            if path == "max_tokens":
                remedy += f" to {context - n_prompt}"
        raise InvalidArgument(
            f"{sizes}, the model's context holds {context}",
            reason=reasons.CONTEXT_EXCEEDED,
            field=path,
            value=total,
            remedy=remedy,
            metadata={
                "prompt_tokens": str(n_prompt),
                "max_tokens": str(max_tokens),
                "context_length": str(context),
            },
        )

    def _prompts(self, messages: Sequence[pb.Input], field: str) -> tuple[tuple[int, ...], ...]:
        prompts: list[tuple[int, ...]] = []
        total = 0
        for index, message in enumerate(messages):
            prompt = self._prompt(message, True, f"{field}[{index}]")
            total += len(prompt)
            limit = self._limits.max_input_tokens_total
            fields.count(total, field, limit, "max_input_tokens_total", "tokens in all")
            prompts.append(prompt)
        return tuple(prompts)

    def _prompt(self, message: pb.Input, present: bool, field: str) -> tuple[int, ...]:
        form = self._form(message, present, field)
        # An empty text would still be a BOS token where the tokenizer adds one: a prompt nobody wrote.
        ids = [] if form == "text" and not message.text else self._tokens(message, form, field)
        if not ids:
            raise InvalidArgument(
                f"{field} holds no token",
                reason=reasons.EMPTY_INPUT,
                field=field,
                value="0 tokens",
                remedy="write something; to generate from nothing, send the BOS token in token_ids",
            )
        self.check_fits(len(ids), 0, field)
        limit = self._limits.max_prompt_tokens
        fields.count(len(ids), field, limit, "max_prompt_tokens", "prompt tokens")
        return tuple(ids)

    def _tokens(self, message: pb.Input, form: Form, field: str) -> list[int]:
        if form == "token_ids":
            ids = list(message.token_ids)
            limit = self._limits.max_input_tokens_total
            fields.count(len(ids), f"{field}.token_ids", limit, "max_input_tokens_total", "tokens")
            self.check_ids(ids, f"{field}.token_ids")
            return ids
        if form == "messages":
            return self._chat(message.messages, f"{field}.messages", True)[1]
        self._check_size(len(message.text.encode()), f"{field}.text")
        add_special = message.add_special_tokens if message.HasField("add_special_tokens") else True
        return self._codec.encode(message.text, add_special)

    def _chat(self, messages: Sequence[pb.ChatMessage], field: str, answer: bool) -> tuple[str, list[int]]:
        if not messages:
            raise fields.required(field, "at least one message", "send the conversation's messages")
        for index, message in enumerate(messages):
            if not message.role:
                raise fields.required(
                    f"{field}[{index}].role", "who speaks", 'send "system", "user" or "assistant"'
                )
        self._check_size(sum(len(message.content.encode()) for message in messages), field)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._codec.render_chat(turns, answer)
        except ServingError as error:
            error.field = field
            raise
        return text, self._codec.encode(text, False)

    def _check_size(self, n_bytes: int, field: str) -> None:
        fields.count(n_bytes, field, self._limits.max_text_bytes, "max_text_bytes", "bytes of text")

    @staticmethod
    def _form(message: pb.Input, present: bool, field: str) -> Form:
        given: list[Form] = []
        if present:
            if message.HasField("text"):
                given.append("text")
            if message.token_ids:
                given.append("token_ids")
            if message.messages:
                given.append("messages")
        if len(given) == 1:
            return given[0]
        choices = "exactly one of text, token_ids and messages"
        if not given:
            raise fields.required(field, choices, f"set {choices}; an empty list counts as none")
        both = " and ".join(given)
        raise InvalidArgument(
            f"{field} sets {both}, it takes {choices}",
            reason=reasons.FIELD_CONFLICT,
            field=f"{field}.{given[1]}",
            value=both,
            remedy=f"leave out all but one of {both}",
            metadata={"conflict": ", ".join(f"{field}.{form}" for form in given)},
        )


def _is_small(messages: Sequence[pb.Input]) -> bool:
    size = 0
    for message in messages:
        if message.messages:
            return False
        size += 16 + len(message.text) + len(message.token_ids)
        if size > _INLINE_BYTES:
            return False
    return True
