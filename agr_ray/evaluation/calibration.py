"""How sure to be: age intervals, calibrated probabilities and abstention, fitted on labelled images.

The images must be ones that training never saw, and like those to be scored: every promise here is an average over
such images, not one for each group of people. `coverage_report` says for whom it fails.

Age: split conformal prediction (Vovk, Gammerman and Shafer 2005; Lei et al. 2018, JASA 113(523)), by predicted age
group where that has enough images (Mondrian). Gender and race: temperature scaling (Guo et al. 2017, ICML).
Abstention: selective classification with a guaranteed risk (Geifman and El-Yaniv 2017, NeurIPS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import betaincinv, log_softmax, softmax

from agr_ray.config.pipeline import DEFAULT_PIPELINE, Pipeline
from agr_ray.evaluation.metrics import FloatArray, IntArray, Labels, age_group, predicted_gender
from agr_ray.models.predictions import Predictions
from agr_ray.schema import AGE_GROUPS, AGE_MAX_YEARS, AGE_MIN_YEARS, CLASS_MISSING, GENDERS, RACES

FORMAT_VERSION: Final = 2
"""Raised whenever a reader of the old calibration.json would misread the new one."""

ROW_NAMES: Final = ("age_group", "gender", "race", "age_group_pred", "gender_pred", "race_pred")

MIN_ROWS: Final = 50
"""Images below which an age group has no width, and an attribute no temperature, of its own. From 50 images, the
coverage of a 90 % interval is good to 4 percentage points (one standard deviation)."""

TEMPERATURES: Final = (0.2, 5.0)
"""Lowest and highest temperature tried. Without errors to fit, the best one is 0, which claims certainty."""

CONFIDENCE: Final = 0.95
"""Of the intervals of `coverage_report`, and that the risk among accepted images is as low as stated."""

NEVER_SURE: Final = 2.0
"""The `abstain_below` that no probability reaches."""

_NUM_THRESHOLDS = 20
_NUM_BINS = 15
_LEAST_PROBABILITY = 1e-7  # float32 probabilities saturate at 0 and 1, whose logit is infinite


class CalibratedPredictions(NamedTuple):
    """What is said of n faces; None for a task without head, and where it was not calibrated, as said."""

    age: NDArray[np.float32] | None
    """(n,) years, as predicted."""
    age_low: NDArray[np.float32] | None
    """(n,) years; None also for ages that were not calibrated, as the next."""
    age_high: NDArray[np.float32] | None
    p_male: NDArray[np.float32] | None
    """(n,) probability of "male", as predicted where it was not calibrated."""
    race_probs: NDArray[np.float32] | None
    """(n, len(RACES)), in the order of `RACES`; as predicted where they were not calibrated."""
    abstain_gender: NDArray[np.bool_] | None
    """(n,) where gender is too unsure to be told at the stated risk; None also where it was not calibrated."""
    abstain_race: NDArray[np.bool_] | None
    """(n,) the same for race."""


@dataclass(frozen=True)
class AgeCalibration:
    """Intervals of age."""

    n: int
    """Images that it was fitted on."""
    half_widths_years: tuple[float, ...]
    """By predicted age group, in the order of `AGE_GROUPS`."""
    num_rows: tuple[int, ...]
    """Images that each half-width comes from: n itself where the group has fewer than `MIN_ROWS`."""


@dataclass(frozen=True)
class ClassCalibration:
    """Probabilities of gender or of race, and when to tell it."""

    n: int
    """Images that it was fitted on."""
    temperature: float
    """Divides the logits: over 1, the network was too sure."""
    abstain_below: float
    """Probability of the likeliest class below which the model abstains; 0: never; `NEVER_SURE`: always."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was fitted, on what. A part is None where the network has no such head or too few images have the label."""

    coverage: float
    """Nominal share of true ages that lie in their intervals."""
    risk: float
    """Share of errors, among images for which the model does not abstain, that it is to stay below."""
    n: int
    """Images, whatever their labels."""
    age: AgeCalibration | None
    gender: ClassCalibration | None
    race: ClassCalibration | None
    rows: Mapping[str, IntArray]
    """`ROW_NAMES` -> (n,) indices. Truth: -1 where the label is missing. Predictions: -1 where the model abstains,
    has no such head, or was not calibrated in gender or race."""
    notes: tuple[str, ...] = ()
    """What could not be fitted, and why, in plain words."""
    model_digest: str = ""
    """The only model that this may be used with."""
    pipeline: Pipeline = DEFAULT_PIPELINE
    """The settings it was fitted under: of the crops' vision, and of prediction."""
    split_manifest_sha256: str = ""
    """Of the prepared set it was fitted on."""
    content_codes: tuple[int, ...] = ()
    """`models.checkpoint.content_codes` of the images, to tell whether a measured image is among them."""
    num_seen_in_training: int | None = None
    """Images that were also used in training; they make calibration overconfident. None: unknown."""

    @classmethod
    def fit(
        cls,
        labels: Labels,
        predictions: Predictions,
        *,
        coverage: float,
        risk: float,
        model_digest: str = "",
        pipeline: Pipeline = DEFAULT_PIPELINE,
        split_manifest_sha256: str = "",
        content_codes: tuple[int, ...] = (),
        num_seen_in_training: int | None = None,
    ) -> Self:
        """Fit every part on n images that training never saw. A missing label leaves the image out of its part only.

        Args:
            labels: the truth.
            predictions: of the same images, uncalibrated; the logs of probabilities serve as logits.
            coverage: as the field, and so are the rest.
        """
        notes: list[str] = []
        age = None if predictions.age is None else _fit_age(labels.age, predictions.age, coverage, notes)
        gender, race = (
            None if probs is None else _fit_classes(task, truth, probs, risk, notes)
            for task, truth, probs in (
                ("gender", labels.gender, _gender_probs(predictions.p_male)),
                ("race", labels.race, predictions.race_probs),
            )
        )
        num_rows = len(labels.age)
        unknown = np.full(num_rows, CLASS_MISSING, np.int64)
        calibrated = _apply(predictions, age, gender, race)
        rows = {
            "age_group": true_age_group(labels.age),
            "gender": labels.gender,
            "race": labels.race,
            "age_group_pred": unknown if predictions.age is None else age_group(predictions.age),
            "gender_pred": unknown,
            "race_pred": unknown,
        }
        if calibrated.p_male is not None and calibrated.abstain_gender is not None:
            rows["gender_pred"] = np.where(calibrated.abstain_gender, unknown, predicted_gender(calibrated.p_male))
        if calibrated.race_probs is not None and calibrated.abstain_race is not None:
            rows["race_pred"] = np.where(calibrated.abstain_race, unknown, calibrated.race_probs.argmax(axis=1))
        return cls(
            coverage=coverage,
            risk=risk,
            n=num_rows,
            age=age,
            gender=gender,
            race=race,
            rows=rows,
            notes=tuple(notes),
            model_digest=model_digest,
            pipeline=pipeline,
            split_manifest_sha256=split_manifest_sha256,
            content_codes=content_codes,
            num_seen_in_training=num_seen_in_training,
        )

    @property
    def overlap_warning(self) -> str:
        """Warning if training saw, or may have seen, images that the calibration was fitted on; empty: none."""
        if self.num_seen_in_training == 0:
            return ""
        if self.num_seen_in_training is None:
            return f"unknown whether training saw the {self.n:,} images that the calibration was fitted on"
        return (
            f"the model was trained on {self.num_seen_in_training:,} of the {self.n:,} images that its calibration was "
            "fitted on: intervals are too narrow, probabilities overconfident, abstentions too rare; calibrate on "
            "images that training never saw"
        )

    def apply(self, predictions: Predictions) -> CalibratedPredictions:
        """Calibrate what the same network predicts of other faces. The likeliest class stays the likeliest."""
        return _apply(predictions, self.age, self.gender, self.race)

    def to_json(self) -> dict[str, Any]:
        """Return plain values: what calibration.json holds."""
        rows = {name: values.tolist() for name, values in self.rows.items()}
        return {"format_version": FORMAT_VERSION} | asdict(self) | {"rows": rows, "pipeline": self.pipeline.to_json()}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """Rebuild what `to_json` returned.

        Raises:
            ValueError: another format, or a part is missing or of another shape; one line.
        """
        version = said.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"expected format_version {FORMAT_VERSION}, found {version!r}")
        try:
            age = said["age"]
            if age is not None:
                age = AgeCalibration(age["n"], tuple(age["half_widths_years"]), tuple(age["num_rows"]))
            parts = {task: said[task] and ClassCalibration(**said[task]) for task in ("gender", "race")}
            rows = {name: np.asarray(said["rows"][name], np.int64) for name in ROW_NAMES}
            fields = {name: value for name, value in said.items() if name != "format_version"}
            lists = {name: tuple(said[name]) for name in ("notes", "content_codes")}
            seen = {"num_seen_in_training": said["num_seen_in_training"]}
            pipeline = Pipeline.from_json(said["pipeline"])
            made = cls(**fields | parts | lists | seen | {"age": age, "rows": rows, "pipeline": pipeline})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"expected what jobs/evaluate.py --calibrate writes, found otherwise: {error}") from None
        if age is not None and len(age.half_widths_years) != len(AGE_GROUPS):
            raise ValueError(f"expected {len(AGE_GROUPS)} half_widths_years, found {len(age.half_widths_years)}")
        if any(values.shape != (made.n,) for values in rows.values()):
            raise ValueError(f"expected {made.n} of each of rows, found {[len(values) for values in rows.values()]}")
        return made


def coverage_report(labels: Labels, predictions: Predictions, calibration: Calibration) -> dict[str, Any]:
    """Say how the calibration does on n labelled images, which should be others than it was fitted on.

    Keys: `n`; `age` {nominal, groups} and, for all and for each of groups.{age_group,gender,race}.NAME of the true
    label, {n, coverage, interval, mean_width_years}; `gender` and `race` {n, risk, abstained, accepted, error,
    interval, nll, nll_before, ece, ece_before}: `abstained` and `error` are shares, the error that among the
    accepted. `interval` is the exact 95 % interval (Clopper and Pearson 1934) of the share before it. Parts that are
    not calibrated, or of which there is no labelled image, are None.

    Args:
        labels: the truth; a missing label leaves the image out.
        predictions: of the same images, uncalibrated.
        calibration: fitted on others.
    """
    made = calibration.apply(predictions)
    age, gender, race = None, None, None
    if made.age_low is not None and made.age_high is not None:
        age = _coverage(labels, made.age_low, made.age_high, calibration.coverage)
    if made.abstain_gender is not None:
        before, after = _gender_probs(predictions.p_male), _gender_probs(made.p_male)
        gender = _selection(labels.gender, before, after, made.abstain_gender, calibration.risk)
    if made.abstain_race is not None:
        race = _selection(labels.race, predictions.race_probs, made.race_probs, made.abstain_race, calibration.risk)
    return {"n": len(labels.age), "age": age, "gender": gender, "race": race}


def true_age_group(age_years: NDArray[np.floating[Any]]) -> IntArray:
    """Return the index in `AGE_GROUPS` of each age; -1 for NaN."""
    known = np.isfinite(age_years)
    return np.where(known, age_group(np.where(known, age_years, 0.0)), CLASS_MISSING)


def expected_calibration_error(probs: NDArray[np.floating[Any]], truth: IntArray) -> float:
    """Return the mean gap between confidence and accuracy over 15 bins of equal width (Guo et al. 2017, eq. 3).

    Args:
        probs: (n, classes), n at least 1.
        truth: (n,) indices, none missing.
    """
    confidence = probs.max(axis=1).astype(np.float64)
    gap = (probs.argmax(axis=1) == truth) - confidence
    bins = np.minimum((confidence * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
    return float(np.abs(np.bincount(bins, gap)).sum() / len(truth))


def _fit_age(
    truth: NDArray[np.float32], predicted: NDArray[np.float32], coverage: float, notes: list[str]
) -> AgeCalibration | None:
    known = np.isfinite(truth)
    errors = np.abs(predicted[known].astype(np.float64) - truth[known])
    overall = _conformal_quantile(errors, coverage)
    if overall is None:
        notes.append(f"age: {len(errors)} labelled images are too few for intervals of coverage {coverage}")
        return None
    groups = age_group(predicted[known])
    half_widths, num_rows = [], []
    for index in range(len(AGE_GROUPS)):
        own = errors[groups == index]
        own_quantile = _conformal_quantile(own, coverage) if len(own) >= MIN_ROWS else None
        half_widths.append(overall if own_quantile is None else own_quantile)
        num_rows.append(len(errors) if own_quantile is None else len(own))
    return AgeCalibration(len(errors), tuple(half_widths), tuple(num_rows))


def _conformal_quantile(errors: FloatArray, coverage: float) -> float | None:
    """Return the ceil((n + 1) coverage)-th smallest, which a further error stays within so often; None: n is less."""
    rank = math.ceil(round((len(errors) + 1) * coverage, 9))  # 0.7 * 10 is not quite 7
    return float(np.sort(errors)[rank - 1]) if rank <= len(errors) else None


def _fit_classes(
    task: str, truth: IntArray, probs: NDArray[np.floating[Any]], risk: float, notes: list[str]
) -> ClassCalibration | None:
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
        if np.isclose(temperature, TEMPERATURES, rtol=0.01).any():
            notes.append(
                f"{task}: its temperature {temperature:.2f} is the end of the range that is tried, "
                f"{TEMPERATURES[0]} to {TEMPERATURES[1]}: its errors do not determine it"
            )
    calibrated = _scaled(probs, temperature)
    wrong = calibrated.argmax(axis=1) != truth
    abstain_below = _fit_threshold(calibrated.max(axis=1), wrong, risk)
    if abstain_below == NEVER_SURE:
        notes.append(
            f"{task}: always abstains: with {len(truth)} labelled images, {wrong.mean():.1%} of them wrong, a risk of "
            f"{risk} can't be promised at any confidence"
        )
    return ClassCalibration(len(truth), temperature, abstain_below)


def _fit_temperature(truth: IntArray, probs: NDArray[np.floating[Any]]) -> float:
    """Minimise the negative log-likelihood, which has one minimum, over the log of the temperature."""
    logits = _logits(probs)
    rows = np.arange(len(truth))

    def mean_nll(log_temperature: float) -> float:
        return -float(log_softmax(logits / math.exp(log_temperature), axis=1)[rows, truth].mean())

    found = minimize_scalar(mean_nll, bounds=np.log(TEMPERATURES), method="bounded")
    return math.exp(found.x)


def _fit_threshold(confidence: FloatArray, wrong: NDArray[np.bool_], risk: float) -> float:
    """Return the smallest of 20 thresholds above which the error is at most `risk` with a confidence of 95 %.

    They accept the surest 5, 10, ... 100 % of the images. Any of them may be chosen, so each is tested at a 20th of
    the 5 %, where Geifman and El-Yaniv's bisection tests log2(n) and needs the error to fall with the confidence.
    """
    highest_first = np.sort(confidence)[::-1]
    shares = np.arange(1, _NUM_THRESHOLDS) / _NUM_THRESHOLDS
    thresholds = [0.0, *highest_first[np.ceil(shares * len(confidence)).astype(np.int64) - 1][::-1]]
    chance = (1.0 - CONFIDENCE) / _NUM_THRESHOLDS
    for threshold in thresholds:  # from the one that accepts most
        accepted = confidence >= threshold
        if _upper_bound(wrong[accepted].sum(), accepted.sum(), chance) <= risk:
            return float(threshold)
    return NEVER_SURE


def _apply(
    predictions: Predictions, age: AgeCalibration | None, gender: ClassCalibration | None, race: ClassCalibration | None
) -> CalibratedPredictions:
    age_low, age_high, abstain_gender, abstain_race = None, None, None, None
    p_male, race_probs = predictions.p_male, predictions.race_probs
    if predictions.age is not None and age is not None:
        half_widths = np.asarray(age.half_widths_years)[age_group(predictions.age)]
        age_low, age_high = (
            # Labels are in this range, so that clipping loses none.
            np.clip(predictions.age + sign * half_widths, AGE_MIN_YEARS, AGE_MAX_YEARS).astype(np.float32)
            for sign in (-1.0, 1.0)
        )
    gender_probs = _gender_probs(p_male)
    if gender_probs is not None and gender is not None:
        scaled = _scaled(gender_probs, gender.temperature)
        p_male, abstain_gender = scaled[:, 1].astype(np.float32), scaled.max(axis=1) < gender.abstain_below
    if race_probs is not None and race is not None:
        scaled = _scaled(race_probs, race.temperature)
        race_probs, abstain_race = scaled.astype(np.float32), scaled.max(axis=1) < race.abstain_below
    return CalibratedPredictions(predictions.age, age_low, age_high, p_male, race_probs, abstain_gender, abstain_race)


def _coverage(
    labels: Labels, age_low: NDArray[np.float32], age_high: NDArray[np.float32], nominal: float
) -> dict[str, Any] | None:
    known = np.isfinite(labels.age)
    within = (age_low <= labels.age) & (labels.age <= age_high)
    widths = age_high.astype(np.float64) - age_low

    def part(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        num, num_within = int(chosen.sum()), int(within[chosen].sum())
        return {
            "n": num,
            "coverage": num_within / num,
            "interval": _interval(num_within, num),
            "mean_width_years": float(widths[chosen].mean()),
        }

    if not known.any():
        return None
    groups = {}
    for attribute, codes, names in (
        ("age_group", true_age_group(labels.age), AGE_GROUPS),
        ("gender", labels.gender, GENDERS),
        ("race", labels.race, RACES),
    ):
        members = ((name, known & (codes == index)) for index, name in enumerate(names))
        groups[attribute] = {name: part(chosen) for name, chosen in members if chosen.any()}
    return {"nominal": nominal, **part(known), "groups": groups}


def _selection(
    truth: IntArray,
    before: NDArray[np.floating[Any]] | None,
    after: NDArray[np.floating[Any]] | None,
    abstain: NDArray[np.bool_],
    risk: float,
) -> dict[str, Any] | None:
    assert before is not None
    assert after is not None
    known = truth >= 0
    if not known.any():
        return None
    truth, before, after, accept = truth[known], before[known], after[known], ~abstain[known]
    num, num_accepted = len(truth), int(accept.sum())
    num_wrong = int((after.argmax(axis=1) != truth)[accept].sum())
    rows = np.arange(num)
    return {
        "n": num,
        "risk": risk,
        "abstained": 1.0 - num_accepted / num,
        "accepted": num_accepted,
        "error": num_wrong / num_accepted if num_accepted else None,
        "interval": _interval(num_wrong, num_accepted) if num_accepted else None,
        "nll": -float(_logits(after)[rows, truth].mean()),
        "nll_before": -float(_logits(before)[rows, truth].mean()),
        "ece": expected_calibration_error(after, truth),
        "ece_before": expected_calibration_error(before, truth),
    }


def _gender_probs(p_male: NDArray[np.float32] | None) -> FloatArray | None:
    """Return (n, len(GENDERS)) probabilities."""
    if p_male is None:
        return None
    male = p_male.astype(np.float64)
    return np.stack([1.0 - male, male], axis=1)


def _logits(probs: NDArray[np.floating[Any]]) -> FloatArray:
    logits: FloatArray = np.log(np.clip(probs.astype(np.float64), _LEAST_PROBABILITY, 1.0))
    return logits


def _scaled(probs: NDArray[np.floating[Any]], temperature: float) -> FloatArray:
    scaled: FloatArray = softmax(_logits(probs) / temperature, axis=1)
    return scaled


def _upper_bound(num_wrong: int, num: int, chance: float) -> float:
    """Return what a share is below but for `chance`, one-sided (Clopper and Pearson 1934)."""
    return float(betaincinv(num_wrong + 1, num - num_wrong, 1.0 - chance)) if num_wrong < num else 1.0


def _interval(num_true: int, num: int) -> list[float]:
    tail = (1.0 - CONFIDENCE) / 2.0
    return [1.0 - _upper_bound(num - num_true, num, tail), _upper_bound(num_true, num, tail)]
