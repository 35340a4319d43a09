"""Lets vLLM's Model Runner V2 run on a CPU, through Triton's interpreter: for tests only, imported by a `sitecustomize`."""

from __future__ import annotations

import os
from typing import Any


def install() -> None:
    """Call before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TRITON_DEFAULT_BACKEND"] = "cpu"
    import triton.backends as backends

    class Driver:
        """Says that it runs on a CPU."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            import torch

            return torch.cpu

        def get_current_stream(self, *_: Any) -> int:
            return 0

        def get_current_target(self) -> Any:
            from triton.backends.compiler import GPUTarget

            return GPUTarget("cpu", 0, 1)

    class Compiler:
        """Compiles nothing: the interpreter runs kernels."""

        def __init__(self, target: Any = None) -> None:
            pass

        @staticmethod
        def supports_target(target: Any) -> bool:
            return bool(target.backend == "cpu")

        def hash(self) -> str:
            return "interpreted"

    backends.backends["cpu"] = backends.Backend(compiler=Compiler, driver=Driver)
