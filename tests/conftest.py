"""Nothing that a test starts writes to the user's own data folder, or lets threads spin; which tests share a process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

# As `glasshouse serve` does; read when NumPy loads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "GLASSHOUSE_DATA" not in os.environ:
    os.environ["GLASSHOUSE_DATA"] = tempfile.mkdtemp(prefix="glasshouse-tests-")
    atexit.register(shutil.rmtree, os.environ["GLASSHOUSE_DATA"], ignore_errors=True)


class ByFile(LoadFileScheduling):
    """A file's tests run in one process. What runs on both engines is two: vLLM is started once for all that share it."""

    def _split_scope(self, nodeid: str) -> str:
        path, _, name = nodeid.partition("::")
        return "vllm" if "vllm-" in name else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts vLLM takes longest: first."""
    items.sort(key=lambda item: "vllm" not in item.nodeid)
