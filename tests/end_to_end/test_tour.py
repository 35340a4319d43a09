"""`make demo` in a pipe: plain, and as README.md shows it. How long it takes is one of the bars."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
STAGE = re.compile(r"^\d+\. .+$", re.MULTILINE)


def test_the_tour() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "glasshouse.tour"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "50", "PYTHONIOENCODING": "utf-8"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    stages = STAGE.findall(done.stdout)
    assert len(stages) == 17
    shown = README.read_text(encoding="utf-8")
    assert STAGE.findall(shown.partition("```text\n")[2].partition("```")[0]) == stages
