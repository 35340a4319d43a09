"""The card of a set of dictionaries: what they are, and the measured table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TEXT = """# fable's dictionaries

Trained on fable's own activations by `python -m glasshouse.fable.dictionaries.training` and measured by
`python -m glasshouse.fable.dictionaries.evaluation --write`, which opens them as the server does.

- `resid-post-L`: an SAE of `blocks.L.hook_resid_post`.
- `transcoder-L`: the MLP of layer L, from `blocks.L.ln2.hook_out` (after the gain) to `blocks.L.hook_mlp_out`.
- `clt`: a cross-layer transcoder; a feature reads one `ln2.hook_out` and writes the `hook_mlp_out` of its layer
  and of all later ones.
- `crosscoder`: one set of features that reads and writes all six `hook_resid_post`.

Weights are bfloat16, biases and thresholds float32. Decoder rows have unit norm over all they write, so
activations are in the units of the stream. Nothing is normalised at inference. BOS was not trained on: its
activations are unlike all others, and its features mean nothing.

## Measured

Held-out text: {text}.
{n_positions:,} positions (BOS left out) for L0, dead features and explained variance; a feature is dead when it
never fired on them. {n_loss:,} tokens for the loss.

| Name | Saved as (trained as) | Features | L0 | Dead | EV | FVU | Shrinkage | Loss recovered | Rise | MiB | Gates |
|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}

Gates: L0 10 to 40, dead below 10 %, explained variance at least 0.85, loss recovered at least 0.90.
The model's own loss on these tokens: {clean:.4f} nats.

- EV, explained variance: 1 - E||y - y^||^2 / (E||y||^2 - ||E y||^2); of several hook points, the mean of each one's.
- Loss recovered: (zero - spliced) / (zero - clean), cross-entropy; rise: spliced - clean in nats per token. The
  transcoders replace one MLP's output. `clt` replaces all six at once and reads the spliced pass itself, so
  errors compound. `crosscoder` replaces one layer's stream at a time, from the clean streams of all; the mean
  over layers. BOS stays as it is; zero is zero at every position.
- Shrinkage: E||y^||^2 / E[y . y^]; one is none.

## By layer

{by_layer}

## Features of known latents

The one feature, of all SAEs and the crosscoder, whose activation best separates a label of the generator from
the others: chosen on the train split of the labelled set, area under the ROC curve on its test split.

| Latent | Label | Dictionary | Feature | Area under the curve |
|---|---|---|---|---|
{latents}
"""


def _row(measured: Mapping[str, Any]) -> str:
    saved, trained = measured["architecture"], measured["trained_as"]
    rise = sum(measured["loss_spliced"]) / len(measured["loss_spliced"]) - measured["loss_clean"]
    cells = (
        f"`{measured['name']}`",
        saved if saved == trained else f"{saved} ({trained})",
        str(measured["d_sae"]),
        f"{measured['l0']:.1f}",
        f"{measured['dead']:.1%}",
        f"{measured['explained_variance']:.3f}",
        f"{1 - measured['explained_variance']:.3f}",
        f"{measured['shrinkage']:.3f}",
        f"{measured['loss_recovered']:.3f}",
        f"{rise:+.3f}",
        f"{measured['n_bytes'] / 2**20:.2f}",
        "hold" if measured["gates_hold"] else "MISSED",
    )
    return "| " + " | ".join(cells) + " |"


def _layers(measured: Mapping[str, Any]) -> list[str]:
    def numbers(key: str) -> str:
        return ", ".join(f"{value:.3f}" for value in measured[key])

    lines = [f"- `{measured['name']}`: explained variance of layers 0 to 5: {numbers('explained_by_point')}"]
    if len(measured["l0_by_group"]) > 1:
        lines.append(f"  L0 of source layers 0 to 5: {numbers('l0_by_group')}")
    if len(measured["loss_recovered_each"]) > 1:
        lines.append(f"  loss recovered of layers 0 to 5: {numbers('loss_recovered_each')}")
    return lines


def _latent(found: Mapping[str, Any]) -> str:
    return "| {latent} | {label} | `{dictionary}` | {feature} | {auc:.3f} |".format(**found)


def write_card(
    path: Path, report: Mapping[str, Sequence[Mapping[str, Any]]], *, with_collections: bool
) -> None:
    """Writes the card of `dictionaries` (`evaluation.Measurement` as mappings, with `gates_hold`) and `latents`."""
    measured = report["dictionaries"]
    text = "the generator's validation split"
    if with_collections:
        text += ",\nand the unseen ends of the two collections, in the shares of the training corpus"
    several = [entry for entry in measured if len(entry["hook_points_out"]) > 1]
    filled = _TEXT.format(
        text=text,
        n_positions=measured[0]["n_positions"],
        n_loss=measured[0]["n_loss_tokens"],
        clean=measured[0]["loss_clean"],
        rows="\n".join(map(_row, measured)),
        by_layer="\n".join(line for entry in several for line in _layers(entry)),
        latents="\n".join(map(_latent, report["latents"])),
    )
    path.write_text(filled, encoding="utf-8")
