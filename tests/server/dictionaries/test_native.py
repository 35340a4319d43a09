"""Our own format: every architecture and kind written, opened again and equal; nothing copied on opening."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.server.dictionaries import reference as ref
from tests.server.dictionaries.layouts import D, Draw, F, N
from torch import Tensor

from glasshouse.server.dictionaries.formats.glasshouse import Recipe, read_card, save_dictionary
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.dictionaries.open import open_dictionary
from glasshouse.server.types.errors import FailedPrecondition

HOOK = ("blocks.2.hook_resid_post",)


def tensors(seed: int, **more: Tensor) -> dict[str, Tensor]:
    draw = Draw(seed)
    basic = {"W_enc": draw(F, D, scale=0.3), "W_dec": draw(F, D, scale=0.3), "b_enc": draw(F, scale=0.2)}
    return {**basic, "b_dec": draw(D), **more}


def threshold() -> Tensor:
    return Draw(9)(F).abs()


def gates() -> dict[str, Tensor]:
    draw = Draw(10)
    return {name: draw(F, scale=0.3) for name in ("b_gate", "b_mag", "r_mag")}


RULES = {
    "standard": ({}, {}, ref.relu),
    "jumprelu": ({"threshold": threshold()}, {}, lambda h: ref.jumprelu(h, threshold().double())),
    "gated": (gates(), {}, lambda z: ref.gated(z, *ref.f64(*gates().values()))),
    "topk": ({}, {"k": 5}, lambda h: ref.topk(h, 5)),
    "batchtopk": ({}, {"k": 5, "threshold": 0.6}, lambda h: ref.jumprelu(h, 0.6)),
    "groupmax": ({}, {"k": 10}, lambda h: ref.groupmax(h, 10)),
    "abstopk": ({}, {"k": 5}, lambda h: ref.abstopk(h, 5)),
}


@pytest.mark.parametrize("architecture", list(RULES))
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_every_architecture_comes_back(kind: str, architecture: str, tmp_path: Path) -> None:
    extra, settings, rule = RULES[architecture]
    saved = tensors(1, **extra)
    if architecture == "gated":
        del saved["b_enc"]
    if kind == "transcoder":
        saved["W_skip"] = Draw(3)(D, D)
    recipe = Recipe(
        kind=kind,
        architecture=architecture,
        hook_points_in=HOOK,
        hook_points_out=HOOK if kind == "sae" else ("blocks.2.hook_mlp_out",),
        tensors=saved,
        apply_b_dec_to_input=True,
        model_name="fable",
        card={"l0": 12.5},
        **settings,
    )
    save_dictionary(recipe, tmp_path / "d")
    dictionary = open_dictionary("native", tmp_path / "d")
    x = Draw(4)(N, D)
    d = {name: tensor.double() for name, tensor in saved.items()}
    inside = x.double() - (d["b_dec"] if kind == "sae" else 0)
    f = rule(inside @ d["W_enc"].T + d.get("b_enc", torch.zeros(())))
    y = f @ d["W_dec"] + d["b_dec"] + (x.double() @ d["W_skip"] if kind == "transcoder" else 0)
    ref.close(dictionary.encode(x).to_dense(), f)
    ref.close(dictionary.reconstruct(x), y)
    assert (dictionary.facts.kind, dictionary.facts.architecture) == (kind, architecture)
    assert dictionary.facts.model_name == "fable" and read_card(tmp_path / "d") == {"l0": 12.5}


def test_tensors_of_one_memory_are_saved_apart(tmp_path: Path) -> None:
    tied = Draw(6)(F, D)
    recipe = Recipe(
        kind="sae",
        architecture="standard",
        hook_points_in=HOOK,
        hook_points_out=HOOK,
        tensors={
            "W_enc": tied,
            "W_dec": tied,
            "b_enc": torch.zeros(1).expand(F),
            "b_dec": torch.zeros(D),
        },
    )
    save_dictionary(recipe, tmp_path / "d")
    dictionary = open_dictionary("native", tmp_path / "d")
    x = Draw(7)(N, D)
    ref.close(dictionary.reconstruct(x), torch.relu(x.double() @ tied.double().T) @ tied.double())


def test_crosscoder_and_cross_layer_transcoder_come_back(tmp_path: Path) -> None:
    draw, n = Draw(5), 3
    hooks = tuple(f"blocks.{i}.hook_resid_post" for i in range(n))
    cross = {"W_enc": draw(F, n, D), "W_dec": draw(F, n, D), "b_enc": draw(F), "b_dec": draw(n, D)}
    recipe = Recipe(
        kind="crosscoder", architecture="standard", hook_points_in=hooks, hook_points_out=hooks, tensors=cross
    )
    save_dictionary(recipe, tmp_path / "cross")
    x = draw(N, n, D)
    d = {name: tensor.double() for name, tensor in cross.items()}
    f = ref.relu(torch.einsum("nsd,fsd->nf", x.double(), d["W_enc"]) + d["b_enc"])
    crosscoder = open_dictionary("c", tmp_path / "cross")
    ref.close(crosscoder.encode(x).to_dense(), f)
    ref.close(crosscoder.reconstruct(x), torch.einsum("nf,fsd->nsd", f, d["W_dec"]) + d["b_dec"])

    layers = {f"W_enc.{i}": draw(F, D) for i in range(n)} | {f"b_enc.{i}": draw(F) for i in range(n)}
    layers |= {f"W_dec.{i}": draw(F, n - i, D) for i in range(n)}
    layers |= {"b_dec": draw(n, D), "threshold": draw(n * F).abs()}
    outs = tuple(f"blocks.{i}.hook_mlp_out" for i in range(n))
    recipe = Recipe(
        kind="cross_layer_transcoder",
        architecture="jumprelu",
        hook_points_in=hooks,
        hook_points_out=outs,
        tensors=layers,
    )
    save_dictionary(recipe, tmp_path / "clt")
    clt = open_dictionary("clt", tmp_path / "clt")
    d = {name: tensor.double() for name, tensor in layers.items()}
    h = torch.cat([x[:, i].double() @ d[f"W_enc.{i}"].T + d[f"b_enc.{i}"] for i in range(n)], 1)
    f = ref.jumprelu(h, d["threshold"])
    y = d["b_dec"].expand(N, n, D).clone()
    for i in range(n):
        y[:, i:] += torch.einsum("nf,fjd->njd", f[:, i * F : (i + 1) * F], d[f"W_dec.{i}"])
    ref.close(clt.encode(x).to_dense(), f)
    ref.close(clt.reconstruct(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stay_mapped_and_in_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = {name: tensor.to(dtype) for name, tensor in tensors(6).items()}
    recipe = Recipe(
        kind="sae",
        architecture="standard",
        hook_points_in=HOOK,
        hook_points_out=HOOK,
        tensors=saved,
        tied=True,
    )
    save_dictionary(recipe, tmp_path)
    dictionary = open_dictionary("d", tmp_path)
    assert isinstance(dictionary, LinearDictionary)
    encoder, decoder = dictionary.parameters.encoders[0].W_enc, dictionary.parameters.decoders[0].W_dec
    assert encoder.dtype == decoder.dtype == dtype
    assert encoder.data_ptr() == decoder.data_ptr(), "tied: one mapping, two views"
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert any(
        int(line.split("-")[0], 16) <= encoder.data_ptr() < int(line.split("-")[1].split()[0], 16)
        for line in mapped
    )


def test_a_recipe_that_disagrees_is_refused_before_writing(tmp_path: Path) -> None:
    saved = tensors(7)
    saved["b_enc"] = saved["b_enc"][:-1]
    recipe = Recipe(
        kind="sae", architecture="standard", hook_points_in=HOOK, hook_points_out=HOOK, tensors=saved
    )
    with pytest.raises(FailedPrecondition, match="encoder bias"):
        save_dictionary(recipe, tmp_path / "d")
    assert not (tmp_path / "d").exists()
