"""Generates the Python stubs of `glasshouse.v1` beside their protos; `--check` fails where they have drifted.

The generator is pinned (grpcio-tools 1.76.0): its stubs load on every protobuf runtime the package allows.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("glasshouse/v1")


def generate(destination: Path) -> list[Path]:
    """Writes the stubs of every proto under `destination`; returns their paths relative to it."""
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).glob("*.proto"))
    with tempfile.TemporaryDirectory() as longrunning:
        _put_operations(Path(longrunning))
        return _compile(destination, protos, Path(longrunning))


def _put_operations(folder: Path) -> None:
    """Lays out google/longrunning/operations.proto under the name that the installed stubs know it by.

    googleapis-common-protos ships the file as operations_proto.proto; stubs compiled against that name do not load.
    """
    source = _common_protos() / "google/longrunning/operations_proto.proto"
    target = folder / "google/longrunning/operations.proto"
    target.parent.mkdir(parents=True)
    target.write_bytes(source.read_bytes())


def _common_protos() -> Path:
    """Where googleapis-common-protos is installed."""
    spec = find_spec("google.longrunning")
    assert spec is not None and spec.submodule_search_locations, "googleapis-common-protos is not installed"
    return Path(next(iter(spec.submodule_search_locations))).parent.parent


def _compile(destination: Path, protos: list[str], longrunning: Path) -> list[Path]:
    includes = [f"-I{ROOT}", f"-I{files(grpc_tools) / '_proto'}", f"-I{longrunning}", f"-I{_common_protos()}"]
    scripts = Path(sys.executable).parent
    outputs = [
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
        f"--python_out={destination}",
        f"--grpc_python_out={destination}",
        f"--mypy_out={destination}",
        f"--mypy_grpc_out={destination}",
    ]
    if protoc.main(["protoc", *includes, *outputs, *protos]) != 0:
        raise SystemExit("protoc failed; its messages are above")
    return sorted(path.relative_to(destination) for path in (destination / PACKAGE).glob("*_pb2*"))


def main() -> None:
    """Generates in place, or with --check compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed stubs, write nothing"
    )
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        committed = sorted(path.relative_to(ROOT) for path in (ROOT / PACKAGE).glob("*_pb2*"))
        drifted = [
            str(path)
            for path in sorted({*fresh, *committed})
            if path not in fresh
            or path not in committed
            or not filecmp.cmp(ROOT / path, Path(folder) / path, shallow=False)
        ]
    if drifted:
        sys.exit("stubs have drifted from their protos, run `make proto`: " + ", ".join(drifted))
    sys.stdout.write("stubs match their protos\n")


if __name__ == "__main__":
    main()
