"""What a family tells about a loaded model: where its parts are, and which hook points they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from glasshouse.server.models.families.norms import NormKind
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.wire import reasons

TapWhere = Literal["output", "input", "normalized", "rot_q", "rot_k", "scores", "pattern", "logits"]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The sizes a naming table needs, read off the configuration once."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class TapSite:
    """Where a hook point is found.

    `where` says what of the module at `path` is tapped. For "output", `columns` narrows a fused projection
    whose parts lie side by side, and `interleave` = (part, n_parts) one whose parts alternate head by head,
    (B, T, n_heads, n_parts, d_head). `aliases` are other names for the same tensor.
    """

    point: HookPoint
    path: str
    where: TapWhere
    norm: NormKind | None = None
    columns: tuple[int, int] | None = None
    interleave: tuple[int, int] | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """The naming table and the ends of one loaded model.

    `base` maps token ids to the last hidden state after the final norm; `head` is the output embedding.
    `absent` maps a point's name without its layer prefix (``hook_resid_mid``) to why this architecture has
    none. `direct`: the stack runs as embedding, rotary, blocks, norm, called one by one; the base module's
    own forward prepares masks, caches and outputs that are not used here, some 0.2 ms a step on a CPU.
    """

    name: str
    base: str
    head: str
    blocks: str = ""
    attention: str = ""
    norm: str | None = None
    norm_kind: NormKind | None = None
    final_logit_softcap: float | None = None
    direct: bool = False
    taps: tuple[TapSite, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)

    def attention_modules(self, model: nn.Module) -> list[nn.Module]:
        """The attention module of every block, in order."""
        blocks = cast(nn.ModuleList, model.get_submodule(self.blocks))
        return [block.get_submodule(self.attention) for block in blocks]

    def forward_hidden(self, model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Run the stack: int64 ids and absolute positions (B, T) -> the stream after the final norm.

        The result is (B, T, d_model) in the model's dtype.
        """
        base = cast(Any, model.get_submodule(self.base))
        if self.direct:
            stream = base.embed_tokens(input_ids)
            rotary = base.rotary_emb(stream, position_ids=position_ids)
            for block in base.layers:
                stream = block(
                    stream, attention_mask=None, position_embeddings=rotary, position_ids=position_ids
                )
            return cast(Tensor, base.norm(stream))
        out = base(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return cast(Tensor, out.last_hidden_state)

    def unembed(self, model: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Rows after the final norm (N, d_model) -> logits (N, vocab), before and after the final soft cap.

        Without a cap the two are one tensor.
        """
        raw = cast(Tensor, model.get_submodule(self.head)(hidden))
        if self.final_logit_softcap is None:
            return raw, raw
        return raw, torch.tanh(raw / self.final_logit_softcap) * self.final_logit_softcap

    def final_norm(self, model: nn.Module, resid: Tensor) -> Tensor:
        """The final norm with its gain, (N, d_model) both ways: a logit lens puts it before `unembed`."""
        if self.norm is None:
            raise FailedPrecondition(
                f"The final norm of a {self.name} model is not known here.",
                reason=reasons.CAPABILITY_MISSING,
                remedy="Use a model of a supported family for the logit lens.",
            )
        return cast(Tensor, model.get_submodule(self.norm)(resid))
