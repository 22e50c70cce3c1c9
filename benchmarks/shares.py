"""Compare the errors of corrected and raw shares, and measure the coverage of the corrected shares' intervals.

    python benchmarks/shares.py --calibration EVAL/predictions.parquet --test EVAL/predictions.parquet
    python benchmarks/shares.py --simulated 934 --rounds 4 --mixtures 25 --faces 100 1000

jobs/evaluate.py writes both files, for the same model and for splits that it was not trained on: the first for the
calibration split, the second for another one. --simulated needs no files: in each round it draws so many calibration
images, and 4,000 test images (`simulated_faces.py`).

--mixtures times, true shares are drawn at random (Dirichlet), and then --faces test images with these shares. The
images are counted as scoring counts faces, abstentions included, and corrected by the model's errors on the calibration
images. There are three kinds of tables:

- Each breakdown has its own mixtures: the shares of its classes are uniform on the simplex, and within a class images
  are drawn as in the test split. The correction is designed for this case.
- Age group, gender and race all shift strongly at once, so that the errors in one depend on the others. It shows what
  to expect if the correction's assumption fails.
- Ways to correct a single attribute: ours, from counts, also where scoring would refuse (with its percentiles and with
  5 and 95); soft EM and KDEy on each face's probabilities; KDEy on predicted ages (`quantifiers.py`). --strengths gives
  the part of the shares that is drawn at random; the rest are those of the test images.

Prints the mean absolute error of raw and of corrected shares, their ratio, the share of 90 % intervals that contain
the true share, and their mean width. Expected in the first table: errors below the raw ones, and a coverage of 85 % or
more.

An image is repeated in a mixture only if its class has no other left. Repeated faces carry less information than the
intervals assume, so coverage falls if --faces is large compared with the test split. Classes of fewer than --min-rows
test images are left out of the mixtures.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from quantifiers import (
    BANDWIDTH,
    BANDWIDTH_YEARS,
    bootstrapped_shares,
    calibrated,
    estimated_shares,
    kernel_likelihoods,
    kernels,
    soft_likelihoods,
)
from rich.console import Console
from rich.table import Table
from scipy.stats import norm
from simulated_faces import simulated_faces

from agr_ray.config import EvaluateConfig
from agr_ray.console import make_console
from agr_ray.data.crops import read_labels
from agr_ray.evaluation.calibration import CalibratedPredictions, Calibration, gender_probs
from agr_ray.evaluation.terms import predicted_gender
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.predictions import Predictions
from agr_ray.predict.prediction_rows import read_predictions
from agr_ray.schema import DEMOGRAPHIC_COUNTS, PREDICTIONS
from agr_ray.tables.demographics import demographics
from agr_ray.tables.face_rows import count_faces
from agr_ray.tables.prevalence import PERCENTILES, confusion_counts, true_shares

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ATTRIBUTES: Final = tuple(UTKFACE.classes)
SIZES: Final = tuple(len(names) for names in UTKFACE.classes.values())
KEY: Final = "mixture"
BREAKDOWNS: Final = (("gender",), ("race",), ("age_group",), ("gender", "race"), ATTRIBUTES)
NUM_RESAMPLES: Final = 100
NUM_SIMULATED: Final = 4_000
"""Simulated test images of each round."""
COLUMNS: Final = ("raw error", "corrected", "of raw", "coverage", "interval width")


class Scored(NamedTuple):
    """Labelled images with predictions, from an evaluation."""

    labels: Labels
    predictions: Predictions


class Compared(NamedTuple):
    """Estimates of the shares of c classes in g mixtures."""

    truth: FloatArray
    """(g, c), as all others."""
    raw: FloatArray
    share: FloatArray
    low: FloatArray
    high: FloatArray


Results = defaultdict[tuple[str, ...], list[Compared]]
"""Title of the table and the first cells of the row -> the results of each round."""


def main() -> None:
    """Read or draw the images, draw the mixtures, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="predictions.parquet of the calibration split")
    parser.add_argument("--test", type=Path, help="predictions.parquet of another split")
    parser.add_argument("--simulated", type=int, metavar="N", help="draw N calibration images, and test images")
    parser.add_argument("--rounds", type=int, default=1, help="simulated sets of images (1)")
    parser.add_argument("--mixtures", type=int, default=100, help="number of mixtures in each round (100)")
    parser.add_argument("--faces", type=int, nargs="+", default=[500], help="faces in each mixture (500)")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0], help="of the shift (0.5 1)")
    parser.add_argument("--counts-only", action="store_true", help="leave out the methods that need probabilities")
    parser.add_argument("--min-rows", type=int, default=5, help="test images that a combination needs (5)")
    parser.add_argument("--risk", type=float, default=EvaluateConfig().abstain_risk, help="abstain_risk (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.simulated is None) == (arguments.calibration is None or arguments.test is None):
        parser.error("expected --calibration and --test, or --simulated")
    console = make_console()
    results, reasons = Results(list), dict[tuple[str, ...], str]()
    for number, (calibration_set, test) in enumerate(rounds(arguments)):
        calibration = Calibration.fit(*calibration_set, coverage=EvaluateConfig().coverage, risk=arguments.risk)
        counts = f"{len(calibration_set.labels):,} calibration and {len(test.labels):,} test images"
        console.print(f"{counts}; {arguments.mixtures} mixtures of {arguments.faces} faces")
        for note in calibration.notes:
            console.print(f"note: {note}")
        for num_faces in arguments.faces:
            rng = np.random.default_rng([arguments.seed, number, num_faces])
            measure_tables(test, calibration, num_faces, arguments, rng, results, reasons)
            for strength in arguments.strengths:
                measure_methods(calibration_set, test, calibration, num_faces, strength, arguments, rng, results)
    show(console, results)
    for breakdown, reason in reasons.items():
        console.print(f"{','.join(breakdown)}: not corrected: {reason}")


def rounds(arguments: argparse.Namespace) -> Iterator[tuple[Scored, Scored]]:
    """Yield calibration and test images."""
    if arguments.simulated is None:
        yield read(arguments.calibration), read(arguments.test)
        return
    for number in range(arguments.rounds):
        seed = 1000 * arguments.seed + 2 * number
        calibration_set, test = simulated_faces(arguments.simulated, seed), simulated_faces(NUM_SIMULATED, seed + 1)
        yield Scored(*calibration_set), Scored(*test)


def read(path: Path) -> Scored:
    """Read the images that have all labels."""
    rows = pq.read_table(path, schema=PREDICTIONS)
    labels = read_labels(rows, UTKFACE)
    known = np.isfinite(labels.age) & (labels.gender >= 0) & (labels.race >= 0)
    missing = [name for name in ("age_pred", "p_male", "race_probs") if rows[name].null_count]
    if missing:
        raise SystemExit(f"{path}: has rows without {missing[0]}: a model of age, gender and race is needed")
    predictions = read_predictions(rows, ("age", "gender", "race"), UTKFACE)
    return Scored(labels.take(known), {task: values[known] for task, values in predictions.items()})


def measure_tables(
    test: Scored,
    calibration: Calibration,
    num_faces: int,
    arguments: argparse.Namespace,
    rng: np.random.Generator,
    results: Results,
    reasons: dict[tuple[str, ...], str],
) -> None:
    """Measure the demographic tables that scoring would write."""
    faces = scored_faces(calibration.apply(test.predictions))
    for title, shifted in (("each breakdown shifted on its own", None), ("all shifted at once", ATTRIBUTES)):
        for breakdown in BREAKDOWNS:
            shares, chosen = draw_mixtures(
                test.labels, shifted or breakdown, arguments.mixtures, num_faces, arguments.min_rows, rng
            )
            table = table_of(faces, chosen, calibration, breakdown, arguments.seed)
            compared, reason = compare(table, shares, breakdown)
            results[f"{title}, {num_faces} faces", ",".join(breakdown)].append(compared)
            if reason is not None:
                reasons[breakdown] = reason


def measure_methods(
    calibration_set: Scored,
    test: Scored,
    calibration: Calibration,
    num_faces: int,
    strength: float,
    arguments: argparse.Namespace,
    rng: np.random.Generator,
    results: Results,
) -> None:
    """Measure ways to correct the shares of a single attribute."""
    title = f"shift of {strength:g}, {num_faces} faces"
    applied = calibration.apply(test.predictions)
    for axis, name in enumerate(ATTRIBUTES):
        shares, chosen = draw_mixtures(
            test.labels, (name,), arguments.mixtures, num_faces, arguments.min_rows, rng, strength
        )
        truth = shares.sum(axis=tuple(1 + i for i in range(len(SIZES)) if i != axis))
        codes = predicted_codes(applied, name)
        size = SIZES[axis]
        outcomes = np.where(codes < 0, size, codes)[chosen]
        counts = np.stack([np.bincount(each, minlength=size + 1) for each in outcomes])
        told = counts[:, :size]
        with np.errstate(invalid="ignore"):
            raw = told / told.sum(axis=1, keepdims=True)  # NaN if the model abstains on all faces
        confusion = confusion_counts([calibration.rows[name]], [calibration.rows[f"{name}_pred"]], [size])
        for percentiles in (PERCENTILES, (5.0, 95.0)):
            made = true_shares(counts, [confusion], arguments.seed, percentiles)
            method = f"counts, percentiles {percentiles[0]:g} and {percentiles[1]:g}"
            results[title, name, method].append(Compared(truth, raw, *made))
        if arguments.counts_only:
            continue
        weighted = np.stack([np.bincount(each, minlength=len(test.labels)) for each in chosen]).astype(np.float64)
        own = calibration.rows[name]
        resampled = list(resampled_weights(own, rng))
        for method, likelihoods in methods(calibration_set, test, own, name):
            share = estimated_shares(likelihoods(np.ones(len(own))), weighted)
            drawn = bootstrapped_shares([likelihoods(each) for each in resampled], weighted, share, rng)
            low, high = np.clip(np.percentile(drawn, PERCENTILES, axis=0), 0.0, 1.0)
            high = np.maximum(np.maximum(high, share), 1.0 - 0.05 ** (1.0 / num_faces))  # as in prevalence.py
            results[title, name, method].append(Compared(truth, raw, share, np.minimum(low, share), high))


def methods(
    calibration_set: Scored, test: Scored, truth: IntArray, name: str
) -> Iterator[tuple[str, Callable[[FloatArray], FloatArray]]]:
    """Yield each method that needs every face's probabilities, as a function of the calibration images' weights."""
    probs, new_probs = (class_probs(each.predictions, name) for each in (calibration_set, test))
    if probs is not None and new_probs is not None:
        yield "soft EM", lambda weights: soft_likelihoods(truth, probs, new_probs, weights)
        kernel = kernels(calibrated(truth, probs, probs), calibrated(truth, probs, new_probs), BANDWIDTH)
        yield "KDEy", lambda weights: kernel_likelihoods(truth, kernel, weights)
    if name == "age_group":
        ages, new_ages = (each.predictions["age"].astype(np.float64)[:, None] for each in (calibration_set, test))
        of_ages = kernels(ages, new_ages, BANDWIDTH_YEARS)
        yield "KDEy on ages", lambda weights: kernel_likelihoods(truth, of_ages, weights)


def class_probs(predictions: Predictions, name: str) -> FloatArray | None:
    """Return the uncalibrated probabilities of each class, (n, c).

    Those of age groups are of a Gaussian with the predicted mean and spread; None if there is no spread.
    """
    if name == "gender":
        return gender_probs(predictions["gender"])
    if name == "race":
        return predictions["race"].astype(np.float64)
    if "age_spread" not in predictions:
        return None
    ranges = np.array(UTKFACE.age_ranges_years, np.float64)
    edges = (ranges[:-1, 1] + ranges[1:, 0]) / 2
    spread = np.maximum(predictions["age_spread"].astype(np.float64), 0.5)[:, None]
    below = norm.cdf((edges - predictions["age"][:, None]) / spread)
    ends = np.zeros((len(below), 1)), np.ones((len(below), 1))
    return np.diff(np.hstack([ends[0], below, ends[1]]), axis=1)


def predicted_codes(predictions: CalibratedPredictions, name: str) -> IntArray:
    """Return the predicted classes, (n,); -1: the model abstains."""
    assert predictions.age is not None
    assert predictions.p_male is not None
    assert predictions.race_probs is not None
    if name == "age_group":
        return UTKFACE.age_group(predictions.age)
    is_gender = name == "gender"
    codes = predicted_gender(predictions.p_male) if is_gender else predictions.race_probs.argmax(axis=1)
    abstains = predictions.abstain_gender if is_gender else predictions.abstain_race
    return codes if abstains is None else np.where(abstains, -1, codes)


def resampled_weights(truth: IntArray, rng: np.random.Generator) -> Iterator[FloatArray]:
    """Yield how often each calibration image is drawn if those of each class are drawn with replacement."""
    rows_of = [np.flatnonzero(truth == code) for code in np.unique(truth)]
    for _ in range(NUM_RESAMPLES):
        weights = np.zeros(len(truth))
        for rows in rows_of:
            weights[rows] = rng.multinomial(len(rows), np.full(len(rows), 1.0 / len(rows)))
        yield weights


def draw_mixtures(
    labels: Labels,
    shifted: tuple[str, ...],
    num: int,
    num_faces: int,
    min_rows: int,
    rng: np.random.Generator,
    strength: float = 1.0,
) -> tuple[FloatArray, IntArray]:
    """Draw true shares of all combinations, and rows with these shares.

    Shares of each shifted attribute are uniform on the simplex; those of their combinations follow a Dirichlet
    distribution around the products. With a strength below 1, they are averaged with those of the labelled images.
    Given the shifted attributes, the others are distributed as in the labelled images. Rows repeat only if there are
    too few.

    Returns:
        (num, *SIZES) shares, and (num, num_faces) rows.
    """
    truth = np.stack([labels.age_group, labels.gender, labels.race])
    axes = [ATTRIBUTES.index(name) for name in shifted]
    sizes = tuple(SIZES[axis] for axis in axes)
    code = np.ravel_multi_index(tuple(truth[axes]), sizes)
    cells, num_rows = np.unique(code, return_counts=True)
    cells, num_rows = cells[num_rows >= min_rows], num_rows[num_rows >= min_rows]
    rows_of = [np.flatnonzero(code == cell) for cell in cells]
    within = np.zeros((len(cells), *SIZES))  # shares of all combinations in each cell
    for cell, rows in zip(within, rows_of, strict=True):
        np.add.at(cell, tuple(truth[:, rows]), 1.0 / len(rows))
    shares, chosen = np.zeros((num, *SIZES)), np.empty((num, num_faces), np.int64)
    for mixture in range(num):
        expected = np.ones(())
        for size in sizes:
            expected = np.multiply.outer(expected, rng.dirichlet(np.ones(size)))
        weights = expected.ravel()[cells]
        if len(axes) > 1:
            weights = rng.gamma(len(cells) * weights / weights.sum() + 1e-9)
        weights = strength * weights / weights.sum() + (1.0 - strength) * num_rows / num_rows.sum()
        shares[mixture] = np.tensordot(weights, within, 1)
        drawn = rng.multinomial(num_faces, weights)
        pairs = zip(rows_of, drawn, strict=True)
        chosen[mixture] = np.concatenate([np.resize(rng.permutation(rows), n) for rows, n in pairs])
    return shares, chosen


def scored_faces(predictions: CalibratedPredictions) -> pa.Table:
    """Return the columns of faces that counting reads, as scoring writes them; no face is flagged."""
    assert predictions.p_male is not None
    assert predictions.race_probs is not None
    abstained = [
        (name, np.zeros(len(predictions.p_male), bool) if mask is None else mask)
        for name, mask in (("gender", predictions.abstain_gender), ("race", predictions.abstain_race))
    ]
    names = [[name for name, mask in abstained if mask[face]] for face in range(len(predictions.p_male))]
    return pa.table(
        {
            "age": pa.array(predictions.age),
            "gender": np.asarray(UTKFACE.genders)[predicted_gender(predictions.p_male)],
            "race": np.asarray(UTKFACE.races)[predictions.race_probs.argmax(axis=1)],
            "abstain": pa.array(names, pa.list_(pa.string())),
            "flags": pa.array([[]] * len(names), pa.list_(pa.string())),
        }
    )


def table_of(
    faces: pa.Table, chosen: IntArray, calibration: Calibration, attributes: tuple[str, ...], seed: int
) -> pa.Table:
    """Count the chosen rows of each mixture, and return the project's demographic table of them."""
    num, num_faces = chosen.shape
    names = np.arange(num).astype(str)
    drawn = faces.take(pa.array(chosen.ravel())).append_column(KEY, pa.array(np.repeat(names, num_faces)))
    zeros = dict.fromkeys(DEMOGRAPHIC_COUNTS, np.zeros(num, np.int64))
    groups = pa.table({KEY: names} | zeros | dict.fromkeys(("num_images", "num_faces"), np.full(num, num_faces)))
    classes = {name: UTKFACE.classes[name] for name in attributes}
    table = demographics(count_faces(drawn, [KEY], UTKFACE), groups, calibration.rows, classes, seed)
    return table.filter(pc.invert(table["is_total"]))


def compare(table: pa.Table, shares: FloatArray, breakdown: tuple[str, ...]) -> tuple[Compared, str | None]:
    """Return the estimates of a breakdown, NaN if it is not corrected, and why it is not."""
    rows = table.filter(pc.equal(table["breakdown"], ",".join(breakdown)))
    truth = shares.sum(axis=tuple(1 + i for i, name in enumerate(ATTRIBUTES) if name not in breakdown))
    names = ("share", "share_corrected", "share_low", "share_high")
    estimates = (rows[name].to_numpy().astype(np.float64).reshape(len(shares), -1) for name in names)
    reason: str | None = rows["correction"][0].as_py()
    return Compared(truth.reshape(len(shares), -1), *estimates), reason


def show(console: Console, results: Results) -> None:
    """Print a table for each title."""
    for title in dict.fromkeys(key[0] for key in results):
        rows = {key[1:]: each for key, each in results.items() if key[0] == title}
        first = ("breakdown", "method")[: len(next(iter(rows)))]
        table = Table(*first, *COLUMNS, title=title)
        for cells, each in rows.items():
            table.add_row(*cells, *figures(each))
        console.print(table)


def figures(rounds: Sequence[Compared]) -> list[str]:
    """Return the cells of `COLUMNS`; those that need corrected shares count only the rounds that have them."""
    raw = np.concatenate([np.abs(each.raw - each.truth).ravel() for each in rounds])
    corrected = [each for each in rounds if np.isfinite(each.share).all()]
    if not corrected:
        return [_number(raw.mean())]
    error = np.mean([np.abs(each.share - each.truth).mean() for each in corrected])
    own_raw = np.mean([np.abs(each.raw - each.truth).mean() for each in corrected])
    of_raw = "" if np.isnan(own_raw) else f"{error / own_raw:.0%}"
    held = np.mean([((each.low <= each.truth) & (each.truth <= each.high)).mean() for each in corrected])
    width = np.mean([(each.high - each.low).mean() for each in corrected])
    return [_number(raw.mean()), _number(error), of_raw, f"{100 * held:.1f} %", f"{width:.3f}"]


def _number(value: float | np.floating[Any]) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"


if __name__ == "__main__":
    main()
