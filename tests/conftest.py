"""Nothing that a test starts writes to the user's own data folder, or lets threads spin; which tests share a process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

VLLM_TESTS = Path(__file__).parent / "vllm"

# As `glasshouse serve` does; read when NumPy loads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "GLASSHOUSE_DATA" not in os.environ:
    os.environ["GLASSHOUSE_DATA"] = tempfile.mkdtemp(prefix="glasshouse-tests-")
    atexit.register(shutil.rmtree, os.environ["GLASSHOUSE_DATA"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`: a file is a group of its own, and all that starts vLLM is one, for one lives at a time."""
    for item in items:
        starts_vllm = "vllm-" in item.name or "vllm" in item.path.name or VLLM_TESTS in item.path.parents
        item.add_marker(pytest.mark.xdist_group("vllm" if starts_vllm else str(item.path)))
