"""fable: the small model the package carries, its dictionaries, and the labelled sets of its corpus generator."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = ["concepts_path", "dictionary_names", "dictionary_path", "labelled", "labelled_names", "model_path"]


def _folder() -> Path:
    return Path(str(files("glasshouse.fable")))


def model_path() -> Path:
    """The Hugging Face folder of the packaged weights."""
    return _folder() / "weights"


def dictionary_names() -> list[str]:
    """The packaged dictionaries there are."""
    folder = _folder() / "dictionaries" / "weights"
    return sorted(path.parent.name for path in folder.glob("*/dictionary.json"))


def dictionary_path(name: str) -> Path:
    """The folder of a packaged dictionary, in the server's own format."""
    if name not in dictionary_names():
        raise KeyError(f"no dictionary {name!r}; there are {', '.join(dictionary_names())}")
    return _folder() / "dictionaries" / "weights" / name


def concepts_path() -> Path:
    """The folder of the packaged directions and probes, as the server reads what comes with a model."""
    return _folder() / "concepts" / "saved"


def labelled_names() -> list[str]:
    """The labelled sets there are."""
    return sorted(path.stem for path in (_folder() / "labelled").glob("*.jsonl"))


def labelled(name: str) -> list[dict[str, Any]]:
    """The records of a labelled set: each has `text`, `label`, `kind`, and `split` ("train" or "test")."""
    path = _folder() / "labelled" / f"{name}.jsonl"
    if not path.exists():
        raise KeyError(f"no labelled set {name!r}; there are {', '.join(labelled_names())}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
