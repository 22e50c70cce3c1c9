"""Calibration on faces whose true uncertainty is known: guarantees hold over repeated draws."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agr_ray.config import EvaluateJob, PredictConfig, parse
from agr_ray.config.pipeline import Pipeline
from agr_ray.errors import ConfigError
from agr_ray.evaluation.calibration import Calibration
from agr_ray.evaluation.coverage import coverage_report
from agr_ray.evaluation.reliability import expected_calibration_error
from agr_ray.evaluation.selection import NEVER_SURE
from agr_ray.labels import FAIRFACE, UTKFACE, Labels
from agr_ray.models.checkpoint import CALIBRATION, CheckpointError, read_calibration_json
from agr_ray.models.predictions import Predictions

NAN = math.nan
TRUE_TEMPERATURE = 2.5


def draw(num_rows: int, seed: int) -> tuple[Labels, Predictions]:
    """Draw faces and the predictions of an overconfident network, `TRUE_TEMPERATURE` times its logits.

    Ages miss by a normal error whose width grows with the age that is predicted.
    """
    rng = np.random.default_rng(seed)
    predicted = rng.uniform(5.0, 85.0, num_rows)
    age = np.clip(predicted + rng.normal(0.0, 1.0 + predicted / 8.0), 0.0, 116.0)
    gender_logit = rng.normal(0.0, 3.0, num_rows)
    race_logits = rng.normal(0.0, 4.0, (num_rows, len(UTKFACE.races)))
    gender = (rng.random(num_rows) < _sigmoid(gender_logit)).astype(np.int64)
    race = (race_logits + rng.gumbel(size=race_logits.shape)).argmax(axis=1)
    exponentials = np.exp(TRUE_TEMPERATURE * race_logits)
    return Labels(UTKFACE, age.astype(np.float32), gender, race), {
        "age": predicted.astype(np.float32),
        "gender": _sigmoid(TRUE_TEMPERATURE * gender_logit).astype(np.float32),
        "race": (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32),
    }


def _sigmoid(logit: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-logit))


def fit(labels: Labels, predictions: Predictions, coverage: float = 0.9, risk: float = 0.1) -> Calibration:
    return Calibration.fit(labels, predictions, coverage=coverage, risk=risk)


def only_age(truth: list[float], predicted: list[float]) -> tuple[Labels, Predictions]:
    missing = np.full(len(truth), -1)
    age = np.asarray(predicted, np.float32)
    return Labels(UTKFACE, np.asarray(truth, np.float32), missing, missing), {"age": age}


FRESH = draw(10_000, seed=1)


@pytest.mark.parametrize(("num_rows", "coverage"), [(20, 0.9), (200, 0.8), (1000, 0.95)])
def test_age_intervals_cover_as_promised_over_repeated_draws(num_rows: int, coverage: float) -> None:
    reports = []
    for seed in range(2, 62):
        labels, predictions = draw(num_rows, seed)
        calibration = fit(labels, {"age": predictions["age"]}, coverage=coverage)
        reports.append(coverage_report(FRESH[0], {"age": FRESH[1]["age"]}, calibration)["age"])

    # Conformal coverage is nominal to nominal + 1 / (n + 1) on average; the width of the pooled intervals is taken
    # from all ages, so small sets are a little off.
    assert np.mean([report["coverage"] for report in reports]) == pytest.approx(coverage, abs=0.02)
    assert reports[0]["nominal"] == coverage


def test_age_groups_with_enough_images_have_their_own_widths() -> None:
    calibration = fit(*draw(5000, seed=2))
    report = coverage_report(*FRESH, calibration)["age"]

    assert calibration.age is not None
    assert calibration.age.by_group is not None
    half_widths = calibration.age.by_group.half_widths_years
    assert half_widths[0] < 0.4 * half_widths[7]
    predicted_old = FRESH[1]["age"] > 70
    old = FRESH[0].take(predicted_old)
    some = {task: values[predicted_old] for task, values in FRESH[1].items()}
    assert coverage_report(old, some, calibration)["age"]["coverage"] == pytest.approx(0.9, abs=0.03)
    assert set(report["groups"]["age_group"]) == set(UTKFACE.age_groups)
    assert sum(part["n"] for part in report["groups"]["race"].values()) == report["n"] == 10_000


def test_the_half_width_is_the_finite_sample_quantile_by_hand() -> None:
    # 9 errors 1 .. 9: ceil(10 * 0.7) = the 7th smallest. The ends stay within what labels can be.
    labels, predictions = only_age([21, 22, 23, 24, 25, 26, 27, 28, 29], [20] * 9)
    calibration = fit(labels, predictions, coverage=0.7)
    made = calibration.apply({"age": np.array([3, 50, 112], np.float32)})

    assert made.age_low is not None
    assert made.age_high is not None
    assert made.age_low.tolist() == [0, 43, 105]
    assert made.age_high.tolist() == [10, 57, 116]
    assert (made.p_male, made.race_probs, made.abstain_gender, made.abstain_race) == (None,) * 4


def test_too_few_ages_give_no_interval_and_a_note() -> None:
    labels, predictions = only_age([30, NAN, 31], [30, 30, 30])
    calibration = fit(labels, predictions)
    made = calibration.apply(predictions)

    assert calibration.age is None
    assert calibration.notes == ("age: 2 images labelled with an exact age are too few for intervals of coverage 0.9",)
    assert made.age is predictions["age"]
    assert (made.age_low, made.age_high) == (None, None)
    assert coverage_report(labels, predictions, calibration) == {"n": 3, "age": None, "gender": None, "race": None}


def test_temperatures_are_recovered() -> None:
    calibration = fit(*draw(5000, seed=2))
    report = coverage_report(*FRESH, calibration)

    for task, part in (("gender", calibration.gender), ("race", calibration.race)):
        assert part is not None
        assert part.temperature == pytest.approx(TRUE_TEMPERATURE, rel=0.08)
        assert report[task]["ece"] < 0.02 < 0.05 < report[task]["ece_before"]
        assert report[task]["nll"] < report[task]["nll_before"]


def test_the_likeliest_class_stays_the_likeliest() -> None:
    predictions = FRESH[1]
    made = fit(*draw(500, seed=2)).apply(predictions)

    assert made.p_male is not None
    assert made.race_probs is not None
    assert ((made.p_male > 0.5) == (predictions["gender"] > 0.5)).all()
    assert (made.race_probs.argmax(axis=1) == predictions["race"].argmax(axis=1)).all()
    assert made.race_probs.sum(axis=1) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("task", ["gender", "race"])
def test_the_risk_is_met_in_95_of_100_draws(task: str) -> None:
    fresh = {task: FRESH[1][task]}
    reports = []
    for seed in range(2, 102):
        labels, predictions = draw(800, seed)
        calibration = fit(labels, {task: predictions[task]})
        reports.append(coverage_report(FRESH[0], fresh, calibration)[task])

    assert sum(report["error"] is None or report["error"] <= 0.1 for report in reports) >= 95
    assert np.mean([report["abstained"] for report in reports]) < 0.5  # it is no art to abstain always


def test_an_easy_risk_needs_no_abstention_and_an_impossible_one_always_abstains() -> None:
    labels, predictions = draw(800, seed=2)
    loose, strict = fit(labels, predictions, risk=0.6), fit(labels, predictions, risk=0.0001)

    assert loose.race is not None
    assert strict.race is not None
    assert (loose.race.abstain_below, strict.race.abstain_below) == (0.0, NEVER_SURE)
    assert not loose.apply(predictions).abstain_race.any()  # type: ignore[union-attr]
    assert strict.apply(predictions).abstain_race.all()  # type: ignore[union-attr]
    assert "race: always abstains" in strict.notes[-1]
    report = coverage_report(labels, predictions, strict)["race"]
    assert (report["abstained"], report["accepted"], report["error"], report["interval"]) == (1.0, 0, None, None)
    assert (strict.rows["race_pred"] == -1).all()


def test_perfectly_separated_labels_keep_the_networks_own_probabilities_and_say_so() -> None:
    labels, predictions = draw(200, seed=2)
    truth = dataclasses.replace(labels, race=predictions["race"].argmax(axis=1))
    calibration = fit(truth, predictions)

    assert calibration.race is not None
    assert calibration.race.temperature == 1.0
    assert "race: too few of 200 labelled images are wrong to fit a temperature: 1 is used" in calibration.notes


def test_saturated_probabilities_stay_finite() -> None:
    labels, predictions = draw(200, seed=2)
    certain = np.eye(len(UTKFACE.races), dtype=np.float32)[labels.race]
    certain[:5] = certain[5:10]  # some are wrong, with a probability of 1
    saturated = {**predictions, "gender": labels.gender.astype(np.float32), "race": certain}
    calibration = fit(labels, saturated)

    json.dumps(calibration.to_json(), allow_nan=False)
    json.dumps(coverage_report(labels, saturated, calibration), allow_nan=False)


def test_an_image_with_a_missing_label_counts_for_the_others() -> None:
    labels, predictions = draw(600, seed=2)
    gone = np.arange(600) < 200
    holes = Labels(
        UTKFACE,
        np.where(gone, NAN, labels.age).astype(np.float32),
        np.where(np.roll(gone, 200), -1, labels.gender),
        np.where(np.roll(gone, 400), -1, labels.race),
    )
    calibration = fit(holes, predictions)
    alone = fit(labels.take(~gone), {task: values[~gone] for task, values in predictions.items()})
    report = coverage_report(holes, predictions, calibration)

    assert calibration.age == alone.age
    assert (calibration.n, calibration.gender.n, calibration.race.n) == (600, 400, 400)  # type: ignore[union-attr]
    assert [report[task]["n"] for task in ("age", "gender", "race")] == [400, 400, 400]
    assert (calibration.rows["age_group"] == -1).sum() == 200
    assert (calibration.rows["age_group_pred"] >= 0).all()


def test_a_label_that_no_row_has_does_not_change_predictions() -> None:
    labels, predictions = draw(100, seed=2)
    calibration = fit(dataclasses.replace(labels, race=np.full(100, -1)), predictions)
    made = calibration.apply(predictions)

    assert calibration.race is None
    assert made.race_probs is predictions["race"]
    assert made.abstain_race is None
    assert made.abstain_gender is not None
    assert (calibration.rows["race_pred"] == -1).all()
    assert calibration.notes == ("race: no labelled image",)


def test_a_prediction_without_a_head_is_none() -> None:
    labels, predictions = draw(300, seed=2)
    predictions = {task: values for task, values in predictions.items() if task != "gender"}
    calibration = fit(labels, predictions)
    made = calibration.apply(predictions)

    assert calibration.gender is None
    assert (made.p_male, made.abstain_gender) == (None, None)
    assert coverage_report(labels, predictions, calibration)["gender"] is None
    assert (calibration.rows["gender_pred"] == -1).all()


@pytest.mark.parametrize("num_rows", [0, 1, 5, 30])
def test_tiny_sets_are_split_as_well_as_possible(num_rows: int) -> None:
    labels, predictions = draw(num_rows, seed=2)
    calibration = fit(labels, predictions)
    made = calibration.apply(predictions)

    assert (calibration.age is None) == (num_rows < 9)
    assert calibration.gender is None or calibration.gender.temperature == 1.0
    assert made.abstain_gender is None or made.abstain_gender.all()
    assert calibration.notes
    coverage_report(labels, predictions, calibration)


def test_the_calibration_error_by_hand() -> None:
    probs = np.array([[0.9, 0.1], [0.92, 0.08], [0.3, 0.7], [1.0, 0.0]])
    # 0.9 and 0.92 share the bin from 13/15 to 14/15: one of two right; 0.7 is wrong; 1 is right.
    assert expected_calibration_error(probs, np.array([0, 1, 0, 0])) == pytest.approx((1.82 - 1 + 0.7) / 4)


def squeezed(num_rows: int, seed: int) -> tuple[Labels, Predictions]:
    """Draw faces whose ages are predicted half as far from 40 years as they are, and 10 years too high."""
    labels, predictions = draw(num_rows, seed)
    return labels, predictions | {"age": (50.0 + 0.5 * (predictions["age"] - 40.0)).astype(np.float32)}


def test_corrected_ages_are_unbiased_and_their_intervals_cover() -> None:
    calibration = Calibration.fit(*squeezed(3_000, seed=2), coverage=0.9, risk=0.1, correct_age=True)
    assert calibration.age is not None
    assert calibration.age.slope == pytest.approx(2.0, abs=0.1)
    assert calibration.age.offset_years == pytest.approx(40.0 - 2.0 * 50.0, abs=5.0)
    labels, predictions = squeezed(10_000, seed=1)

    measured = coverage_report(labels, predictions, calibration)["age"]
    assert measured["bias_years_before"] > 5.0
    assert measured["bias_years"] == pytest.approx(0.0, abs=0.6)  # ages are clipped at 0
    assert measured["mae_years"] < 0.6 * measured["mae_years_before"]
    assert 0.88 <= measured["coverage"] <= 0.92
    applied = calibration.apply(predictions)
    assert applied.age is not None
    assert applied.age_low is not None
    assert (applied.age_low <= applied.age).all()
    again = Calibration.from_json(json.loads(json.dumps(calibration.to_json())))
    assert again.age == calibration.age


def test_ages_are_corrected_only_if_asked() -> None:
    labels, predictions = squeezed(3_000, seed=2)
    calibration = fit(labels, predictions)
    applied = calibration.apply(predictions)
    assert applied.age is not None
    assert (applied.age == predictions["age"]).all()
    measured = coverage_report(labels, predictions, calibration)["age"]
    assert measured["mae_years"] == measured["mae_years_before"]


@pytest.mark.parametrize(
    ("predicted", "note"),
    [
        (np.arange(49.0), "49 images with an exact age are fewer than 50"),
        (np.full(200, 35.27), "older faces are not predicted to be older"),
        (-np.arange(200.0) / 2 + 100, "older faces are not predicted to be older"),
    ],
)
def test_ages_that_cannot_be_corrected_stay_and_a_note_says_why(predicted: np.ndarray, note: str) -> None:
    labels, predictions = only_age(np.arange(len(predicted)).tolist(), predicted.tolist())
    calibration = Calibration.fit(labels, predictions, coverage=0.9, risk=0.1, correct_age=True)

    assert calibration.age is not None
    assert (calibration.age.offset_years, calibration.age.slope) == (0.0, 1.0)
    assert [each for each in calibration.notes if "not corrected" in each] == [f"age: not corrected, because {note}"]


def test_ages_are_not_corrected_without_calibration() -> None:
    with pytest.raises(ConfigError, match="correct_age needs calibrate"):
        parse(EvaluateJob, ["--checkpoint", "c", "--data", "d", "--correct-age"], {})


def test_json_round_trips() -> None:
    labels, predictions = draw(300, seed=2)
    calibration = Calibration.fit(
        labels,
        {task: values for task, values in predictions.items() if task != "gender"},
        coverage=0.8,
        risk=0.1,
        model_digest="ab",
        pipeline=Pipeline(predict=PredictConfig(flip_average=True)),
        precisions=("float32", "bfloat16"),
        split_manifest_sha256="ef",
        content_codes=(-(2**63), 2**63 - 1),
    )
    said = json.loads(json.dumps(calibration.to_json(), allow_nan=False))
    again = Calibration.from_json(said)

    assert json.loads(json.dumps(again.to_json())) == said
    assert again.pipeline.predict.flip_average
    assert (again.notes, again.content_codes) == (calibration.notes, calibration.content_codes)
    assert again.precisions == ("float32", "bfloat16")
    assert (again.age, again.gender, again.race) == (calibration.age, None, calibration.race)
    assert again.rows["race_pred"].dtype == np.int64
    for one, other in zip(again.apply(predictions), calibration.apply(predictions), strict=True):
        assert one is other or (one == other).all()


def test_the_reference_holds_calibrated_predictions_of_detected_faces_only() -> None:
    labels, predictions = draw(3000, seed=2)
    detected = np.arange(3000) % 3 > 0
    scores = np.where(detected, 0.99, NAN)
    quality = {"detector_score": scores, "sharpness": np.where(detected, np.arange(3000.0), 1e6)}

    calibration = Calibration.fit(labels, predictions, coverage=0.9, risk=0.1, quality=quality)

    reference = calibration.reference
    assert reference is not None
    assert {name: histogram.num_faces for name, histogram in reference.histograms.items()} == dict.fromkeys(
        ("detector_score", "sharpness", "age", "p_male", "race"), 2000
    )
    assert reference.histograms["sharpness"].edges[-1] < 3000
    made = calibration.apply(predictions)
    assert made.p_male is not None
    assert reference.count({"p_male": made.p_male[detected].astype(float)})["p_male"].tolist() == list(
        reference.histograms["p_male"].counts
    )
    again = Calibration.from_json(json.loads(json.dumps(calibration.to_json())))
    assert again.reference == reference


def test_without_a_detected_face_or_without_qualities_there_is_no_reference() -> None:
    labels, predictions = draw(60, seed=2)
    quality = {"detector_score": np.full(60, NAN)}

    assert fit(labels, predictions).reference is None
    assert Calibration.fit(labels, predictions, coverage=0.9, risk=0.1, quality=quality).reference is None


def test_an_invalid_calibration_is_rejected() -> None:
    said = fit(*draw(60, seed=2)).to_json()
    for damage, complaint in (
        ({"format_version": 1}, "expected format_version 4, found 1"),
        ({"rows": {}}, "not in the format that agr-ray evaluate --calibrate writes: 'age_group'"),
        ({"race": {"n": 1}}, "not in the format that agr-ray evaluate --calibrate writes: "),
        ({"surplus": 1}, "not in the format that agr-ray evaluate --calibrate writes: "),
        (
            {"pipeline": {}},
            "not in the format that agr-ray evaluate --calibrate writes: vision: expected a table",
        ),
        ({"n": 61}, "expected 61 of each of rows, found"),
        (
            {"age": said["age"] | {"by_group": said["age"]["by_group"] | {"half_widths_years": [1.0]}}},
            "expected 9 half_widths_years, found 1",
        ),
        ({"age": said["age"] | {"by_group": None}}, "expected either age.by_spread or age.by_group"),
        ({"age": said["age"] | {"half_widths_years": [1.0]}}, "unexpected keyword argument 'half_widths_years'"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Calibration.from_json(said | damage)


def test_a_calibration_file_is_read_or_named_in_the_error(tmp_path: Path) -> None:
    assert read_calibration_json(tmp_path) is None
    (tmp_path / CALIBRATION).write_text('{"n": 1}')
    assert read_calibration_json(tmp_path) == {"n": 1}
    for damaged in ("{", "[]"):
        (tmp_path / CALIBRATION).write_text(damaged)
        with pytest.raises(CheckpointError, match=r"calibration\.json: expected"):
            read_calibration_json(tmp_path)


@pytest.mark.parametrize(
    ("argv", "expected"), [((), False), (("--calibrate",), True), (("--evaluate.calibrate",), True)]
)
def test_calibrate_is_a_flag(argv: tuple[str, ...], expected: bool) -> None:
    needed = ("--evaluate.checkpoint", "best", "--evaluate.data", "prepared")
    assert parse(EvaluateJob, (*needed, *argv), {}).evaluate.calibrate is expected


def test_without_exact_ages_there_is_no_interval_but_a_note() -> None:
    labels, predictions = draw(200, seed=2)
    ranges = dataclasses.replace(
        labels, age=np.full(200, NAN, np.float32), age_low=labels.age - 2, age_high=labels.age + 2
    )
    calibration = fit(ranges, predictions)

    assert calibration.age is None
    assert calibration.notes == (
        "age: 0 images labelled with an exact age are too few for intervals of coverage 0.9; 200 others are labelled "
        "with an age range, which has no error",
    )
    spans = labels.space.age_group(labels.age - 2) != labels.space.age_group(labels.age + 2)
    assert 0 < spans.sum() < 200
    assert (calibration.rows["age_group"] == np.where(spans, -1, labels.age_group)).all()
    assert coverage_report(ranges, predictions, calibration)["age"] is None


def test_only_exact_ages_determine_the_interval() -> None:
    labels, predictions = draw(300, seed=2)
    exact = np.arange(300) < 200
    mixed = dataclasses.replace(
        labels, age=np.where(exact, labels.age, NAN).astype(np.float32), age_low=labels.age - 2, age_high=labels.age + 2
    )
    alone = fit(labels.take(exact), {task: values[exact] for task, values in predictions.items()})
    assert fit(mixed, predictions).age == alone.age


def test_a_calibration_keeps_its_label_space() -> None:
    labels, predictions = draw(200, seed=2)
    own = dataclasses.replace(labels, space=dataclasses.replace(FAIRFACE, races=UTKFACE.races))
    calibration = fit(own, predictions)
    again = Calibration.from_json(json.loads(json.dumps(calibration.to_json())))
    assert again.space == own.space
    np.testing.assert_array_equal(again.apply(predictions).age_low, calibration.apply(predictions).age_low)  # type: ignore[arg-type]
