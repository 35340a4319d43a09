"""Loading a model: a folder or a hub id in, a `LoadedModel` out, or a refusal that says what to do.

1. The configuration is read first, and refused by name where the checkpoint needs remote code, an attention
   we do not compute, or an architecture we cannot check.
2. Weights come from safetensors only, in the wanted dtype, with our attention function built in.
3. Every attention module gets its site. A family without a naming table is admitted, without hook points,
   only if it reproduces its own eager logits through our attention (`self_test`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glasshouse.server.models import attention
from glasshouse.server.models.families import SUPPORTED, FamilySpec, ModelFacts, family_spec, unknown_family
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.models.self_test import reproduces_eager
from glasshouse.server.models.tokenizer import TextCodec
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.wire import reasons

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
# Rotary kinds whose frequencies change with the longest sequence of a batch: served up to where they do not.
_LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")


def load_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    allow_remote_code: bool = False,
    name: str | None = None,
) -> LoadedModel:
    """Load a causal language model from a folder (never touching the network) or a hub id.

    `dtype`: auto, fp32, float32, bf16, bfloat16, fp16 or float16. ``auto`` is float32 on a CPU, where half
    precision is slower and rounds what is read, and the checkpoint's own dtype on a GPU. `device`: auto, cpu,
    cuda or cuda:N. `name` is the served name; by default the folder's or repository's own.
    """
    torch_device = _device(device)
    located, config, options = _read_config(source, revision, allow_remote_code)
    model = _load_weights(located, config, _dtype(dtype, torch_device), options)
    model.eval().requires_grad_(False).to(torch_device)
    tokenizer = _load_tokenizer(located, options)
    return wrap_model(model, tokenizer, name=name or _name_of(located), source=located)


def outline_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    allow_remote_code: bool = False,
    name: str | None = None,
) -> LoadedModel:
    """What `load_model` returns, without the weights: every fact, the tokenizer and the naming table, and a module on
    torch's meta device that computes nothing. For engines that run the model elsewhere, on `device`.

    `dtype` as in `load_model`, "auto" by `device`. A model of no known family is taken as it is, without hook points.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    located, config, options = _read_config(source, revision, allow_remote_code)
    wanted = _dtype(dtype, torch.device(device))
    if isinstance(wanted, str):
        wanted = getattr(config.get_text_config(), "dtype", None) or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=wanted, attn_implementation="eager", trust_remote_code=allow_remote_code
        )
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(located, **options)
    facts = _facts(model, config.get_text_config())
    family = family_spec(config, facts) or unknown_family(model, config)
    if family is None:
        raise _unsupported(f"{config.model_type!r} is not laid out as transformers' own models are")
    tokenizer = _load_tokenizer(located, options)
    outlined = _loaded(
        model,
        tokenizer,
        family,
        attention.AttentionSwitch(),
        facts,
        name=name or _name_of(located),
        source=located,
    )
    return replace(outlined, device=torch.device(device))


def wrap_model(model: nn.Module, tokenizer: Any, *, name: str, source: str = "") -> LoadedModel:
    """Make a served model of a Hugging Face model and tokenizer already in memory.

    Puts the model in eval mode, takes gradients off its parameters and replaces its attention.
    """
    attention.register()
    config: Any = model.config
    text_config = config.get_text_config()
    facts = _facts(model, text_config)
    model.eval().requires_grad_(False)
    switch = attention.AttentionSwitch()
    family = family_spec(config, facts)
    if family is not None:
        _text_model(model, family).set_attn_implementation(attention.IMPLEMENTATION)  # type: ignore[operator]
        for layer, module in enumerate(family.attention_modules(model)):
            attention.install(module, switch, layer)
    else:
        family = _admit_unknown(model, config, switch)
    return _loaded(model, tokenizer, family, switch, facts, name=name, source=source)


def _loaded(
    model: nn.Module,
    tokenizer: Any,
    family: FamilySpec,
    switch: attention.AttentionSwitch,
    facts: ModelFacts,
    *,
    name: str,
    source: str,
) -> LoadedModel:
    config: Any = model.config
    text_config = config.get_text_config()
    parameter = next(model.parameters())
    return LoadedModel(
        name=name,
        source=source,
        model=model,
        tokenizer=TextCodec(tokenizer),
        family=family,
        attention=switch,
        n_layers=facts.n_layers,
        d_model=facts.d_model,
        n_heads=facts.n_heads,
        n_kv_heads=facts.n_kv_heads,
        d_head=facts.d_head,
        d_mlp=facts.d_mlp,
        vocab_size=facts.vocab_size,
        context_length=_context_length(text_config),
        dtype=parameter.dtype,
        device=parameter.device,
        eos_token_ids=_eos_token_ids(model, tokenizer),
        bos_token_id=_first(
            getattr(tokenizer, "bos_token_id", None), getattr(text_config, "bos_token_id", None)
        ),
        special_token_ids=frozenset(int(i) for i in getattr(tokenizer, "all_special_ids", ())),
    )


def _read_config(
    source: str | Path, revision: str | None, allow_remote_code: bool
) -> tuple[str, Any, dict[str, Any]]:
    """Where the model is, its configuration checked, and the options that all of its files are read with."""
    from transformers import AutoConfig

    where = Path(source).expanduser()
    is_folder = where.is_dir()
    located = str(where) if is_folder else str(source)
    if not is_folder and (isinstance(source, Path) or located.startswith((".", "/", "~"))):
        raise _unsupported(f"There is no model folder {located!r}", "Give an existing folder or a hub id.")
    if is_folder:
        _check_folder(where)
    options: dict[str, Any] = {
        "revision": revision,
        "local_files_only": is_folder,
        "trust_remote_code": allow_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(located, **options)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise _remote_code(located) from error
        raise _unsupported(
            f"The configuration of {located!r} cannot be read: {_first_line(error)}"
        ) from error
    if getattr(config, "auto_map", None) and not allow_remote_code:
        raise _remote_code(located)
    text_config = config.get_text_config()
    _check_config(config, text_config)
    return located, config, options


def _name_of(located: str) -> str:
    where = Path(located)
    return where.resolve().name if where.is_dir() else located.rsplit("/", 1)[-1]


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise _unsupported(
            f"The folder {str(folder)!r} has no config.json", "Give a Hugging Face model folder."
        )
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
    if pickled:
        raise _unsupported(
            f"The folder {str(folder)!r} holds its weights as {pickled[0]}, a pickle that could run code",
            "Convert it once, where you trust it: load it with transformers and save_pretrained it again.",
        )
    raise _unsupported(
        f"The folder {str(folder)!r} holds no *.safetensors weights", "Add the model's weights."
    )


def _check_config(config: Any, text_config: Any) -> None:
    """Refuse, before the weights are read, what would be computed wrongly."""
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(f"{config.model_type!r} is an encoder-decoder, not a causal language model")
    if config.model_type in SUPPORTED:
        return
    if text_config is not config:
        raise _unsupported(f"{config.model_type!r} wraps its language model in a multimodal one")
    if getattr(text_config, "attention_chunk_size", None):
        raise _unsupported(f"{config.model_type!r} attends in chunks")
    others = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise _unsupported(f"{config.model_type!r} has layers of the kinds {', '.join(sorted(others))}")


def _load_weights(located: str, config: Any, dtype: torch.dtype | str, options: dict[str, Any]) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with _no_progress_bar():
            model, info = AutoModelForCausalLM.from_pretrained(
                located,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="eager",
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unsupported(f"The weights of {located!r} cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):  # transformers would serve them at random
        raise _unsupported(
            f"The weights of {located!r} lack {len(missing)} tensors, first {missing[0]!r}",
            "Give the folder the weights that its config.json describes.",
        )
    assert isinstance(model, nn.Module)
    return model


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one on standard error, in the middle of the logs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_tokenizer(located: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(located, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unsupported(f"The tokenizer of {located!r} cannot be loaded: {_first_line(error)}") from error


def _text_model(model: nn.Module, family: FamilySpec) -> nn.Module:
    """The module whose attention is replaced: the model, or the language model inside a multimodal one."""
    return model if family.base.count(".") == 0 else model.get_submodule(family.base)


def _admit_unknown(model: nn.Module, config: Any, switch: attention.AttentionSwitch) -> FamilySpec:
    family = unknown_family(model, config)
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    for module in modules:
        attention.install(module, switch, module.layer_idx)  # type: ignore[arg-type]
    if family is not None and reproduces_eager(model, family, switch):
        return family
    raise _unsupported(f"{config.model_type!r} does not reproduce its own logits through our attention")


def _facts(model: nn.Module, config: Any) -> ModelFacts:
    n_heads = int(config.num_attention_heads)
    d_model = int(config.hidden_size)
    head = model.get_output_embeddings()  # type: ignore[operator]
    vocab_size = int(config.vocab_size if head is None else head.weight.shape[0])
    d_mlp = _first(getattr(config, "intermediate_size", None), getattr(config, "n_inner", None), 4 * d_model)
    assert d_mlp is not None
    return ModelFacts(
        n_layers=int(config.num_hidden_layers),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        d_head=int(getattr(config, "head_dim", None) or d_model // n_heads),
        d_mlp=d_mlp,
        vocab_size=vocab_size,
    )


def _context_length(config: Any) -> int:
    length = int(getattr(config, "max_position_embeddings", 0) or 0)
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") in _LENGTH_DEPENDENT_ROTARY:
        original = rotary.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        length = min(length, int(original or length))
    if length <= 0:
        raise _unsupported("The configuration states no context length (max_position_embeddings)")
    return length


def _eos_token_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    ids: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for value in (
        getattr(generation, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        ids.update([value] if isinstance(value, int) else value or ())
    return tuple(sorted(ids))


def _first(*values: int | None) -> int | None:
    return next((int(value) for value in values if value is not None), None)


def _dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        raise InvalidArgument(
            f"Unknown dtype {dtype!r}.",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="dtype",
            value=dtype,
            remedy=f"Use auto or one of {', '.join(_DTYPES)}.",
        )
    return _DTYPES[dtype]


def _device(device: str) -> torch.device:
    remedy = "Use auto, cpu, cuda or cuda:N."
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        message = f"Unknown device {device!r}."
    elif kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        message = f"There is no device {device!r} here: {torch.cuda.device_count()} CUDA devices are visible."
    else:
        return torch.device(device)
    raise InvalidArgument(
        message, reason=reasons.VALUE_OUT_OF_RANGE, field="device", value=device, remedy=remedy
    )


def _remote_code(located: str) -> FailedPrecondition:
    return _unsupported(
        f"{located!r} brings Python code of its own (auto_map)", "Allow remote code if you trust its author."
    )


def _unsupported(message: str, remedy: str = "") -> FailedPrecondition:
    return FailedPrecondition(
        f"{message}.",
        reason=reasons.MODEL_NOT_SUPPORTED,
        field="model",
        remedy=remedy or f"Serve a model of one of these families: {', '.join(SUPPORTED)}.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
