"""Calibration: age intervals, corrected ages, calibrated probabilities and abstention, fitted on labelled images.

Training must never have seen these images, and they must resemble those to be scored. Guarantees are averages over such
images, and need not hold for each group of people: `coverage.coverage_report` shows where they fail. Only age intervals
by spread are fitted for each age separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from agr_ray.config.pipeline import DEFAULT_PIPELINE, Pipeline
from agr_ray.evaluation.age_calibration import AgeCalibration, fit_age
from agr_ray.evaluation.selection import ClassCalibration, fit_classes, scaled_probs
from agr_ray.evaluation.shift import Reference, Values
from agr_ray.evaluation.terms import FloatArray, predicted_gender
from agr_ray.labels import CLASS_MISSING, IntArray, Labels, LabelSpace
from agr_ray.models.predictions import Predictions

FORMAT_VERSION: Final = 4
"""Increased whenever a reader of the old calibration.json would misread the new one."""

ROW_NAMES: Final = ("age_group", "gender", "race", "age_group_pred", "gender_pred", "race_pred")


class CalibratedPredictions(NamedTuple):
    """Predictions for n faces, calibrated if a calibration was fitted; None for a task without a head."""

    age: NDArray[np.float32] | None
    """(n,) years; as predicted if age was not corrected."""
    age_low: NDArray[np.float32] | None
    """(n,) years; also None, like `age_high`, if age was not calibrated."""
    age_high: NDArray[np.float32] | None
    p_male: NDArray[np.float32] | None
    """(n,) probability of "male"; as predicted if gender was not calibrated."""
    race_probs: NDArray[np.float32] | None
    """(n, races), in the label space's order; as predicted if race was not calibrated."""
    abstain_gender: NDArray[np.bool_] | None
    """(n,) whether gender is too uncertain for the stated risk; also None if gender was not calibrated."""
    abstain_race: NDArray[np.bool_] | None
    """(n,) the same for race."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A fitted calibration. A part is None if the network has no such head or too few images have the label."""

    space: LabelSpace
    """Label space of the indices in `rows` and of the intervals' age groups."""
    coverage: float
    """Nominal share of true ages that lie in their intervals."""
    risk: float
    """Maximum share of errors among images for which the model does not abstain."""
    n: int
    """Number of images, with or without labels."""
    age: AgeCalibration | None
    gender: ClassCalibration | None
    race: ClassCalibration | None
    rows: Mapping[str, IntArray]
    """`ROW_NAMES` -> (n,) indices. Truth: -1 if the label is missing. Predictions: -1 if the model abstains, has no
    such head, or was not calibrated in gender or race."""
    notes: tuple[str, ...] = ()
    """Parts that could not be fitted, and why."""
    model_digest: str = ""
    """Digest of the only model that this may be used with."""
    pipeline: Pipeline = DEFAULT_PIPELINE
    """Settings that it was fitted under: [vision] of the crops, and [predict]."""
    precisions: tuple[str, ...] = ()
    """Data types that the predictions were computed in. With predict.precision auto they depend on the device."""
    split_manifest_sha256: str = ""
    """Digest of the splits of the prepared set that it was fitted on."""
    content_codes: tuple[int, ...] = ()
    """`models.checkpoint.content_codes` of the images, to detect an evaluation on the same images."""
    num_seen_in_training: int | None = None
    """Images that were also used in training; they make calibration overconfident. None: unknown."""
    reference: Reference | None = None
    """What the images' faces are like, to notice a scoring run whose faces differ. None: no face was detected."""

    @classmethod
    def fit(
        cls,
        labels: Labels,
        predictions: Predictions,
        *,
        coverage: float,
        risk: float,
        correct_age: bool = False,
        model_digest: str = "",
        pipeline: Pipeline = DEFAULT_PIPELINE,
        precisions: tuple[str, ...] = (),
        split_manifest_sha256: str = "",
        content_codes: tuple[int, ...] = (),
        num_seen_in_training: int | None = None,
        quality: Values | None = None,
    ) -> Self:
        """Fit every part on n images that training never saw. A missing label excludes the image from its part only.

        Args:
            labels: the truth.
            predictions: of the same images, uncalibrated; the logs of probabilities serve as logits.
            correct_age: correct ages by a linear regression, see `AgeCalibration`.
            coverage: see the field of that name, as for the other arguments.
            quality: `shift.quality_values` of the images; images without a detector score are left out of `reference`.
                None: there is no reference.
        """
        notes: list[str] = []
        age = None
        if "age" in predictions:
            spread = predictions.get("age_spread")
            age = fit_age(labels, predictions["age"], spread, coverage, notes, correct=correct_age)
        gender, race = (
            None if probs is None else fit_classes(task, truth, probs, risk, notes)
            for task, truth, probs in (
                ("gender", labels.gender, gender_probs(predictions.get("gender"))),
                ("race", labels.race, predictions.get("race")),
            )
        )
        num_rows = len(labels)
        unknown = np.full(num_rows, CLASS_MISSING, np.int64)
        calibrated = _apply(labels.space, predictions, age, gender, race)
        rows = {
            "age_group": labels.age_group,
            "gender": labels.gender,
            "race": labels.race,
            "age_group_pred": unknown if calibrated.age is None else labels.space.age_group(calibrated.age),
            "gender_pred": unknown,
            "race_pred": unknown,
        }
        if calibrated.p_male is not None and calibrated.abstain_gender is not None:
            rows["gender_pred"] = np.where(calibrated.abstain_gender, unknown, predicted_gender(calibrated.p_male))
        if calibrated.race_probs is not None and calibrated.abstain_race is not None:
            rows["race_pred"] = np.where(calibrated.abstain_race, unknown, calibrated.race_probs.argmax(axis=1))
        return cls(
            space=labels.space,
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
            precisions=precisions,
            split_manifest_sha256=split_manifest_sha256,
            content_codes=content_codes,
            num_seen_in_training=num_seen_in_training,
            reference=None if quality is None else _reference(labels.space, calibrated, quality),
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

    def precision_warning(self, precisions: Iterable[str]) -> str:
        """Return a warning if predictions were computed in another data type than the calibration's; empty: none."""
        others = sorted(set(precisions) - set(self.precisions))
        if not others or not self.precisions:
            return ""
        return (
            f"predicted in {' and '.join(others)}, but calibrated on predictions in {' and '.join(self.precisions)}: "
            f"predict.precision {self.pipeline.predict.precision} depends on the device, and intervals and "
            "probabilities may be slightly off; calibrate on such a device, or with a fixed predict.precision"
        )

    def apply(self, predictions: Predictions) -> CalibratedPredictions:
        """Calibrate the same network's predictions for other faces. The most likely class stays the same."""
        return _apply(self.space, predictions, self.age, self.gender, self.race)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the content of calibration.json."""
        values = asdict(self)
        space, rows = {"label_space": self.space.to_json()}, {name: codes.tolist() for name, codes in self.rows.items()}
        del values["space"]
        return {"format_version": FORMAT_VERSION} | space | values | {"rows": rows, "pipeline": self.pipeline.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json`'s result.

        Raises:
            ValueError: the format differs, or a part is missing or has another shape; the message is one line.
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"expected format_version {FORMAT_VERSION}, found {version!r}")
        try:
            space = LabelSpace.from_json(values["label_space"])
            age = values["age"] and AgeCalibration.from_json(values["age"], space)
            parts = {task: values[task] and ClassCalibration(**values[task]) for task in ("gender", "race")}
            rows = {name: np.asarray(values["rows"][name], np.int64) for name in ROW_NAMES}
            fields = {name: value for name, value in values.items() if name not in ("format_version", "label_space")}
            lists = {name: tuple(values[name]) for name in ("notes", "precisions", "content_codes")}
            seen = {"num_seen_in_training": values["num_seen_in_training"]}
            reference = values["reference"] and Reference.from_json(values["reference"])
            pipeline = Pipeline.from_json(values["pipeline"])
            calibration = cls(
                **fields
                | parts
                | lists
                | seen
                | {"space": space, "age": age, "rows": rows, "pipeline": pipeline, "reference": reference}
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not in the format that agr-ray evaluate --calibrate writes: {error}") from None
        if any(codes.shape != (calibration.n,) for codes in rows.values()):
            raise ValueError(f"expected {calibration.n} of each of rows, found {list(map(len, rows.values()))}")
        return calibration


def _apply(
    space: LabelSpace,
    predictions: Predictions,
    age: AgeCalibration | None,
    gender: ClassCalibration | None,
    race: ClassCalibration | None,
) -> CalibratedPredictions:
    age_low, age_high, abstain_gender, abstain_race = None, None, None, None
    ages, p_male, race_probs = (predictions.get(task) for task in ("age", "gender", "race"))
    if ages is not None and age is not None:
        ages, age_low, age_high = age.apply(ages, predictions.get("age_spread"), space)
    probs = gender_probs(p_male)
    if probs is not None and gender is not None:
        scaled = scaled_probs(probs, gender.temperature)
        p_male, abstain_gender = scaled[:, 1].astype(np.float32), scaled.max(axis=1) < gender.abstain_below
    if race_probs is not None and race is not None:
        scaled = scaled_probs(race_probs, race.temperature)
        race_probs, abstain_race = scaled.astype(np.float32), scaled.max(axis=1) < race.abstain_below
    return CalibratedPredictions(ages, age_low, age_high, p_male, race_probs, abstain_gender, abstain_race)


def _reference(space: LabelSpace, calibrated: CalibratedPredictions, quality: Values) -> Reference | None:
    """Return what the faces that a detector found are like; None if there are none."""
    found = np.isfinite(quality["detector_score"])
    if not found.any():
        return None
    predicted = {"age": calibrated.age, "p_male": calibrated.p_male}
    if calibrated.race_probs is not None:
        predicted["race"] = calibrated.race_probs.argmax(axis=1)
    values = dict(quality) | {name: each for name, each in predicted.items() if each is not None}
    return Reference.fit({name: each[found].astype(np.float64) for name, each in values.items()}, space.races)


def gender_probs(p_male: NDArray[np.float32] | None) -> FloatArray | None:
    """Return the probabilities of the genders, (n, 2)."""
    if p_male is None:
        return None
    male = p_male.astype(np.float64)
    return np.stack([1.0 - male, male], axis=1)
