"""The end of a model, from the residual stream to the logits: what directions add, and its weights read alone.

An outlined model has no weights in this process. `materialise_head` reads those of its final norm and output embedding, a
few tensors of the checkpoint, so that questions about the head need no engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.server.models.families.norms import NormKind, regain
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.wire import reasons

_INDEX = "model.safetensors.index.json"
# Heads that checkpoints name otherwise than the modules are named: GPT-NeoX'.
_HEADS = ("embed_out.weight",)


@torch.inference_mode()
def token_contributions(loaded: LoadedModel, directions: Tensor) -> Tensor:
    """What directions (n, d_model) in the residual stream add to the logits, (n, vocab) float32 on the host: through the
    final norm's gain and the unembedding, the norm's scale left out, uncapped.

    Raises:
        FailedPrecondition: the model's final norm is not known.
    """
    family, module = loaded.family, loaded.model
    if family.norm is None or family.norm_kind is None:
        raise FailedPrecondition(
            f"the final norm of a {family.name} model is not known here",
            reason=reasons.CAPABILITY_MISSING,
            remedy="use a model of a supported family",
        )
    norm = module.get_submodule(family.norm)
    weight = next(norm.parameters())
    rows = directions.to(weight.device, weight.dtype)
    if family.norm_kind is NormKind.LAYER:
        rows = rows - rows.mean(dim=-1, keepdim=True)
    # Without the gain's and the head's constant parts, which no direction brings about.
    nothing = family.unembed(module, regain(family.norm_kind, norm, torch.zeros_like(rows[:1])))[0]
    logits = family.unembed(module, regain(family.norm_kind, norm, rows))[0] - nothing
    return logits.float().cpu()


def materialise_head(outlined: LoadedModel) -> None:
    """Reads the weights of an outlined model's final norm and output embedding, in place, onto the host.

    Raises:
        FailedPrecondition: the final norm is not known, or the checkpoint does not name the tensors as its modules do.
    """
    family, model = outlined.family, outlined.model
    if family.norm is None:
        return
    for path in (family.norm, family.head):
        module = model.get_submodule(path)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = _read(outlined, f"{path}.{name}").to(parameter.dtype)
                setattr(module, name, nn.Parameter(value, requires_grad=False))


def _read(outlined: LoadedModel, name: str) -> Tensor:
    """One tensor of the checkpoint; the input embedding where the output embedding is tied to it."""
    from safetensors import safe_open

    folder = _folder(outlined.source)
    files = _files(folder)
    for wanted in _names(outlined, name):
        for file, keys in files.items():
            # A checkpoint may leave out or add the first part of the path.
            key = next(
                (k for k in keys if k == wanted or wanted.endswith("." + k) or k.endswith("." + wanted)), None
            )
            if key is not None:
                with safe_open(folder / file, framework="pt") as tensors:
                    value: Tensor = tensors.get_tensor(key)
                return value
    raise FailedPrecondition(
        f"the checkpoint has no tensor {name}",
        reason=reasons.CAPABILITY_MISSING,
        field="model",
        value=outlined.source,
        remedy="serve the model with the transformers engine for what needs its head",
    )


def _names(outlined: LoadedModel, name: str) -> list[str]:
    """What a checkpoint may call a tensor of ours."""
    if name != f"{outlined.family.head}.weight":
        return [name]
    model: Any = outlined.model
    if not model.config.get_text_config().tie_word_embeddings:
        return [name, *_HEADS]
    embedding = model.get_input_embeddings()
    return [name, next(f"{path}.weight" for path, module in model.named_modules() if module is embedding)]


def _files(folder: Path) -> dict[str, list[str]]:
    """The checkpoint's files with the names of their tensors."""
    from safetensors import safe_open

    index = folder / _INDEX
    if index.is_file():
        files: dict[str, list[str]] = {}
        for key, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(file, []).append(key)
        return files
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            found[path.name] = list(tensors.keys())
    return found


def _folder(source: str) -> Path:
    """The checkpoint's folder; a hub id's is in the cache, where the engine has put it."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.safetensors", _INDEX]))
