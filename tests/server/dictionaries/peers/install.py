"""Makes the peers' environment at .cache/peers/venv from deploy/peers.txt. Takes minutes; run by hand.

torch first (of whatever index pip is set to), then each library on its own, because two of them disagree
about a dependency that their loaders never use. torchvision arrives with one of them built for another torch,
and breaks transformers' imports: it is taken out.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[4]
FOLDER = ROOT / ".cache/peers/venv"
CONSTRAINTS = ROOT / "deploy/peers-constraints.txt"


def main() -> None:
    if not (FOLDER / "bin/python").exists():
        venv.create(FOLDER, with_pip=True)
    pip = [str(FOLDER / "bin/python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "-c", str(CONSTRAINTS), "torch", "numpy"], check=True)
    for line in (ROOT / "deploy/peers.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            subprocess.run([*pip, "install", "--quiet", "-c", str(CONSTRAINTS), line], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    subprocess.run(
        [str(FOLDER / "bin/python"), "-c", "import sae_lens, sparsify, circuit_tracer"], check=True
    )
    print(f"ready: {FOLDER}")


if __name__ == "__main__":
    sys.exit(main())
