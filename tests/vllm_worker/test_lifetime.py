"""Processes of the engine do not outlive the server's, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no pidfd on this system")

# The server; below it the engine's process, which is the worker or has it below itself.
SERVER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, sys.argv[1], *sys.argv[2:]])
time.sleep(600)
"""
ENGINE = """
import os, subprocess, sys, time
environment = dict(os.environ) | {"GATEWAY": str(os.getppid())}
subprocess.Popen([sys.executable, *sys.argv[1:]], env=environment)
print("here", flush=True)
time.sleep(600)
"""
WORKER = """
import os, time
from glasshouse.server.engines.vllm.worker import lifetime
lifetime.end_with(int(os.environ.get("GATEWAY", os.getppid())))
print("here", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("apart", [False, True], ids=["one_process", "worker_apart"])
def test_an_engine_does_not_outlive_its_server(tmp_path: Path, apart: bool) -> None:
    for name, source in (("server", SERVER), ("engine", ENGINE), ("worker", WORKER)):
        (tmp_path / f"{name}.py").write_text(source)
    below = ["engine", "worker", "x"] if apart else ["worker", "x"]
    command = [sys.executable, str(tmp_path / "server.py"), *(str(tmp_path / f"{name}.py") for name in below)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        for _ in below[:-1]:
            server.stdout.readline()
        os.kill(server.pid, signal.SIGKILL)
        # It ends when the last process that has it does, and each of them has it.
        assert server.stdout.read() == ""
