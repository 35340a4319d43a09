"""The dictionary in training: encoder, sparsity, decoder, in normalised units.

1. x~ = (x - mean) * scale per hook point, so that E||x~||^2 = D at each; targets alike. Both are fixed.
2. h = x~ W_enc, one encoder a group of features. A cross-layer transcoder has a group a layer, others one.
3. f = sparsifier(h); y~^ = f W_dec + b_dec.
4. The decoder row of a feature, over all it writes, has unit norm: gradients along it are removed before the
   step, and it is set to one after it. `mask` keeps a cross-layer transcoder causal.

Matrix products run in bfloat16 with float32 accumulation, as the model's own training does; parameters, their
gradients' sums and everything elementwise are float32.

Shapes: B batch, S hook points in, M out, D width, G groups, F features in all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from glasshouse.fable.dictionaries.recipes import DictionaryRecipe
from glasshouse.fable.dictionaries.sparsity import Sparsifier, make_sparsifier

_INITIAL_ENCODER_SCALE = 1.0


class Units(NamedTuple):
    """mean (S, D) and scale (S, 1) of some hook points: normalised = (raw - mean) * scale."""

    mean: Tensor
    scale: Tensor

    def enter(self, raw_BSD: Tensor) -> Tensor:
        """(B, S, D) in normalised units."""
        return (raw_BSD - self.mean) * self.scale


def measure_units(sample_BSD: Tensor) -> Units:
    """The units in which a sample (B, S, D) has zero mean and a mean squared norm of D at each hook point."""
    mean_SD = sample_BSD.mean(0)
    power_S = (sample_BSD - mean_SD).square().sum(-1).mean(0)
    return Units(mean_SD, (sample_BSD.shape[-1] / power_S).sqrt().unsqueeze(1))


class SparseCoder(nn.Module):
    """Parameters W_enc (G, S / G * D, F / G), W_dec (F, M * D), b_dec (M * D), and the sparsifier's own."""

    mean_in: Tensor
    scale_in: Tensor
    mean_out: Tensor
    scale_out: Tensor
    mask: Tensor

    def __init__(self, recipe: DictionaryRecipe, units_in: Units, units_out: Units) -> None:
        super().__init__()
        self.recipe = recipe
        groups, (n_in, width), n_out = recipe.n_groups, units_in.mean.shape, units_out.mean.shape[0]
        per_group = recipe.d_sae // groups
        generator = torch.Generator().manual_seed(recipe.seed)
        mask = torch.ones(recipe.d_sae, n_out * width)
        if groups > 1:
            for group in range(groups):
                mask[group * per_group : (group + 1) * per_group, : group * width] = 0.0
        W_dec = torch.randn(recipe.d_sae, n_out * width, generator=generator) * mask
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        if recipe.kind in ("sae", "crosscoder"):
            W_enc = W_dec.T.contiguous().unsqueeze(0)
        else:
            W_enc = torch.randn(groups, n_in // groups * width, per_group, generator=generator)
            W_enc /= W_enc.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(W_enc * _INITIAL_ENCODER_SCALE)
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(n_out * width))
        self.sparsifier: Sparsifier = make_sparsifier(recipe)
        for name, value in (
            ("mean_in", units_in.mean),
            ("scale_in", units_in.scale),
            ("mean_out", units_out.mean),
            ("scale_out", units_out.scale),
            ("mask", mask),
        ):
            self.register_buffer(name, value)

    @property
    def units_in(self) -> Units:
        return Units(self.mean_in, self.scale_in)

    @property
    def units_out(self) -> Units:
        return Units(self.mean_out, self.scale_out)

    def encode_linear(self, x_BSD: Tensor) -> Tensor:
        """h (B, F) of normalised inputs (B, S, D), without any bias."""
        n_batch, groups = x_BSD.shape[0], self.W_enc.shape[0]
        x_BGI = x_BSD.reshape(n_batch, groups, -1)
        with torch.autocast(x_BSD.device.type, torch.bfloat16):
            if groups == 1:
                h_BF = x_BGI[:, 0] @ self.W_enc[0]
            else:
                h_BF = torch.bmm(x_BGI.transpose(0, 1), self.W_enc).transpose(0, 1).flatten(1)
        return h_BF.float()

    def decode(self, f_BF: Tensor) -> Tensor:
        """Normalised outputs (B, M, D) of features."""
        with torch.autocast(f_BF.device.type, torch.bfloat16):
            product = f_BF @ self.W_dec
        return (product.float() + self.b_dec).view(-1, *self.mean_out.shape)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Removes from the decoder's gradient what would change a row's norm or break causality."""
        gradient = self.W_dec.grad
        assert gradient is not None, "called between backward and step"
        gradient *= self.mask
        gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Sets every decoder row to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def reset_features(self, features: Tensor, x_NSD: Tensor, error_NMD: Tensor) -> None:
        """Points each of `features` (N,) at one badly explained position: inputs (N, S, D), errors (N, M, D).

        Decoder: the direction of the error. Encoder: of the input for a transcoder, of the error for the others
        (theirs is the same space). A causal mask cuts the error first.
        """
        rows = error_NMD.flatten(1) * self.mask[features]
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)
        self.W_dec[features] = rows
        groups, per_group = self.W_enc.shape[0], self.W_enc.shape[2]
        if self.recipe.kind in ("sae", "crosscoder"):
            self.W_enc[0, :, features] = rows.T
        else:
            x_NGI = x_NSD.reshape(len(features), groups, -1)
            own = x_NGI[torch.arange(len(features)), features // per_group]
            own = own / own.norm(dim=1, keepdim=True).clamp_min(1e-6)
            self.W_enc[features // per_group, :, features % per_group] = own
        self.sparsifier.reset(features)
