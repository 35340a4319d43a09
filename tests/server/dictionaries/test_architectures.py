"""Every architecture against the float64 reference: encode, top-k, chosen features, decode, error."""

from __future__ import annotations

import math

import pytest
import torch
from tests.server.dictionaries import reference as ref
from torch import Tensor

from glasshouse.server.dictionaries import encode as tiled
from glasshouse.server.dictionaries.architectures import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    TopK,
)
from glasshouse.server.dictionaries.features import NO_FEATURE, SparseFeatures
from glasshouse.server.dictionaries.formats.build import cross_layer, crosscoder, single_site
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.dictionaries.normalisation import ConstantNorm, FixedScale, LayerNorm, Standardise
from glasshouse.server.dictionaries.parameters import DecoderBlock, DecoderScale
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument, NotFound

N, D, F = 13, 24, 320
HOOK = ("blocks.1.hook_resid_post",)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape) * 7919)
    return torch.randn(*shape, generator=generator) * scale


X, W_ENC, W_DEC = draw(N, D), draw(D, F, seed=1, scale=0.3), draw(F, D, seed=2, scale=0.3)
B_ENC, B_DEC = draw(F, seed=3, scale=0.2), draw(D, seed=4, scale=0.5)
THRESHOLD = draw(F, seed=5).abs() * 0.8
B_GATE, B_MAG, R_MAG = draw(F, seed=6, scale=0.3), draw(F, seed=7, scale=0.3), draw(F, seed=8, scale=0.2)

ARCHITECTURES: dict[str, tuple[Activation, object]] = {
    "standard": (ReLU(), ref.relu),
    "jumprelu": (JumpReLU(threshold=THRESHOLD), lambda h: ref.jumprelu(h, THRESHOLD.double())),
    "gated": (
        Gated(b_gate=B_GATE, b_mag=B_MAG, r_mag=R_MAG),
        lambda h: ref.gated(h, *ref.f64(B_GATE, B_MAG, R_MAG)),
    ),
    "topk": (TopK(keep=9), lambda h: ref.topk(h, 9)),
    "topk more than positive": (TopK(keep=250), lambda h: ref.topk(h, 250)),
    "topk without relu": (TopK(keep=250, relu=False), lambda h: ref.topk(h, 250, positive=False)),
    "batchtopk": (BatchTopK(threshold=0.7), lambda h: ref.jumprelu(h, 0.7)),
    "batchtopk never estimated": (BatchTopK(threshold=-1.0), ref.relu),
    "groupmax": (GroupMax(groups=16), lambda h: ref.groupmax(h, 16)),
    "abstopk": (AbsTopK(keep=11), lambda h: ref.abstopk(h, 11)),
}


def dense_top_k(dictionary: LinearDictionary, x: Tensor, k: int) -> Tensor:
    return dictionary.encode_top_k(x, k).sparse().to_dense()


def agree(dictionary: LinearDictionary, x: Tensor, f: Tensor, y: Tensor) -> None:
    """All ways to read and write a dictionary against reference features f (N, F) and output y, float64."""
    fired = dictionary.encode(x)
    ref.close(fired.to_dense(), f)
    ref.same_active(fired.to_dense(), f)
    assert bool((fired.values != 0).all()) and fired.values.dtype == torch.float32
    ref.close(dictionary.reconstruct(x), y)
    ref.close(dictionary.decode(fired, x), y)
    k = 6
    signed = dictionary.facts.architecture == "abstopk"
    ref.close(dense_top_k(dictionary, x, k), ref.abstopk(f, k) if signed else _largest(f, k))
    chosen = torch.tensor([5, 0, dictionary.facts.d_sae - 1, 17, 5])
    ref.close(dictionary.encode_features(x, chosen), f[:, chosen])


def _largest(f: Tensor, k: int) -> Tensor:
    """The k largest of the features that fired; negative ones only where fewer than k are positive."""
    key = torch.where(f == 0, torch.full_like(f, -math.inf), f)
    return torch.where(f == 0, f, ref._keep(f, key, k))


@pytest.fixture(params=[True, False], ids=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(tiled, "TILE_SCORES", 1)
        monkeypatch.setattr(tiled, "NARROWEST_TILE", 64)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("subtract", [False, True], ids=["x", "x - b_dec"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_architecture_equals_the_reference(name: str, subtract: bool) -> None:
    activation, nonlinearity = ARCHITECTURES[name]
    b_enc = None if name == "gated" else B_ENC
    dictionary = LinearDictionary(
        "d",
        single_site(
            W_enc=W_ENC,
            W_dec=W_DEC,
            b_enc=b_enc,
            b_dec=B_DEC,
            activation=activation,
            source_format="test",
            hook_points_in=HOOK,
            hook_points_out=HOOK,
            subtract_b_dec=subtract,
        ),
    )
    x, W_enc, W_dec, b_dec = ref.f64(X, W_ENC, W_DEC, B_DEC)
    h = (x - b_dec if subtract else x) @ W_enc + (0 if b_enc is None else b_enc.double())
    f = nonlinearity(h)  # type: ignore[operator]
    agree(dictionary, X, f, f @ W_dec + b_dec)
    ref.close(dictionary.error(X), x - (f @ W_dec + b_dec), 1e-4)


def test_tied_encoder_is_the_decoders_transpose() -> None:
    tied = LinearDictionary(
        "d",
        single_site(
            W_enc=W_DEC.T,
            W_dec=W_DEC,
            b_enc=B_ENC,
            b_dec=B_DEC,
            activation=ReLU(),
            source_format="test",
            hook_points_in=HOOK,
            hook_points_out=HOOK,
        ),
    )
    x, W_dec, b_enc, b_dec = ref.f64(X, W_DEC, B_ENC, B_DEC)
    f = ref.relu(x @ W_dec.T + b_enc)
    agree(tied, X, f, f @ W_dec + b_dec)
    assert tied.parameters.encoders[0].W_enc.data_ptr() == W_DEC.data_ptr()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("keep", [True, False], ids=["values stay scaled", "selection only"])
@pytest.mark.parametrize("activation", [TopK(keep=9), JumpReLU(threshold=THRESHOLD), AbsTopK(keep=9)])
def test_decoder_norm_scale(keep: bool, activation: Activation) -> None:
    dictionary = LinearDictionary(
        "d",
        single_site(
            W_enc=W_ENC,
            W_dec=W_DEC,
            b_enc=B_ENC,
            b_dec=B_DEC,
            activation=activation,
            source_format="test",
            hook_points_in=HOOK,
            hook_points_out=HOOK,
            scale=DecoderScale(keep=keep),
        ),
    )
    x, W_enc, W_dec, b_enc, b_dec = ref.f64(X, W_ENC, W_DEC, B_ENC, B_DEC)
    n = (W_dec**2).sum(1) ** 0.5
    scaled = (x @ W_enc + b_enc) * n
    nonlinearity = {
        "topk": lambda h: ref.topk(h, 9),
        "jumprelu": lambda h: ref.jumprelu(h, THRESHOLD.double()),
        "abstopk": lambda h: ref.abstopk(h, 9),
    }[activation.name]
    fired = nonlinearity(scaled)
    f = fired if keep else fired / n
    y = (fired / n) @ W_dec + b_dec
    agree(dictionary, X, f, y) if activation.name != "abstopk" or keep else ref.close(
        dictionary.reconstruct(X), y
    )
    ids = torch.tensor([3, 8])
    ref.close(dictionary.decoder_rows(ids), (W_dec / n[:, None] if keep else W_dec)[ids])


def _normalised(x: Tensor, name: str) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """(x~, scale, shift) with output = y * scale + shift."""
    if name == "layer_norm":
        normalised, mean, std = ref.layer_norm(x)
        return normalised, std, mean
    if name == "constant_norm_rescale":
        factor = x.shape[-1] ** 0.5 / ((x**2).sum(-1, keepdim=True) ** 0.5)
        return x * factor, 1 / factor, 0.0
    return x * 0.25, 1 / 0.5, 0.0


@pytest.mark.parametrize(
    "normalisation", [LayerNorm(), ConstantNorm(), None], ids=["layer", "constant", "fixed"]
)
def test_normalisation_comes_before_the_bias_and_is_undone(
    normalisation: LayerNorm | ConstantNorm | None,
) -> None:
    fixed = FixedScale(scale_in=torch.full((1, 1), 0.25), scale_out=torch.full((1, 1), 0.5))
    dictionary = LinearDictionary(
        "d",
        single_site(
            W_enc=W_ENC,
            W_dec=W_DEC,
            b_enc=B_ENC,
            b_dec=B_DEC,
            activation=ReLU(),
            source_format="test",
            hook_points_in=HOOK,
            hook_points_out=HOOK,
            subtract_b_dec=True,
            normalisation=normalisation or fixed,
        ),
    )
    x, W_enc, W_dec, b_enc, b_dec = ref.f64(X, W_ENC, W_DEC, B_ENC, B_DEC)
    inside, scale, shift = _normalised(x, "fixed" if normalisation is None else normalisation.name)
    f = ref.relu((inside - b_dec) @ W_enc + b_enc)
    agree(dictionary, X, f, (f @ W_dec + b_dec) * scale + shift)
    ids, deltas = torch.tensor([4, 9]), draw(N, 2, seed=31)
    edited = f.clone()
    edited[:, ids] += deltas.double()
    moved = ((edited @ W_dec + b_dec) - (f @ W_dec + b_dec)) * scale
    ref.close(dictionary.steering_delta(X, ids, deltas), moved)


def test_skip_transcoder_adds_the_raw_input_once() -> None:
    W_skip, W_out, b_out = draw(D, 16, seed=20), draw(F, 16, seed=21), draw(16, seed=22)
    dictionary = LinearDictionary(
        "t",
        single_site(
            W_enc=W_ENC,
            W_dec=W_out,
            b_enc=B_ENC,
            b_dec=b_out,
            activation=TopK(keep=5),
            source_format="test",
            hook_points_in=("blocks.1.ln2.hook_out",),
            hook_points_out=("blocks.1.hook_mlp_out",),
            W_skip=W_skip,
        ),
    )
    x, W_enc, b_enc, skip, W_dec, b_dec = ref.f64(X, W_ENC, B_ENC, W_skip, W_out, b_out)
    f = ref.topk(x @ W_enc + b_enc, 5)
    agree(dictionary, X, f, f @ W_dec + b_dec + x @ skip)
    assert dictionary.facts.kind == "transcoder" and dictionary.facts.has_skip
    with pytest.raises(InvalidArgument, match="hook_mlp_out"):
        dictionary.error(X)
    target = draw(N, 16, seed=23)
    ref.close(dictionary.error(X, target), target.double() - (f @ W_dec + b_dec + x @ skip), 1e-4)


@pytest.mark.usefixtures("tiles")
def test_crosscoder_sums_its_encoder_over_sites() -> None:
    n_sites = 3
    W_enc, W_dec = draw(n_sites, D, F, seed=40, scale=0.2), draw(F, n_sites, D, seed=41, scale=0.2)
    b_dec, mean = draw(n_sites, D, seed=42), draw(n_sites, D, seed=43)
    factor = torch.tensor([[0.5], [1.5], [0.8]])
    dictionary = LinearDictionary(
        "c",
        crosscoder(
            W_enc=W_enc.flatten(0, 1),
            W_dec=list(W_dec.unbind(1)),
            activation=ReLU(),
            b_enc=B_ENC,
            b_dec=b_dec,
            source_format="test",
            hook_points=tuple(f"blocks.{i}.hook_resid_post" for i in range(n_sites)),
            normalisation=Standardise(mean=mean, scale=factor),
        ),
    )
    x32 = draw(N, n_sites, D, seed=44)
    x, We, Wd, bd, m, s, be = ref.f64(x32, W_enc, W_dec, b_dec, mean, factor, B_ENC)
    inside = (x - m) * s
    f = ref.relu(torch.einsum("nsd,sdf->nf", inside, We) + be)
    y = (torch.einsum("nf,fsd->nsd", f, Wd) + bd) / (s + 1e-8) + m
    agree(dictionary, x32, f, y)
    ids = torch.tensor([7, 300])
    ref.close(dictionary.encoder_rows(ids), We[:, :, ids].permute(2, 0, 1))
    ref.close(dictionary.decoder_norms, (Wd**2).sum((1, 2)) ** 0.5)
    with pytest.raises(InvalidArgument, match="3, 24"):
        dictionary.encode(X)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("activation", ["jumprelu", "topk per group", "topk of all"])
def test_cross_layer_transcoder_writes_its_own_and_later_layers(activation: str) -> None:
    n_layers, per_layer = 3, 64
    encoders = [draw(D, per_layer, seed=50 + i, scale=0.3) for i in range(n_layers)]
    W_dec = [draw(per_layer, n_layers - i, D, seed=60 + i, scale=0.3) for i in range(n_layers)]
    b_enc, b_dec = draw(n_layers * per_layer, seed=70, scale=0.2), draw(n_layers, D, seed=71)
    threshold = draw(n_layers * per_layer, seed=72).abs()
    rules: dict[str, Activation] = {
        "jumprelu": JumpReLU(threshold=threshold),
        "topk per group": TopK(keep=4, per_group=True),
        "topk of all": TopK(keep=10),
    }
    dictionary = LinearDictionary(
        "clt",
        cross_layer(
            encoders=encoders,
            decoders=[
                DecoderBlock(W_dec=W_dec[i][:, j], group=i, site=i + j)
                for i in range(n_layers)
                for j in range(n_layers - i)
            ],
            activation=rules[activation],
            b_enc=b_enc,
            b_dec=b_dec,
            source_format="test",
            hook_points_in=tuple(f"blocks.{i}.hook_resid_mid" for i in range(n_layers)),
            hook_points_out=tuple(f"blocks.{i}.hook_mlp_out" for i in range(n_layers)),
        ),
    )
    x32 = draw(N, n_layers, D, seed=73)
    x = x32.double()
    h = torch.stack([x[:, i] @ encoders[i].double() for i in range(n_layers)], 1) + b_enc.double().view(3, -1)
    if activation == "jumprelu":
        f = ref.jumprelu(h, threshold.double().view(n_layers, per_layer)).flatten(1)
    else:
        f = ref.topk(h, 4).flatten(1) if activation == "topk per group" else ref.topk(h.flatten(1), 10)
    y = b_dec.double().expand(N, n_layers, D).clone()
    for target in range(n_layers):
        for source in range(target + 1):
            part = f[:, source * per_layer : (source + 1) * per_layer]
            y[:, target] += part @ W_dec[source][:, target - source].double()
    agree(dictionary, x32, f, y)
    assert dictionary.facts.flat_id(2, 5) == 2 * per_layer + 5
    assert dictionary.facts.group_of(2 * per_layer + 5) == (2, 5)
    rows = dictionary.decoder_rows(torch.tensor([per_layer + 3]))
    assert bool((rows[0, 0] == 0).all()), "a feature of layer 1 writes nothing to layer 0"


def _half(name: str) -> LinearDictionary:
    activation, _ = ARCHITECTURES[name]
    return LinearDictionary(
        "h",
        single_site(
            W_enc=W_ENC.bfloat16(),
            W_dec=W_DEC.bfloat16(),
            b_enc=None if name == "gated" else B_ENC.bfloat16(),
            b_dec=B_DEC.bfloat16(),
            activation=activation,
            source_format="test",
            hook_points_in=HOOK,
            hook_points_out=HOOK,
        ),
    )


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_bfloat16_weights_under_float32_activations_are_exact(name: str) -> None:
    x, W_enc, W_dec, b_dec = ref.f64(X, W_ENC.bfloat16(), W_DEC.bfloat16(), B_DEC.bfloat16())
    h = x @ W_enc + (0 if name == "gated" else B_ENC.bfloat16().double())
    f = ARCHITECTURES[name][1](h)  # type: ignore[operator]
    agree(_half(name), X, f, f @ W_dec + b_dec)


@pytest.mark.parametrize("name", ["standard", "jumprelu", "gated", "topk", "abstopk", "groupmax"])
def test_bfloat16_throughout_stays_within_its_rounding(name: str) -> None:
    dictionary = _half(name)
    x = X.bfloat16()
    W_enc = W_ENC.bfloat16().double()
    h = x.double() @ W_enc + (0 if name == "gated" else B_ENC.bfloat16().double())
    f = ARCHITECTURES[name][1](h)  # type: ignore[operator]
    found = dictionary.encode(x).to_dense()
    both = (found != 0) & (f != 0)
    assert float(both.sum()) >= 0.9 * float((f != 0).sum())
    assert float((found.double() - f)[both].abs().max()) <= 2**-6 * float(f.abs().max())
    top = dictionary.encode_top_k(x, 4)
    assert bool((top.values[:, :-1].abs() >= top.values[:, 1:].abs()).all())


def test_top_k_pads_where_fewer_fire() -> None:
    dictionary = LinearDictionary(
        "d",
        single_site(
            W_enc=W_ENC,
            W_dec=W_DEC,
            b_enc=torch.full((F,), -4.0),
            b_dec=B_DEC,
            activation=ReLU(),
            source_format="test",
            hook_points_in=HOOK,
            hook_points_out=HOOK,
        ),
    )
    top = dictionary.encode_top_k(X, 50)
    counts = dictionary.encode(X).indptr.diff()
    assert top.ids.shape == (N, 50) and int(counts.min()) < 50
    assert torch.equal((top.ids != NO_FEATURE).sum(1), counts)
    assert bool((top.values[top.ids == NO_FEATURE] == 0).all())


def test_refusals_name_the_feature_and_the_parts() -> None:
    dictionary = _half("standard")
    with pytest.raises(NotFound, match=f"no feature {F}"):
        dictionary.decoder_rows(torch.tensor([F]))
    with pytest.raises(InvalidArgument, match="k is 0"):
        dictionary.encode_top_k(X, 0)
    with pytest.raises(
        FailedPrecondition, match=r"decoder of group 0 .* is \(319, 24\), expected \(320, 24\)"
    ):
        single_site(
            W_enc=W_ENC,
            W_dec=W_DEC[:-1],
            b_enc=B_ENC,
            b_dec=B_DEC,
            activation=ReLU(),
            source_format="test",
            hook_points_in=HOOK,
            hook_points_out=HOOK,
        ).check("file")


def test_random_tiles_never_lose_a_survivor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The running table against one torch.topk, over random shapes, duplicates and hostile orders."""
    monkeypatch.setattr(tiled, "NARROWEST_TILE", 64)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        n_rows, k = 1 + seed % 9, 1 + (seed * 5) % 40
        n_features = 64 * (1 + seed % 7) + (seed % 3) * 11
        scores = torch.randn(n_rows, n_features, generator=generator)
        if seed % 4 == 0:
            scores = scores.sort(dim=1).values  # every tile beats all before it
        signed = seed % 2 == 0
        table = tiled.RunningTopK(k, 0.0, signed, 0, scores[:, :64])
        for start in range(64, n_features, 64):
            table.offer(start, scores[:, start : start + 64])
        kept = SparseFeatures.from_entries(
            torch.arange(n_rows).repeat_interleave(k)[(table.ids != NO_FEATURE).flatten()],
            table.ids[table.ids != NO_FEATURE],
            table.scores[table.ids != NO_FEATURE],
            n_rows,
            n_features,
        ).to_dense()
        double = scores.double()
        ref.close(kept, ref.abstopk(double, k) if signed else ref.topk(double, k), 1e-12)


def test_empty_input_is_empty_output() -> None:
    dictionary = _half("standard")
    assert dictionary.encode(X[:0]).n_positions == 0
    assert dictionary.encode_top_k(X[:0], 3).ids.shape == (0, 3)
    assert dictionary.reconstruct(X[:0]).shape == (0, D)
