"""`glasshouse serve` as a process of its own: started, found, and stopped in order.

1. Port 0 lets the server choose; its start line on standard output says what it chose.
2. Its logs go to a file, which is shown when something goes wrong.
3. SIGTERM ends it: requests in flight finish, then the exit status is 0.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Self

_METRICS_LINE = re.compile(r"glasshouse: metrics on (?P<url>\S+)\n")
_START_LINE = re.compile(r"glasshouse: serving (?P<model>\S+) on (?P<target>\S+)\n")
_LOG_TAIL_BYTES = 4096


class ServerProcessError(Exception):
    """The server did not start, or did not end as it should; the message has the end of its log."""


class ServerProcess:
    """A running server. A context manager: leaving it stops the server if `stop` has not.

    `target`: its address. `metrics_url`: its metrics page, empty where `arguments` ask for none. `start_line`:
    what it printed once it was serving. `startup_seconds`: from the command to that line.

    Raises:
        ServerProcessError: it ended, or did not serve within `timeout_s`.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        timeout_s: float = 120.0,
    ) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
        self.target = self.metrics_url = self.start_line = ""
        begun = time.perf_counter()
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "glasshouse.cli.main", "serve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
            text=True,
        )
        try:
            self._await_start(timeout_s)
        except BaseException:
            self.kill()
            raise
        self.startup_seconds = time.perf_counter() - begun

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has logged."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def terminate(self) -> None:
        """Tells it to stop; `wait` says how it did."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Waits for its end; the exit status. Raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def stop(self, timeout_s: float = 60.0) -> float:
        """Stops it in order; the seconds that took.

        Raises:
            ServerProcessError: an exit status other than 0, or none within `timeout_s`.
        """
        begun = time.perf_counter()
        self.terminate()
        try:
            status = self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ServerProcessError(self._with_log(f"the server still ran {timeout_s:g} s later")) from None
        if status != 0:
            raise ServerProcessError(self._with_log(f"the server ended with status {status}"))
        return time.perf_counter() - begun

    def kill(self) -> None:
        """Ends it at once, if it still runs, and lets its files go."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _await_start(self, timeout_s: float) -> None:
        assert self._process.stdout is not None
        patience = threading.Timer(timeout_s, self._process.kill)
        patience.start()
        try:
            for line in self._process.stdout:
                if metrics := _METRICS_LINE.fullmatch(line):
                    self.metrics_url = metrics["url"]
                elif start := _START_LINE.fullmatch(line):
                    self.start_line, self.target = line.rstrip("\n"), start["target"]
                    return
        finally:
            patience.cancel()
        raise ServerProcessError(self._with_log("the server did not start"))

    def _with_log(self, message: str) -> str:
        return f"{message}; the end of its log:\n{self.log[-_LOG_TAIL_BYTES:]}"
