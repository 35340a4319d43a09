"""Tiny random models of every family, and a reference that recomputes each from its weights alone.

The reference shares no code with transformers' modules or with ours: plain matrix products, a mask by
position, a rotary by formula. It calls `at(name, tensor)` at every hook point, so it can be edited there too:
what an edit should do is what the reference does with the same edit.

Shapes: B batch, T positions, H heads, K key-value heads, D d_head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from glasshouse.server.hooks.table import HookTable
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.models.loading import wrap_model

N_POSITIONS = 9
_BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = _BASE | {
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 4,
    "final_logit_softcapping": 3.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_NEOX = _BASE | {"num_key_value_heads": None, "attention_bias": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _BASE | {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "mistral": _BASE | {"model_type": "mistral", "sliding_window": 4, "head_dim": 12},
    "qwen2": _BASE
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen3": _BASE | {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
    "gemma2": _GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 1.5},
    "gemma3": _GEMMA | {"model_type": "gemma3_text"},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": 40,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _NEOX | {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "gpt_neox_sequential": _NEOX | {"model_type": "gpt_neox", "use_parallel_residual": False},
    "olmo2": _BASE | {"model_type": "olmo2"},
    "phi3": _BASE
    | {"model_type": "phi3", "sliding_window": 5, "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
}

At = Callable[[str, Tensor], Tensor]


@dataclass
class Tiny:
    """One architecture: our loaded model, its weights, and a batch of two rows of equal length."""

    arch: str
    loaded: LoadedModel
    table: HookTable
    config: Any
    ids: Tensor
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.ids.shape[1]).expand_as(self.ids)

    def forward(self, ids: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab) through our attention, after the final cap."""
        ids = self.ids if ids is None else ids
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        hidden = self.loaded.family.forward_hidden(self.loaded.model, ids, positions)
        return self.loaded.family.unembed(self.loaded.model, hidden.flatten(0, 1))[1].unflatten(0, ids.shape)

    def reference(self, edit: At = lambda name, x: x) -> dict[str, Tensor]:
        """Every point by hand, under `edit`; ``logits`` are after the final cap."""
        points: dict[str, Tensor] = {}

        def at(name: str, x: Tensor) -> Tensor:
            points[name] = edit(name, x).clone()
            return points[name]

        with torch.no_grad():
            points["logits"] = Reference(self, at).run()
        return points


def build_model(arch: str) -> Any:
    """A tiny Hugging Face model, eager, whose gains and biases are as random as its weights."""
    settings = dict(ARCHITECTURES[arch])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(len(arch))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0, 0.3)
                if name.endswith("weight") and not arch.startswith("gemma"):
                    parameter.add_(1.0)
            else:
                parameter.normal_(0.0, 0.2)
    return model


@pytest.fixture(params=sorted(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    arch = str(request.param)
    torch.set_num_threads(1)
    model = build_model(arch)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 61, (2, N_POSITIONS), generator=generator)
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, all_special_ids=[1, 2])
    loaded = wrap_model(model, tokenizer, name=arch)
    weights = dict(model.state_dict())
    return Tiny(arch, loaded, HookTable(loaded), model.config, ids, weights)


class Reference:
    """A forward pass by hand. Every branch on `arch` is a fact about that architecture."""

    def __init__(self, tiny: Tiny, at: At) -> None:
        self.arch, self.config, self.w, self.at = (
            tiny.arch.removesuffix("_sequential"),
            tiny.config,
            tiny.weights,
            at,
        )
        self.ids = tiny.ids
        self.parallel = tiny.arch == "gpt_neox"
        self.n_heads = self.config.num_attention_heads
        self.n_kv = getattr(self.config, "num_key_value_heads", None) or self.n_heads
        self.d_head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.n_heads

    def run(self) -> Tensor:
        at, w, T = self.at, self.w, self.ids.shape[1]
        if self.arch == "gpt2":
            x = at("hook_embed", w["transformer.wte.weight"][self.ids])
            x = x + at("hook_pos_embed", w["transformer.wpe.weight"][:T].expand_as(x))
            root, final, head = "transformer.h", "transformer.ln_f", "lm_head.weight"
        elif self.arch == "gpt_neox":
            x = at("hook_embed", w["gpt_neox.embed_in.weight"][self.ids])
            root, final, head = "gpt_neox.layers", "gpt_neox.final_layer_norm", "lm_head.weight"
        else:
            scale = math.sqrt(self.config.hidden_size) if self.arch.startswith("gemma") else 1.0
            x = at("hook_embed", w["model.embed_tokens.weight"][self.ids] * scale)
            root, final, head = "model.layers", "model.norm", "lm_head.weight"
        for layer in range(self.config.num_hidden_layers):
            x = self.block(layer, f"{root}.{layer}.", x)
        x = self.norm("ln_final", final, x, out="ln_final.hook_out")
        logits = at("unembed", x @ w[head].T)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def block(self, layer: int, root: str, x: Tensor) -> Tensor:
        name = f"blocks.{layer}."
        at = self.at
        pre, ln1, ln2 = at(name + "hook_resid_pre", x), "input_layernorm", "post_attention_layernorm"
        if self.arch == "gpt2":
            ln1, ln2 = "ln_1", "ln_2"
        sandwich = self.arch in ("gemma2", "gemma3")
        if sandwich:
            ln2 = "pre_feedforward_layernorm"
        x = (
            pre
            if self.arch == "olmo2"
            else self.norm(name + "ln1", root + ln1, pre, out=name + "ln1.hook_out")
        )
        x = self.attention(layer, name, root, x)
        if sandwich or self.arch == "olmo2":
            x = self.norm(name + "ln1_post", root + "post_attention_layernorm", x)
        attn_out = at(name + "hook_attn_out", x)
        mid = pre if self.parallel else at(name + "hook_resid_mid", pre + attn_out)
        x = (
            mid
            if self.arch == "olmo2"
            else self.norm(name + "ln2", root + ln2, mid, out=name + "ln2.hook_out")
        )
        x = self.mlp(name, root + "mlp.", x)
        if sandwich or self.arch == "olmo2":
            x = self.norm(name + "ln2_post", root + "post_feedforward_layernorm", x)
        mlp_out = at(name + "hook_mlp_out", x)
        return at(name + "hook_resid_post", mid + mlp_out + (attn_out if self.parallel else 0.0))

    def norm(self, name: str, path: str, x: Tensor, *, out: str = "") -> Tensor:
        weight, bias = self.w[path + ".weight"], self.w.get(path + ".bias")
        if bias is not None:
            eps = getattr(self.config, "layer_norm_eps", None) or self.config.layer_norm_epsilon
            centred = x - x.mean(-1, keepdim=True)
            normalized = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        else:
            normalized = x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        normalized = self.at(name + ".hook_normalized", normalized)
        gain = 1 + weight if self.arch.startswith("gemma") else weight
        y = normalized * gain + (0.0 if bias is None else bias)
        return self.at(out, y) if out else y

    def linear(self, path: str, x: Tensor) -> Tensor:
        weight, bias = self.w[path + ".weight"], self.w.get(path + ".bias")
        y = x @ (weight if self.arch == "gpt2" else weight.T)
        return y if bias is None else y + bias

    def mlp(self, name: str, path: str, x: Tensor) -> Tensor:
        at = self.at
        if self.arch in ("gpt2", "gpt_neox"):
            up, down = ("c_fc", "c_proj") if self.arch == "gpt2" else ("dense_h_to_4h", "dense_4h_to_h")
            pre = at(name + "mlp.hook_pre", self.linear(path + up, x))
            act = F.gelu(pre, approximate="tanh" if self.arch == "gpt2" else "none")
            return self.linear(path + down, at(name + "mlp.hook_post", act))
        if self.arch == "phi3":
            gate, linear = self.linear(path + "gate_up_proj", x).split(self.config.intermediate_size, -1)
        else:
            gate, linear = self.linear(path + "gate_proj", x), self.linear(path + "up_proj", x)
        gate, linear = at(name + "mlp.hook_pre", gate), at(name + "mlp.hook_pre_linear", linear)
        act = (
            F.gelu(gate, approximate="tanh") if self.arch.startswith("gemma") else gate * torch.sigmoid(gate)
        )
        return self.linear(path + "down_proj", at(name + "mlp.hook_post", act * linear))

    def attention(self, layer: int, name: str, root: str, x: Tensor) -> Tensor:
        at, H, K, D = self.at, self.n_heads, self.n_kv, self.d_head
        B, T, _ = x.shape
        out_proj = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}.get(self.arch, "self_attn.o_proj")
        q, k, v = self.qkv(root, x)
        q = at(name + "attn.hook_q", q)
        k = at(name + "attn.hook_k", k)
        v = at(name + "attn.hook_v", v)
        if self.arch == "olmo2":
            q, k = self.head_norm(root + "self_attn.q_norm", q), self.head_norm(root + "self_attn.k_norm", k)
        q, k = q.reshape(B, T, H, D), k.reshape(B, T, K, D)
        if self.arch in ("qwen3", "gemma3"):
            q, k = self.head_norm(root + "self_attn.q_norm", q), self.head_norm(root + "self_attn.k_norm", k)
        if self.arch != "gpt2":
            q = at(name + "attn.hook_rot_q", self.rotate(q, layer).flatten(-2)).reshape(B, T, H, D)
            k = at(name + "attn.hook_rot_k", self.rotate(k, layer).flatten(-2)).reshape(B, T, K, D)
        scale = self.config.query_pre_attn_scalar if self.arch.startswith("gemma") else D
        k = k.repeat_interleave(H // K, dim=2)
        v = v.reshape(B, T, K, D).repeat_interleave(H // K, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(scale)
        if self.arch == "gpt2":
            scores = scores / (layer + 1)
        if self.arch == "gemma2":
            cap = self.config.attn_logit_softcapping
            scores = cap * torch.tanh(scores / cap)
        for query in range(T):
            for key in range(T):
                window = self.window(layer)
                if key > query or (window is not None and query - key >= window):
                    scores[:, :, query, key] = -math.inf
        scores = at(name + "attn.hook_attn_scores", scores)
        pattern = at(name + "attn.hook_pattern", scores.exp() / scores.exp().sum(-1, keepdim=True))
        z = at(name + "attn.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, v).flatten(-2))
        return self.linear(root + out_proj, z)

    def qkv(self, root: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        H, K, D = self.n_heads, self.n_kv, self.d_head
        if self.arch == "gpt2":
            q, k, v = self.linear(root + "attn.c_attn", x).split(H * D, -1)
        elif self.arch == "gpt_neox":
            fused = self.linear(root + "attention.query_key_value", x).unflatten(-1, (H, 3 * D))
            q, k, v = (part.flatten(-2) for part in fused.split(D, -1))
        elif self.arch == "phi3":
            q, k, v = self.linear(root + "self_attn.qkv_proj", x).split([H * D, K * D, K * D], -1)
        else:
            q, k, v = (self.linear(f"{root}self_attn.{part}_proj", x) for part in "qkv")
        return q, k, v

    def head_norm(self, path: str, x: Tensor) -> Tensor:
        gain = self.w[path + ".weight"] + (1.0 if self.arch == "gemma3" else 0.0)
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * gain

    def window(self, layer: int) -> int | None:
        window: int | None = getattr(self.config, "sliding_window", None)
        layer_types = getattr(self.config, "layer_types", None)
        if window is None or (layer_types and layer_types[layer] != "sliding_attention"):
            return None
        return window

    def rotate(self, x: Tensor, layer: int) -> Tensor:
        """Rotate pairs (i, i + half) of the first rotary dimensions of each head of (B, T, H, D)."""
        rope = self.config.rope_parameters
        if self.arch == "gemma3":
            rope = rope[self.config.layer_types[layer]]
        n_rotary = int(self.d_head * rope.get("partial_rotary_factor", 1.0))
        half = n_rotary // 2
        y = x.clone()
        for i in range(half):
            angle = torch.arange(x.shape[1]) * rope["rope_theta"] ** (-2.0 * i / n_rotary)
            cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
            y[..., i] = x[..., i] * cos - x[..., i + half] * sin
            y[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
        return y
