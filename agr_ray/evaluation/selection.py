"""Calibrated class probabilities, and when to abstain.

Temperature scaling (Guo et al. 2017, ICML), and abstention by selective classification with a guaranteed risk (Geifman
and El-Yaniv 2017, NeurIPS).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agr_ray.evaluation.conformal import MIN_ROWS
from agr_ray.evaluation.estimates import CONFIDENCE, exact_ends
from agr_ray.evaluation.terms import FloatArray
from agr_ray.labels import IntArray

TEMPERATURES: Final = (0.2, 5.0)
"""Lowest and highest temperature tried. Without any errors, the best temperature would be 0, which means certainty."""

NEVER_SURE: Final = 2.0
"""The `abstain_below` that no probability reaches."""

_NUM_SHARES: Final = 20
_STARTS: Final = (2, 5, 10, 20)
"""Shares, in twentieths, at which sequences of tests start."""
_LEAST_PROBABILITY = 1e-7  # float32 probabilities saturate at 0 and 1, whose logit is infinite


@dataclass(frozen=True)
class ClassCalibration:
    """Calibration of gender or race: a temperature, and a threshold for abstaining."""

    n: int
    """Number of images that it was fitted on."""
    temperature: float
    """Divides the logits: above 1, the network was overconfident."""
    abstain_below: float
    """Probability of the likeliest class below which the model abstains; 0: never; `NEVER_SURE`: always."""


def fit_classes(
    task: str, truth: IntArray, probs: NDArray[np.floating[Any]], risk: float, notes: list[str]
) -> ClassCalibration | None:
    """Fit temperature and threshold; without a labelled image, return None and add a note.

    Args:
        task: in notes.
        truth: (n,) indices; -1: missing.
        probs: (n, classes), uncalibrated.
        risk: maximum share of errors among images for which the model does not abstain.
        notes: a note on anything that could not be fitted is appended.
    """
    known = truth >= 0
    truth, probs = truth[known], probs[known]
    if not len(truth):
        notes.append(f"{task}: no labelled image")
        return None
    temperature = 1.0
    if len(truth) < MIN_ROWS:
        notes.append(f"{task}: {len(truth)} labelled images are too few to fit a temperature: 1 is used")
    else:
        temperature = _fit_temperature(truth, probs)
        if np.isclose(temperature, TEMPERATURES[0], rtol=0.01):
            # With almost no errors, lower is always likelier, but on other images it would be overconfident.
            temperature = 1.0
            notes.append(f"{task}: too few of {len(truth)} labelled images are wrong to fit a temperature: 1 is used")
        elif np.isclose(temperature, TEMPERATURES[1], rtol=0.01):
            notes.append(
                f"{task}: the temperature is {temperature:.2f}, the largest that is tried; a larger one may fit better"
            )
    calibrated = scaled_probs(probs, temperature)
    wrong = calibrated.argmax(axis=1) != truth
    abstain_below = _fit_threshold(calibrated.max(axis=1), wrong, risk)
    if abstain_below == NEVER_SURE:
        example = ", such as 0.4 (up to 40 % wrong is accepted)" if risk < 0.4 else ""
        notes.append(
            f"{task}: always abstains: with {len(truth)} labelled images, {100 * wrong.mean():.1f} % of them wrong, no "
            f"probability guarantees that at most {100 * risk:g} % of its answers are wrong; more validation images or "
            f"a better model help, or a higher --abstain_risk{example}"
        )
    return ClassCalibration(len(truth), temperature, abstain_below)


def _fit_temperature(truth: IntArray, probs: NDArray[np.floating[Any]]) -> float:
    """Minimise the negative log-likelihood, which has a single minimum, over the log of the temperature."""
    from scipy.optimize import minimize_scalar  # takes long to import; only fitting needs it
    from scipy.special import log_softmax

    logits = logits_of(probs)
    rows = np.arange(len(truth))

    def mean_nll(log_temperature: float) -> float:
        return -float(log_softmax(logits / math.exp(log_temperature), axis=1)[rows, truth].mean())

    found = minimize_scalar(mean_nll, bounds=np.log(TEMPERATURES), method="bounded")
    return math.exp(found.x)


def _fit_threshold(confidence: FloatArray, wrong: NDArray[np.bool_], risk: float) -> float:
    """Return the smallest of 19 thresholds above which the error is at most `risk` with a confidence of 95 %.

    The thresholds accept the most confident 10, 15, ... 100 % of the images. Fixed-sequence testing (Angelopoulos et
    al., "Learn then Test", 2021): from each of a few starting shares, accept more images until a test fails. Each
    sequence tests at its part of the 5 %. There are several starts, because a few confident mistakes or a small sample
    would fail the first test of one.
    """
    highest_first = np.sort(confidence)[::-1]
    tail = (1.0 - CONFIDENCE) / len(_STARTS)
    lowest = NEVER_SURE
    for start in _STARTS:
        for share in range(start, _NUM_SHARES + 1):
            last = math.ceil(share / _NUM_SHARES * len(confidence)) - 1
            threshold = 0.0 if share == _NUM_SHARES else float(highest_first[last])
            accepted = confidence >= threshold
            num_wrong = wrong[accepted].sum()
            _, highest_error = exact_ends(num_wrong, accepted.sum() - num_wrong, tail)
            if highest_error > risk:
                break
            lowest = min(lowest, threshold)
    return lowest


def logits_of(probs: NDArray[np.floating[Any]]) -> FloatArray:
    """Return the logarithms of probabilities, which serve as logits."""
    logits: FloatArray = np.log(np.clip(probs.astype(np.float64), _LEAST_PROBABILITY, 1.0))
    return logits


def scaled_probs(probs: NDArray[np.floating[Any]], temperature: float) -> FloatArray:
    """Return (n, classes) probabilities whose logits are divided by the temperature."""
    from scipy.special import softmax  # takes long to import; without a calibration it is not needed

    scaled: FloatArray = softmax(logits_of(probs) / temperature, axis=1)
    return scaled
