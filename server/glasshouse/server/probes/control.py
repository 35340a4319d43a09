"""The control task: what a probe of the same make learns from labels that mean nothing (Hewitt & Liang 2019,
arXiv 1909.03368).

Each group of examples (a token type, a text, a pair's side; see `LabelledActivations.groups`) is given another group's
label, by one random permutation. Without groups each row is permuted by itself. A probe that does well on its task and
at chance on the control reads the concept; one that does well on both memorises. Selectivity is the difference of
their held-out accuracies.
"""

from __future__ import annotations

import numpy as np

from glasshouse.server.probes.examples import IntRows, LabelledActivations


def shuffled(examples: LabelledActivations, *, seed: int = 0) -> IntRows:
    """Labels of the shape of `examples.labels`, permuted over groups: a group whose rows agree keeps one label."""
    rng = np.random.default_rng(seed)
    if examples.groups is None or not _agree(examples.labels, examples.groups):
        permuted: IntRows = examples.labels[rng.permutation(examples.n_examples)]
        return permuted
    _, firsts, of_row = np.unique(examples.groups, return_index=True, return_inverse=True)
    by_group: IntRows = examples.labels[firsts][rng.permutation(len(firsts))]
    return by_group[of_row]


def _agree(labels: IntRows, groups: IntRows) -> bool:
    _, firsts, of_row = np.unique(groups, return_index=True, return_inverse=True)
    return bool((labels[firsts][of_row] == labels).all())
