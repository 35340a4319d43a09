"""The layout that Llama set: pre-norms, split q/k/v, a gated MLP. Its relatives differ by parameters."""

from __future__ import annotations

from glasshouse.server.models.families.norms import NormKind
from glasshouse.server.models.families.spec import ModelFacts
from glasshouse.server.models.families.table import BlockLayout, Part, StackLayout


def llama_like(
    facts: ModelFacts,
    *,
    root: str = "model",
    norm: NormKind = NormKind.RMS,
    ln1: str | None = "input_layernorm",
    ln2: str | None = "post_attention_layernorm",
    ln1_post: str | None = None,
    ln2_post: str | None = None,
    fused: bool = False,
    direct: bool = True,
    embed_note: str = "",
    post_norm_note: str = "",
) -> StackLayout:
    """A stack with the modules named as Llama names them; `fused`: qkv_proj and gate_up_proj (Phi-3)."""
    if fused:
        d_q, d_kv, d_mlp = facts.n_heads * facts.d_head, facts.n_kv_heads * facts.d_head, facts.d_mlp
        qkv, gate_up = "self_attn.qkv_proj", "mlp.gate_up_proj"
        q = Part(path=qkv, label="q", columns=(0, d_q))
        k = Part(path=qkv, label="k", columns=(d_q, d_q + d_kv))
        v = Part(path=qkv, label="v", columns=(d_q + d_kv, d_q + 2 * d_kv))
        gate = Part(path=gate_up, label="gate", columns=(0, d_mlp))
        up = Part(path=gate_up, label="up", columns=(d_mlp, 2 * d_mlp))
    else:
        q, k, v = (Part(path=f"self_attn.{name}_proj") for name in "qkv")
        gate, up = Part(path="mlp.gate_proj"), Part(path="mlp.up_proj")
    block = BlockLayout(
        attention="self_attn",
        q=q,
        k=k,
        v=v,
        out_proj="self_attn.o_proj",
        mlp="mlp",
        mlp_pre=gate,
        mlp_pre_linear=up,
        mlp_out_proj="mlp.down_proj",
        ln1=ln1,
        ln2=ln2,
        ln1_post=ln1_post,
        ln2_post=ln2_post,
        norm=norm,
        post_norm_note=post_norm_note,
    )
    return StackLayout(
        base=root,
        blocks=f"{root}.layers",
        embed=f"{root}.embed_tokens",
        final_norm=f"{root}.norm",
        head="lm_head",
        block=block,
        direct=direct,
        embed_note=embed_note,
    )
