"""Every format on files written to its documented layout, against the float64 reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.server.dictionaries import reference as ref
from tests.server.dictionaries.layouts import CASES, Case, transcoder_set

from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.open import estimate_bytes, open_dictionaries, open_dictionary
from glasshouse.server.types.errors import FailedPrecondition


def agree(dictionary: Dictionary, case: Case) -> None:
    fired = dictionary.encode(case.x)
    ref.close(fired.to_dense(), case.f)
    ref.same_active(fired.to_dense(), case.f)
    ref.close(dictionary.reconstruct(case.x), case.y)
    chosen = torch.tensor([3, 0, dictionary.facts.d_sae - 1])
    ref.close(dictionary.encode_features(case.x, chosen), case.f[:, chosen])
    whole = dictionary.encode_top_k(case.x, dictionary.facts.d_sae)
    ref.close(whole.sparse().to_dense(), case.f)
    assert dictionary.facts.architecture == case.architecture
    if case.hook_in:
        assert dictionary.facts.hook_points_in[0] == case.hook_in
    for name, value in case.expect.items():
        assert getattr(dictionary.facts, name) == value, name


@pytest.mark.parametrize("name", list(CASES))
def test_format_on_its_documented_layout(name: str, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    dictionary = open_dictionary("d", f"{case.path}{case.query}")
    agree(dictionary, case)
    agree(dictionary.to("cpu"), case)
    assert dictionary.facts.name == "d"
    assert dictionary.first_not_finite() == ""
    assert estimate_bytes(case.path) >= sum(t.numel() for t in (case.f[0],)) * 4


@pytest.mark.parametrize("kinds", [("relu", "jumprelu", "skip"), ("topk", "topk")])
def test_transcoder_set_opens_one_dictionary_a_layer(kinds: tuple[str, ...], tmp_path: Path) -> None:
    cases = transcoder_set(tmp_path, kinds)
    opened = open_dictionaries("mlp", tmp_path)
    assert [d.facts.name for d in opened] == [f"mlp/{i}" for i in range(len(kinds))]
    for dictionary, case in zip(opened, cases, strict=True):
        agree(dictionary, case)
    with pytest.raises(FailedPrecondition, match="a set of"):
        open_dictionary("mlp", tmp_path)


def test_approximations_are_said(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    case = CASES["bussmann batchtopk"](tmp_path / "a")
    assert "each position keeps its own" in open_dictionary("d", case.path).facts.notes[0]
    case = CASES["sparsify skip, old config"](tmp_path / "b")
    assert "FVU" in open_dictionary("d", case.path).facts.notes[0]
