"""Sampling weights of rows: from label frequencies over all ranks, with missing labels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from agr_ray.labels import UTKFACE, Labels
from agr_ray.learn.sampling import Balance, Sampler

NAN = math.nan


def labels(*rows: tuple[float, int, int, int]) -> Labels:
    """Return labels of (age, gender, race), each so often as its last number says."""
    age, gender, race = (np.repeat([row[k] for row in rows], [row[3] for row in rows]) for k in range(3))
    return Labels(UTKFACE, age.astype(np.float32), gender.astype(np.int64), race.astype(np.int64))


def joined(*parts: Labels) -> Labels:
    arrays = [part.arrays for part in parts]
    return Labels.from_arrays(UTKFACE, {name: np.concatenate([of[name] for of in arrays]) for name in arrays[0]})


def fit(truth: Labels, by: Balance, power: float = 1.0) -> Sampler:
    sampler = Sampler.fit(truth, by, power)
    assert sampler is not None
    return sampler


def shares(truth: Labels, by: Balance, power: float = 1.0) -> dict[tuple[float, int, int], float]:
    """Return the chance that a draw is a row of these labels."""
    weights = fit(truth, by, power).weights(truth)
    assert weights.mean() == pytest.approx(1.0)
    found: dict[tuple[float, int, int], float] = {}
    for age, gender, race, weight in zip(truth.age, truth.gender, truth.race, weights, strict=True):
        key = (float(age), int(gender), int(race))
        found[key] = found.get(key, 0.0) + float(weight) / len(weights)
    return found


def test_without_balance_there_is_no_sampler() -> None:
    assert Sampler.fit(labels((20, 0, 0, 3)), "none", 1.0) is None


def test_classes_are_equally_frequent() -> None:
    truth = labels((20, 0, 0, 60), (30, 0, 1, 20), (40, 1, 1, 20))
    assert shares(truth, "gender") == pytest.approx({(20, 0, 0): 0.375, (30, 0, 1): 0.125, (40, 1, 1): 0.5})
    assert shares(truth, "race") == pytest.approx({(20, 0, 0): 0.5, (30, 0, 1): 0.25, (40, 1, 1): 0.25})


def test_ages_are_balanced_by_the_papers_groups() -> None:
    truth = labels((21, 0, 0, 50), (30, 0, 0, 10), (31, 0, 0, 20), (90, 0, 0, 5), (81, 0, 0, 15))
    assert shares(truth, "age") == pytest.approx(
        {(21, 0, 0): 5 / 18, (30, 0, 0): 1 / 18, (31, 0, 0): 1 / 3, (90, 0, 0): 1 / 12, (81, 0, 0): 1 / 4}
    )


def test_non_empty_cells_are_equally_frequent() -> None:
    truth = labels((20, 0, 0, 70), (20, 1, 0, 20), (60, 1, 4, 10))
    assert list(shares(truth, "cells").values()) == pytest.approx([1 / 3] * 3)


def test_balance_power_interpolates_from_unchanged_to_equal() -> None:
    truth = labels((20, 0, 0, 90), (20, 1, 0, 10))
    men = [shares(truth, "gender", power)[20, 1, 0] for power in (0.0, 0.5, 1.0)]
    assert men == pytest.approx([0.1, 0.25, 0.5])  # sqrt(90) : sqrt(10) = 3 : 1


def test_rows_without_the_label_keep_their_share() -> None:
    truth = labels((20, 0, 0, 70), (20, 1, 0, 10), (20, -1, 0, 20))
    assert shares(truth, "gender") == pytest.approx({(20, 0, 0): 0.4, (20, 1, 0): 0.4, (20, -1, 0): 0.2})
    ages = labels((20, 0, 0, 70), (60, 0, 0, 10), (NAN, 0, 0, 20))
    assert list(fit(ages, "age").weights(labels((20, 0, 0, 1), (60, 0, 0, 1), (NAN, 0, 0, 1)))) == pytest.approx(
        [4 / 7, 4.0, 1.0]
    )


def test_cells_are_balanced_among_rows_with_the_same_labels() -> None:
    truth = labels((20, 0, 0, 30), (60, 1, 0, 10), (20, 0, -1, 5), (60, 0, -1, 55))
    assert list(shares(truth, "cells").values()) == pytest.approx([0.2, 0.2, 0.3, 0.3])


def test_absent_labels_do_not_change_training() -> None:
    assert fit(labels((NAN, 0, 0, 4)), "age").weights(labels((NAN, 0, 0, 2))).tolist() == [1.0, 1.0]


def test_a_label_has_the_same_weight_on_every_rank() -> None:
    first, second = labels((20, 0, 0, 60), (20, 1, 0, 2)), labels((20, 0, 0, 20), (20, 1, 0, 18))
    whole = joined(first, second)
    sampler = fit(whole, "gender")
    weights = np.concatenate([sampler.weights(first), sampler.weights(second)])
    np.testing.assert_array_equal(weights, sampler.weights(whole))


# Several sets


def drawn_shares(
    parts: list[Labels], by: Balance, asked: list[float]
) -> tuple[list[float], dict[tuple[int, float, int, int], float]]:
    """Return the share of many draws that each set has, and each combination of set and labels."""
    truth = joined(*parts)
    set_index = np.repeat(np.arange(len(parts)), [len(part.age) for part in parts])
    sampler = Sampler.fit(truth, by, 1.0, set_index, asked)
    assert sampler is not None
    assert sampler.weights(truth, set_index).mean() == pytest.approx(1.0)
    rng = np.random.default_rng(1)
    drawn = np.concatenate([sampler.draw(truth, rng, set_index) for _ in range(100)])
    keys = list(
        zip(
            set_index[drawn].tolist(),
            truth.age[drawn],
            truth.gender[drawn],
            truth.race[drawn],
            strict=True,
        )
    )
    found = {key: keys.count(key) / len(keys) for key in set(keys)}
    return [float(np.mean(set_index[drawn] == k)) for k in range(len(parts))], found


ONE, OTHER = labels((20, 0, 0, 240), (20, 1, 0, 60)), labels((20, 0, -1, 25), (20, 1, -1, 75))


@pytest.mark.parametrize("by", ["none", "gender", "race", "cells"])
def test_sets_are_drawn_by_their_shares_whatever_is_balanced(by: Balance) -> None:
    # Of 40,000 draws, four standard deviations are 0.01.
    assert drawn_shares([ONE, OTHER], by, [1, 3])[0] == pytest.approx([0.25, 0.75], abs=0.01)
    assert drawn_shares([ONE, OTHER, OTHER], by, [0.5, 0.2, 0.3])[0] == pytest.approx([0.5, 0.2, 0.3], abs=0.01)


def test_labels_of_a_set_without_balancing_keep_their_frequencies() -> None:
    found = drawn_shares([ONE, OTHER], "none", [1, 1])[1]
    assert found[0, 20, 1, 0] == pytest.approx(0.5 * 0.2, abs=0.01)
    assert found[1, 20, 1, -1] == pytest.approx(0.5 * 0.75, abs=0.01)


def test_with_shares_labels_are_balanced_within_each_set() -> None:
    found = drawn_shares([ONE, OTHER], "gender", [1, 3])[1]
    assert [found[0, 20, gender, 0] for gender in (0, 1)] == pytest.approx([0.125, 0.125], abs=0.01)
    assert [found[1, 20, gender, -1] for gender in (0, 1)] == pytest.approx([0.375, 0.375], abs=0.01)


def test_without_shares_all_sets_are_balanced_as_one() -> None:
    truth = joined(ONE, OTHER)
    set_index = np.repeat([0, 1], [300, 100])
    sampler = Sampler.fit(truth, "gender", 1.0, set_index)
    assert sampler is not None
    assert np.array_equal(sampler.weights(truth, set_index), fit(truth, "gender").weights(truth))


def test_draws_follow_the_weights_and_can_be_repeated() -> None:
    truth = labels((20, 0, 0, 9000), (20, 1, 0, 1000))
    sampler = fit(truth, "gender")
    drawn = sampler.draw(truth, np.random.default_rng(0))
    assert len(drawn) == 10000
    assert truth.gender[drawn].mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(drawn, sampler.draw(truth, np.random.default_rng(0)))
    assert len(sampler.draw(labels((20, 0, 0, 0)), np.random.default_rng(0))) == 0
