"""The hub id form of a dictionary's path: `hf:org/repo/sub/folder[@revision]`.

Only the named folder is fetched, and never a pickle where it holds safetensors. huggingface_hub comes with
the server's extra; without a network the refusal says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.wire import reasons

PREFIX = "hf:"
CONFIG_PATTERNS = ("*.json", "*.yaml")
SAFE_PATTERNS = ("*.safetensors", "*.npz")
PICKLE_PATTERNS = ("*.pt", "*.pth")


class HubId(NamedTuple):
    """repo: org/name. folder: within it, "" for the root. revision: branch, tag or commit."""

    repo: str
    folder: str
    revision: str | None


def parse(path: str) -> HubId:
    """`hf:org/repo/sub/folder@revision` in its parts."""
    body, _, revision = path.removeprefix(PREFIX).partition("@")
    parts = [part for part in body.split("/") if part]
    if len(parts) < 2 or ".." in parts:
        raise InvalidArgument(
            f"{path!r} is not a hub id",
            reason=reasons.VALUE_MALFORMED,
            field="path",
            value=path,
            remedy="Write hf:org/repo, hf:org/repo/sub/folder or hf:org/repo/sub/folder@revision.",
        )
    return HubId("/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def fetch(path: str) -> Path:
    """The local copy of a hub id's folder or file, downloaded where it is not cached."""
    wanted = parse(path)
    try:
        from huggingface_hub import HfApi, snapshot_download

        files = HfApi().list_repo_files(wanted.repo, revision=wanted.revision)
        prefix = f"{wanted.folder}/" if wanted.folder else ""
        here = [f for f in files if f.startswith(prefix) or f == wanted.folder]
        safe = any(f.endswith((".safetensors", ".npz")) for f in here)
        patterns = [*CONFIG_PATTERNS, *(SAFE_PATTERNS if safe else PICKLE_PATTERNS)]
        allowed = [wanted.folder] if wanted.folder in files else [prefix + p for p in patterns]
        root = snapshot_download(wanted.repo, revision=wanted.revision, allow_patterns=allowed)
    except Exception as error:
        raise FailedPrecondition(
            f"{path}: could not be fetched from the hub: {str(error)[:300]}",
            reason=reasons.DICTIONARY_MALFORMED,
            field="path",
            value=path,
            remedy="Check the id and the network, or copy the folder here and give its path.",
        ) from None
    return Path(root) / wanted.folder
