"""Each command through typer's runner: what it prints, and what it exits with."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from glasshouse.cli.main import app
from glasshouse.client import Client
from glasshouse.client.testing import Failure, FakeServer

HOOK = "blocks.0.hook_resid_post"


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def test_models_and_hook_points(server: FakeServer) -> None:
    assert run("models").stdout.split("\t")[:4] == ["fake", "fake", "2", "8"]
    assert json.loads(run("models", "--json").stdout)[0]["context_length"] == 512
    lines = run("hook-points").stdout.splitlines()
    assert len(lines) == 7
    assert lines[0].split("\t")[:4] == ["hook_embed", "embed", "8", "rw"]
    assert len(run("hook-points", "--layer", 1).stdout.splitlines()) == 3
    found = json.loads(run("hook-points", "--grep", "pattern", "--json").stdout)
    assert [point["name"] for point in found] == ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]
    assert not found[0]["writable"]


def test_tokenize(server: FakeServer) -> None:
    assert run("tokenize", "ab").stdout == "0\t256\t'<bos>'\n1\t97\t'a'\n2\t98\t'b'\n"
    assert json.loads(run("tokenize", "ab", "--no-special", "--json").stdout) == {
        "ids": [97, 98],
        "strings": ["a", "b"],
    }


def test_generate_streams_the_text_the_client_gets(server: FakeServer, vector: Path) -> None:
    with Client(server.target) as client:
        text = client.model().generate("Once", max_tokens=9, seed=5).result().text
    plain = run("generate", "Once", "--max-tokens", 9, "--seed", 5).stdout
    assert plain == text + "\n"
    steered = run("generate", "Once", "--max-tokens", 9, "--seed", 5, "--steer", f"{HOOK}={vector}*4").stdout
    assert steered != plain
    sent = server.calls[-1].request.interventions[0]
    assert (sent.hook_point, sent.add_vector.coefficient) == (HOOK, 4.0)


def test_generate_sends_what_it_is_told(server: FakeServer, vector: Path, tmp_path: Path) -> None:
    tensors = tmp_path / "direction.safetensors"
    save_file({"direction": np.arange(8, dtype=np.float32)}, tensors)
    run(
        *("generate", "x", "--max-tokens", 2, "--temperature", 0, "--top-p", 0.9, "--top-k", 3, "--seed", -7),
        *("--stop", "a", "--stop", "b", "--ignore-eos", "--positions", "1:", "--timeout", 9),
        *(
            "--steer",
            f"{HOOK}={vector}",
            "--steer",
            f"{HOOK}={tensors}*-1.5",
            "--ablate",
            f"hook_embed={vector}",
        ),
    )
    request = server.calls[-1].request
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0, 0.9, 3)
    assert (request.sampling.seed, list(request.stop), request.ignore_eos) == (-7, ["a", "b"], True)
    assert [edit.WhichOneof("edit") for edit in request.interventions] == [
        "add_vector",
        "add_vector",
        "ablate_direction",
    ]
    assert [edit.add_vector.coefficient for edit in request.interventions[:2]] == [1.0, -1.5]
    assert {edit.positions.span.start for edit in request.interventions} == {1}


def test_generate_json_is_one_event_a_line(server: FakeServer) -> None:
    out = run(
        "generate", "ab", "--max-tokens", 3, "--json", "--read", HOOK, "--lens", f"{HOOK}:2", "--logprobs", 1
    )
    events = [json.loads(line) for line in out.stdout.splitlines()]
    assert [event["event"] for event in events] == ["prompt", "token", "token", "token", "finished"]
    assert np.shape(events[0]["activations"][HOOK]["values"]) == (3, 8)
    assert len(events[0]["logit_lens"][HOOK]["top"]) == 3
    assert np.shape(events[1]["activations"][HOOK]) == (8,)
    assert len(events[1]["logit_lens"][HOOK]["token_ids"]) == 2
    assert events[-1]["finish_reason"] == "length" and events[-1]["usage"]["generated_tokens"] == 3
    assert "".join(event["text"] for event in events[1:-1]) == events[-1]["text"]


def test_generate_with_readouts_is_a_line_a_token(server: FakeServer) -> None:
    out = run(
        "generate", "ab", "--max-tokens", 3, "--read", HOOK, "--lens", f"{HOOK}:1", "--logprobs", 2
    ).stdout
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == ["3", "4", "5"]
    assert all(line[4].startswith(f"{HOOK}: ") and line[5].startswith(f"|{HOOK}|") for line in lines)


def test_score(server: FakeServer, vector: Path) -> None:
    lines = run("score", "ab", "--top-k", 2).stdout.splitlines()
    assert len(lines) == 3 and lines[0].split("\t")[2] == ""
    found = json.loads(run("score", "ab", "--json", "--steer", f"{HOOK}={vector}").stdout)
    assert found["logprobs"][0] is None and found["logprobs"][1] < 0
    assert found["receipt"][0]["positions_applied"] == 3


def test_activations_of_one_text(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    said = run("activations", "abc", "--hook-point", HOOK, "--hook-point", "hook_embed", "-o", out).stdout
    assert str(out) in said
    with Client(server.target) as client, np.load(out) as saved:
        acts = client.model().activations("abc", hook_points=HOOK)
        assert set(saved) == {HOOK, "hook_embed", "token_ids", "positions"}
        assert np.array_equal(saved[HOOK], acts[HOOK])
        assert saved["token_ids"].tolist() == acts.token_ids
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_of_many_texts(server: FakeServer, tmp_path: Path, dtype: str) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"text {n}\n\n" for n in range(70)))
    out = tmp_path / "a.safetensors"
    said = run(
        *("activations", "first", "--file", lines, "--hook-point", HOOK, "--positions", "last"),
        *("-o", out, "--dtype", dtype, "--json"),
    )
    summary = json.loads(said.stdout)
    assert summary["inputs"] == 71 and summary["arrays"][f"70/{HOOK}"] == [1, 8]
    assert sum(call.method == "ExtractActivations" for call in server.calls) == 2
    with Client(server.target) as client, safe_open(out, "pt") as saved:
        expected = client.model().activations("text 69", hook_points=HOOK, positions=[7], dtype=dtype)  # type: ignore[call-overload]
        array = saved.get_tensor(f"70/{HOOK}")
        assert array.float().numpy().tolist() == expected[HOOK].astype(np.float32).tolist()
        assert str(array.dtype) == f"torch.{dtype}"


def test_safetensors_of_bfloat16_can_steer(server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_file({"v": np.ones(8, dtype=ml_dtypes.bfloat16)}, path)
    run("generate", "x", "--max-tokens", 1, "--steer", f"{HOOK}={path}*2")


def usage_errors(tmp_path: Path) -> dict[str, list[object]]:
    np.save(tmp_path / "v.npy", np.ones(8))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "junk.npy").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 20)
    save_file({"a": np.ones(1), "b": np.ones(1)}, tmp_path / "two.safetensors")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    out, hook = ["-o", tmp_path / "o.npz"], ["--hook-point", HOOK]
    steer = [["generate", "x", "--steer", text] for text in (
        "*2", "v.npy*2", f"{HOOK}=", f"={tmp_path}/v.npy", f"{HOOK}={tmp_path}/v.npy*strong",
        f"{HOOK}=/nowhere.npy",        f"{HOOK}={tmp_path}/objects.npy", f"{HOOK}={tmp_path}/junk.npy",
        f"{HOOK}={tmp_path}/junk.safetensors",
        f"{HOOK}={tmp_path}/two.safetensors", f"{HOOK}={tmp_path}/v.txt",
    )]  # fmt: skip
    others = [
        ["generate"],
        ["generate", "x", "--max-tokens", "many"],
        ["generate", "x", "--max-tokens", 1 << 40],
        ["generate", "x", "--positions", "some"],
        ["generate", "x", "--positions", "1:2:3"],
        ["generate", "x", "--lens", f"{HOOK}:x"],
        ["generate", "x", "--no-such-option"],
        ["generate", "x", "--timeout", 0],
        ["generate", "x", "--target", "example.org:1", "--api-key", "k"],
        ["generate", "x", "--tls-ca", "/nowhere.pem"],
        ["activations", *hook, *out],
        ["activations", "x", *out],
        ["activations", "x", *hook],
        ["activations", "x", *hook, "-o", tmp_path / "o.txt"],
        ["activations", "x", *hook, *out, "--dtype", "bfloat16"],
        ["activations", "x", *hook, *out, "--dtype", "int8"],
        ["activations", "x", *hook, "-o", "/nowhere/o.npz"],
        ["activations", "x", *hook, "-o", "/nowhere/o.safetensors"],
        ["activations", *hook, *out, "--file", "/nowhere.txt"],
        ["activations", *hook, *out, "--file", tmp_path / "latin.txt"],
        ["nonsense"],
    ]
    return {" ".join(map(str, case)): case for case in [*steer, *others]}


def test_bad_usage_exits_2_and_says_why(server: FakeServer, tmp_path: Path) -> None:
    for name, case in usage_errors(tmp_path).items():
        result = CliRunner().invoke(app, [str(argument) for argument in case])
        assert result.exit_code == 2, (name, result.output, result.exception)
        assert result.stderr and "Traceback" not in result.stderr, name
        assert result.stdout == "", name
    assert not [call for call in server.calls if call.method in ("Generate", "ExtractActivations")]


def test_a_refusal_exits_1_with_message_and_remedy(server: FakeServer, tmp_path: Path) -> None:
    said = run("generate", "x", "--steer", f"{HOOK}={_vector(tmp_path, 3)}", status=1).stderr
    assert "error: the width is (3,)" in said and "remedy: Pass a vector of 8 elements" in said
    assert "field: interventions[0].add_vector.vector" in said and "request: " in said
    said = run("hook-points", "--model", "fak", status=1).stderr
    assert "closest: fake" in said
    out = tmp_path / "a.npz"
    run("activations", "x", "--hook-point", "nope", "-o", out, status=1)
    assert not out.exists() and not list(tmp_path.glob("*.part"))
    server.fail("Score", Failure("RESOURCE_EXHAUSTED", "queue full", reason="QUEUE_FULL", retry_after_s=2))
    assert "retry after: 2 s" in run("score", "x", status=1).stderr


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("models", "--target", "localhost:1", "--timeout", 1, status=1).stderr
    assert "no server answers at localhost:1" in said and "glasshouse serve" in said


def test_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer(api_key="k") as server:
        assert "Pass api_key=" in run("models", "--target", server.target, status=1).stderr
        monkeypatch.setenv("GLASSHOUSE_API_KEY", "k")
        run("models", "--target", server.target)


def test_version() -> None:
    assert run("version").stdout.startswith("glasshouse ")
    assert set(json.loads(run("version", "--json").stdout)) == {"version"}


def _vector(folder: Path, width: int) -> Path:
    path = folder / f"{width}.npy"
    np.save(path, np.ones(width))
    return path
