"""Every Python example of the client's guide runs, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glasshouse.client.testing import FakeServer

GUIDE = Path(__file__).parents[2] / "client" / "README.md"


def run_guide(target: str) -> None:
    """Runs the guide's examples against a server; a failure shows the guide's own line."""
    guide = GUIDE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"```python\n(.*?)```", guide, re.DOTALL))
    assert len(blocks) > 8
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        line = guide.count("\n", 0, block.start(1))
        source = "\n" * line + block[1].replace("localhost:50051", target)
        exec(compile(source, str(GUIDE), "exec"), names)  # noqa: S102
    names["client"].close()  # type: ignore[attr-defined]


def test_examples_run(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    run_guide(server.target)
    assert "HOOK_POINT_NOT_FOUND" in capsys.readouterr().out
