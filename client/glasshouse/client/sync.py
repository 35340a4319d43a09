"""The blocking client: `Client`, `Model`, `GenerationStream`. `aio` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import overload

from glasshouse.client import calls
from glasshouse.client.attribution.sync import ClientAttribution, ModelAttribution
from glasshouse.client.concepts.sync import ConceptMethods
from glasshouse.client.conditions import Condition
from glasshouse.client.connection import TLSConfig, connection
from glasshouse.client.dictionaries import calls as dictionary_calls
from glasshouse.client.dictionaries.sync import Dictionary
from glasshouse.client.dictionaries.values import DictionaryInfo
from glasshouse.client.generation import GenerationView
from glasshouse.client.inputs import ChatMessageLike, InputLike, as_inputs
from glasshouse.client.interventions import Intervention
from glasshouse.client.monitors.sync import MonitorMethods
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
from glasshouse.client.sync_transport import MessageStream, Transport


class Client(ClientAttribution):
    """A server's models. Cheap to make; connects when first used; safe to share between threads.

    `timeout` is the deadline of each call in seconds, a whole generation included; every method takes its
    own. `tls`: True for the system's authorities, a TLSConfig for others. A server that cannot be reached, or
    asks to be tried again, is tried `max_attempts` times within the deadline, but never after its first
    answer.

    Raises ValueError for an api_key without TLS to another machine.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        api_key: str | None = None,
        tls: bool | TLSConfig | None = None,
        timeout: float = 60.0,
        max_attempts: int = 5,
    ) -> None:
        self._transport = Transport(
            connection(target, api_key=api_key, tls=tls, timeout=timeout, max_attempts=max_attempts)
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._transport.connection.target!r})"

    def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        self._transport.close()

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Waits until the server says it is serving. Raises UnavailableError after `timeout` seconds."""
        self._transport.wait_ready(timeout)

    def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """The models served, by name."""
        return list(self._transport.items(calls.list_models, timeout))

    def model(self, name: str | None = None, *, timeout: float | None = None) -> Model:
        """One model; without a name the only one served. Raises NotFoundError with the closest names."""
        return Model(self._transport, self._transport.unary(calls.get_model(name), timeout))


class Model(ConceptMethods, MonitorMethods, ModelAttribution):
    """A served model. Made by `Client.model`."""

    def __init__(self, transport: Transport, info: ModelInfo) -> None:
        self.info = info
        self._transport = transport
        self._name = resource_name(info.name)

    def __repr__(self) -> str:
        return f"Model({self.info.name!r})"

    def hook_points(self, *, timeout: float | None = None) -> list[HookPointInfo]:
        """What can be read and edited, in the order of the forward pass."""
        pages = partial(calls.list_hook_points, self._name)
        return list(self._transport.items(pages, timeout))

    def tokenize(
        self, text: InputLike, add_special_tokens: bool = True, *, timeout: float | None = None
    ) -> Tokens:
        """The tokens of a text, or of a conversation as the model's chat template renders it."""
        return self._transport.unary(calls.tokenize(self._name, text, add_special_tokens), timeout)

    def detokenize(self, ids: Iterable[int], *, timeout: float | None = None) -> str:
        """The text of token ids, special tokens included."""
        return self._transport.unary(calls.detokenize(self._name, ids), timeout)

    def render_chat(
        self,
        messages: Iterable[ChatMessageLike],
        add_generation_prompt: bool = True,
        *,
        timeout: float | None = None,
    ) -> RenderedChat:
        """A conversation as the text and tokens the model reads."""
        return self._transport.unary(calls.render_chat(self._name, messages, add_generation_prompt), timeout)

    def dictionaries(self, *, timeout: float | None = None) -> list[DictionaryInfo]:
        """The dictionaries loaded for this model, by name."""
        pages = partial(dictionary_calls.list_dictionaries, self._name)
        return list(self._transport.items(pages, timeout))

    def dictionary(self, name: str, *, timeout: float | None = None) -> Dictionary:
        """One dictionary. Raises NotFoundError with the closest names."""
        call = dictionary_calls.get_dictionary(self._name, name)
        return Dictionary(self._transport, self._transport.unary(call, timeout))

    def load_dictionary(self, name: str, path: str, *, timeout: float | None = None) -> list[Dictionary]:
        """Loads a dictionary that the server finds at `path`, on its disk or as `hf:org/repo`: one, or those of a
        set as `name/part`. Needs the admin role."""
        call = dictionary_calls.load_dictionary(self._name, name, path)
        return [Dictionary(self._transport, info) for info in self._transport.unary(call, timeout)]

    @overload
    def activations(  # type: ignore[overload-overlap]
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
    def activations(
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

    def activations(
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
        found = dict(self._extract(call, progress, timeout))
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
    ) -> Iterator[tuple[int, Activations]]:
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

    def score(
        self,
        input: InputLike,
        *,
        interventions: Sequence[Intervention] = (),
        top_k: int = 0,
        timeout: float | None = None,
    ) -> Score:
        """Teacher-forced log-probabilities of a sequence, under interventions; `top_k` alternatives a
        position."""
        return self._transport.unary(calls.score(self._name, input, interventions, top_k), timeout)

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
    ) -> GenerationStream:
        """Starts a generation; iterate for tokens as they come, or call `.result()`.

        `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 keep all. A `seed` gives the same
        tokens whatever else the server does. `stop` strings end the text before them. `logprobs` asks for
        that many alternatives with each token. `abort_when`: a condition, or
        several, made by `when`; as soon as one holds, the generation ends (`stream.abort`). `labels` say what the
        request is about, for monitors to choose by; `allow_text_in_events` lets those that ask for it tell its text.
        Leaving a `with` block cancels what has not finished.
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
        return GenerationStream(call, self._transport.stream(call, timeout))

    def _extract(
        self,
        call: calls.ExtractionCall,
        progress: Callable[[Progress], object] | None,
        timeout: float | None,
    ) -> Iterator[tuple[int, Activations]]:
        messages = self._transport.stream(call, timeout)
        state = call.state
        try:
            while (event := messages.read()) is not None:
                complete = state.feed(event)
                if progress is not None:
                    progress(state.progress)
                if complete is not None:
                    yield complete
            state.end()
        finally:
            messages.cancel()


class GenerationStream(GenerationView):
    """A generation under way: a context manager and an iterator of GeneratedToken."""

    def __init__(self, call: calls.GenerationCall, messages: MessageStream) -> None:
        super().__init__(call.state)
        self._messages = messages

    @property
    def request_id(self) -> str:
        """The id under which the server's log knows this call."""
        return self._messages.request_id

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt as fed. Waits for the first event."""
        while self._state.prompt is None:
            self._read()
        return self._state.prompt

    @property
    def prompt_readouts(self) -> PromptReadouts:
        """What the readouts saw over the prompt. Waits until all of it has come."""
        while not self._state.prompt_complete:
            self._read()
        return self._state.prompt_readouts()

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.finished:
            self.cancel()

    def __iter__(self) -> GenerationStream:
        return self

    def __next__(self) -> GeneratedToken:
        pending = self._state.pending
        while not pending:
            if self.finished:
                raise StopIteration
            self._read()
        return pending.popleft()

    def result(self) -> GenerationResult:
        """Waits for the end. Its `tokens` are those not iterated over before."""
        tokens = list(self)
        return self._state.result(tokens)

    def cancel(self) -> None:
        """Ends the generation, here and at the server; what waits for its tokens gets CancelledError."""
        self._messages.cancel()

    def _read(self) -> None:
        event = self._messages.read()
        if event is None:
            self._state.end()
        else:
            self._state.feed(event)
            if self.finished:
                self._messages.read()  # The status, so that the call has ended well on both sides.
