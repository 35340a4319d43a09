"""Publishes without end, to be killed: run as ``python publisher.py URL BLOBS``.

A line on standard input forks a child; its process id is printed, then the names it was told are published. Forking
spares every child the time of importing.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from glasshouse.server.registry.names import Kind
from glasshouse.server.registry.records import Draft, FeatureLabel
from glasshouse.server.registry.registry import Registry


def publish_without_end(url: str, blobs: str, child: str) -> None:
    registry = Registry.open(url, blobs)
    rng = np.random.default_rng(int(child))
    number = 0
    while True:
        name = f"d{child}-{number}"
        registry.publish(
            Draft(
                kind=Kind.FEATURE_LABELS,
                model="fable",
                name=name,
                tensors={"vector": rng.normal(size=5000)},
                labels=tuple(FeatureLabel(feature=i, label=f"label {i}") for i in range(50)),
            )
        )
        os.write(1, f"{name}\n".encode())
        number += 1


def main(url: str, blobs: str) -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            publish_without_end(url, blobs, line.strip())
        os.write(1, f"pid {pid}\n".encode())
        os.waitpid(pid, 0)
        os.write(1, b"dead\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
