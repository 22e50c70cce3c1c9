"""The estimators that benchmarks/shares.py compares ours with, against QuaPy 0.2.3 on the same probabilities.

QuaPy is not installed here: its results, `EMQ.EM(prior, posteriors, epsilon=1e-9)` and `KDEyML.aggregate` with its
default bandwidth of 0.1, are typed in.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

EMQ = [0.11699, 0.24048, 0.64253]
KDEY = [0.12244, 0.25703, 0.62053]


@pytest.fixture(scope="module")
def quantifiers() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "quantifiers.py"
    spec = importlib.util.spec_from_file_location("quantifiers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quantifiers"] = module
    spec.loader.exec_module(module)
    return module


def drawn(num: int, shares: list[float], seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return true classes, and the probabilities of an overconfident network."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, num, p=shares)
    logits = rng.normal(0.0, 1.0, (num, 3))
    logits[np.arange(num), truth] += 2.0
    exponentials = np.exp(1.3 * logits)
    return truth, exponentials / exponentials.sum(axis=1, keepdims=True)


TRUTH, PROBS = drawn(400, [0.5, 0.3, 0.2], seed=0)
NEW_PROBS = drawn(300, [0.1, 0.2, 0.7], seed=1)[1]
EVEN = np.ones(400)


def test_soft_em_gives_the_shares_of_quapy(quantifiers: ModuleType) -> None:
    likelihoods = quantifiers.soft_likelihoods(TRUTH, PROBS, NEW_PROBS, EVEN)
    shares = quantifiers.estimated_shares(likelihoods, np.ones((1, 300)))
    assert shares[0] == pytest.approx(EMQ, abs=1e-4)


def test_kernel_densities_give_the_shares_of_quapy(quantifiers: ModuleType) -> None:
    points, new_points = (quantifiers.calibrated(TRUTH, PROBS, each) for each in (PROBS, NEW_PROBS))
    likelihoods = quantifiers.kernel_likelihoods(TRUTH, quantifiers.kernels(points, new_points, 0.1), EVEN)
    shares = quantifiers.estimated_shares(likelihoods, np.ones((1, 300)))
    assert shares[0] == pytest.approx(KDEY, abs=1e-4)


def test_a_face_counts_as_often_as_its_group_has_it(quantifiers: ModuleType) -> None:
    likelihoods = quantifiers.soft_likelihoods(TRUTH, PROBS, NEW_PROBS, EVEN)
    counts = np.zeros((2, 300))
    counts[0], counts[1, :50] = 1.0, 6.0
    shares = quantifiers.estimated_shares(likelihoods, counts)
    alone = quantifiers.estimated_shares(likelihoods[:50], np.ones((1, 50)))

    assert shares[0] == pytest.approx(EMQ, abs=1e-4)
    assert shares[1] == pytest.approx(alone[0], abs=1e-4)


def test_resampled_shares_are_around_the_estimate_and_may_leave_the_simplex(quantifiers: ModuleType) -> None:
    likelihoods = quantifiers.soft_likelihoods(TRUTH, PROBS, NEW_PROBS, EVEN)
    first = quantifiers.calibrated(TRUTH, PROBS, NEW_PROBS).argmax(axis=1) == 0
    counts = np.stack([np.ones(300), 1.0 * first])  # the second group: faces of one class
    shares = quantifiers.estimated_shares(likelihoods, counts)
    resampled = quantifiers.bootstrapped_shares([likelihoods] * 200, counts, shares, np.random.default_rng(0))

    assert resampled.shape == (200, 2, 3)
    assert resampled[:, 0].mean(axis=0) == pytest.approx(shares[0], abs=0.01)
    assert 0.02 < resampled[:, 0].std(axis=0).max() < 0.05  # as chance in 300 faces, and a little more
    assert resampled[:, 1].min() < -0.01
