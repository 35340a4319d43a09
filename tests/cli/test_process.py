"""The command as a process: start-up time, pipes, interrupts, and what `serve` hands on."""

from __future__ import annotations

import os
import pty
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glasshouse.client.testing import FakeServer

# Interrupts are taken as on a terminal, whatever the tests' own parent does with them.
TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
COMMAND = [sys.executable, "-c", f"{TERMINAL}; from glasshouse.cli.main import run; run()"]
HOOK = "blocks.0.hook_resid_post"


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Seconds of the processor, which a busy machine does not stretch.
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and "hook-points" in done.stdout
    assert min(times) < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from glasshouse.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(', '.join({'numpy', 'grpc', 'google.protobuf', 'torch'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_text_in_a_pipe_is_plain(server: FakeServer) -> None:
    done = run("generate", "Once", "--max-tokens", "5", "--seed", "1")
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout) == 6 and "\x1b" not in done.stdout


def test_text_streams_as_it_comes() -> None:
    with FakeServer(token_delay_s=0.2) as server:
        process = subprocess.Popen(
            [*COMMAND, "generate", "x", "--max-tokens", "30", "--target", server.target],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        assert process.poll() is None, "the first text comes before the last"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        server.wait_cancelled(1)
        process.stdout.close()


def test_an_interrupt_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    with FakeServer(token_delay_s=0.2) as server:
        out = tmp_path / "a.npz"
        process = subprocess.Popen(
            [
                *COMMAND,
                "activations",
                *["x"] * 50,
                "--hook-point",
                HOOK,
                "-o",
                str(out),
                "--target",
                server.target,
            ],
            stderr=subprocess.PIPE,
        )
        _wait(lambda: server.active_calls == 1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 130
        assert b"Traceback" not in said
        server.wait_cancelled(1)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_traceback(server: FakeServer) -> None:
    command = shlex.join([*COMMAND, "generate", "x", "--max-tokens", "400", "--json"])
    shell = f"{command} | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_terminal_gets_tables_and_a_bar(server: FakeServer, tmp_path: Path) -> None:
    def shown(*arguments: str) -> str:
        parent, child = pty.openpty()
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=child,
            stderr=child,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
        )
        os.close(child)
        data = b""
        while True:
            try:
                piece = os.read(parent, 65536)
            except OSError:
                break
            data += piece
        os.close(parent)
        assert process.wait(20) == 0, data
        return data.decode()

    assert "hook point" in shown("hook-points")
    assert "5 tokens in" in shown("generate", "x", "--max-tokens", "5")
    server.token_delay_s = 0.15
    bar = shown("activations", "x", "y", "--hook-point", HOOK, "-o", str(tmp_path / "a.npz"))
    assert "reading" in bar and "1/2" in bar


def test_a_refusal_has_no_traceback(server: FakeServer) -> None:
    done = run("generate", "x", "--max-tokens", "0")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: 0 is not positive\n")


SERVER_MAIN = "def main(argv):\n    print(argv)\n    return 7\n"


@pytest.fixture
def fake_server_package(tmp_path: Path) -> Path:
    """A `glasshouse.server.main` that stands before the real one."""
    package = tmp_path / "glasshouse" / "server"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "main.py").write_text(SERVER_MAIN)
    return tmp_path


def test_serve_hands_its_arguments_on_untouched(fake_server_package: Path) -> None:
    arguments = ["--model", "fable", "--dictionary", "a=b", "--dictionary=c=d", "-v", "--help", "extra"]
    done = _serve(fake_server_package, *arguments)
    assert done.stdout.strip() == repr(arguments)
    assert done.returncode == 7


def test_serve_without_the_extra_says_what_to_install(fake_server_package: Path) -> None:
    main = fake_server_package / "glasshouse" / "server" / "main.py"
    main.write_text("import a_module_of_the_server_extra\n")
    done = _serve(fake_server_package, "--model", "fable")
    assert done.returncode == 1
    assert "pip install 'glasshouse[server]'" in done.stderr and "Traceback" not in done.stderr


def _serve(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "import glasshouse\n"
        f"glasshouse.__path__ = [{str(folder / 'glasshouse')!r}, *glasshouse.__path__]\n"
        "from glasshouse.cli.main import run; run()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "serve", *arguments], capture_output=True, text=True, check=False
    )


def _wait(condition: object) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)
