"""THE naming table: from a block's layout to its hook points.

An architecture says where its parts are (`StackLayout`, `BlockLayout`); `build_taps` turns that into named
taps, in the order in which a forward pass meets them. What a name means:

- ``hook_embed``: what enters block 0's stream from the token embedding (with Gemma's sqrt(d_model)).
- ``hook_resid_pre | mid | post``: the stream before attention, between attention and MLP, after the MLP.
- ``ln1 | ln2 | ln1_post | ln2_post | ln_final . hook_normalized``: after normalisation, before the gain;
  ``.hook_out`` is after the gain, the vector that the next module reads.
- ``attn.hook_q | k | v``: per head, before q/k-norm and rotary; k and v have n_kv_heads, unrepeated.
  ``attn.hook_rot_q | rot_k``: after both, as attention uses (and caches) them.
- ``attn.hook_attn_scores``: scaled, capped, then masked with -inf; ``attn.hook_pattern``: its softmax.
- ``attn.hook_z``: per head, before W_O. ``hook_attn_out``: what is added to the stream.
- ``mlp.hook_pre``: the gate's pre-activation (the only one where there is no gate); ``mlp.hook_pre_linear``:
  the up projection; ``mlp.hook_post``: what enters W_out. ``hook_mlp_out``: what is added to the stream.
- ``unembed``: logits before the final soft cap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from glasshouse.server.models.families.norms import NormKind
from glasshouse.server.models.families.spec import ModelFacts, TapSite, TapWhere
from glasshouse.server.types.hook_points import HookPoint, HookPointKind

Span = tuple[int, int]

BLOCK_POINTS = (
    "hook_resid_pre",
    "ln1.hook_normalized",
    "ln1.hook_out",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "ln1_post.hook_normalized",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_normalized",
    "ln2.hook_out",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "ln2_post.hook_normalized",
    "hook_mlp_out",
    "hook_resid_post",
    "attn.hook_in",
    "mlp.hook_in",
    "ln1_post.hook_out",
    "ln2_post.hook_out",
)
"""Every block point that some architecture has, without ``blocks.{L}.``; the last four are aliases."""

MODEL_POINTS = ("hook_embed", "hook_pos_embed", "ln_final.hook_normalized", "ln_final.hook_out", "unembed")


@dataclass(frozen=True, kw_only=True)
class Part:
    """The output of a projection, or one part of a fused one: see `TapSite.columns` and `.interleave`."""

    path: str
    label: str = ""
    columns: Span | None = None
    interleave: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Where one architecture keeps the parts of a block. Paths are relative to the block."""

    attention: str
    q: Part
    k: Part
    v: Part
    out_proj: str  # W_O: its input is z
    mlp: str
    mlp_pre: Part
    mlp_pre_linear: Part | None
    mlp_out_proj: str  # W_out: its input is hook_post
    ln1: str | None
    ln2: str | None
    ln1_post: str | None = None
    ln2_post: str | None = None
    norm: NormKind = NormKind.RMS
    parallel: bool = False
    rotary: bool = True
    post_norm_note: str = ""


@dataclass(frozen=True, kw_only=True)
class StackLayout:
    """Where one architecture keeps its parts. Paths are relative to the causal language model."""

    base: str
    blocks: str
    embed: str
    final_norm: str
    head: str
    block: BlockLayout
    pos_embed: str | None = None
    direct: bool = False  # see FamilySpec
    embed_note: str = ""


def build_taps(stack: StackLayout, facts: ModelFacts) -> tuple[TapSite, ...]:
    """All taps of a model, in the order of the forward pass."""
    taps = [_flat("hook_embed", stack.embed, facts.d_model, kind="residual", note=stack.embed_note)]
    if stack.pos_embed is not None:
        taps.append(_flat("hook_pos_embed", stack.pos_embed, facts.d_model, kind="residual"))
    for layer in range(facts.n_layers):
        taps.extend(_block_taps(stack, facts, layer))
    norm, d_model = stack.final_norm, facts.d_model
    kind = stack.block.norm
    taps.append(_flat("ln_final.hook_normalized", norm, d_model, where="normalized", norm=kind))
    taps.append(_flat("ln_final.hook_out", norm, d_model, note="after the gain"))
    taps.append(
        _flat(
            "unembed", stack.head, facts.vocab_size, where="logits", note="logits before the final soft cap"
        )
    )
    return tuple(taps)


def absences(stack: StackLayout) -> dict[str, str]:
    """Point name without its prefix -> why this architecture has none and what to use instead."""
    block = stack.block
    absent: dict[str, str] = {}
    if block.parallel:
        absent["hook_resid_mid"] = (
            "attention and MLP run in parallel here, both from hook_resid_pre: "
            "use hook_resid_pre or hook_resid_post"
        )
    for ln, pre_norm, post_norm, reads, alias, added in (
        ("ln1", block.ln1, block.ln1_post, "hook_resid_pre", "attn.hook_in", "hook_attn_out"),
        ("ln2", block.ln2, block.ln2_post, "hook_resid_mid", "mlp.hook_in", "hook_mlp_out"),
    ):
        if pre_norm is None:
            why = f"this architecture normalises after attention and MLP, not before: use {reads}"
            absent[f"{ln}.hook_normalized"] = why + f" or {ln}_post.hook_normalized"
            absent[f"{ln}.hook_out"] = absent[alias] = why
        if post_norm is None:
            why = f"this architecture has no norm after attention and MLP: use {ln}.hook_normalized"
            absent[f"{ln}_post.hook_normalized"] = why
            absent[f"{ln}_post.hook_out"] = (
                f"this architecture has no norm after attention and MLP: use {added}"
            )
    if block.mlp_pre_linear is None:
        absent["mlp.hook_pre_linear"] = "this architecture's MLP has no gate: use mlp.hook_pre"
    if not block.rotary:
        absent["attn.hook_rot_q"] = "positions are not rotary here: use attn.hook_q"
        absent["attn.hook_rot_k"] = "positions are not rotary here: use attn.hook_k"
    if stack.pos_embed is None:
        absent["hook_pos_embed"] = "positions are not added to the stream here: use hook_embed"
    return absent


def _block_taps(stack: StackLayout, facts: ModelFacts, layer: int) -> Iterator[TapSite]:
    block, d_model = stack.block, facts.d_model
    root = f"{stack.blocks}.{layer}"
    name = f"blocks.{layer}."

    def at(path: str) -> str:
        return f"{root}.{path}"

    def stream(
        point: str, path: str, *, where: TapWhere = "output", alias: str = "", note: str = ""
    ) -> TapSite:
        aliases = (path,) if alias and alias != path else ()
        site = _flat(name + point, path, d_model, kind="residual", where=where, layer=layer, note=note)
        if not alias:
            return site
        return replace(site, aliases=aliases, point=replace(site.point, module_path=alias))

    def norm_taps(ln: str, path: str, alias: str) -> Iterator[TapSite]:
        point = f"{name}{ln}.hook_normalized"
        yield _flat(point, at(path), d_model, where="normalized", norm=block.norm, layer=layer)
        if alias:
            site = _flat(f"{name}{ln}.hook_out", at(path), d_model, layer=layer, note="after the gain")
            yield replace(site, aliases=(name + alias,))

    def heads(point: str, part: Part, n_heads: int) -> TapSite:
        return _heads(name + point, at(part.path), n_heads, facts.d_head, layer, part=part)

    yield stream("hook_resid_pre", root, where="input")
    if block.ln1 is not None:
        yield from norm_taps("ln1", block.ln1, "attn.hook_in")
    attention = at(block.attention)
    yield heads("attn.hook_q", block.q, facts.n_heads)
    yield heads("attn.hook_k", block.k, facts.n_kv_heads)
    yield heads("attn.hook_v", block.v, facts.n_kv_heads)
    if block.rotary:
        yield _heads(name + "attn.hook_rot_q", attention, facts.n_heads, facts.d_head, layer, where="rot_q")
        yield _heads(
            name + "attn.hook_rot_k", attention, facts.n_kv_heads, facts.d_head, layer, where="rot_k"
        )
    yield _map(name + "attn.hook_attn_scores", attention, facts.n_heads, layer, "scores")
    yield _map(name + "attn.hook_pattern", attention, facts.n_heads, layer, "pattern")
    yield _heads(name + "attn.hook_z", at(block.out_proj), facts.n_heads, facts.d_head, layer, where="input")
    if block.ln1_post is not None:
        yield from norm_taps("ln1_post", block.ln1_post, "")
        site = stream("hook_attn_out", at(block.ln1_post), note=_sandwich("attention", block))
        yield replace(site, aliases=(name + "ln1_post.hook_out",))
    else:
        yield stream("hook_attn_out", at(block.out_proj), alias=attention)
    mlp = at(block.mlp)
    if not block.parallel:
        yield stream("hook_resid_mid", mlp if block.ln2 is None else at(block.ln2), where="input")
    if block.ln2 is not None:
        yield from norm_taps("ln2", block.ln2, "mlp.hook_in")
    gate_note = "the gate's pre-activation" if block.mlp_pre_linear is not None else ""
    yield _part(name + "mlp.hook_pre", at(block.mlp_pre.path), facts.d_mlp, layer, block.mlp_pre, gate_note)
    if (up := block.mlp_pre_linear) is not None:
        yield _part(name + "mlp.hook_pre_linear", at(up.path), facts.d_mlp, layer, up, "the up projection")
    yield _flat(name + "mlp.hook_post", at(block.mlp_out_proj), facts.d_mlp, where="input", layer=layer)
    if block.ln2_post is not None:
        yield from norm_taps("ln2_post", block.ln2_post, "")
        site = stream("hook_mlp_out", at(block.ln2_post), note=_sandwich("MLP", block))
        yield replace(site, aliases=(name + "ln2_post.hook_out",))
    else:
        yield stream("hook_mlp_out", at(block.mlp_out_proj), alias=mlp)
    yield stream("hook_resid_post", root)


def _sandwich(what: str, block: BlockLayout) -> str:
    return (
        f"the {what}'s contribution after its post-norm, what is added to the stream" + block.post_norm_note
    )


def _path(path: str, where: TapWhere, label: str = "") -> str:
    """The module path reported beside a point: the bare path is the module's output."""
    suffix = label if where in ("output", "logits") else where
    return f"{path}:{suffix}" if suffix else path


def _flat(
    name: str,
    path: str,
    width: int,
    *,
    kind: HookPointKind = "flat",
    where: TapWhere = "output",
    norm: NormKind | None = None,
    layer: int | None = None,
    note: str = "",
) -> TapSite:
    point = HookPoint(
        name=name, module_path=_path(path, where), kind=kind, layer=layer, width=width, n_heads=0, d_head=0,
        readable=True, writable=True, note=note,
    )  # fmt: skip
    return TapSite(point=point, path=path, where=where, norm=norm)


def _part(name: str, path: str, width: int, layer: int, part: Part, note: str) -> TapSite:
    site = _flat(name, path, width, layer=layer, note=note)
    point = replace(site.point, module_path=_path(path, "output", part.label))
    return replace(site, point=point, columns=part.columns, interleave=part.interleave)


def _heads(
    name: str, path: str, n_heads: int, d_head: int, layer: int, *, where: TapWhere = "output",
    part: Part | None = None,
) -> TapSite:  # fmt: skip
    label = part.label if part is not None else ""
    point = HookPoint(
        name=name, module_path=_path(path, where, label), kind="heads", layer=layer, width=n_heads * d_head,
        n_heads=n_heads, d_head=d_head, readable=True, writable=True,
    )  # fmt: skip
    columns, interleave = (part.columns, part.interleave) if part is not None else (None, None)
    return TapSite(point=point, path=path, where=where, columns=columns, interleave=interleave)


def _map(name: str, path: str, n_heads: int, layer: int, where: TapWhere) -> TapSite:
    point = HookPoint(
        name=name, module_path=_path(path, where), kind="attention", layer=layer, width=0, n_heads=n_heads,
        d_head=0, readable=True, writable=False,
    )  # fmt: skip
    return TapSite(point=point, path=path, where=where)
