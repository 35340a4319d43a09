"""The examples of README.md and of the server's pages run, against a real server, in the order they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from glasshouse.tour.server_process import ServerProcess

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "client/attribution.md",
    "server/README.md",
    "server/attribution.md",
    "server/dictionaries.md",
    "server/directions.md",
    "server/monitors.md",
)
OPTIONS = ("--listen", "127.0.0.1:0", "--registry", "memory", "--threads", "1")
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(*OPTIONS) as process:
        yield process


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page: str, server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "example"}
    found = list(EXAMPLE.finditer(text))
    assert found, f"no example in {page}"
    for example in found:
        line = text[: example.start()].count("\n") + 1
        code = "\n" * line + example[1].replace("localhost:50051", server.target)
        exec(compile(code, str(ROOT / page), "exec"), names)  # noqa: S102 - our own pages
    if "client" in names:
        names["client"].close()  # type: ignore[attr-defined]


def test_steering_changes_the_ending(capsys: pytest.CaptureFixture[str]) -> None:
    """What the second example of README.md claims to show. A server of its own: the page publishes names."""
    with ServerProcess(*OPTIONS) as server:
        test_the_examples_run("README.md", server, capsys)
    printed = capsys.readouterr().out.splitlines()
    receipts = [line for line in printed if re.fullmatch(r"\d+ [0-9a-f]{12}", line)]
    assert len(receipts) == 2
    first, second = (printed[printed.index(receipt) - 2] for receipt in receipts)
    assert first != second


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in LINK.findall(text):
        assert ((ROOT / page).parent / target).exists(), target
