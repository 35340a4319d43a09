"""An oracle that shares no code with the engine: Hugging Face's own model, one request at a time.

Its attention is eager, it keeps no cache, and plain PyTorch hooks edit it by absolute position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from glasshouse import fable

from .formulas import Formula


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
            "ln2.hook_out": (block.post_attention_layernorm, False),
            "hook_attn_out": (block.self_attn, False),
            "hook_mlp_out": (block.mlp, False),
            "attn.hook_q": (block.self_attn.q_proj, False),
            "attn.hook_z": (block.self_attn.o_proj, True),
            "mlp.hook_pre": (block.mlp.gate_proj, False),
            "mlp.hook_post": (block.mlp.down_proj, True),
        }[point]

    @contextmanager
    def _hooked(
        self, edits: Sequence[tuple[str, Callable[[int], bool], Formula]], captures: dict[str, Tensor]
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
            handle = module.register_forward_hook(
                lambda _m, _a, out: see(out[0] if isinstance(out, tuple) else out)
            )
        stack.callback(handle.remove)

    @torch.no_grad()
    def forward(
        self,
        ids: Sequence[int],
        edits: Sequence[tuple[str, Callable[[int], bool], Formula]] = (),
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
        edits: Sequence[tuple[str, Callable[[int], bool], Formula]] = (),
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
