"""Files that must be refused, each with the file, what was expected, what was found and the remedy; never
run.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.server.dictionaries.layouts import CASES, D, F

from glasshouse.server.dictionaries import hub
from glasshouse.server.dictionaries.open import estimate_bytes, open_dictionary
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from glasshouse.wire import reasons


def refused(path: Path | str, *words: str) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        open_dictionary("d", path)
    error = caught.value
    assert error.reason == reasons.DICTIONARY_MALFORMED
    assert error.remedy and str(path).split("?")[0].rsplit("/", 1)[-1] in error.message
    for word in words:
        assert word in error.message, (word, error.message)
    return error


@pytest.fixture
def saelens(tmp_path: Path) -> Path:
    CASES["saelens new"](tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    _saved(tensors, folder).replace(path)


def _saved(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "next")
    return folder / "next"


def test_missing_tensor(saelens: Path) -> None:
    rewrite(saelens, b_enc=None)
    refused(saelens, "sae_weights.safetensors", "no tensor b_enc")


def test_wrong_shape(saelens: Path) -> None:
    rewrite(saelens, W_dec=torch.zeros(F, D + 1))
    refused(saelens, "W_dec", str((F, D + 1)), str((F, D)))


def test_surprising_dtype(saelens: Path) -> None:
    rewrite(saelens, W_dec=torch.zeros(F, D, dtype=torch.int8))
    refused(saelens, "W_dec", "int8", "bfloat16")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_weights(saelens: Path, value: float) -> None:
    weights = torch.zeros(D, F)
    weights[3, 4] = value
    rewrite(saelens, W_enc=weights)
    refused(saelens, "W_enc", "NaN")


def test_truncated_safetensors(saelens: Path) -> None:
    path = saelens / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(saelens, "sae_weights.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize(
    "header", [b"", b"\xff" * 8, (2**62).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"{"]
)
def test_hostile_safetensors_header(saelens: Path, header: bytes) -> None:
    (saelens / "sae_weights.safetensors").write_bytes(header)
    refused(saelens, "sae_weights.safetensors")


@pytest.mark.parametrize("text", ["{", "[1, 2]", "[" * 100_000, "\xff"])
def test_hostile_config(saelens: Path, text: str) -> None:
    (saelens / "cfg.json").write_text(text, encoding="latin-1")
    refused(saelens, "cfg.json")


def test_config_of_the_wrong_type(saelens: Path) -> None:
    config = json.loads((saelens / "cfg.json").read_text())
    (saelens / "cfg.json").write_text(json.dumps({**config, "d_in": "many"}))
    refused(saelens, "d_in", "many")
    (saelens / "cfg.json").write_text(json.dumps({**config, "architecture": "matching_pursuit"}))
    refused(saelens, "matching_pursuit")


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_never_run(zipped: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / "Llama-SAE-l19.pth"
    state = {"encoder_linear.weight": torch.zeros(F, D), "extra": Bomb(mark)}
    if zipped:
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state, protocol=2))
    error = refused(path)
    assert "safetensors" in error.remedy
    assert not mark.exists()


def test_truncated_pickle_and_not_a_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "7.pt"
    torch.save({"pre_bias": torch.zeros(D)}, path)
    path.write_bytes(path.read_bytes()[:-64])
    refused(path)
    torch.save([torch.zeros(D)], path)
    refused(path, "list")


def test_legacy_pickle_still_loads(tmp_path: Path) -> None:
    case = CASES["goodfire"](tmp_path)
    state = torch.load(case.path, weights_only=True)
    torch.save(state, case.path, _use_new_zipfile_serialization=False)
    assert open_dictionary("d", case.path).facts.d_sae == F


def test_npz_with_objects(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res/layer_5/width_16k/average_l0_71"
    CASES["gemma scope 1"](tmp_path)
    import numpy as np

    np.savez(folder / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    refused(folder, "params.npz", "Python objects")
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00")
    refused(folder, "params.npz")


def test_unknown_format_and_empty_folder(tmp_path: Path) -> None:
    save_file({"something": torch.zeros(2)}, tmp_path / "model.safetensors")
    refused(tmp_path, "no known format", "something")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no weight files")
    with pytest.raises(NotFound, match="no such file"):
        open_dictionary("d", tmp_path / "nowhere")


def test_missing_layer_of_a_set_over_layers(tmp_path: Path) -> None:
    case = CASES["gemma scope 2 clt"](tmp_path)
    (case.path / "params_layer_10.safetensors").rename(case.path / "params_layer_12.safetensors")
    refused(case.path, "params_layer_10.safetensors missing")


def test_unfolded_norm_says_what_to_do(tmp_path: Path) -> None:
    error = refused(CASES["saelens unfolded norm"](tmp_path).path, "factor is not on disk")
    assert "average_norm" in error.remedy


def test_hook_point_that_no_file_names(tmp_path: Path) -> None:
    error = refused(CASES["openai topk"](tmp_path).path, "which hook point")
    assert "hook_point=" in error.remedy
    (tmp_path / "glasshouse.json").write_text('{"hook_point": "blocks.1.hook_resid_post"}')
    assert open_dictionary("d", tmp_path / "7.pt").facts.hook_points_in == ("blocks.1.hook_resid_post",)
    refused(f"{tmp_path / '7.pt'}?hookpoint=x", "unknown setting hookpoint")


def test_budget_is_checked_before_loading(saelens: Path) -> None:
    size = (saelens / "sae_weights.safetensors").stat().st_size
    assert estimate_bytes(saelens) == size
    (saelens / "cfg.json").write_text("{")  # never reached
    with pytest.raises(ResourceExhausted) as caught:
        open_dictionary("d", saelens, budget_bytes=size - 1)
    assert caught.value.reason == reasons.MEMORY_BUDGET
    assert caught.value.metadata == {"needed_bytes": str(size), "budget_bytes": str(size - 1)}


def test_hub_ids() -> None:
    assert hub.parse("hf:org/repo/sub/folder@v1") == hub.HubId("org/repo", "sub/folder", "v1")
    assert hub.parse("hf:org/repo") == hub.HubId("org/repo", "", None)
    with pytest.raises(InvalidArgument, match="not a hub id"):
        hub.parse("hf:org")
