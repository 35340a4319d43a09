"""Which registry a server's settings mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from glasshouse.server.registry.names import Kind
from glasshouse.server.registry.opening import default_data_folder, opened
from glasshouse.server.types.configuration import RegistrySettings
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument

from . import drafts


def test_a_folder_keeps_what_is_published(tmp_path: Path) -> None:
    settings = RegistrySettings(data=str(tmp_path / "new" / "folder"))
    with opened(settings) as registry:
        registry.publish(drafts.direction())
    with opened(settings) as registry:
        assert len(registry.list(Kind.DIRECTION).records) == 1


def test_memory_leaves_nothing_behind() -> None:
    with opened(RegistrySettings(url="memory")) as registry:
        folder = Path(registry.location.removeprefix("sqlite+pysqlite:///")).parent
        registry.publish(drafts.direction())
        assert folder.is_dir()
    assert not folder.exists()


def test_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLASSHOUSE_DATA", str(tmp_path / "said"))
    assert default_data_folder() == tmp_path / "said"
    monkeypatch.delenv("GLASSHOUSE_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_folder() == tmp_path / "glasshouse"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_data_folder() == tmp_path / "home" / ".local" / "share" / "glasshouse"


def test_a_home_that_cannot_be_written_is_no_reason_not_to_serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "below")
    monkeypatch.delenv("GLASSHOUSE_DATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", below)
    with opened(RegistrySettings()) as registry:
        registry.publish(drafts.direction())
        assert below not in registry.location
    monkeypatch.setenv("GLASSHOUSE_DATA", below)
    with pytest.raises(FailedPrecondition, match="cannot be written"), opened(RegistrySettings()):
        pass
    with (
        pytest.raises(FailedPrecondition, match="cannot be written"),
        opened(RegistrySettings(data=str(tmp_path / "file" / "below"))),
    ):
        pass


def test_a_shared_database_needs_a_shared_place_for_tensors() -> None:
    with (
        pytest.raises(InvalidArgument, match="where its tensors lie"),
        opened(RegistrySettings(url="postgresql://nobody@/x")),
    ):
        pass
