"""The configuration file, the flags over it, and the pages that describe both."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from glasshouse.server import main as serve
from glasshouse.server.transport.configuration import ConfigurationError, from_tables, load
from glasshouse.server.types.configuration import Settings

DEPLOY = Path(__file__).parents[3] / "deploy"


def sections() -> dict[str, dict[str, Any]]:
    """Every setting and its default."""
    settings = Settings()
    return {
        field.name: dataclasses.asdict(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if field.name not in ("dictionaries", "secrets")
    }


def parsed(*argv: str) -> Settings:
    return serve.settings_from(serve._parser().parse_args(argv))


def test_every_kind_of_value(tmp_path: Path) -> None:
    file = tmp_path / "glasshouse.toml"
    file.write_text(
        """
        [model]
        threads = 2
        allow_remote_code = true
        [dictionaries]
        sae = "/data/sae"
        [server]
        drain_timeout_s = 5
        [keys]
        entries = ["a user b"]
        [limits]
        max_tokens = 7
        """
    )
    settings = load(file)
    assert (settings.model.threads, settings.model.allow_remote_code) == (2, True)
    assert settings.dictionaries == {"sae": "/data/sae"}
    assert settings.server.drain_timeout_s == 5.0
    assert settings.keys.entries == ("a user b",)
    assert settings.limits.max_tokens == 7


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"limit": {}}, "'limit' is no section; did you mean limits"),
        ({"limits": {"max_token": 1}}, "'max_token' is no setting of .limits.; did you mean max_tokens"),
        ({"zzz": {}}, "there are model"),
        ({"limits": 3}, r"write it as \[limits\]"),
        ({"limits": {"max_tokens": "7"}}, "limits.max_tokens is '7', it must be a whole number"),
        ({"limits": {"max_tokens": True}}, "limits.max_tokens is True"),
        ({"limits": {"max_tokens": 0}}, "limits.max_tokens is 0, it must be above 0"),
        ({"limits": {"max_deadline_s": float("nan")}}, "limits.max_deadline_s"),
        ({"limits": {"default_deadline_s": 9.0, "max_deadline_s": 8.0}}, "above limits.max_deadline_s"),
        ({"server": {"listen": 50051}}, "a string in quotes"),
        ({"server": {"insecure_listen": "yes"}}, "true or false"),
        ({"server": {"drain_timeout_s": -1}}, "0 or more"),
        ({"keys": {"entries": "a"}}, "a list of strings"),
        ({"log": {"format": "xml"}}, "one of auto, console, json"),
        ({"log": {"level": "loud"}}, "log.level"),
        ({"dictionaries": {"a": 1}}, "dictionaries.a"),
        ({"secrets": {"a": "hunter2"}}, "secrets.a must say where the secret is found"),
        ({"secrets": {"a": "env:"}}, "secrets.a must say"),
        ({"monitors": {"text": "always"}}, "one of caller, never"),
        ({"monitors": {"webhook_hosts": "x"}}, "a list of strings"),
    ],
)
def test_what_is_refused_and_how(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        from_tables(tables)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model")
    with pytest.raises(ConfigurationError, match="not TOML"):
        load(tmp_path / "bad.toml")


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "g.toml"
    file.write_text(
        "[model]\nmodel = 'x/y'\nthreads = 3\n[dictionaries]\na = 'A'\n[limits]\nmax_running = 5\n"
    )
    settings = parsed(
        "--config", str(file), "--threads", "1", "--dictionary", "b=B=C", "--log-level", "debug"
    )
    assert (settings.model.model, settings.model.threads) == ("x/y", 1)
    assert settings.dictionaries == {"a": "A", "b": "B=C"}
    assert (settings.limits.max_running, settings.log.level) == (5, "debug")
    assert parsed("--max-running", "9").limits.max_running == 9
    assert parsed() == Settings()


def test_models_are_named_by_their_last_part(tmp_path: Path) -> None:
    assert serve.engine_settings(parsed("--model", "org/tiny-model")).name == "tiny-model"
    assert serve.engine_settings(parsed("--model", str(tmp_path / "folder") + "/")).name == "folder"
    assert serve.engine_settings(parsed("--model", "a", "--name", "b")).name == "b"
    with pytest.raises(serve.StartError, match="cannot be a model's name"):
        serve.engine_settings(parsed("--model", "a", "--name", "b/c"))


def test_the_flags_are_pinned() -> None:
    flags = {text for action in serve._parser()._actions for text in action.option_strings}
    assert flags == {
        "-h", "--help", "--model", "--name", "--engine", "--dictionary", "--listen", "--metrics", "--config",
        "--dtype", "--device", "--threads", "--vllm", "--max-running", "--log-format", "--log-level",
        "--allow-remote-code", "--insecure-listen", "--data", "--registry", "--registry-blobs",
    }  # fmt: skip


def test_the_example_shows_every_setting_with_its_default() -> None:
    text = (DEPLOY / "glasshouse.toml").read_text()
    shown = tomllib.loads(re.sub(r"^#(?=\w+ = |\[)", "", text, flags=re.MULTILINE))
    shown.pop("dictionaries")
    shown.pop("secrets")
    assert from_tables(tomllib.loads(text)) == Settings()
    assert shown == {
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for name, values in sections().items()
    }


def test_the_operations_page_lists_every_setting_with_its_default() -> None:
    page = (DEPLOY / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+\.\w+)` \| (.*?) \|", page, re.MULTILINE))
    expected = {
        f"{section}.{key}": f"`{written(value)}`"
        for section, values in sections().items()
        for key, value in values.items()
    }
    assert rows == expected


def test_the_operations_page_lists_every_metric_and_flag() -> None:
    from .test_metrics import CONTRACT

    page = (DEPLOY / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(glasshouse_\w+)` \| (\w+) \|", page, re.MULTILINE))
    assert rows == {name: kind for name, (kind, _) in CONTRACT.items()}
    for action in serve._parser()._actions:
        assert f"`{action.option_strings[-1]}`" in page


def written(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return str(list(value)) if isinstance(value, tuple) else str(value)


def test_settings_of_vllm(tmp_path: Path) -> None:
    file = tmp_path / "g.toml"
    file.write_text(
        "[vllm]\ntensor_parallel_size = 2\ngpu_memory_utilization = 1\n"
        '[vllm.speculative]\nmethod = "ngram"\nnum_speculative_tokens = 3\n'
        "[vllm.arguments]\nswap_space = 2\n"
    )
    settings = parsed(
        "--config",
        str(file),
        "--vllm",
        "enforce_eager=true",
        "--vllm",
        "quantization=awq",
        "--vllm",
        "max_edits=7",
    )
    assert settings.vllm.tensor_parallel_size == 2
    assert settings.vllm.gpu_memory_utilization == 1.0
    assert settings.vllm.speculative == {"method": "ngram", "num_speculative_tokens": 3}
    assert settings.vllm.arguments == {"swap_space": 2}
    assert (settings.vllm.enforce_eager, settings.vllm.quantization, settings.vllm.max_edits) == (
        True,
        "awq",
        7,
    )
    assert serve.engine_settings(settings).vllm == settings.vllm
    table = parsed("--vllm", "speculative={method = 'ngram'}").vllm.speculative
    assert table == {"method": "ngram"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensor_parallel_size", "is not NAME=VALUE"),
        ("tensor_parallel=2", "did you mean tensor_parallel_size"),
        ("tensor_parallel_size=two", "must be a whole number"),
        ("tensor_parallel_size=0", "must be above 0"),
        ("gpu_memory_utilization=1.5", "must be at most 1"),
        ("distributed_executor=mpi", "must be one of"),
        ("speculative=ngram", "must be a table"),
    ],
)
def test_settings_of_vllm_that_cannot_be(given: str, message: str) -> None:
    with pytest.raises(serve.StartError, match=message):
        parsed("--vllm", given)
