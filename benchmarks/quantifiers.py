"""Estimators of the shares of classes among faces that need each face's probabilities, for comparison with ours.

`agr_ray.tables.prevalence` needs only the number of faces by predicted class. Like it, both estimators maximise the
likelihood of the faces as a mixture of the classes. They differ in the likelihood of a face under a class, (faces,
classes), which they learn from calibration images:

- `soft_likelihoods`: the calibrated probability of the class divided by its share among the calibration images (soft
  EM: Saerens, Latinne and Decaestecker 2002, with the probabilities calibrated as Alexandari, Kundaje and Shrikumar
  2020, ICML, recommend: one temperature, and a bias for each class).
- `kernel_likelihoods`: a kernel density of the calibration images of the class (KDEy-ML: Gonzalez, Moreo and Sebastiani
  2024, Machine Learning 113). The kernel compares vectors of probabilities, or predicted ages.

`estimated_shares` maximises by EM; `bootstrapped_shares` are for intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

BANDWIDTH: Final = 0.1
"""Of the kernel on probabilities: QuaPy's default."""
BANDWIDTH_YEARS: Final = 2.0
"""Of the kernel on predicted ages."""

_MAX_STEPS: Final = 2000
_TOLERANCE: Final = 1e-6
_LEAST_LIKELIHOOD: Final = 1e-12
_LEAST_PROBABILITY: Final = 1e-7


def soft_likelihoods(truth: IntArray, probs: FloatArray, new_probs: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the likelihoods of n faces, up to a factor of each face.

    Args:
        truth: (m,) classes of the calibration images, none missing.
        probs: (m, c) their predicted probabilities.
        new_probs: (n, c) of the faces.
        weights: (m,) how often each calibration image counts.
    """
    temperature, biases = _calibration(truth, probs, weights)
    posterior = np.exp(log_softmax(_logits(new_probs) / temperature + biases, axis=1))
    shares = np.bincount(truth, weights, probs.shape[1]) / weights.sum()
    return np.maximum(posterior, _LEAST_LIKELIHOOD) / np.maximum(shares, _LEAST_LIKELIHOOD)


def calibrated(truth: IntArray, probs: FloatArray, new_probs: FloatArray) -> FloatArray:
    """Return the calibrated probabilities of n faces, (n, c); arguments as those of `soft_likelihoods`."""
    temperature, biases = _calibration(truth, probs, np.ones(len(truth)))
    return np.exp(log_softmax(_logits(new_probs) / temperature + biases, axis=1))


def kernels(points: FloatArray, new_points: FloatArray, bandwidth: float) -> FloatArray:
    """Return the Gaussian kernel between n faces and m calibration images, (n, m), up to a constant factor."""
    squares = (new_points**2).sum(axis=1)[:, None] + (points**2).sum(axis=1) - 2.0 * new_points @ points.T
    return np.exp(-0.5 * np.maximum(squares, 0.0) / bandwidth**2)


def kernel_likelihoods(truth: IntArray, kernel: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the likelihoods of n faces from the (n, m) `kernels`, and weights of the m calibration images."""
    of_class = (truth[:, None] == np.arange(truth.max() + 1)) * weights[:, None]
    return np.maximum(kernel @ of_class / of_class.sum(axis=0), _LEAST_LIKELIHOOD)


def estimated_shares(likelihoods: FloatArray, counts: FloatArray) -> FloatArray:
    """Return the most likely shares in each of g groups by EM, (g, c).

    Args:
        likelihoods: (n, c).
        counts: (g, n) how often each face is in the group.
    """
    shares = np.full((len(counts), likelihoods.shape[1]), 1.0 / likelihoods.shape[1])
    totals = counts.sum(axis=1, keepdims=True)
    for _ in range(_MAX_STEPS):
        better = shares * ((counts / (shares @ likelihoods.T)) @ likelihoods) / totals
        change, shares = np.abs(better - shares).max(), better
        if change < _TOLERANCE:
            break
    return shares / shares.sum(axis=1, keepdims=True)


def bootstrapped_shares(
    likelihoods: Sequence[FloatArray], counts: FloatArray, shares: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """Return shares of resampled calibration images and faces that may be negative, (r, g, c).

    Each is one step of Newton's method from the estimate towards the maximum of the resampled likelihood, without the
    limits of 0 and 1: estimates that pile up there make intervals too narrow.

    Args:
        likelihoods: r times (n, c), each of other resampled calibration images.
        counts: (g, n) as those of `estimated_shares`.
        shares: (g, c) its result.
        rng: resamples the faces.
    """
    num_faces = counts.sum(axis=1).astype(np.int64)
    result = np.empty((len(likelihoods), *shares.shape))
    for index, each in enumerate(likelihoods):
        drawn = np.stack([rng.multinomial(n, row / n) for n, row in zip(num_faces, counts, strict=True)])
        mixed = shares @ each.T
        pairs = (each[:, :, None] * each[:, None, :]).reshape(len(each), -1)
        gradient = (drawn / mixed) @ each - num_faces[:, None]
        information = ((drawn / mixed**2) @ pairs).reshape(len(shares), *[each.shape[1]] * 2)
        step = np.linalg.pinv(information, rcond=1e-9, hermitian=True) @ gradient[:, :, None]
        result[index] = shares + step[:, :, 0]
    return result


def _calibration(truth: IntArray, probs: FloatArray, weights: FloatArray) -> tuple[float, FloatArray]:
    """Return the temperature and the biases, (c,), that make the true classes most likely."""
    logits, rows = _logits(probs), np.arange(len(truth))
    is_true = truth[:, None] == np.arange(probs.shape[1])
    total = weights.sum()

    def loss(values: FloatArray) -> tuple[float, FloatArray]:
        scale, biases = np.exp(values[0]), values[1:]
        log_posterior = log_softmax(scale * logits + biases, axis=1)
        errors = weights[:, None] * (np.exp(log_posterior) - is_true) / total
        of_scale = scale * (errors * logits).sum()
        value = -float(weights @ log_posterior[rows, truth]) / total + 1e-4 * float(values @ values)
        return value, np.concatenate([[of_scale], errors.sum(axis=0)]) + 2e-4 * values

    best = minimize(loss, np.zeros(1 + probs.shape[1]), jac=True, method="L-BFGS-B").x
    return float(np.exp(-best[0])), best[1:]


def _logits(probs: FloatArray) -> FloatArray:
    return np.log(np.clip(probs, _LEAST_PROBABILITY, 1.0))
