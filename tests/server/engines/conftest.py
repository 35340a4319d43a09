"""The engine on fable, and an oracle that shares no code with it: Hugging Face's own model with its eager attention, one
request at a time, no cache, plain PyTorch hooks that edit by absolute position with the formulas written out.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from glasshouse import fable
from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.models.loading import load_model
from glasshouse.server.types.generation import (
    Finished,
    GenerationRequest,
    NewToken,
    Prefilled,
    Sampling,
)
from glasshouse.server.types.limits import Limits

Edit = Callable[[Tensor], Tensor]


@dataclass
class Answer:
    """A generation, whole."""

    prefilled: Prefilled | None = None
    tokens: list[NewToken] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for token in self.tokens]

    @property
    def text(self) -> str:
        tail = self.finished.trailing_text if self.finished else ""
        return "".join(token.text for token in self.tokens) + tail


@pytest.fixture(scope="session")
def fable_model() -> Any:
    torch.set_num_threads(2)
    return load_model(fable.model_path(), dtype="float32", device="cpu", name="fable")


@pytest.fixture
async def engine(fable_model: Any) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(fable_model, limits=Limits(max_running=32, max_queued=64))
    await engine.start()
    yield engine
    await engine.stop()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fable_model.model.modules())


@pytest.fixture
def answer() -> Callable[..., Any]:
    async def ask(engine: TransformersEngine, prompt: Sequence[int], **rest: Any) -> Answer:
        rest.setdefault("sampling", Sampling(temperature=0.0))
        answer = Answer()
        async for batch in engine.generate(GenerationRequest(prompt=tuple(prompt), **rest)):
            for event in batch:
                match event:
                    case Prefilled():
                        answer.prefilled = event
                    case NewToken():
                        answer.tokens.append(event)
                    case Finished():
                        answer.finished = event
        return answer

    return ask


class Oracle:
    """Hugging Face transformers, one request at a time, recomputing everything at each token."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            fable.model_path(), dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def _place(self, name: str) -> tuple[torch.nn.Module, bool]:
        """The module of a hook point, and whether the point is its input."""
        base = self.model.model
        if name == "hook_embed":
            return base.embed_tokens, False
        _, layer, point = name.split(".", 2)
        block = base.layers[int(layer)]
        return {
            "hook_resid_pre": (block, True),
            "hook_resid_mid": (block.post_attention_layernorm, True),
            "hook_resid_post": (block, False),
            "hook_attn_out": (block.self_attn, False),
            "hook_mlp_out": (block.mlp, False),
            "attn.hook_q": (block.self_attn.q_proj, False),
            "attn.hook_z": (block.self_attn.o_proj, True),
            "mlp.hook_pre": (block.mlp.gate_proj, False),
            "mlp.hook_post": (block.mlp.down_proj, True),
        }[point]

    @contextmanager
    def _hooked(
        self, edits: Sequence[tuple[str, Callable[[int], bool], Edit]], captures: dict[str, Tensor]
    ) -> Iterator[None]:
        with ExitStack() as stack:
            # A module's forward hooks run in the order they are registered: edits in order, then captures.
            for name, selected, edit in edits:

                def change(tensor: Tensor, selected: Any = selected, edit: Any = edit) -> None:
                    for position in range(tensor.shape[1]):
                        if selected(position):
                            tensor[0, position] = edit(tensor[0, position].clone())

                self._register(stack, name, change)
            for name in captures:

                def read(tensor: Tensor, name: str = name) -> None:
                    captures[name] = tensor[0].clone()

                self._register(stack, name, read)
            yield

    def _register(self, stack: ExitStack, name: str, see: Callable[[Tensor], None]) -> None:
        module, is_input = self._place(name)
        if is_input:
            handle = module.register_forward_pre_hook(
                lambda _m, args, kwargs: see(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        else:
            handle = module.register_forward_hook(lambda _m, _a, out: see(out[0] if isinstance(out, tuple) else out))
        stack.callback(handle.remove)

    @torch.no_grad()
    def forward(
        self,
        ids: Sequence[int],
        edits: Sequence[tuple[str, Callable[[int], bool], Edit]] = (),
        capture: Sequence[str] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities (T, vocab) and the captured activations (T, width)."""
        captures: dict[str, Tensor] = dict.fromkeys(capture, torch.empty(0))
        with self._hooked(edits, captures):
            logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), dim=-1), captures

    def greedy(
        self,
        prompt: Sequence[int],
        n_tokens: int,
        edits: Sequence[tuple[str, Callable[[int], bool], Edit]] = (),
        capture: Sequence[str] = (),
    ) -> tuple[list[int], list[float], dict[str, Tensor]]:
        """Tokens, their log-probabilities, and the captures of the last forward pass (all fed positions)."""
        ids, chosen, captures = list(prompt), [], {}
        for _ in range(n_tokens):
            logprobs, captures = self.forward(ids, edits, capture)
            token = int(logprobs[-1].argmax())
            ids.append(token)
            chosen.append(float(logprobs[-1, token]))
        return ids[len(prompt) :], chosen, captures


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()


def _unit(v: np.ndarray) -> Tensor:
    return torch.from_numpy(v / np.linalg.norm(v)).float()


class Formulas:
    """The edits as the design states them, on one activation."""

    @staticmethod
    def add(v: np.ndarray, c: float) -> Edit:
        return lambda s: s + c * torch.from_numpy(v)

    @staticmethod
    def add_norm(v: np.ndarray, c: float) -> Edit:
        return lambda s: s + c * s.norm() * _unit(v)

    @staticmethod
    def add_kept(v: np.ndarray, c: float) -> Edit:
        def edit(s: Tensor) -> Tensor:
            t = s + c * torch.from_numpy(v)
            return t / t.norm() * s.norm()

        return edit

    @staticmethod
    def ablate(v: np.ndarray) -> Edit:
        return lambda s: s - (s @ _unit(v)) * _unit(v)

    @staticmethod
    def cap(v: np.ndarray, low: float, high: float) -> Edit:
        def edit(s: Tensor) -> Tensor:
            p = float(s @ _unit(v))
            return s + (min(max(p, low), high) - p) * _unit(v)

        return edit

    @staticmethod
    def rotate(first: np.ndarray, second: np.ndarray, angle: float) -> Edit:
        b1 = _unit(first)
        b2 = torch.from_numpy(second).float()
        b2 = b2 - (b2 @ b1) * b1
        b2 = b2 / b2.norm()

        def edit(s: Tensor) -> Tensor:
            a, b = s @ b1, s @ b2
            return s - a * b1 - b * b2 + torch.sqrt(a * a + b * b) * (math.cos(angle) * b1 + math.sin(angle) * b2)

        return edit

    @staticmethod
    def constant(value: np.ndarray) -> Edit:
        return lambda s: torch.from_numpy(value).to(s.dtype)


@pytest.fixture(scope="session")
def formulas() -> type[Formulas]:
    return Formulas
