"""What loads, with which facts, and what is refused in which words."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.server.hooks.table import HookTable
from glasshouse.server.models.loading import load_model
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.wire import reasons

MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loading a folder must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def change_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(source: Path | str, match: str, **options: Any) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition, match=match) as caught:
        load_model(source, **options)
    assert caught.value.reason == reasons.MODEL_NOT_SUPPORTED
    assert caught.value.remedy
    return caught.value


def test_facts(make_folder: MakeFolder) -> None:
    loaded = load_model(make_folder("llama", num_key_value_heads=2))
    assert loaded.name == "tiny-llama"
    assert (loaded.n_layers, loaded.d_model, loaded.n_heads, loaded.n_kv_heads) == (2, 32, 4, 2)
    assert (loaded.d_head, loaded.d_mlp, loaded.vocab_size, loaded.context_length) == (8, 48, 331, 64)
    assert loaded.eos_token_ids == (2, 5)
    assert loaded.bos_token_id == 1
    assert loaded.special_token_ids == {0, 1, 2}
    assert loaded.dtype == torch.float32  # auto, on a CPU
    assert loaded.device == torch.device("cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.encode("a")[0] == 1
    assert load_model(make_folder("llama"), name="fable").name == "fable"


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bf16", torch.bfloat16), ("float32", torch.float32), ("fp16", torch.float16)]
)
def test_dtype(make_folder: MakeFolder, dtype: str, expected: torch.dtype) -> None:
    assert load_model(make_folder(), dtype=dtype).dtype == expected


@pytest.mark.parametrize(
    "option", [{"dtype": "int4"}, {"device": "tpu"}, {"device": "cuda:99"}, {"device": "cpu:x"}]
)
def test_options_out_of_range(make_folder: MakeFolder, option: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_model(make_folder(), **option)  # type: ignore[arg-type]
    assert caught.value.field == next(iter(option))
    assert next(iter(option.values())) in caught.value.message


def test_the_loaded_weights_are_the_saved_ones(make_folder: MakeFolder) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_folder("qwen2", num_key_value_heads=2)
    loaded = load_model(folder)
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        hidden = loaded.family.forward_hidden(loaded.model, ids, torch.arange(9)[None])
        ours = loaded.family.unembed(loaded.model, hidden[0])[1]
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        torch.testing.assert_close(ours, plain(ids).logits[0], rtol=1e-4, atol=1e-5)


def test_pickled_weights_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    error = refused(folder, "pytorch_model.bin")
    assert "save_pretrained" in error.remedy


def test_missing_parts_are_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no model folder")
    refused("./nowhere", "no model folder")
    refused(tmp_path, "no config.json")
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    refused(folder, r"no \*.safetensors")


def test_a_broken_file_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    refused(folder, "weights")
    (folder / "config.json").write_text("{")
    refused(folder, "configuration")


def test_weights_of_another_shape_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    change_config(folder, intermediate_size=64)
    refused(folder, "weights")


def test_missing_weights_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    change_config(folder, num_hidden_layers=3)
    assert "model.layers.2" in refused(folder, "lack 9 tensors").message


def test_remote_code_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert "remote code" in refused(folder, "auto_map").remedy


def test_a_model_without_tokenizer_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    for path in folder.glob("*token*"):
        path.unlink()
    refused(folder, "tokenizer")


def test_an_unlisted_family_that_reproduces_itself_is_served_without_points(make_folder: MakeFolder) -> None:
    loaded = load_model(make_folder("stablelm", num_key_value_heads=2))
    assert loaded.family.name == "stablelm"
    table = HookTable(loaded)
    assert table.points == ()
    with pytest.raises(FailedPrecondition, match="without hook points") as caught:
        table.resolve("blocks.0.hook_resid_post")
    assert caught.value.reason == reasons.HOOK_POINT_ABSENT
    with pytest.raises(FailedPrecondition) as lens:
        loaded.family.final_norm(loaded.model, torch.zeros(1, 32))
    assert lens.value.reason == reasons.CAPABILITY_MISSING


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        # Attention sinks; logits scaled after the head; positions as biases; a state space.
        ("gpt_oss", {"head_dim": 8, "num_key_value_heads": 2, "num_local_experts": 2}),
        ("cohere", {"logit_scale": 0.5}),
        ("bloom", {"n_head": 4, "n_layer": 2}),
        ("mamba", {"state_size": 4}),
    ],
)
def test_an_unlisted_family_that_does_not_is_refused(
    make_folder: MakeFolder, model_type: str, settings: dict[str, Any]
) -> None:
    error = refused(make_folder(model_type, **settings), model_type)
    assert "llama" in error.remedy
    assert "gpt_neox" in error.remedy


def test_an_encoder_decoder_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    change_config(folder, model_type="t5", is_encoder_decoder=True)
    refused(folder, "encoder-decoder")


def test_context_stops_where_rotary_would_change_with_the_batch(make_folder: MakeFolder) -> None:
    rope = {
        "rope_type": "dynamic",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    }
    assert load_model(make_folder("llama", rope_parameters=rope)).context_length == 32


def test_the_text_model_of_a_multimodal_gemma3(make_folder: MakeFolder, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, Gemma3Config

    text = {
        "vocab_size": 331, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    folder = make_folder()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    loaded = load_model(folder)
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        hidden = loaded.family.forward_hidden(loaded.model, ids, torch.arange(9)[None])
        ours = loaded.family.unembed(loaded.model, hidden[0])[1]
        torch.testing.assert_close(ours, model(input_ids=ids).logits[0], rtol=1e-4, atol=1e-5)
    point = HookTable(loaded).resolve("blocks.1.hook_resid_post")
    assert point.module_path == "model.language_model.layers.1"
