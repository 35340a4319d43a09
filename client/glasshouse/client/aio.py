"""The asyncio client: `AsyncClient`, `AsyncModel`, `AsyncGenerationStream`. `sync` is its twin."""

# A timeout here is a gRPC deadline, which the server sees too: asyncio.timeout would not tell it.
# ruff: noqa: ASYNC109

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, overload

from glasshouse.client import calls
from glasshouse.client.aio_transport import AsyncMessageStream, AsyncTransport
from glasshouse.client.attribution.aio import AsyncClientAttribution, AsyncModelAttribution
from glasshouse.client.concepts.aio import AsyncConceptMethods
from glasshouse.client.conditions import Condition
from glasshouse.client.connection import TLSConfig, connection
from glasshouse.client.dictionaries import calls as dictionary_calls
from glasshouse.client.dictionaries.aio import AsyncDictionary
from glasshouse.client.dictionaries.values import DictionaryInfo
from glasshouse.client.generation import GenerationView
from glasshouse.client.inputs import ChatMessageLike, InputLike, as_inputs
from glasshouse.client.interventions import Intervention
from glasshouse.client.monitors.aio import AsyncMonitorMethods
from glasshouse.client.parsers import resource_name
from glasshouse.client.positions import PositionsLike
from glasshouse.client.readouts import ActivationDType, Readout
from glasshouse.client.results import (
    Activations,
    GeneratedToken,
    GenerationResult,
    HookPointInfo,
    ModelInfo,
    Progress,
    PromptReadouts,
    RenderedChat,
    Score,
    Tokens,
)


class AsyncClient(AsyncClientAttribution):
    """`Client` for asyncio: the same names and arguments, awaited. Belongs to the event loop of its first
    call."""

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        api_key: str | None = None,
        tls: bool | TLSConfig | None = None,
        timeout: float = 60.0,
        max_attempts: int = 5,
    ) -> None:
        self._transport = AsyncTransport(
            connection(target, api_key=api_key, tls=tls, timeout=timeout, max_attempts=max_attempts)
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._transport.connection.target!r})"

    async def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        await self._transport.close()

    async def wait_ready(self, timeout: float = 30.0) -> None:
        """Waits until the server says it is serving. Raises UnavailableError after `timeout` seconds."""
        await self._transport.wait_ready(timeout)

    async def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """The models served, by name."""
        return [info async for info in self._transport.items(calls.list_models, timeout)]

    async def model(self, name: str | None = None, *, timeout: float | None = None) -> AsyncModel:
        """One model; without a name the only one served. Raises NotFoundError with the closest names."""
        return AsyncModel(self._transport, await self._transport.unary(calls.get_model(name), timeout))


class AsyncModel(AsyncConceptMethods, AsyncMonitorMethods, AsyncModelAttribution):
    """A served model. Made by `await AsyncClient.model()`."""

    def __init__(self, transport: AsyncTransport, info: ModelInfo) -> None:
        self.info = info
        self._transport = transport
        self._name = resource_name(info.name)

    def __repr__(self) -> str:
        return f"AsyncModel({self.info.name!r})"

    async def hook_points(self, *, timeout: float | None = None) -> list[HookPointInfo]:
        """What can be read and edited, in the order of the forward pass."""
        pages = partial(calls.list_hook_points, self._name)
        return [point async for point in self._transport.items(pages, timeout)]

    async def tokenize(
        self, text: InputLike, add_special_tokens: bool = True, *, timeout: float | None = None
    ) -> Tokens:
        """The tokens of a text, or of a conversation as the model's chat template renders it."""
        return await self._transport.unary(calls.tokenize(self._name, text, add_special_tokens), timeout)

    async def detokenize(self, ids: Iterable[int], *, timeout: float | None = None) -> str:
        """The text of token ids, special tokens included."""
        return await self._transport.unary(calls.detokenize(self._name, ids), timeout)

    async def render_chat(
        self,
        messages: Iterable[ChatMessageLike],
        add_generation_prompt: bool = True,
        *,
        timeout: float | None = None,
    ) -> RenderedChat:
        """A conversation as the text and tokens the model reads."""
        return await self._transport.unary(
            calls.render_chat(self._name, messages, add_generation_prompt), timeout
        )

    async def dictionaries(self, *, timeout: float | None = None) -> list[DictionaryInfo]:
        """The dictionaries loaded for this model, by name."""
        pages = partial(dictionary_calls.list_dictionaries, self._name)
        return [info async for info in self._transport.items(pages, timeout)]

    async def dictionary(self, name: str, *, timeout: float | None = None) -> AsyncDictionary:
        """One dictionary. Raises NotFoundError with the closest names."""
        call = dictionary_calls.get_dictionary(self._name, name)
        return AsyncDictionary(self._transport, await self._transport.unary(call, timeout))

    async def load_dictionary(
        self, name: str, path: str, *, timeout: float | None = None
    ) -> list[AsyncDictionary]:
        """Loads a dictionary that the server finds at `path`, on its disk or as `hf:org/repo`: one, or those of a
        set as `name/part`. Needs the admin role."""
        call = dictionary_calls.load_dictionary(self._name, name, path)
        return [AsyncDictionary(self._transport, info) for info in await self._transport.unary(call, timeout)]

    @overload
    async def activations(  # type: ignore[overload-overlap]
        self,
        input: InputLike,
        *,
        hook_points: str | Sequence[str],
        positions: PositionsLike | None = None,
        interventions: Sequence[Intervention] = (),
        dtype: ActivationDType = "float32",
        progress: Callable[[Progress], object] | None = None,
        timeout: float | None = None,
    ) -> Activations: ...

    @overload
    async def activations(
        self,
        input: Sequence[InputLike],
        *,
        hook_points: str | Sequence[str],
        positions: PositionsLike | None = None,
        interventions: Sequence[Intervention] = (),
        dtype: ActivationDType = "float32",
        progress: Callable[[Progress], object] | None = None,
        timeout: float | None = None,
    ) -> list[Activations]: ...

    async def activations(
        self,
        input: InputLike | Sequence[InputLike],
        *,
        hook_points: str | Sequence[str],
        positions: PositionsLike | None = None,
        interventions: Sequence[Intervention] = (),
        dtype: ActivationDType = "float32",
        progress: Callable[[Progress], object] | None = None,
        timeout: float | None = None,
    ) -> Activations | list[Activations]:
        """The activations of one input, or of a list of inputs, read after the interventions.

        Arrays are (n_pos, width), or (n_heads, n_pos, n_tokens) for attention maps, of the `dtype` asked for,
        which is also what travels. `progress` is called as bytes arrive. A list of ints or messages is one
        input.
        """
        inputs, many = as_inputs(input)
        call = calls.extract(
            self._name,
            inputs,
            hook_points=hook_points,
            positions=positions,
            interventions=interventions,
            dtype=dtype,
        )
        found = {index: activations async for index, activations in self._extract(call, progress, timeout)}
        ordered = [found[index] for index in range(len(inputs))]
        return ordered if many else ordered[0]

    def iter_activations(
        self,
        inputs: Sequence[InputLike],
        *,
        hook_points: str | Sequence[str],
        positions: PositionsLike | None = None,
        interventions: Sequence[Intervention] = (),
        dtype: ActivationDType = "float32",
        progress: Callable[[Progress], object] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[tuple[int, Activations]]:
        """(index, activations) of each input as it completes, in the server's order; none is held back.

        For extractions larger than memory: the stream waits while you do. Leaving the loop ends the call when
        the iterator is closed or collected.
        """
        call = calls.extract(
            self._name,
            as_inputs(inputs)[0],
            hook_points=hook_points,
            positions=positions,
            interventions=interventions,
            dtype=dtype,
        )
        return self._extract(call, progress, timeout)

    async def score(
        self,
        input: InputLike,
        *,
        interventions: Sequence[Intervention] = (),
        top_k: int = 0,
        timeout: float | None = None,
    ) -> Score:
        """Teacher-forced log-probabilities of a sequence, under interventions; `top_k` alternatives a
        position."""
        return await self._transport.unary(calls.score(self._name, input, interventions, top_k), timeout)

    def generate(
        self,
        prompt: InputLike,
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: int = 0,
        interventions: Sequence[Intervention] = (),
        readouts: Sequence[Readout] = (),
        abort_when: Condition | Sequence[Condition] = (),
        labels: Mapping[str, str] | None = None,
        allow_text_in_events: bool = False,
        timeout: float | None = None,
    ) -> AsyncGenerationStream:
        """Starts a generation: `async with` it and `async for` its tokens, or `await` its `.result()`.

        `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 keep all. A `seed` gives the same
        tokens whatever else the server does. `stop` strings end the text before them. `logprobs` asks for
        that many alternatives with each token. `abort_when`: a condition, or
        several, made by `when`; as soon as one holds, the generation ends (`stream.abort`). Leaving a `with` block
        cancels what has not finished.
        """
        call = calls.generate(
            self._name,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            interventions=interventions,
            readouts=readouts,
            abort_when=abort_when,
            labels=labels,
            allow_text_in_events=allow_text_in_events,
        )
        return AsyncGenerationStream(call, self._transport.stream(call, timeout))

    async def _extract(
        self,
        call: calls.ExtractionCall,
        progress: Callable[[Progress], object] | None,
        timeout: float | None,
    ) -> AsyncIterator[tuple[int, Activations]]:
        messages = self._transport.stream(call, timeout)
        state = call.state
        try:
            while (event := await messages.read()) is not None:
                complete = state.feed(event)
                if progress is not None:
                    progress(state.progress)
                if complete is not None:
                    yield complete
            state.end()
        finally:
            messages.cancel()


class AsyncGenerationStream(GenerationView):
    """A generation under way: an async context manager and an async iterator of GeneratedToken.

    Entering the block (or awaiting the stream itself) waits for the prompt and its readouts.
    """

    def __init__(self, call: calls.GenerationCall, messages: AsyncMessageStream) -> None:
        super().__init__(call.state)
        self._messages = messages

    @property
    def request_id(self) -> str:
        """The id under which the server's log knows this call."""
        return self._messages.request_id

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt as fed. Raises RuntimeError before the first event has come."""
        if self._state.prompt is None:
            raise RuntimeError("no event has come yet: enter the stream with `async with`, or await it")
        return self._state.prompt

    @property
    def prompt_readouts(self) -> PromptReadouts:
        """What the readouts saw over the prompt. Raises RuntimeError before all of it has come."""
        if not self._state.prompt_complete:
            raise RuntimeError("the prompt is not read yet: enter the stream with `async with`, or await it")
        return self._state.prompt_readouts()

    def __await__(self) -> Generator[Any, None, AsyncGenerationStream]:
        return self._opened().__await__()

    async def __aenter__(self) -> AsyncGenerationStream:
        return await self._opened()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.finished:
            self.cancel()

    def __aiter__(self) -> AsyncGenerationStream:
        return self

    async def __anext__(self) -> GeneratedToken:
        pending = self._state.pending
        while not pending:
            if self.finished:
                raise StopAsyncIteration
            await self._read()
        return pending.popleft()

    async def result(self) -> GenerationResult:
        """Waits for the end. Its `tokens` are those not iterated over before."""
        tokens = [token async for token in self]
        return self._state.result(tokens)

    def cancel(self) -> None:
        """Ends the generation, here and at the server; what waits for its tokens gets CancelledError."""
        self._messages.cancel()

    async def _opened(self) -> AsyncGenerationStream:
        try:
            while not self._state.prompt_complete:
                await self._read()
        except BaseException:
            self.cancel()
            raise
        return self

    async def _read(self) -> None:
        event = await self._messages.read()
        if event is None:
            self._state.end()
        else:
            self._state.feed(event)
            if self.finished:
                await self._messages.read()  # The status, so that the call has ended well on both sides.
