"""Differently treated requests in one batch equal Hugging Face with hooks one at a time, in everything that vLLM does.

And the negative controls: what keeps that true is taken away, and the same comparison must fail.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.oracles.plain_hooks import Oracle
from tests.oracles.treatments import N_TOKENS, PROMPTS, READ, hooked, treatments
from tests.oracles.vllm_engines import require

from glasshouse import fable
from glasshouse.server.dictionaries.open import open_dictionaries
from glasshouse.server.dictionaries.store import DictionaryStore, HeldDictionary
from glasshouse.server.engines.preparation import Preparation
from glasshouse.server.engines.vllm.contract import Ledger, RequestPlan, cache_salt, plan_request
from glasshouse.server.engines.vllm.contract.settings import SITES, dictionary_key
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.models.loading import load_model
from glasshouse.server.types.interventions import Intervention, ScaleFeatures, SetFeatures
from glasshouse.server.types.models import ModelInfo
from glasshouse.server.types.readouts import ReadActivations, ReadFeatures, ReadLogitLens

from .harness import ROOT, Answered, Ask, Session, run_vllm

require()
pytestmark = pytest.mark.timeout(600)

SAE = "resid-post-3"
SAE_POINT = "blocks.3.hook_resid_post"


@dataclass(frozen=True)
class Treated:
    """A request: its plan and salt, and what the oracle is told."""

    prompt: tuple[int, ...]
    plan: RequestPlan
    salt: str | None
    edits: Sequence[Any]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(fable.model_path(), dtype="float32", device="cpu", name="fable")


@pytest.fixture(scope="module")
def sae() -> Any:
    return open_dictionaries(SAE, str(fable.dictionary_path(SAE)))[0]


@pytest.fixture(scope="module")
def preparation(model: Any, sae: Any) -> Preparation:
    import torch

    table = HookTable(model)
    store = DictionaryStore(1 << 30)
    point = table.resolve(SAE_POINT)
    store.add(
        HeldDictionary(
            name=SAE, path="", dictionary=sae, points_in=(point,), points_out=(point,), size_bytes=0
        )
    )
    info = ModelInfo(
        name="fable", family="llama", n_layers=model.n_layers, d_model=model.d_model, n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads, d_head=model.d_head, d_mlp=model.d_mlp, vocab_size=model.vocab_size,
        context_length=512, dtype="float32", device="cpu", engine="vllm", has_chat_template=False,
        eos_token_ids=model.eos_token_ids, bos_token_id=model.bos_token_id,
        special_token_ids=model.special_token_ids, capabilities=(), final_logit_softcap=None,
    )  # fmt: skip
    return Preparation(
        info=info, table=table, device=torch.device("cpu"), dictionaries=store, max_readout_bytes=1 << 30
    )


@pytest.fixture(scope="module")
def treated(model: Any, preparation: Preparation) -> list[Treated]:
    """The treatments at hook points that this engine has, on prompts of several lengths."""
    chosen = [
        treatment
        for treatment in treatments(model.d_model, model.d_mlp)
        if all(part.ours.hook_point.split(".", 2)[-1] in SITES for part in treatment)
    ]
    requests = []
    for index, treatment in enumerate([*chosen, *chosen[:4]]):
        prompt = tuple(model.tokenizer.encode(PROMPTS[(index * 3) % len(PROMPTS)]))
        n_fed = len(prompt) + N_TOKENS - 1
        edits = preparation.edits(tuple(p.ours for p in treatment), prompt=prompt, n_fed=n_fed)
        readouts = preparation.readouts(
            (
                ReadActivations(hook_point=READ),
                ReadLogitLens(hook_point="blocks.3.hook_resid_mid", top_k=3),
                ReadFeatures(dictionary=SAE, top_k=8),
                ReadFeatures(dictionary=SAE, features=(5, 17, 1013)),
            ),
            prompt=prompt,
            n_fed=n_fed,
        )
        keys = {SAE: dictionary_key(SAE, 1)}
        plan = plan_request(index + 1, len(prompt), edits, readouts, dictionary_keys=keys)
        salt = cache_salt(edits, dictionary_keys=keys)
        requests.append(Treated(prompt, plan, salt, hooked(treatment, len(prompt))))
    return requests


@pytest.fixture(scope="module")
def expected(treated: Sequence[Treated]) -> list[Any]:
    oracle = Oracle()
    names = [READ, SAE_POINT, "blocks.3.hook_resid_mid"]
    return [oracle.greedy(request.prompt, N_TOKENS, request.edits, names) for request in treated]


def asks(treated: Sequence[Treated], **changed: Any) -> list[Ask]:
    """The requests as the gateway would send them."""
    return [
        Ask(**({"prompt": r.prompt, "plan": r.plan, "max_tokens": N_TOKENS, "salt": r.salt, "skip_cache": True} | changed))
        for r in treated
    ]  # fmt: skip


def run(tmp_path: Path, wanted: Sequence[Ask], engine: Mapping[str, Any], **more: Any) -> Session:
    session = run_vllm(
        tmp_path,
        wanted,
        engine={"model": str(fable.model_path()), "max_model_len": 512, **engine},
        dictionaries=[(SAE, str(fable.dictionary_path(SAE)))],
        **more,
    )
    assert not session.failure, session.failure[-4000:]
    return session


def disagreement(request: Treated, answer: Answered, expected: Any, sae: Any, *, reporters: int = 1) -> str:
    """What of an answer is not as the oracle has it, "" when nothing is."""
    ids, logprobs, captures = expected
    if answer.error:
        return answer.error
    if len(set(answer.armed)) != reporters:
        return f"armed by {answer.armed}"
    if answer.token_ids != ids:
        return f"tokens {answer.token_ids} instead of {ids}"
    if np.abs(np.subtract(answer.logprobs, logprobs)).max() > 1e-4:
        return "log-probabilities"
    fed = range(len(request.prompt) + N_TOKENS - 1)
    for readout in range(4):
        if not set(fed) <= set(answer.rows.get(readout, {})):
            return f"positions of readout {readout}"
    found = np.stack([answer.rows[0][p][0] for p in fed])
    reference = captures[READ].numpy()
    if np.abs(found - reference).max() > 1e-4 * max(1.0, np.abs(reference).max()):
        return "activations"
    return features_disagreement(answer, captures[SAE_POINT], sae) or accounts_disagree(request, answer)


def features_disagreement(answer: Answered, stream: Any, sae: Any) -> str:
    """Features against the dictionary on the oracle's activations."""
    import torch

    dense = sae.encode_features(stream, torch.arange(sae.facts.d_sae)).numpy()
    for position in range(len(dense)):
        ids, values = answer.rows[2][position]
        kept = ids >= 0
        np.testing.assert_allclose(values[kept], dense[position, ids[kept]], atol=1e-3)
        best = np.sort(dense[position])[::-1][: kept.sum()]
        if np.abs(best - values[kept]).max(initial=0) > 1e-3:
            return f"top features at {position}"
        named_ids, named = answer.rows[3][position]
        if named_ids.tolist() != [5, 17, 1013] or np.abs(named - dense[position, named_ids]).max() > 1e-3:
            return f"named features at {position}"
    return ""


def accounts_disagree(request: Treated, answer: Answered) -> str:
    """The workers' account of what they applied against the clauses."""
    tokens = [*request.prompt, *answer.token_ids]
    fed = len(tokens) - 1
    for rank, runs in answer.ran.items():
        # Every rank of these tests reports for the sites of its own stage, which the edits of its runs are.
        ledger = Ledger(request.plan.edits)
        for run_ in runs:
            ledger.ran(*run_)
        if len(answer.ran) == 1 and (mismatch := ledger.first_mismatch(tokens)) is not None:
            return f"rank {rank} applied {mismatch}"
        if not ledger.complete(fed):
            return f"rank {rank} never ran some positions"
    return ""


def check(
    treated: Sequence[Treated], session: Session, expected: Sequence[Any], sae: Any, **more: Any
) -> None:
    for index, (request, answer) in enumerate(zip(treated, session.answers, strict=True)):
        wrong = disagreement(request, answer, expected[index], sae, **more)
        assert not wrong, f"request {index}: {wrong}"


MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "chunked": {"max_num_batched_tokens": 32, "max_num_seqs": 16},
    "preempted": {
        "num_gpu_blocks_override": 12,
        "block_size": 32,
        "max_num_seqs": 16,
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
    },
    "speculating": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    },
    "compiled": {"enforce_eager": False},
    "tensor_parallel": {"tensor_parallel_size": 2},
}


@pytest.mark.parametrize("mode", sorted(MODES))
def test_one_batch_equals_one_at_a_time(
    mode: str, tmp_path: Path, treated: list[Treated], expected: list[Any], sae: Any
) -> None:
    session = run(tmp_path, asks(treated), MODES[mode])
    check(treated, session, expected, sae)
    if mode == "preempted":
        assert session.preemptions > 0, "nothing was preempted: the mode was not tried"
    for stats in session.stats:
        assert stats["edit_slots_used"] <= max(r.plan.n_edits for r in treated) * len(treated)
        assert stats["requests_failed"] == 0


@pytest.mark.skipif(find_spec("triton") is None, reason="Model Runner V2 needs Triton")
def test_model_runner_v2(tmp_path: Path, treated: list[Treated], expected: list[Any], sae: Any) -> None:
    """The other runner, which GPUs use by default: here through Triton's interpreter."""
    (tmp_path / "sitecustomize.py").write_text("from tests.vllm_worker import v2_shim\nv2_shim.install()\n")
    paths = [str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    few = treated[:6]
    session = run(
        tmp_path / "run",
        asks(few),
        {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128},
        environment={"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": os.pathsep.join(paths)},
        timeout_s=560,
    )
    assert session.boots[0]["runner"] == "v2"
    check(few, session, expected[:6], sae)


@pytest.fixture(scope="module")
def repeated(treated: list[Treated], preparation: Preparation, model: Any) -> list[Treated]:
    """Requests whose prompts span several cache blocks."""
    found = []
    for index, treatment in enumerate(treatments(model.d_model, model.d_mlp)[1:7]):
        prompt = tuple(model.tokenizer.encode(PROMPTS[0])) * 6
        n_fed = len(prompt) + N_TOKENS - 1
        edits = preparation.edits(tuple(p.ours for p in treatment), prompt=prompt, n_fed=n_fed)
        readouts = preparation.readouts((ReadActivations(hook_point=READ),), prompt=prompt, n_fed=n_fed)
        plan = plan_request(index + 1, len(prompt), edits, readouts, dictionary_keys={})
        steered = plan_request(index + 1, len(prompt), edits, (), dictionary_keys={})
        assert plan.reads_prompt and not steered.reads_prompt
        found.append(
            Treated(prompt, plan, cache_salt(edits, dictionary_keys={}), hooked(treatment, len(prompt)))
        )
    return found


@pytest.mark.parametrize("control", ["", "no_salt", "no_skip"])
def test_a_warm_prefix_cache(control: str, tmp_path: Path, repeated: list[Treated]) -> None:
    oracle = Oracle()
    steered = [
        RequestPlan(tag=100 + r.plan.tag, n_prompt=r.plan.n_prompt, edits=r.plan.edits) for r in repeated
    ]
    salts = [None if control == "no_salt" else r.salt for r in repeated]
    wanted = [Ask(prompt=r.prompt, max_tokens=2) for r in repeated]
    # The same treatment twice: the second finds the first one's keys and values under its salt.
    for wave in (1, 2):
        wanted += [
            Ask(prompt=r.prompt, plan=RequestPlan(tag=plan.tag * 10 + wave, n_prompt=plan.n_prompt, edits=plan.edits),
                max_tokens=N_TOKENS, salt=salt, wave=wave)
            for r, plan, salt in zip(repeated, steered, salts, strict=True)
        ]  # fmt: skip
    wanted += [
        Ask(
            prompt=r.prompt,
            plan=r.plan,
            max_tokens=N_TOKENS,
            salt=salt,
            wave=3,
            skip_cache=control != "no_skip",
        )
        for r, salt in zip(repeated, salts, strict=True)
    ]
    session = run(tmp_path, wanted, {"block_size": 32})
    n = len(repeated)
    wrong_tokens = missing = 0
    for index, request in enumerate(repeated):
        ids, logprobs, _ = oracle.greedy(request.prompt, N_TOKENS, request.edits, [READ])
        for answer in (session.answers[n + index], session.answers[2 * n + index]):
            assert not answer.error
            near = answer.token_ids == ids and np.abs(np.subtract(answer.logprobs, logprobs)).max() < 1e-4
            wrong_tokens += not near
        read = session.answers[3 * n + index]
        fed = set(range(len(request.prompt) + N_TOKENS - 1))
        missing += not fed <= set(read.rows.get(0, {}))
    if control != "no_salt":
        assert session.answers[2 * n].cached > 0, "the second wave did not read the cache: nothing was tried"
    assert bool(wrong_tokens) == (control == "no_salt")
    assert bool(missing) == (control == "no_skip")


def test_edits_of_features(tmp_path: Path, model: Any, preparation: Preparation, sae: Any) -> None:
    import torch

    prompt = tuple(model.tokenizer.encode(PROMPTS[0]))
    n_fed = len(prompt) + N_TOKENS - 1
    keys = {SAE: dictionary_key(SAE, 1)}
    dense = sae.encode_features(
        Oracle().forward(prompt, (), [SAE_POINT])[1][SAE_POINT], torch.arange(sae.facts.d_sae)
    )
    strongest = dense[1:].mean(0).topk(3).indices.tolist()
    edits_of = [
        SetFeatures(dictionary=SAE, features=(strongest[0], 40), values=(12.0, 4.0)),
        ScaleFeatures(dictionary=SAE, features=tuple(strongest), factors=(0.0,)),
    ]
    wanted, oracles = [], []
    for index, edit in enumerate(edits_of):
        made = preparation.edits((Intervention(hook_point="", edit=edit),), prompt=prompt, n_fed=n_fed)
        plan = plan_request(index + 1, len(prompt), made, (), dictionary_keys=keys)
        wanted.append(
            Ask(prompt=prompt, plan=plan, max_tokens=N_TOKENS, salt=cache_salt(made, dictionary_keys=keys))
        )

        def change(s: torch.Tensor, edit: Any = edit) -> torch.Tensor:
            ids = torch.tensor(edit.features)
            now = sae.encode_features(s[None], ids)[0]
            if isinstance(edit, SetFeatures):
                then = torch.tensor(edit.values)
            else:
                then = now * torch.tensor(edit.factors)
            return s + (then - now) @ sae.decoder_rows(ids)

        oracles.append([(SAE_POINT, lambda p: True, change)])
    session = run(tmp_path, wanted, {})
    oracle = Oracle()
    for answer, edits in zip(session.answers, oracles, strict=True):
        assert not answer.error
        ids, logprobs, _ = oracle.greedy(prompt, N_TOKENS, edits)
        assert answer.token_ids == ids
        np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-4)
        (runs,) = answer.ran.values()
        assert sum(applied for _, _, applied in runs) == n_fed


def test_a_hook_that_does_not_fire_ends_the_start(tmp_path: Path) -> None:
    session = run_vllm(
        tmp_path,
        [],
        engine={
            "model": str(fable.model_path()),
            "max_model_len": 64,
            "worker_cls": "tests.vllm_worker.sabotage.SilentWorker",
        },
    )
    assert "blocks.2.hook_mlp_out did not fire" in session.failure


def test_a_hook_that_stops_firing_fails_its_requests_and_no_others(
    tmp_path: Path, treated: list[Treated], expected: list[Any], sae: Any
) -> None:
    session = run(tmp_path, asks(treated), {"worker_cls": "tests.vllm_worker.sabotage.FallingSilentWorker"})
    for index, (request, answer) in enumerate(zip(treated, session.answers, strict=True)):
        sites = {site for edit in request.plan.edits for site in edit.sites_out}
        if sites & {"blocks.2.hook_resid_post", "blocks.3.hook_resid_pre", "blocks.2.hook_mlp_out"}:
            assert answer.error.startswith("not_applied: blocks.2.hook_mlp_out did not fire")
        else:
            assert not disagreement(request, answer, expected[index], sae), f"request {index}"
