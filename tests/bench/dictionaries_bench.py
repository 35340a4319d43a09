"""The encode bars of issue 3: top-32 of 4,096 positions, d_in 2,048, d_sae 65,536, bfloat16 and float32 on
CPU.

Run alone: `python tests/bench/dictionaries_bench.py [--threads 2] [--repeats 3]`. Each line is
`NAME VALUE UNIT (baseline ..., bar ...)`. The baselines are taken in the same process, alternating with ours:

- the bare product `x @ W_enc` of the same shape, dtype and layout (bar: at least 0.85 of its speed)
- the product, bias, ReLU and torch.topk, which is what sae-lens' `encode` then `topk` computes; with the
  peers' environment (GLASSHOUSE_PEERS_PYTHON) sae-lens itself is measured in it instead (bar: at least 1.1
  times)
- memory: the high-water mark of the process over the encode, against the full (positions, d_sae) matrix
- opening a 2 GiB safetensors dictionary, and reading the decoder row of one feature
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from glasshouse.server.dictionaries.architectures import ReLU
from glasshouse.server.dictionaries.formats.glasshouse import Recipe, save_dictionary
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.dictionaries.open import open_dictionary
from glasshouse.server.dictionaries.parameters import DecoderBlock, DictionaryParameters, EncoderBlock

N_POSITIONS, D_IN, D_SAE, TOP_K = 4096, 2048, 65536, 32
PEERS = Path(__file__).parents[2] / ".cache/peers/venv/bin/python"


class Report(Protocol):
    """Called once a figure."""

    def __call__(self, name: str, value: float, unit: str, baseline: str, bar: str, holds: bool) -> None: ...


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """How far the process's resident memory rose above where it stood, at its highest, during the call."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(field)


def _dictionary(W_enc: torch.Tensor, W_dec: torch.Tensor) -> LinearDictionary:
    dtype = W_enc.dtype
    return LinearDictionary(
        "bench",
        DictionaryParameters(
            kind="sae",
            hook_points_in=("blocks.0.hook_resid_post",),
            hook_points_out=("blocks.0.hook_resid_post",),
            encoders=(EncoderBlock(W_enc=W_enc),),
            decoders=(DecoderBlock(W_dec=W_dec),),
            activation=ReLU(),
            source_format="bench",
            b_enc=torch.full((W_enc.shape[1],), -0.1, dtype=dtype),
            b_dec=torch.zeros(1, W_enc.shape[0], dtype=dtype),
        ),
    )


def bench_encode(report: Report, dtype: torch.dtype, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_POSITIONS, D_IN, generator=generator).to(dtype)
    W_enc = (torch.randn(D_IN, D_SAE, generator=generator) / D_IN**0.5).to(dtype)
    W_dec = torch.zeros(1, D_IN, dtype=dtype).expand(D_SAE, D_IN)
    dictionary = _dictionary(W_enc, W_dec)
    b_enc = dictionary.parameters.b_enc
    assert b_enc is not None

    def then_topk() -> object:
        return torch.relu(x @ W_enc + b_enc).topk(TOP_K, dim=-1)

    def ours() -> object:
        return dictionary.encode_top_k(x, TOP_K)

    name = "bf16" if dtype == torch.bfloat16 else "f32"
    bare, naive, tiled = [], [], []
    for _ in range(repeats):
        bare.append(seconds(lambda: x @ W_enc))
        tiled.append(seconds(ours))
        naive.append(seconds(then_topk))
    product, fused, plain = (statistics.median(each) for each in (bare, tiled, naive))
    ratio = product / fused
    report(f"encode_{name}_vs_product", ratio, "x", f"x @ W_enc {product:.2f} s", ">= 0.85", ratio >= 0.85)
    peer = peers_seconds(name, repeats)
    baseline = f"sae-lens {peer:.2f} s" if peer else f"product, bias, ReLU, topk {plain:.2f} s"
    gain = (peer or plain) / fused
    report(f"encode_{name}_vs_topk", gain, "x", baseline, ">= 1.1", gain >= 1.1)
    share = peak_extra_bytes(ours) / (N_POSITIONS * D_SAE * x.element_size())
    report(f"encode_{name}_peak_memory", 100 * share, "%", "(positions, d_sae) matrix", "< 10", share < 0.1)


PEER_SCRIPT = """
import sys, time, torch
from sae_lens import StandardSAE, StandardSAEConfig
n, d, f, k, name, threads, repeats = sys.argv[1:]
torch.set_num_threads(int(threads))
dtype = "bfloat16" if name == "bf16" else "float32"
sae = StandardSAE(StandardSAEConfig(d_in=int(d), d_sae=int(f), dtype=dtype))
sae.b_enc.data.fill_(-0.1)
x = torch.randn(int(n), int(d)).to(sae.W_enc.dtype)
best = 1e9
with torch.no_grad():
    for _ in range(int(repeats)):
        start = time.perf_counter()
        sae.encode(x).topk(int(k), dim=-1)
        best = min(best, time.perf_counter() - start)
print("SECONDS", best)
"""


def peers_seconds(name: str, repeats: int) -> float | None:
    """sae-lens' own encode-then-topk in the peers' environment; None where there is none."""
    python = Path(os.environ.get("GLASSHOUSE_PEERS_PYTHON", str(PEERS)))
    if not python.exists():
        return None
    sizes = [str(v) for v in (N_POSITIONS, D_IN, D_SAE, TOP_K)]
    command = [str(python), "-c", PEER_SCRIPT, *sizes, name, str(torch.get_num_threads()), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS")]
    return float(lines[0].split()[1]) if lines else None


def bench_open(report: Report) -> None:
    """A float32 SAE of 2 GiB: d_in 2,048, d_sae 131,072, opened from disk."""
    d_sae = (2 << 30) // (2 * 4 * D_IN)
    with tempfile.TemporaryDirectory() as folder:
        save_dictionary(
            Recipe(
                kind="sae",
                architecture="standard",
                hook_points_in=("blocks.0.hook_resid_post",),
                hook_points_out=("blocks.0.hook_resid_post",),
                tensors={
                    "W_enc": torch.zeros(d_sae, D_IN),
                    "W_dec": torch.ones(d_sae, D_IN),
                    "b_enc": torch.zeros(d_sae),
                    "b_dec": torch.zeros(D_IN),
                },
            ),
            Path(folder),
        )
        opened = seconds(lambda: open_dictionary("big", folder))
        dictionary = open_dictionary("big", folder)
        report("open_2gib", opened, "s", "none", "< 1", opened < 1)
        row = torch.tensor([d_sae // 2])
        extra = peak_extra_bytes(lambda: dictionary.decoder_rows(row))
        touched = extra / (1 << 20)
        report("steer_one_feature_touches", touched, "MiB", "2048 MiB file", "< 4", touched < 4)


def run(report: Report, repeats: int = 3) -> None:
    """Every figure of this file."""
    bench_open(report)
    for dtype in (torch.bfloat16, torch.float32):
        bench_encode(report, dtype, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[dict[str, object]] = []

    def report(name: str, value: float, unit: str, baseline: str, bar: str, holds: bool) -> None:
        print(f"{name} {value:.3g} {unit} (baseline {baseline}, bar {bar})", flush=True)
        row = {"name": name, "value": value, "unit": unit, "baseline": baseline, "bar": bar, "holds": holds}
        results.append(row)

    run(report, arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
