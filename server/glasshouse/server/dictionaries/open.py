"""Opening a dictionary: NAME=PATH, the format found by looking at the files.

PATH is a folder, a single weight file, or a hub id (`hf:org/repo/sub/folder[@revision]`), and may end in
settings the files leave out: `PATH?hook_point=blocks.3.hook_resid_post&k=50&average_norm=27.3`. The same
settings can stand in a `glasshouse.json` beside the weights; the path wins.

A path that holds a set (a transcoder a layer, an SAE a layer) opens as several dictionaries, named NAME/0,
NAME/1 and so on: `open_dictionaries`. A cross-layer transcoder or a crosscoder is one dictionary.

Weights stay mapped: what is read of the files on opening is their headers, the small tensors and a sample of
rows. The files must not be rewritten while they are served; replace the folder and load it again.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from urllib.parse import parse_qs

from glasshouse.server.dictionaries import hub
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.formats import FORMATS, Format
from glasshouse.server.dictionaries.formats.files import WEIGHT_SUFFIXES, Source
from glasshouse.server.dictionaries.formats.format import OVERRIDES_FILE, Overrides
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.dictionaries.parameters import malformed
from glasshouse.server.types.errors import ResourceExhausted
from glasshouse.wire import reasons


def open_dictionaries(
    name: str, path: str | Path, *, overrides: Overrides | None = None, budget_bytes: int | None = None
) -> tuple[Dictionary, ...]:
    """Every dictionary of a path. `budget_bytes` refuses before anything but the listing is read."""
    folder, settings = _split(str(path))
    source = Source(_locate(folder))
    if budget_bytes is not None:
        _check_budget(source, budget_bytes)
    beside = Overrides.of(source.config(OVERRIDES_FILE), str(source.folder / OVERRIDES_FILE))
    chosen = (overrides or Overrides()).over(settings).over(beside)
    loaded = find_format(source).load(source, chosen)
    opened = []
    for suffix, parameters in loaded:
        parameters.check(str(source))
        opened.append(LinearDictionary(f"{name}/{suffix}" if suffix else name, parameters))
    return tuple(opened)


def open_dictionary(
    name: str, path: str | Path, *, overrides: Overrides | None = None, budget_bytes: int | None = None
) -> Dictionary:
    """The only dictionary of a path; a set is refused with the names it holds."""
    opened = open_dictionaries(name, path, overrides=overrides, budget_bytes=budget_bytes)
    if len(opened) != 1:
        names = ", ".join(d.facts.name for d in opened[:8])
        raise malformed(
            str(path), f"holds a set of {len(opened)} dictionaries ({names})", "Open the path as a set."
        )
    return opened[0]


def find_format(source: Source) -> Format:
    """The format of a path, refused with what was seen where none fits."""
    for candidate in FORMATS:
        if candidate.detects(source):
            return candidate
    for name in source.weight_files:  # a damaged or hostile file says so itself rather than "unknown format"
        source.tensors(name)
    if not source.weight_files and not source.is_file:
        nested = sorted(p.name for p in source.path.iterdir() if p.is_dir())
        raise malformed(
            str(source),
            f"has no weight files; folders: {', '.join(nested[:10]) or 'none'}",
            "Give the folder that holds the weights.",
        )
    seen = {name: sorted(source.keys_of(name))[:8] for name in source.weight_files[:4]}
    raise malformed(
        str(source),
        f"is in no known format; saw {seen}",
        f"Known formats: {', '.join(f.name for f in FORMATS)}.",
    )


def estimate_bytes(path: str | Path) -> int:
    """Bytes of weights under a path, as they are in memory when all of it is read; from the listing alone."""
    return _weight_bytes(Source(_locate(_split(str(path))[0])))


def _weight_bytes(source: Source) -> int:
    files = (
        [source.path]
        if source.is_file
        else [p for p in source.path.rglob("*") if p.suffix in WEIGHT_SUFFIXES]
    )
    total = 0
    for file in files:
        if file.suffix == ".npz" and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                total += sum(member.file_size for member in archive.infolist())
        else:
            total += file.stat().st_size
    return total


def _check_budget(source: Source, budget_bytes: int) -> None:
    needed = _weight_bytes(source)
    if needed > budget_bytes:
        raise ResourceExhausted(
            f"{source} needs {needed} bytes, {budget_bytes} are left of the dictionaries' budget",
            reason=reasons.MEMORY_BUDGET,
            field="path",
            value=str(source),
            remedy="Unload another dictionary, raise the budget, or load a smaller one.",
            metadata={"needed_bytes": str(needed), "budget_bytes": str(budget_bytes)},
        )


def _split(path: str) -> tuple[str, Overrides]:
    """(path, settings) of PATH?name=value&...; a file whose name really has a '?' is taken as it is."""
    base, mark, query = path.rpartition("?")
    if not mark or Path(path).exists():
        return path, Overrides()
    values = {key: found[-1] for key, found in parse_qs(query, strict_parsing=False).items()}
    return base, Overrides.of(values, path)


def _locate(path: str) -> Path:
    return hub.fetch(path) if path.startswith(hub.PREFIX) else Path(path)
