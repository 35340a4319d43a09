"""Files written by the libraries that own the formats, against those libraries' own encode and decode.

They live in an environment of their own (`deploy/peers.txt`), named by GLASSHOUSE_PEERS_PYTHON or found at
.cache/peers/venv. Without it these tests are skipped and `test_formats.py` holds the same formats to their
documented layouts.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.server.dictionaries import reference as ref

from glasshouse.server.dictionaries.open import open_dictionaries

HERE = Path(__file__).parent / "peers"
PYTHON = Path(
    os.environ.get("GLASSHOUSE_PEERS_PYTHON", str(Path(__file__).parents[3] / ".cache/peers/venv/bin/python"))
)
LIBRARIES = {
    "saelens": 15,
    "sparsify": 5,
    "dictionary_learning": 8,
    "circuit_tracer": 6,
}

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no peers' environment (deploy/peers.txt)")


@pytest.mark.parametrize("library", list(LIBRARIES))
def test_equal_to_the_owner_library(library: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(HERE)}
    command = [str(PYTHON), str(HERE / f"write_{library}.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = sorted(path.parent.parent for path in tmp_path.glob("*/expected/expected.json"))
    assert len(cases) == LIBRARIES[library]
    for case in cases:
        compare(case)


def compare(case: Path) -> None:
    """Max relative error 1e-5, identical active sets; a set is compared dictionary by dictionary."""
    opens = json.loads((case / "expected/expected.json").read_text())["opens"]
    saved = {
        name: tensor.double() for name, tensor in load_file(case / "expected/expected.safetensors").items()
    }
    opened = open_dictionaries(case.name, case / opens)
    single = len(opened) == 1
    for i, dictionary in enumerate(opened):
        x, f, y = (saved[name] if single else saved[name][i] for name in ("x", "f", "y"))
        try:
            found = dictionary.encode(x.float())
            ref.close(found.to_dense(), f)
            ref.same_active(found.to_dense(), f)
            ref.close(dictionary.reconstruct(x.float()), y)
            ids = torch.arange(0, dictionary.facts.d_sae, 7)
            ref.close(dictionary.encode_features(x.float(), ids), f[:, ids])
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
