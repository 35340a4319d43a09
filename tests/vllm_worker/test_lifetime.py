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
import multiprocessing, os, sys, time
from glasshouse.server.engines.vllm.worker import lifetime

def running(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False

def worker(server, late):
    if not late:
        lifetime.end_with(server)
    print("here", flush=True)
    while late and running(server):
        time.sleep(0.01)
    if late:
        lifetime.end_with(server)
    time.sleep(600)

def engine(server, apart, late):
    if apart:
        multiprocessing.Process(target=worker, args=(server, late)).start()
        time.sleep(600)
    else:
        worker(server, late)

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    apart, late = "apart" in sys.argv, "late" in sys.argv
    multiprocessing.Process(target=engine, args=(os.getpid(), apart, late)).start()
    time.sleep(600)
"""


@pytest.mark.parametrize("late", [False, True], ids=["watched", "gone_before"])
@pytest.mark.parametrize("apart", [False, True], ids=["one_process", "worker_apart"])
def test_an_engine_does_not_outlive_its_server(tmp_path: Path, apart: bool, late: bool) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    command = [sys.executable, str(script), *["apart"] * apart, *["late"] * late]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        os.kill(server.pid, signal.SIGKILL)
        # It ends when the last process that has it does, and each of them has it.
        assert server.stdout.read() == ""
