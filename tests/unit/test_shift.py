"""The shift alarm is silent for fair samples, and fires if half of the faces are shifted."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from agr_ray.evaluation import shift
from agr_ray.evaluation.shift import QUANTITIES, Reference, Shift, compare

RACES = ("white", "black", "asian", "indian", "other")
NAN = float("nan")
Values = dict[str, np.ndarray]


def draw(num: int, seed: int) -> Values:
    """Draw faces as a detector and a network find them: skewed, with many values at an end of their range."""
    rng = np.random.default_rng(seed)
    return {
        "detector_score": 1.0 - np.minimum(rng.exponential(0.004, num), 0.05) * (rng.random(num) < 0.6),
        "face_px": np.exp(rng.normal(4.5, 0.7, num)),
        "sharpness": np.exp(rng.normal(5.0, 0.9, num)),
        "yaw": rng.normal(0.0, 15.0, num),
        "pitch": rng.normal(-3.0, 8.0, num),
        "age": np.clip(rng.gamma(4.0, 9.0, num), 0.0, 100.0),
        "p_male": rng.beta(0.15, 0.15, num),
        "race": rng.choice(len(RACES), num, p=[0.43, 0.19, 0.15, 0.17, 0.06]).astype(float),
    }


SHIFTS: dict[str, Any] = {
    "detector_score": lambda values: values - 0.02,
    "face_px": lambda values: values / 3.0,
    "sharpness": lambda values: values / 4.0,
    "yaw": lambda values: values + 25.0,
    "pitch": lambda values: values - 14.0,
    "age": lambda values: values / 2.0,
    "p_male": lambda values: 0.9 * values + 0.1,
    "race": lambda values: np.ones_like(values),
}


def half_shifted(values: Values, names: list[str]) -> Values:
    half = np.arange(len(values["age"])) % 2 == 0
    return {name: np.where(half & (name in names), SHIFTS[name](each), each) for name, each in values.items()}


def verdicts(found: Shift) -> dict[str, str]:
    return {each.quantity: each.verdict for each in found.quantities}


@pytest.mark.parametrize("num", [200, 1000, 50_000])
@pytest.mark.parametrize("num_reference", [200, 2800])
def test_a_fair_sample_is_silent(num: int, num_reference: int) -> None:
    for seed in range(80 if num < 50_000 else 8):
        reference = Reference.fit(draw(num_reference, 1000 + seed), RACES)
        found = compare(reference, reference.count(draw(num, seed)))

        assert found.verdict == "similar", found
        assert verdicts(found) == dict.fromkeys(SHIFTS, "similar")


@pytest.mark.parametrize("num", [200, 5000, 50_000])
def test_a_shifted_half_fires_in_the_shifted_quantity_alone(num: int) -> None:
    for name in SHIFTS:
        for seed in range(10 if num < 50_000 else 2):
            reference = Reference.fit(draw(2800, 1000 + seed), RACES)
            found = compare(reference, reference.count(half_shifted(draw(num, seed), [name])))

            assert verdicts(found) == dict.fromkeys(SHIFTS, "similar") | {name: "shifted"}, name
            predicted = name in ("age", "p_male", "race")
            assert found.verdict == ("predictions_differ" if predicted else "photographs_differ")


def test_a_difference_below_the_accepted_one_rarely_fires_and_one_above_it_fires_with_enough_faces() -> None:
    """A tenth of a standard deviation has an index of 0.01, half a standard deviation one of 0.25."""
    fired = {0.1: 0, 0.25: 0, 0.5: 0}
    for moved in fired:
        for seed in range(20):
            reference = Reference.fit(draw(2800, 1000 + seed), RACES)
            values = draw(5000, seed)
            found = compare(reference, reference.count(values | {"yaw": values["yaw"] + moved * 15.0}))
            fired[moved] += verdicts(found)["yaw"] == "shifted"

    assert fired == {0.1: 0, 0.25: 0, 0.5: 20}


def test_the_false_alarm_rate_of_few_faces_is_the_nominal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "FALSE_ALARM", 0.05)
    monkeypatch.setattr(shift, "MIN_SHIFT", 0.0)
    rng = np.random.default_rng(0)
    shares = np.full(10, 0.1)
    for num_expected, num_found in ((200, 200), (2800, 200), (2800, 5000)):
        threshold = shift.alarm_threshold(10, num_expected, num_found)
        draws = [(rng.multinomial(num_expected, shares), rng.multinomial(num_found, shares)) for _ in range(4000)]
        assert np.mean([shift.stability_index(*each) > threshold for each in draws]) == pytest.approx(0.05, abs=0.015)


def test_few_faces_need_a_larger_difference_and_many_the_accepted_one() -> None:
    thresholds = [shift.alarm_threshold(10, 2800, num) for num in (200, 1000, 5000, 50_000)]

    assert thresholds == pytest.approx([0.1806, 0.1, 0.1, 0.1], abs=1e-3)


def test_the_index_of_two_bins_by_hand() -> None:
    # (0.7 - 0.5) ln(0.7 / 0.5) + (0.3 - 0.5) ln(0.3 / 0.5), up to half a face in a million
    index = shift.stability_index(np.array([500_000, 500_000]), np.array([700_000, 300_000]))

    assert index == pytest.approx(0.2 * np.log(1.4) - 0.2 * np.log(0.6), rel=1e-5)


def test_chips_say_nothing_about_face_size_and_detector_score() -> None:
    chips = draw(2800, 1) | {"face_px": np.random.default_rng(1).normal(130.0, 8.0, 2800)}
    reference = Reference.fit(chips, RACES)

    found = compare(reference, reference.count(half_shifted(draw(5000, 2), ["face_px", "detector_score"])))

    assert reference.are_chips
    assert found.verdict == "similar"
    by_name = {each.quantity: each for each in found.quantities}
    assert [by_name[name].verdict for name in ("detector_score", "face_px")] == ["not_compared"] * 2
    lines = shift.not_compared_lines(found.to_json()["quantities"])
    assert lines == [
        "not compared: detector score, face size in pixels, because the calibration images are chips, cut to one size "
        "around a face"
    ]
    assert by_name["face_px"].statistic is None


def test_counts_of_files_add_up_to_those_of_all() -> None:
    reference, values = Reference.fit(draw(500, 1), RACES), draw(1000, 2)

    parts = [reference.count({name: each[start::3] for name, each in values.items()}) for start in range(3)]

    assert {name: np.sum([part[name] for part in parts], axis=0).tolist() for name in parts[0]} == {
        name: counts.tolist() for name, counts in reference.count(values).items()
    }


def test_equal_values_share_a_bin_and_rounding_does_not_move_them_across_an_edge() -> None:
    certain = np.where(np.arange(1000) % 4 == 0, 0.5, 1.0)
    reference = Reference.fit({"p_male": certain}, RACES)

    nearly = reference.count({"p_male": certain - 1e-4})["p_male"]

    assert nearly.tolist() == list(reference.histograms["p_male"].counts) == [250, 750]


def test_missing_values_are_not_compared_and_the_sentence_says_so() -> None:
    without = draw(500, 1) | {"yaw": np.full(500, NAN), "pitch": np.where(np.arange(500) < 99, 1.0, NAN)}
    del without["race"]
    reference = Reference.fit(without, RACES)

    found = compare(reference, reference.count(draw(200, 2) | {"age": np.full(200, NAN)}))

    sentences = {each.quantity: each.sentence for each in found.quantities if each.verdict == "not_compared"}
    assert sentences == {
        "yaw": "the calibration images have no such values",
        "pitch": "only 99 calibration faces have a value; 100 are needed",
        "age": "no scored face has a value",
        "race": "the calibration images have no such values",
    }
    assert found.verdict == "similar"


def test_few_faces_and_no_reference_are_not_compared() -> None:
    reference = Reference.fit(draw(500, 1), RACES)

    for values in (draw(99, 2), {}):
        found = compare(reference, reference.count(values))
        assert (found.verdict, found.quantities) == ("not_compared", ())
        assert found.sentence.startswith("fewer than 100 faces: it is not known whether these photographs are like")
    found = compare(None, {}, "the checkpoint has no calibration.json")
    assert (found.verdict, found.quantities) == ("not_compared", ())
    assert found.sentence == "not compared with the calibration images: the checkpoint has no calibration.json"


def test_the_sentence_says_where_most_faces_are_beyond_the_calibration_faces() -> None:
    reference = Reference.fit(draw(2800, 1), RACES)
    values = draw(5000, 2)
    values["sharpness"] = np.where(np.arange(5000) < 2500, 1.0, values["sharpness"])
    values["race"] = np.where(np.arange(5000) < 2500, 1.0, values["race"])

    sentences = {each.quantity: each.sentence for each in compare(reference, reference.count(values)).quantities}

    assert sentences["sharpness"].startswith("sharpness below ")
    assert sentences["sharpness"].endswith(": 55 % of the faces, 10 % of the calibration faces")
    assert sentences["race"].startswith("predicted race black: 59 % of the faces, ")


def test_hidden_counts_leave_only_verdicts_about_photographs() -> None:
    reference = Reference.fit(draw(2800, 1), RACES)
    found = compare(reference, reference.count(half_shifted(draw(5000, 2), ["race", "yaw"])))

    plain, hidden = found.to_json(), found.to_json(hides_counts=True)

    assert [each["quantity"] for each in plain["quantities"]] == [quantity.name for quantity in QUANTITIES]
    assert [each["quantity"] for each in hidden["quantities"]] == [
        "detector_score",
        "face_px",
        "sharpness",
        "yaw",
        "pitch",
    ]
    assert hidden["verdict"] == "photographs_differ"
    assert plain["quantities"][0].keys() == hidden["quantities"][0].keys()
    numbers = ("statistic", "threshold", "num_faces", "num_reference", "bins", "shares", "reference_shares")
    assert [each[name] or None for each in hidden["quantities"] for name in numbers] == [None] * 35
    assert not any(character.isdigit() for character in json.dumps(hidden))


def test_a_shift_of_predictions_alone_is_not_told_if_counts_are_hidden() -> None:
    reference = Reference.fit(draw(2800, 1), RACES)
    found = compare(reference, reference.count(half_shifted(draw(5000, 2), ["race"])))

    assert (found.verdict, found.to_json(hides_counts=True)["verdict"]) == ("predictions_differ", "similar")


def test_a_reference_survives_json_and_a_damaged_one_is_rejected() -> None:
    reference = Reference.fit(draw(500, 1), RACES)
    values = json.loads(json.dumps(reference.to_json()))

    assert dataclasses.asdict(Reference.from_json(values)) == dataclasses.asdict(reference)
    values["histograms"]["age"]["counts"].pop()
    with pytest.raises(ValueError, match="reference: age has 9 edges and 9 counts"):
        Reference.from_json(values)
