"""`make demo` in a pipe: plain, under a minute, and as README.md shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
STAGE = re.compile(r"^\d+\. .+$", re.MULTILINE)


def test_the_tour() -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "glasshouse.tour"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "50", "PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert time.monotonic() - begun < 60
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    stages = STAGE.findall(done.stdout)
    assert len(stages) == 11
    shown = README.read_text(encoding="utf-8")
    assert STAGE.findall(shown.partition("```text\n")[2].partition("```")[0]) == stages
