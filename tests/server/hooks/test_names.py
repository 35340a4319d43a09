"""Names that callers get wrong: which error, with which words."""

from __future__ import annotations

from typing import Any

import pytest

from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument, NotFound
from glasshouse.wire import reasons

PRE_NORM = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "gpt_neox_sequential"}


def test_unknown_name(tiny: Any) -> None:
    with pytest.raises(NotFound) as caught:
        tiny.table.resolve("blocks.1.hook_resid_pots", field="readouts[0].hook_point")
    error = caught.value
    assert error.reason == reasons.HOOK_POINT_NOT_FOUND
    assert (error.field, error.resource_name) == ("readouts[0].hook_point", "blocks.1.hook_resid_pots")
    assert error.closest[0] == "blocks.1.hook_resid_post"
    assert "blocks.1.hook_resid_post" in error.message


@pytest.mark.parametrize(
    "name", ["", "blocks", "blocks.x.hook_z", "blocks.-1.hook_resid_post", "blocks.1.attn"]
)
def test_malformed_names_are_not_found(tiny: Any, name: str) -> None:
    with pytest.raises(NotFound):
        tiny.table.resolve(name)


def test_layer_out_of_range(tiny: Any) -> None:
    last = tiny.table.resolve("blocks.2.hook_resid_post").module_path
    for name in ("blocks.3.hook_resid_post", "blocks.99.attn.hook_z", last.replace("2", "3")):
        with pytest.raises(InvalidArgument, match="layers 0 to 2") as caught:
            tiny.table.resolve(name)
        assert caught.value.reason == reasons.LAYER_OUT_OF_RANGE
        assert caught.value.field == "hook_point"
        assert caught.value.metadata == {"n_layers": "3"}


def absent(tiny: Any, name: str) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        tiny.table.resolve(name)
    assert caught.value.reason == reasons.HOOK_POINT_ABSENT
    assert tiny.table.loaded.family.name in caught.value.message
    assert caught.value.remedy.startswith("Use ")
    return caught.value


def test_points_of_other_architectures(tiny: Any) -> None:
    if tiny.arch == "gpt_neox":
        error = absent(tiny, "blocks.1.hook_resid_mid")
        assert "in parallel" in error.message
        assert "hook_resid_pre" in error.remedy
    else:
        assert tiny.table.resolve("blocks.1.hook_resid_mid").kind == "residual"
    if tiny.arch == "olmo2":
        assert "hook_resid_pre" in absent(tiny, "blocks.0.ln1.hook_normalized").remedy
        assert "hook_resid_mid" in absent(tiny, "blocks.0.mlp.hook_in").remedy
        assert "TransformerLens" in tiny.table.resolve("blocks.0.hook_attn_out").note
    if tiny.arch in PRE_NORM:
        assert "ln1.hook_normalized" in absent(tiny, "blocks.0.ln1_post.hook_normalized").remedy
        absent(tiny, "blocks.0.ln2_post.hook_out")
    if tiny.arch in {"gpt2", "gpt_neox", "gpt_neox_sequential"}:
        assert "no gate" in absent(tiny, "blocks.0.mlp.hook_pre_linear").message
    if tiny.arch == "gpt2":
        assert "hook_q" in absent(tiny, "blocks.0.attn.hook_rot_q").remedy
        assert tiny.table.resolve("hook_pos_embed").module_path == "transformer.wpe"
    else:
        assert "hook_embed" in absent(tiny, "hook_pos_embed").remedy


def test_absence_wins_over_a_layer_out_of_range(tiny: Any) -> None:
    if tiny.arch == "gpt_neox":
        absent(tiny, "blocks.77.hook_resid_mid")


def test_canonical_names(tiny: Any) -> None:
    """The surface: what every architecture has under these names."""
    names = {point.name for point in tiny.table.points}
    always = {"hook_embed", "ln_final.hook_normalized", "ln_final.hook_out", "unembed"} | {
        f"blocks.{layer}.{point}"
        for layer in range(3)
        for point in (
            "hook_resid_pre", "hook_resid_post", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z",
            "attn.hook_attn_scores", "attn.hook_pattern", "hook_attn_out", "mlp.hook_pre", "mlp.hook_post",
            "hook_mlp_out",
        )
    }  # fmt: skip
    assert always <= names
