"""Compare the errors of corrected and raw shares, and measure the coverage of the corrected shares' intervals.

    python benchmarks/shares.py --calibration EVAL/predictions.parquet --test EVAL/predictions.parquet

jobs/evaluate.py writes both files, for the same model and for splits that it was not trained on: the first for the
calibration split, the second for another one. --mixtures times, true shares are drawn at random (Dirichlet), and then
--faces test images with these shares. The images are counted as scoring counts faces, abstentions included, and
corrected by the model's errors on the calibration images.

There are two tables. In the first, each breakdown has its own mixtures: the shares of its classes are uniform on the
simplex, and within a class images are drawn as in the test split. The correction is designed for this case. In the
second, age group, gender and race all shift strongly at once, so that the errors in one depend on the others. It shows
what to expect if the correction's assumption fails.

Prints the mean absolute error of raw and of corrected shares, their ratio, the share of 90 % intervals that contain
the true share, and their mean width. Expected in the first table: errors below the raw ones, and a coverage of 85 % or
more.

An image is repeated in a mixture only if its class has no other left. Repeated faces carry less information than the
intervals assume, so coverage falls if --faces is large compared with the test split. Classes of fewer than --min-rows
test images are left out of the mixtures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.table import Table

from agr_ray.config import EvaluateConfig
from agr_ray.console import make_console
from agr_ray.data.crops import read_labels
from agr_ray.evaluation.calibration import CalibratedPredictions, Calibration
from agr_ray.evaluation.terms import predicted_gender
from agr_ray.labels import UTKFACE, Labels
from agr_ray.models.predictions import Predictions
from agr_ray.predict.crop_predictor import read_predictions
from agr_ray.schema import DEMOGRAPHIC_COUNTS, PREDICTIONS
from agr_ray.tables.demographics import demographics
from agr_ray.tables.face_rows import count_faces

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ATTRIBUTES = tuple(UTKFACE.classes)
SIZES = tuple(len(names) for names in UTKFACE.classes.values())
KEY = "mixture"
BREAKDOWNS = (("gender",), ("race",), ("age_group",), ("gender", "race"), ATTRIBUTES)


class Scored(NamedTuple):
    """Labelled images with predictions, from an evaluation."""

    labels: Labels
    predictions: Predictions


def main() -> None:
    """Read both files, draw the mixtures, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="predictions.parquet of the calibration split")
    parser.add_argument("--test", type=Path, required=True, help="predictions.parquet of another split")
    parser.add_argument("--mixtures", type=int, default=100, help="number of mixtures (100)")
    parser.add_argument("--faces", type=int, default=500, help="faces in each mixture (500)")
    parser.add_argument("--min-rows", type=int, default=5, help="test images that a combination needs (5)")
    parser.add_argument("--risk", type=float, default=EvaluateConfig().abstain_risk, help="abstain_risk (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    calibration_set, test = read(arguments.calibration), read(arguments.test)
    calibration = Calibration.fit(*calibration_set, coverage=EvaluateConfig().coverage, risk=arguments.risk)
    faces = scored_faces(calibration.apply(test.predictions))
    console = make_console()
    counts = f"{len(calibration_set.labels.age):,} calibration and {len(test.labels.age):,} test images"
    console.print(f"{counts}; {arguments.mixtures} mixtures of {arguments.faces:,} faces")
    for note in calibration.notes:
        console.print(f"note: {note}")
    reasons = {}
    for title, shifted in (("each breakdown shifted on its own", None), ("all shifted at once", ATTRIBUTES)):
        figures = Table("breakdown", "raw error", "corrected", "of raw", "coverage", "interval width", title=title)
        for breakdown in BREAKDOWNS:
            rng = np.random.default_rng(arguments.seed)
            shares, chosen = draw_mixtures(
                test.labels, shifted or breakdown, arguments.mixtures, arguments.faces, arguments.min_rows, rng
            )
            table = table_of(faces, chosen, calibration, breakdown, arguments.seed)
            cells, reason = compared(table, shares, breakdown)
            figures.add_row(",".join(breakdown), *cells)
            if reason is not None:
                reasons[breakdown] = reason
        console.print(figures)
    for breakdown, reason in reasons.items():
        console.print(f"{','.join(breakdown)}: not corrected: {reason}")


def read(path: Path) -> Scored:
    """Read the images that have all labels."""
    rows = pq.read_table(path, schema=PREDICTIONS)
    labels = read_labels(rows, UTKFACE)
    known = np.isfinite(labels.age) & labels.has("gender") & labels.has("race")
    missing = [name for name in ("age_pred", "p_male", "race_probs") if rows[name].null_count]
    if missing:
        raise SystemExit(f"{path}: has rows without {missing[0]}: a model of age, gender and race is needed")
    predictions = read_predictions(rows, UTKFACE)
    return Scored(labels.take(known), {task: values[known] for task, values in predictions.items()})


def draw_mixtures(
    labels: Labels,
    shifted: tuple[str, ...],
    num: int,
    num_faces: int,
    min_rows: int,
    rng: np.random.Generator,
) -> tuple[FloatArray, IntArray]:
    """Draw true shares of all combinations, and rows with these shares.

    Shares of each shifted attribute are uniform on the simplex; those of their combinations follow a Dirichlet
    distribution around the products. Given the shifted attributes, the others are distributed as in the labelled
    images. Rows repeat only if there are too few.

    Returns:
        (num, *SIZES) shares, and (num, num_faces) rows.
    """
    truth = np.stack([labels.age_group, labels.gender, labels.race])
    axes = [ATTRIBUTES.index(name) for name in shifted]
    sizes = tuple(SIZES[axis] for axis in axes)
    code = np.ravel_multi_index(tuple(truth[axes]), sizes)
    cells, num_rows = np.unique(code, return_counts=True)
    cells = cells[num_rows >= min_rows]
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
        weights = weights / weights.sum()
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


def compared(table: pa.Table, shares: FloatArray, breakdown: tuple[str, ...]) -> tuple[list[str], str | None]:
    """Return the figures of a breakdown, and why it is not corrected."""
    rows = table.filter(pc.equal(table["breakdown"], ",".join(breakdown)))
    truth = shares.sum(axis=tuple(1 + i for i, name in enumerate(ATTRIBUTES) if name not in breakdown)).ravel()
    share, corrected, low, high = (
        rows[name].to_numpy() for name in ("share", "share_corrected", "share_low", "share_high")
    )
    raw = np.abs(share - truth).mean()
    reason: str | None = rows["correction"][0].as_py()
    if reason is not None:
        return [f"{raw:.4f}"], reason
    error = np.abs(corrected - truth).mean()
    held = ((low <= truth) & (truth <= high)).mean()
    figures = [f"{raw:.4f}", f"{error:.4f}", f"{error / raw:.0%}", f"{100 * held:.1f} %", f"{(high - low).mean():.3f}"]
    return figures, None


if __name__ == "__main__":
    main()
