"""The engine's processes end with the server's: at once where they are told to, and also where it could tell them nothing.

vLLM's engine does not notice that a server was killed; its own workers notice that the engine was.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading


def end_with(server: int) -> None:
    """Ends this process, and the engine's where that is another, as soon as the process `server` is gone. Where the
    system cannot tell (no pidfd), nothing is watched.
    """
    try:
        watched = os.pidfd_open(server)
    except ProcessLookupError:
        _end(server)
        return
    except (AttributeError, OSError):
        return
    threading.Thread(target=_wait, args=(watched, server), name="glasshouse-lifetime", daemon=True).start()


def _wait(watched: int, server: int) -> None:
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    poll.poll()
    _end(server)


def _end(server: int) -> None:
    # A worker apart is the engine's child. Still its child: no other process has taken the number.
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid not in (None, server) and os.getppid() == parent.pid:
        os.kill(parent.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def leave_at_once() -> None:
    """Lets an orderly end skip taking the interpreter apart, which takes seconds that vLLM waits for. Call it last."""
    if sys.exc_info()[0] in (None, SystemExit):
        atexit.register(_leave)


def _leave() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(0)
