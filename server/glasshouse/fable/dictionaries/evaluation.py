"""The dictionaries' evaluation: `python -m glasshouse.fable.dictionaries.evaluation [--corpora DIR]`.

1. Held-out text in the shares of the training corpus: the generator's validation split and, with the
   collections, their unseen ends.
2. Dictionaries are opened from disk by the server's own loader; nothing of the trainer is used.
3. `fit` measures L0, dead features and explained variance on `--positions` positions, `splicing` the loss
   recovered on the first `--loss-positions` of them.
4. Every gate is printed with its value, bar and whether it holds; `--write` puts `measurements.json` and
   `CARD.md` beside the dictionaries, with the features that know the generator's latents (`latents`). Exit
   status 1 where a gate is missed.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from glasshouse.fable import model_path
from glasshouse.fable.corpus.mixture import SHARES, validation_documents
from glasshouse.fable.dictionaries.activations import encode, harvest
from glasshouse.fable.dictionaries.card import write_card
from glasshouse.fable.dictionaries.fit import Fit, select
from glasshouse.fable.dictionaries.latents import find_latent_features
from glasshouse.fable.dictionaries.splicing import Losses, LossMeter
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.formats.glasshouse import read_card
from glasshouse.server.dictionaries.open import open_dictionary
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.models.loading import load_model

PACKAGED = Path(__file__).parent / "weights"
_CHUNK_POSITIONS = 6_000
_CHARS_PER_TOKEN = 4.2


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One requirement of a dictionary: `value` compared with `bar`."""

    name: str
    value: float
    relation: str
    bar: float

    @property
    def holds(self) -> bool:
        return bool(
            {">=": operator.ge, "<=": operator.le, "<": operator.lt}[self.relation](self.value, self.bar)
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The figures of one dictionary; lists have one entry a hook point written, or a source layer for L0."""

    name: str
    kind: str
    architecture: str
    trained_as: str
    hook_points_in: list[str]
    hook_points_out: list[str]
    d_sae: int
    n_bytes: int
    n_positions: int
    n_loss_tokens: int
    l0: float
    l0_by_group: list[float]
    dead: float
    explained_variance: float
    explained_by_point: list[float]
    shrinkage: float
    loss_clean: float
    loss_spliced: list[float]
    loss_zero: list[float]
    loss_recovered: float
    loss_recovered_each: list[float]

    @property
    def gates(self) -> list[Gate]:
        return [
            Gate(name="L0 at least", value=self.l0, relation=">=", bar=10.0),
            Gate(name="L0 at most", value=self.l0, relation="<=", bar=40.0),
            Gate(name="dead", value=self.dead, relation="<", bar=0.10),
            Gate(name="explained variance", value=self.explained_variance, relation=">=", bar=0.85),
            Gate(name="loss recovered", value=self.loss_recovered, relation=">=", bar=0.90),
        ]


def held_out_texts(corpora: Path | None, n_positions: int, seed: int) -> Iterator[str]:
    """Validation documents, the kind furthest behind its training share next; about `n_positions` tokens."""
    wanted_chars = n_positions * _CHARS_PER_TOKEN
    pools = validation_documents(seed, int(wanted_chars / 150) + 50, corpora)
    emitted = dict.fromkeys(pools, 0)
    left = {kind: iter(texts) for kind, texts in pools.items()}
    while left and sum(emitted.values()) < wanted_chars:
        kind = min(left, key=lambda name: emitted[name] / SHARES[name])
        text = next(left[kind], None)
        if text is None:
            del left[kind]
            continue
        emitted[kind] += len(text)
        yield text


def _chunks(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    chunk: list[list[int]] = []
    for row in rows:
        chunk.append(row)
        if sum(map(len, chunk)) >= _CHUNK_POSITIONS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def measure(
    table: HookTable, paths: Sequence[Path], rows: Sequence[list[int]], n_loss_positions: int
) -> list[Measurement]:
    """The figures of the dictionaries in these folders on rows of token ids, BOS first."""
    dictionaries = [open_dictionary(path.name, path) for path in paths]
    fits = [Fit(dictionary=dictionary) for dictionary in dictionaries]
    points = sorted({p for d in dictionaries for p in (*d.facts.hook_points_in, *d.facts.hook_points_out)})
    for chunk in _chunks(rows):
        activations = harvest(table, chunk, points)
        for fit in fits:
            facts = fit.dictionary.facts
            fit.add(select(activations, facts.hook_points_in), select(activations, facts.hook_points_out))
    loss_rows, n_taken = [], 0
    for row in rows:
        loss_rows.append(row)
        n_taken += len(row) - 1
        if n_taken >= n_loss_positions:
            break
    meter = LossMeter(table, loss_rows)
    return [
        _measurement(path, dictionary, fit, meter.measure(dictionary), meter.n_tokens)
        for path, dictionary, fit in zip(paths, dictionaries, fits, strict=True)
    ]


def _measurement(path: Path, dictionary: Dictionary, fit: Fit, losses: Losses, n_loss: int) -> Measurement:
    facts = dictionary.facts
    return Measurement(
        name=facts.name,
        kind=facts.kind,
        architecture=facts.architecture,
        trained_as=str(read_card(path).get("trained_as", facts.architecture)),
        hook_points_in=list(facts.hook_points_in),
        hook_points_out=list(facts.hook_points_out),
        d_sae=facts.d_sae,
        n_bytes=sum(file.stat().st_size for file in path.iterdir()),
        n_positions=fit.n_positions,
        n_loss_tokens=n_loss,
        l0=fit.l0,
        l0_by_group=fit.l0_by_group,
        dead=fit.dead,
        explained_variance=fit.explained_variance,
        explained_by_point=fit.explained_by_point,
        shrinkage=fit.shrinkage,
        loss_clean=losses.clean,
        loss_spliced=losses.spliced,
        loss_zero=losses.zero,
        loss_recovered=losses.recovered,
        loss_recovered_each=losses.recovered_each,
    )


def print_gates(measurements: Sequence[Measurement]) -> bool:
    """One line a gate; whether all hold."""
    for measurement in measurements:
        for gate in measurement.gates:
            verdict = "holds" if gate.holds else "MISSED"
            print(
                f"{measurement.name:14} {gate.name:20} {gate.value:8.4f}  bar {gate.relation} {gate.bar:<5} {verdict}"
            )
    missed = [(m.name, gate.name) for m in measurements for gate in m.gates if not gate.holds]
    print(f"{len(missed)} gates missed" + "".join(f"; {name}: {gate}" for name, gate in missed))
    return not missed


def write_report(
    folder: Path, table: HookTable, measurements: Sequence[Measurement], *, with_collections: bool
) -> None:
    """Writes measurements.json and CARD.md; dictionaries that were not measured now keep their figures."""
    file = folder / "measurements.json"
    known = json.loads(file.read_text(encoding="utf-8"))["dictionaries"] if file.exists() else []
    entries = {entry["name"]: entry for entry in known}
    entries |= {m.name: asdict(m) | {"gates_hold": all(gate.holds for gate in m.gates)} for m in measurements}
    opened = [open_dictionary(name, folder / name) for name in sorted(entries)]
    streams = [dictionary for dictionary in opened if dictionary.facts.kind in ("sae", "crosscoder")]
    report = {
        "dictionaries": [entries[name] for name in sorted(entries)],
        "latents": [asdict(found) for found in find_latent_features(table, streams)],
    }
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_card(folder / "CARD.md", report, with_collections=with_collections)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure fable's dictionaries on held-out text.")
    parser.add_argument("--dictionaries", type=Path, default=PACKAGED, help="default: the packaged ones")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="folders under --dictionaries")
    parser.add_argument("--model", type=Path, default=model_path(), help="default: the packaged weights")
    parser.add_argument("--corpora", type=Path, help="folder of the public collections")
    parser.add_argument("--positions", type=int, default=200_000, help="for L0, dead and variance")
    parser.add_argument("--loss-positions", type=int, default=20_000, help="for the loss recovered")
    parser.add_argument("--write", action="store_true", help="write measurements.json and CARD.md")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = args.only or sorted(path.name for path in args.dictionaries.iterdir() if path.is_dir())
    loaded = load_model(args.model, dtype="float32", device="cpu")
    rows = encode(loaded, held_out_texts(args.corpora, args.positions, args.seed))
    paths = [args.dictionaries / name for name in names]
    table = HookTable(loaded)
    measurements = measure(table, paths, rows, args.loss_positions)
    all_hold = print_gates(measurements)
    if args.write:
        write_report(args.dictionaries, table, measurements, with_collections=args.corpora is not None)
    sys.exit(0 if all_hold else 1)


if __name__ == "__main__":
    main()
