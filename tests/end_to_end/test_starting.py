"""What must be so before the model loads."""

from __future__ import annotations

import os
import subprocess
import sys

CHECK = """
import os, sys
from glasshouse.cli import main as cli
from glasshouse.server.main import main
assert main(["--config", "/none.toml"]) == 1
assert os.environ["OMP_WAIT_POLICY"] == {expected!r}
assert "torch" not in sys.modules
"""


def run(expected: str, **environment: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    subprocess.run(
        [sys.executable, "-c", CHECK.format(expected=expected)], env={**kept, **environment}, check=True
    )


def test_the_waiting_threads_of_a_computation_sleep() -> None:
    """The policy is read when torch loads: it must be settled before, and left alone where the operator set it."""
    run("PASSIVE")
    run("ACTIVE", OMP_WAIT_POLICY="ACTIVE")
