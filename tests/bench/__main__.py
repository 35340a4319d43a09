"""`python -m tests.bench [--only NAME ...] [--repeats N] [--cores N] [--long]`: every bar, on two cores.

Exit status 1 where a figure is below its bar.
"""

from __future__ import annotations

import argparse
import os
import sys

from .harness import RESULTS, Results


def pin(n_cores: int) -> int:
    """Keeps this process and those it starts to `n_cores` cores, where the system can; how many it has."""
    if not hasattr(os, "sched_setaffinity"):
        return min(n_cores, os.cpu_count() or 1)
    cores = sorted(os.sched_getaffinity(0))[:n_cores]
    os.sched_setaffinity(0, cores)
    return len(cores)


def main() -> int:
    """Measures, prints, writes; the exit status."""
    # As the server does. Read when torch loads, which the bars' imports do.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .bars.registry import BARS
    from .workbench import Workbench

    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure the bars.")
    parser.add_argument("--only", metavar="NAME", action="append", choices=list(BARS), help=", ".join(BARS))
    parser.add_argument(
        "--repeats", metavar="N", type=int, help="turns of each comparison; default: 5, of vllm 15"
    )
    parser.add_argument("--long", action="store_true", help="of vllm, the larger model too")
    parser.add_argument("--cores", metavar="N", type=int, default=2)
    parser.add_argument("--threads", metavar="N", type=int, help="of torch, everywhere; default: --cores")
    arguments = parser.parse_args()
    n_cores = pin(arguments.cores)
    results = Results()
    with Workbench(
        threads=arguments.threads or n_cores, repeats=arguments.repeats, long=arguments.long
    ) as bench:
        for name in arguments.only or BARS:
            BARS[name](bench, results.report)
    results.write()
    for figure in results.missed:
        print(f"below its bar: {figure.name}", file=sys.stderr)
    print(f"{len(results.figures)} figures in {RESULTS.relative_to(RESULTS.parents[1])}", file=sys.stderr)
    return 1 if results.missed else 0


if __name__ == "__main__":
    sys.exit(main())
