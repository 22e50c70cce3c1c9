"""The evaluation report, against scikit-learn and against arithmetic by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference

from agr_ray.evaluation import auc as auc_module
from agr_ray.evaluation import figures as figures_module
from agr_ray.evaluation import selective as selective_module
from agr_ray.evaluation.auc import group_auc
from agr_ray.evaluation.audit import metrics_report
from agr_ray.evaluation.cells import BREAKDOWNS, Cells
from agr_ray.evaluation.metrics import MetricSums
from agr_ray.evaluation.reliability import expected_calibration_error
from agr_ray.evaluation.selective import selective_risk
from agr_ray.evaluation.units import units_of
from agr_ray.labels import UTKFACE, Labels, LabelSpace
from agr_ray.models.predictions import Predictions

NUM = 1200
NAN = math.nan
EXACT = {"abs": 1e-9, "rel": 0.0}


def rows(seed: int = 0, num: int = NUM) -> tuple[Labels, Predictions, np.ndarray]:
    """Return labels, some of them missing, predictions with many ties, and whether a face was found."""
    rng = np.random.default_rng(seed)
    truth = Labels(
        UTKFACE,
        np.where(rng.random(num) < 0.1, NAN, rng.integers(0, 100, num)).astype(np.float32),
        rng.integers(-1, 2, num),
        rng.integers(-1, 5, num),
    )
    logits = 1.5 * np.eye(6)[truth.race][:, :5] + rng.normal(size=(num, 5)).round(1)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    guess = {
        "age": (np.nan_to_num(truth.age, nan=30.0) + rng.normal(0, 8, num)).clip(0, 116).astype(np.float32),
        "gender": (0.4 * truth.gender.clip(0) + 0.6 * rng.random(num)).round(2).astype(np.float32),
        "race": probs.astype(np.float32),
    }
    return truth, guess, rng.random(num) < 0.1


TRUTH, GUESS, FALLBACK = rows()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return metrics_report(TRUTH, GUESS, FALLBACK)


def groups_of_rows() -> Iterator[tuple[str, str, np.ndarray]]:
    cells = Cells(UTKFACE)
    of_row = cells.codes(TRUTH)
    for breakdown in BREAKDOWNS:
        for group, own in zip(cells.groups[breakdown], cells.members(breakdown), strict=True):
            yield breakdown, group.name, own[of_row]


def test_the_breakdowns_hold_the_rows_that_their_names_say() -> None:
    members = {(breakdown, name): chosen for breakdown, name, chosen in groups_of_rows()}

    assert len(members) == 2 + 5 + 9 + 10 + 18 + 45
    young = (TRUTH.age >= 11) & (TRUTH.age <= 20)
    expected = {
        ("gender", "male"): TRUTH.gender == 1,
        ("race", "indian"): TRUTH.race == 3,
        ("age_group", "11-20"): young,
        ("gender_race", "female/asian"): (TRUTH.gender == 0) & (TRUTH.race == 2),
        ("gender_age_group", "male/11-20"): (TRUTH.gender == 1) & young,
        ("race_age_group", "black/11-20"): (TRUTH.race == 1) & young,
    }
    for group, chosen in expected.items():
        np.testing.assert_array_equal(members[group], chosen)


def test_sums_by_group_and_class_are_those_of_the_cells() -> None:
    cells = Cells(UTKFACE)
    values = np.random.default_rng(0).random((3, cells.num))
    for breakdown in BREAKDOWNS:
        expected = values @ cells.members(breakdown).T
        np.testing.assert_allclose(cells.group_sums(values, breakdown), expected)
    of_class = cells.group_sums(values, "race_age_group", "gender")
    for k in range(2):
        own = cells.members("race_age_group") * (cells.of_attribute["gender"] == k)
        np.testing.assert_allclose(of_class[:, :, k], values @ own.T)
    of_race = cells.group_sums(values, "gender_age_group", "race")
    own = cells.members("gender_age_group") * (cells.of_attribute["race"] == 4)
    np.testing.assert_allclose(of_race[:, :, 4], values @ own.T)


def check_classes(found: dict[str, Any], truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> None:
    assert found["n"] == len(truth)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted), **EXACT)
    recalls = reference.recall_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
    assert found["balanced_accuracy"] == pytest.approx(recalls, **EXACT)
    if "confusion" in found:
        matrix = reference.confusion_matrix(truth, predicted, labels=range(num_classes))
        assert found["confusion"] == matrix.tolist()


def macro_auc(truth: np.ndarray, probs: np.ndarray) -> float | None:
    """Return the mean AUC of one class against the rest, by scikit-learn, over classes that have both."""
    present = [k for k in np.unique(truth) if (truth != k).any()]
    return np.mean([reference.roc_auc_score(truth == k, probs[:, k]) for k in present]) if present else None


@pytest.mark.parametrize("breakdown", ["all", *BREAKDOWNS])
def test_every_group_agrees_with_scikit_learn(report: dict[str, Any], breakdown: str) -> None:
    everyone = [("all", "", np.ones(NUM, bool))]
    chosen_groups = [each for each in [*everyone, *groups_of_rows()] if each[0] == breakdown]
    assert chosen_groups
    for _, name, chosen in chosen_groups:
        found = report if breakdown == "all" else report["groups"][breakdown][name]
        assert found["n"] == chosen.sum()
        assert found["n_fallback"] == FALLBACK[chosen].sum()
        assert found["detector"]["fallback_share"] == pytest.approx(FALLBACK[chosen].mean(), **EXACT)
        aged = chosen & np.isfinite(TRUTH.age)
        true_age, age = TRUTH.age[aged].astype(np.float64), GUESS["age"][aged].astype(np.float64)
        assert found["age"]["mae_years"] == pytest.approx(reference.mean_absolute_error(true_age, age), **EXACT)
        assert found["age"]["bias_years"] == pytest.approx((age - true_age).mean(), **EXACT)
        assert found["age"]["within_5"] == pytest.approx((np.abs(age - true_age) <= 5).mean(), **EXACT)

        known = chosen & (TRUTH.gender >= 0)
        male = GUESS["gender"][known]
        check_classes(found["gender"], TRUTH.gender[known], (male > 0.5).astype(int), 2)
        if len(np.unique(TRUTH.gender[known])) == 2:
            expected = reference.roc_auc_score(TRUTH.gender[known], male)
            assert found["gender"]["auc"] == pytest.approx(expected, **EXACT)
        else:
            assert found["gender"]["auc"] is None
        two = np.stack([1 - male.astype(np.float64), male.astype(np.float64)], axis=1)
        error = expected_calibration_error(two, TRUTH.gender[known])
        assert found["gender"]["ece"] == pytest.approx(error, **EXACT)

        known = chosen & (TRUTH.race >= 0)
        probs = GUESS["race"][known]
        check_classes(found["race"], TRUTH.race[known], probs.argmax(axis=1), 5)
        expected_auc = macro_auc(TRUTH.race[known], probs)
        assert found["race"]["auc"] == (None if expected_auc is None else pytest.approx(expected_auc, **EXACT))
        confident = probs.max(axis=1).astype(np.float64).mean() - (probs.argmax(axis=1) == TRUTH.race[known]).mean()
        assert found["race"]["overconfidence"] == pytest.approx(confident, **EXACT)
        error = expected_calibration_error(probs, TRUTH.race[known])
        assert found["race"]["ece"] == pytest.approx(error, **EXACT)


def test_every_interval_holds_its_value(report: dict[str, Any]) -> None:
    num = 0
    for values in [report, *(group for of in report["groups"].values() for group in of.values())]:
        for task, intervals in values["intervals"].items():
            for name, interval in intervals.items():
                value = values[task][name]
                assert (value is None) <= (interval is None)
                for one, ends in zip(value, interval, strict=True) if name == "cs" else [(value, interval)]:
                    if ends is not None:
                        assert ends[0] <= one <= ends[1], (task, name)
                        num += 1
    assert num > 900


def test_groups_of_one_attribute_have_matrices_and_of_two_do_not(report: dict[str, Any]) -> None:
    for breakdown, members in report["groups"].items():
        for values in members.values():
            has = {name for task in ("age", "gender", "race") for name in ("confusion", "cs") if name in values[task]}
            assert has == (set() if len(BREAKDOWNS[breakdown]) > 1 else {"confusion", "cs"})


def test_the_report_is_plain_json(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_slices_and_parts_of_any_size_give_the_same_report(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures_module, "_SLICE_ROWS", 97)
    monkeypatch.setattr(auc_module, "_PART_ROWS", 61)
    monkeypatch.setattr(selective_module, "_PART_ROWS", 53)
    sliced = metrics_report(TRUTH, GUESS, FALLBACK)

    expected, found = flat(report), flat(sliced)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float) else value), name


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict | list):
        return {prefix: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return {key: each for name, value in items for key, each in flat(value, f"{prefix}/{name}").items()}


# The paper's tables


def predicted_from(matrix: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return true and predicted classes that have this confusion matrix."""
    pairs = [(i, j) for i, row in enumerate(matrix) for j, num in enumerate(row) for _ in range(num)]
    truth, predicted = np.array(pairs).T
    return truth, predicted


def test_the_papers_gender_matrix_is_97_3_per_cent() -> None:
    """Table 3, in our order: female, male. The paper says 98.3 %."""
    matrix = [[1470, 30], [50, 1450]]
    truth, predicted = predicted_from(matrix)
    sums = MetricSums(UTKFACE)
    labels = Labels(UTKFACE, np.full(3000, NAN, np.float32), truth, np.full(3000, -1))
    sums.update(labels, {"gender": predicted.astype(np.float32)})
    found = sums.to_json()["gender"]

    assert found["confusion"] == matrix
    assert f"{100 * found['accuracy']:.1f}" == "97.3"


def test_the_papers_race_matrix_is_93_7_per_cent() -> None:
    """Table 4. The paper says 93.1 %."""
    matrix = [
        [900, 20, 15, 5, 10],
        [25, 850, 10, 5, 10],
        [20, 15, 800, 25, 10],
        [10, 5, 30, 840, 15],
        [15, 10, 20, 10, 820],
    ]
    truth, predicted = predicted_from(matrix)
    sums = MetricSums(UTKFACE)
    labels = Labels(UTKFACE, np.full(len(truth), NAN, np.float32), np.full(len(truth), -1), truth)
    sums.update(labels, {"race": np.eye(5, dtype=np.float32)[predicted]})
    found = sums.to_json()["race"]

    assert found["confusion"] == matrix
    assert f"{100 * found['accuracy']:.1f}" == "93.7"


# Single figures by hand


def test_the_cell_average_counts_each_cell_the_same(report: dict[str, Any]) -> None:
    """Three white women of 25 with errors of 1, 2 and 3 years, and one black man of 60 with 10: (2 + 10) / 2."""
    truth = Labels(
        UTKFACE, np.array([25, 25, 25, 60, 40], np.float32), np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, -1])
    )
    found = metrics_report(truth, {"age": np.array([26, 27, 28, 50, 0], np.float32)})
    assert (found["age"]["cell_mae_years"], found["age"]["num_cells"]) == (6.0, 2)

    means = []
    for gender in range(2):
        for race in range(5):
            for group in range(9):
                own = (TRUTH.gender == gender) & (TRUTH.race == race) & (TRUTH.age_group == group)
                if own.any():
                    means.append(np.abs(GUESS["age"].astype(np.float64) - TRUTH.age)[own].mean())
    assert report["age"]["cell_mae_years"] == pytest.approx(np.mean(means), **EXACT)
    assert report["age"]["num_cells"] == len(means)


def test_the_reliability_curve_by_hand() -> None:
    truth = Labels(UTKFACE, np.full(4, NAN, np.float32), np.array([1, 1, 0, 1]), np.full(4, -1))
    p_male = np.array([0.98, 0.95, 0.96, 0.45], np.float32)  # right, right, wrong, wrong
    found = metrics_report(truth, {"gender": p_male})

    low, high = found["reliability"]["gender"]
    assert (low["n"], low["accuracy"], high["n"]) == (1, 0.0, 3)
    assert low["confidence"] == pytest.approx(0.55)
    assert (low["from"], low["to"]) == (8 / 15, 9 / 15)
    assert high["accuracy"] == pytest.approx(2 / 3)
    assert high["confidence"] == pytest.approx((0.98 + 0.95 + 0.96) / 3)
    gaps = 0.55 + abs(2 - (0.98 + 0.95 + 0.96))
    assert found["gender"]["ece"] == pytest.approx(gaps / 4)
    assert found["gender"]["overconfidence"] == pytest.approx((0.98 + 0.95 + 0.96 + 0.55 - 2) / 4)


def test_selective_risk_by_hand() -> None:
    """Accepted in the order 0.1 (right), 0.2 (wrong), two of 0.3 (right, wrong)."""
    uncertainty = np.array([0.3, 0.1, 0.2, 0.3], np.float32)
    wrong = np.array([True, False, True, False])
    found = selective_risk(uncertainty, wrong, units_of(None, 4), "share")

    assert found is not None
    assert found["area"] == pytest.approx((0 + 1 / 2 + 2 / 4 + 2 / 4) / 4)
    assert [(point["coverage"], point["n"], point["risk"]) for point in found["curve"]] == [
        (0.25, 1, 0.0),
        (0.5, 2, 0.5),
        (1.0, 4, 0.5),
    ]
    assert [point["max_uncertainty"] for point in found["curve"]] == pytest.approx([0.1, 0.2, 0.3])


def test_selective_risk_of_years_and_its_interval_by_leaving_persons_out() -> None:
    rng = np.random.default_rng(2)
    uncertainty = rng.random(200).round(1)
    years = rng.exponential(3 + 5 * uncertainty)
    persons = rng.integers(0, 60, 200)

    def area(chosen: np.ndarray) -> float:
        own = uncertainty[chosen]
        return float(np.mean([years[chosen][own <= value].mean() for value in own]))

    found = selective_risk(uncertainty, years, units_of(persons, 200), "positive")
    without = np.array([area(persons != person) for person in np.unique(persons)])
    jackknife = math.sqrt((len(without) - 1) / len(without) * ((without - without.mean()) ** 2).sum())

    assert found is not None
    assert found["area"] == pytest.approx(area(np.ones(200, bool)))
    low, high = found["area_interval"]
    assert (high - low) / 2 == pytest.approx(2.0 * jackknife, rel=0.1)
    assert found["curve"][-1]["risk"] == pytest.approx(years.mean())
    assert found["curve"][0]["risk"] == pytest.approx(years[uncertainty == 0.0].mean())


def test_without_an_uncertainty_ages_have_no_selective_risk(report: dict[str, Any]) -> None:
    assert report["selective"]["age"] is None
    widths = np.full(NUM, 20, np.float32)
    known = metrics_report(TRUTH, GUESS, age_uncertainty=widths)["selective"]["age"]
    assert known["curve"] == [known["curve"][0]]  # all are equally uncertain
    assert known["area"] == pytest.approx(known["curve"][0]["risk"])


def test_the_influence_on_the_auc_is_that_of_leaving_a_person_out() -> None:
    rng = np.random.default_rng(3)
    scores, positive = rng.random(300).round(1).astype(np.float32), rng.random(300) < 0.4
    groups, persons = rng.integers(-1, 3, 300), rng.integers(0, 50, 300)
    units = units_of(persons, 300)
    whole = group_auc(scores, positive, groups, 4, units)

    assert np.isnan(whole.value).tolist() == [False, False, False, True]
    for person in (0, 7, 49):
        kept = units.codes != person
        rest = group_auc(scores[kept], positive[kept], groups[kept], 4, units._replace(codes=units.codes[kept]))
        change = (whole.value - rest.value)[:3]
        np.testing.assert_allclose(whole.influence[person, :3], change, rtol=0.2, atol=3e-4)
    np.testing.assert_allclose(whole.influence.sum(axis=0), 0.0, atol=1e-12)


def test_the_auc_of_extreme_scores_is_exact() -> None:
    scores = np.array([0.0, -0.0, 1.0, 1.0 - 2**-24, 1e-45, 0.5], np.float32)
    positive = np.array([True, False, True, False, True, False])
    found = group_auc(scores, positive, np.zeros(6, int), 1, units_of(None, 6))
    assert found.value[0] == reference.roc_auc_score(positive, scores)


# Age thresholds


def test_false_adult_and_false_minor_rates_by_hand() -> None:
    age = np.array([10, 16, 17, 17, 18, 22, 24, 40, NAN, NAN, NAN], np.float32)
    low = np.array([NAN] * 8 + [13, 15, 20], np.float32)
    high = np.array([NAN] * 8 + [17, 19, 24], np.float32)  # a minor, unknown, an adult
    predicted = np.array([12, 26, 17.9, 20, 17.5, 25, 24.9, 41, 30, 30, 18], np.float32)
    gender = np.array([0, 1, 1, 0, 0, 1, 1, 0, -1, 0, 0])
    labels = Labels(UTKFACE, age, gender, np.full(11, -1), low, high)
    (found,) = metrics_report(labels, {"age": predicted}, age_thresholds=(18,))["age_thresholds"]

    assert (found["threshold_years"], found["buffer_years"], found["challenge_years"]) == (18, 7, 25)
    plain, buffered = found["at_threshold"], found["with_buffer"]
    assert (plain["n_minor"], plain["n_adult"]) == (5, 5)
    assert plain["false_adult_rate"] == 3 / 5  # 26, 20 and 30
    assert plain["false_minor_rate"] == 1 / 5  # 17.5
    assert buffered["false_adult_rate"] == 2 / 5  # 26 and 30
    assert buffered["false_minor_rate"] == 3 / 5  # 17.5, 24.9 and 18
    assert (plain["n_near_minor"], plain["n_near_adult"]) == (4, 2)
    assert plain["near_false_adult_rate"] == 3 / 4
    assert buffered["near_false_minor_rate"] == 1 / 2
    assert buffered["groups"]["gender"]["male"]["false_adult_rate"] == 1 / 2
    assert buffered["groups"]["gender"]["male"]["n_adult"] == 2
    assert buffered["groups"]["gender_race"]["male/white"]["false_adult_rate"] is None
    by_challenge = {point["challenge_years"]: point for point in found["curve"]}
    assert list(by_challenge) == list(range(18, 34))
    assert by_challenge[18]["false_adult_rate"] == plain["false_adult_rate"]
    assert by_challenge[25]["false_minor_rate"] == buffered["false_minor_rate"]
    assert by_challenge[30]["false_adult_rate"] == 1 / 5
    by_age = {point["age_years"]: point for point in found["by_age"]}
    assert list(by_age) == [10, 16, 17, 18, 22, 24]
    assert (by_age[17]["n"], by_age[17]["passes_threshold"], by_age[17]["passes_with_buffer"]) == (2, 0.5, 0.0)


def test_thresholds_and_buffer_are_chosen() -> None:
    labels = Labels(UTKFACE, np.array([15, 30], np.float32), np.zeros(2, int), np.zeros(2, int))
    found = metrics_report(
        labels, {"age": np.array([17, 19], np.float32)}, age_thresholds=(16, 30), age_buffer_years=2
    )["age_thresholds"]
    assert [(each["threshold_years"], each["challenge_years"]) for each in found] == [(16, 18), (30, 32)]
    assert [each["at_threshold"]["false_adult_rate"] for each in found] == [1.0, 0.0]
    assert [each["with_buffer"]["false_adult_rate"] for each in found] == [0.0, 0.0]
    assert metrics_report(labels, {"gender": np.zeros(2, np.float32)})["age_thresholds"] == []


def test_a_set_without_exact_ages_has_rates_from_ranges_only() -> None:
    low, high = np.array([4, 25, 15], np.float32), np.array([6, 32, 20], np.float32)
    labels = Labels(UTKFACE, np.full(3, NAN, np.float32), np.full(3, 1), np.full(3, -1), low, high)
    (found,) = metrics_report(labels, {"age": np.array([5, 30, 19], np.float32)}, age_thresholds=(18,))[
        "age_thresholds"
    ]
    assert (found["at_threshold"]["n_minor"], found["at_threshold"]["n_adult"]) == (1, 1)
    assert found["by_age"] == []


def test_a_label_space_with_very_many_cells_has_fewer_units() -> None:
    space = LabelSpace("custom", ("a", "b", "c", "d", "e", "f", "g"), tuple(f"{year}-{year}" for year in range(100)))
    rng = np.random.default_rng(0)
    num = 2000
    truth = Labels(
        space, rng.integers(0, 100, num).astype(np.float32), rng.integers(0, 2, num), rng.integers(0, 7, num)
    )
    guess = {"age": (truth.age + rng.normal(0, 5, num)).astype(np.float32)}
    found = metrics_report(truth, guess)

    assert found["uncertainty"]["unit"] == "image groups"
    assert 480 < found["uncertainty"]["num_units"] <= 1_250_000 // (3 * 8 * 101)
    errors = np.abs(guess["age"].astype(np.float64) - truth.age)
    low, high = found["intervals"]["age"]["mae_years"]
    assert (high - low) / 2 == pytest.approx(1.96 * errors.std() / math.sqrt(num), rel=0.15)
    assert found["groups"]["age_group"]["40-40"]["age"]["mae_years"] == pytest.approx(errors[truth.age == 40].mean())
