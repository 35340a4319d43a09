"""Each metric against its definition in plain float64 arithmetic, whatever the batches; and the wrong-tap
alarm.
"""

from __future__ import annotations

import math

import pytest
import torch
from tests.server.dictionaries.layouts import Draw

from glasshouse.server.dictionaries import sanity
from glasshouse.server.dictionaries.architectures import JumpReLU
from glasshouse.server.dictionaries.features import SparseFeatures
from glasshouse.server.dictionaries.formats.build import single_site
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.dictionaries.metrics import ActivationMetrics, SpliceMetrics, ce_score, kl_score

N, F, D = 60, 40, 12


@pytest.mark.parametrize("batches", [(60,), (1, 20, 39), (30, 30)])
def test_metrics_equal_their_definitions(batches: tuple[int, ...]) -> None:
    draw = Draw(1)
    f = draw(N, F) * (draw(N, F) > 1)
    f[:, 5] = 0
    y, y_hat = draw(N, D) + 3, draw(N, D) + 2.5
    stream = ActivationMetrics(F, D)
    parts = zip(f.split(batches), y.split(batches), y_hat.split(batches))
    for f_part, y_part, out in parts:
        stream.add(SparseFeatures.from_dense(f_part), y_part, out)
    found = stream.result()
    f, y, y_hat = f.double(), y.double(), y_hat.double()
    error = ((y - y_hat) ** 2).sum(1)
    variance = (y**2).sum(1).mean() - (y.mean(0) ** 2).sum()
    dot, norm, norm_out = (y * y_hat).sum(1), y.norm(dim=1), y_hat.norm(dim=1)
    expected = {
        "n_tokens": N,
        "l0": (f != 0).sum(1).double().mean(),
        "l1": f.abs().sum(1).mean(),
        "mse": error.mean(),
        "explained_variance": 1 - error.mean() / variance,
        "fvu": error.sum() / ((y - y.mean(0)) ** 2).sum(),
        "cossim": (dot / (norm * norm_out)).mean(),
        "l2_ratio": (norm_out / norm).mean(),
        "relative_reconstruction_bias": (norm_out**2).mean() / dot.mean(),
        "n_dead": ((f != 0).sum(0) == 0).sum(),
    }
    for name, value in expected.items():
        assert math.isclose(float(getattr(found, name)), float(value), rel_tol=1e-6), name
    assert torch.equal(stream.density, (f != 0).double().mean(0))
    if batches == (60,):
        legacy = (1 - error / ((y - y.mean(0)) ** 2).sum(1)).mean()
        assert math.isclose(found.explained_variance_legacy, float(legacy), rel_tol=1e-9)


def test_splice_metrics() -> None:
    draw, n_vocab = Draw(2), 9
    clean, spliced, zero = draw(N, n_vocab), draw(N, n_vocab), draw(N, n_vocab)
    ids = torch.arange(N) % n_vocab
    stream = SpliceMetrics()
    for start in (0, 25):
        rows = slice(start, 25 if start == 0 else N)
        stream.add(clean[rows], spliced[rows], zero[rows], ids[rows])
    p = [torch.softmax(t.double(), -1) for t in (clean, spliced, zero)]
    ce = [float(-t[torch.arange(N), ids].log().mean()) for t in p]
    kl = [float((p[0] * (p[0].log() - t.log())).sum(1).mean()) for t in p[1:]]
    assert stream.cross_entropy == pytest.approx(tuple(ce))
    assert stream.divergence == pytest.approx(tuple(kl))
    assert stream.ce_score == pytest.approx((ce[2] - ce[1]) / (ce[2] - ce[0]))
    assert stream.kl_score == pytest.approx((kl[1] - kl[0]) / kl[1])
    assert ce_score(clean=2.0, spliced=2.0, zero=9.0) == 1 and kl_score(spliced=0.0, zero=3.0) == 1


def _planted(threshold: float) -> tuple[LinearDictionary, torch.Tensor]:
    """A dictionary that knows its data: sparse codes of orthogonal directions, and tokens made of them."""
    draw = Draw(3)
    basis = torch.linalg.qr(draw(64, 64))[0]
    codes = draw(200, 64).abs() * (draw(200, 64) > 1.3)
    dictionary = LinearDictionary(
        "planted",
        single_site(
            W_enc=basis.T.contiguous(),
            W_dec=basis,
            b_enc=torch.zeros(64),
            b_dec=torch.zeros(64),
            activation=JumpReLU(threshold=torch.full((64,), threshold)),
            source_format="test",
            hook_points_in=("blocks.1.hook_resid_post",),
            hook_points_out=("blocks.1.hook_resid_post",),
        ),
    )
    return dictionary, codes @ basis


def test_the_right_tap_is_quiet_and_the_wrong_one_loud() -> None:
    dictionary, x = _planted(0.05)
    right = sanity.check(dictionary, x)
    assert right.verdict == "fits" and right.warning == "" and right.fvu < 0.01
    wrong = sanity.check(dictionary, 30 * Draw(4)(200, 64), target=x)
    assert wrong.verdict == "absurd" and wrong.fvu > 100
    for word in ("WRONG TAP?", "planted", "blocks.1.hook_resid_post", "FVU", "ln2.hook_normalized"):
        assert word in wrong.warning
    silent, _ = _planted(1e9)
    assert "no feature fires" in sanity.check(silent, x).warning
    assert sanity.check(dictionary, x[:3]).verdict == "unmeasured"
