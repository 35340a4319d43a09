"""Foreign names of hook points in ours.

Transcoders hide three taps behind one name: before the MLP's norm (`hook_resid_mid`), normalised before the
gain (`ln2.hook_normalized`) and after it (`ln2.hook_out`, what the MLP reads). Each format says which it
means here.
"""

from __future__ import annotations

import re

_MODULE = re.compile(r"^(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h|blocks)\.(\d+)(?:\.(.+))?$")

_MODULE_OUT = {
    "": "hook_resid_post",
    "output": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "self_attn": "hook_attn_out",
    "attention": "hook_attn_out",
    "attn": "hook_attn_out",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "ln2.hook_out",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}


def of_module(path: str, *, reads_input: bool = False) -> str:
    """A Hugging Face module path as a hook point: its output, or for an MLP with `reads_input` what it reads.

    Paths without a counterpart are returned as they are: the server accepts module paths as aliases.
    """
    match = _MODULE.match(path)
    if not match:
        return path
    layer, rest = match.group(1), match.group(2) or ""
    if reads_input and rest == "mlp":
        return f"blocks.{layer}.ln2.hook_out"
    point = _MODULE_OUT.get(rest)
    return f"blocks.{layer}.{point}" if point else path


def of_layer(layer: int, hook: str) -> str:
    """circuit-tracer's per-block names: `mlp.hook_in` is after the gain, `hook_mlp_in` (TransformerLens)
    before the norm.
    """
    hook = {
        "mlp.hook_in": "ln2.hook_out",
        "hook_mlp_in": "hook_resid_mid",
        "mlp.hook_out": "hook_mlp_out",
    }.get(hook, hook)
    return f"blocks.{layer}.{hook}"
