"""True shares are estimated from the predictions of a classifier with known errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from agr_ray.tables.prevalence import (
    MIN_CALIBRATION_ROWS,
    Shares,
    confusion_counts,
    true_shares,
    why_not,
    why_not_together,
)

RACES = np.array(  # outcomes: the five classes and, last, abstained
    [
        [0.84, 0.01, 0.02, 0.02, 0.03, 0.08],
        [0.02, 0.82, 0.02, 0.04, 0.01, 0.09],
        [0.03, 0.01, 0.86, 0.01, 0.02, 0.07],
        [0.06, 0.06, 0.02, 0.68, 0.04, 0.14],
        [0.20, 0.05, 0.05, 0.13, 0.32, 0.25],
    ]
)
GENDERS = np.array([[0.86, 0.08, 0.06], [0.12, 0.85, 0.03]])
SURE = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def drawn_confusion(rates: NDArray[Any], num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw labelled images, evenly of each class."""
    return np.array([rng.multinomial(num_rows // len(rates), row) for row in rates])


def drawn_counts(rates: list[NDArray[Any]], shares: NDArray[Any], num_faces: int, rng: Any) -> NDArray[np.int64]:
    """Draw predictions for the faces of several mixtures."""
    together = rates[0]
    for more in rates[1:]:
        together = np.kron(together, more)
    return rng.multinomial(num_faces, shares @ together)


def seen_shares(counts: NDArray[np.int64], sizes: tuple[int, ...]) -> NDArray[Any]:
    """Return the shares of classes among the faces that got one in every part."""
    cells = counts.reshape(len(counts), *(size + 1 for size in sizes))
    told = cells[(slice(None), *(slice(size) for size in sizes))].reshape(len(counts), -1)
    return told / told.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("num_faces", [100, 3000])
@pytest.mark.parametrize("rates", [[GENDERS], [RACES], [GENDERS, RACES]], ids=["gender", "race", "joint"])
@pytest.mark.parametrize("evenness", [0.5, 5.0])
def test_corrected_shares_are_closer_and_intervals_cover(
    rates: list[NDArray[Any]], num_faces: int, evenness: float
) -> None:
    rng = np.random.default_rng(1)
    sizes = tuple(len(each) for each in rates)
    truth, raw, parts = [], [], []
    for seed in range(10):  # new labelled images for every ten mixtures
        shares = rng.dirichlet(np.full(np.prod(sizes), evenness), size=10)
        counts = drawn_counts(rates, shares, num_faces, rng)
        truth.append(shares)
        raw.append(seen_shares(counts, sizes))
        parts.append(true_shares(counts, [drawn_confusion(each, 1500, rng) for each in rates], seed))
    made = Shares(*(np.concatenate(each) for each in zip(*parts, strict=True)))
    shares = np.concatenate(truth)

    if num_faces > 100:  # chance outweighs the classifier's errors in a hundred faces of even classes
        assert np.abs(made.share - shares).mean() < np.abs(np.concatenate(raw) - shares).mean()
    covered = ((made.low <= shares) & (shares <= made.high)).mean()
    assert covered >= 0.85
    assert (made.high - made.low).mean() < 0.3  # intervals that say nothing would cover, too


def test_expected_counts_give_the_shares_they_come_from() -> None:
    rng = np.random.default_rng(2)
    shares = np.stack([rng.dirichlet(np.ones(10)), rng.dirichlet(np.full(10, 0.1))])
    counts = np.rint(1e6 * shares @ np.kron(GENDERS, RACES)).astype(np.int64)
    confusions = [np.rint(1e7 * rates).astype(np.int64) for rates in (GENDERS, RACES)]

    assert true_shares(counts, confusions).share == pytest.approx(shares, abs=2e-3)


def test_a_class_on_which_the_model_mostly_abstains_gets_its_share_back() -> None:
    often = np.array([[0.95, 0.0, 0.05], [0.0, 0.2, 0.8]])
    counts = np.array([[475, 100, 425]])

    made = true_shares(counts, [np.rint(often * 10_000).astype(np.int64)])

    assert seen_shares(counts, (2,))[0, 1] < 0.2
    assert made.share[0] == pytest.approx([0.5, 0.5], abs=0.01)


def test_shares_stay_on_the_simplex_and_within_their_interval() -> None:
    # More of outcome 0 than even a population of class 0 alone would give.
    counts = np.array([[100, 0, 0], [3, 0, 0], [0, 0, 4], [50, 40, 10]])

    made = true_shares(counts, [np.array([[60, 20, 20], [20, 60, 20]])])

    assert made.share.sum(axis=1) == pytest.approx(1.0)
    assert made.share[0, 0] > 0.99
    assert (made.low >= 0.0).all()
    assert (made.low <= made.share).all()
    assert (made.share <= made.high).all()
    assert (made.high <= 1.0).all()


def test_a_class_that_was_never_predicted_is_not_excluded() -> None:
    made = true_shares(np.array([[5, 0, 0]]), [np.rint(SURE * 10_000).astype(np.int64)])

    assert made.share[0] == pytest.approx([1.0, 0.0], abs=1e-3)
    assert made.high[0, 1] == pytest.approx(1.0 - 0.05 ** (1 / 5), abs=1e-3)


def test_more_faces_give_narrower_intervals_until_the_labelled_images_limit_them() -> None:
    few, many, most = np.array([[60, 40, 0]]), np.array([[6000, 4000, 0]]), np.array([[6 * 10**6, 4 * 10**6, 0]])
    confusion = np.array([[90, 10, 0], [10, 90, 0]])

    widths = [
        np.ptp([made.low[0, 0], made.high[0, 0]]) for made in (true_shares(n, [confusion]) for n in (few, many, most))
    ]

    assert widths[0] > 1.5 * widths[1]
    assert widths[2] == pytest.approx(widths[1], rel=0.2)
    assert widths[2] > 0.03


def test_a_group_without_faces_has_no_shares_and_does_not_change_others() -> None:
    counts = np.array([[50, 40, 10], [0, 0, 0]])
    confusion = np.array([[80, 10, 10], [10, 80, 10]])

    made, alone = true_shares(counts, [confusion], seed=3), true_shares(counts[:1], [confusion], seed=3)

    assert np.isnan([made.share[1], made.low[1], made.high[1]]).all()
    for mine, its in zip(made, alone, strict=True):
        assert (mine[0] == its[0]).all()


def test_shares_of_a_group_reveal_nothing_about_other_groups() -> None:
    rng = np.random.default_rng(4)
    counts = drawn_counts([GENDERS, RACES], rng.dirichlet(np.full(10, 0.5), size=6), 200, rng)
    confusions = [drawn_confusion(each, 1500, rng) for each in (GENDERS, RACES)]
    made = true_shares(counts, confusions)

    for group, cell in ((0, 0), (0, 7), (3, 2), (4, 2)):
        changed = counts.copy()
        changed[group, cell] += 1  # which an attacker would try, were the count hidden

        other = true_shares(changed, confusions)

        for mine, its in zip(made, other, strict=True):
            assert np.array_equal(np.delete(mine, group, axis=0), np.delete(its, group, axis=0))


@pytest.mark.parametrize(
    ("confusion", "reason"),
    [
        (
            [[500, 480, 20], [480, 500, 20]],
            "the model cannot tell the classes apart well enough (confusion matrix of condition number 49.0, ",
        ),
        (
            [[0, 0, 900], [0, 0, 90]],
            "the model cannot tell the classes apart well enough: it abstained on all calibration images (confusion "
            "matrix of condition number",
        ),
        (
            [[900, 0, 0], [900, 0, 0]],
            "the model cannot tell the classes apart well enough: it never predicted male for a calibration image "
            "(confusion matrix singular, at most 30 is allowed)",
        ),
        ([[900, 50, 50], [5, MIN_CALIBRATION_ROWS - 6, 0]], "male: 19 calibration images, 20 are needed"),
    ],
)
def test_an_uncorrected_share_has_a_reason(confusion: list[list[int]], reason: str) -> None:
    said = why_not(np.array(confusion), ["female", "male"])

    assert said is not None
    assert said.startswith(reason)


def blurred(size: int, blur: float) -> NDArray[Any]:
    """Return rates of a classifier of ordered classes that errs to their neighbours, and of 5 % abstentions."""
    rates = blur ** np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    told = 0.95 * rates / rates.sum(axis=1, keepdims=True)
    return np.hstack([told, np.full((size, 1), 0.05)])


@pytest.mark.parametrize(("blurs", "is_allowed"), [((0.3, 0.3), True), ((0.68, 0.65), False)])
def test_matrices_usable_alone_are_rejected_if_their_product_is_ill_conditioned(
    blurs: tuple[float, float], is_allowed: bool
) -> None:
    rng = np.random.default_rng(3)
    rates = [blurred(size, blur) for size, blur in zip((9, 10), blurs, strict=True)]
    error, raw_error = [], []
    for seed in range(3):
        confusions = [np.rint(300 * each).astype(np.int64) for each in rates]
        assert [why_not(each, [""] * len(each)) for each in confusions] == [None, None]
        said = why_not_together(confusions)
        shares = rng.dirichlet(np.full(90, 0.5), size=5)
        counts = drawn_counts(rates, shares, 1000, rng)
        error.append(np.abs(true_shares(counts, confusions, seed).share - shares).mean())
        raw_error.append(np.abs(seen_shares(counts, (9, 10)) - shares).mean())
        assert (said is None) == is_allowed
        if said is not None:
            assert said.startswith("the model cannot tell the combinations of classes apart well enough (")
            assert said.endswith(", at most 30 is allowed)")

    assert (np.mean(error) < np.mean(raw_error)) == is_allowed


def test_a_usable_confusion_matrix_gives_no_reason() -> None:
    assert why_not(np.array([[80, 10, 10], [2, MIN_CALIBRATION_ROWS - 2, 0]]), ["female", "male"]) is None


def test_confusions_ignore_missing_labels_and_count_abstentions_last() -> None:
    truth, outcome = np.array([0, 0, 0, 1, 1, -1]), np.array([0, 1, -1, 1, 1, 0])

    assert confusion_counts([truth], [outcome], [2]).tolist() == [[1, 1, 1], [0, 2, 0]]


def test_a_prediction_of_one_attribute_counts_if_the_model_abstains_on_the_other() -> None:
    gender, race = np.array([0, 0, 1, 1, 1]), np.array([2, 2, 2, -1, 0])
    gender_said, race_said = np.array([0, -1, 1, 1, 1]), np.array([-1, 2, -1, 0, 0])

    counts = confusion_counts([gender, race], [gender_said, race_said], [2, 3])

    assert counts.shape == (6, 12)
    expected = {(2, 3): 1, (2, 10): 1, (5, 7): 1, (3, 4): 1}
    assert {(row, column): counts[row, column] for row, column in np.argwhere(counts).tolist()} == expected
