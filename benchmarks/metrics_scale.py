"""Measure the time and the memory of all metrics, group tables and intervals, for many prediction rows.

    python benchmarks/metrics_scale.py --rows 10000000

Makes a table of predictions in a temporary folder (about 60 bytes a row), then reads and measures it in a process of
its own, on two threads at most, and prints the time and the peak memory of that process. Then it does the same for
`--plain-rows` rows in the plain way: read the table whole, take the rows of each group, and resample all persons 1,000
times. The plain way computes only means and shares, with an interval for each group.

Target: 10 million rows in less than 2 GiB and 120 s on two cores.

`--check` makes 20,000 rows and compares the values and intervals of both ways; it takes a few seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from agr_ray.evaluation.audit import metrics_report
from agr_ray.evaluation.cells import BREAKDOWNS, Cells
from agr_ray.evaluation.terms import row_terms
from agr_ray.labels import GENDERS, UTKFACE
from agr_ray.models.predictions import class_probs_column
from agr_ray.predict.prediction_rows import MEASURED_COLUMNS, PredictionRows, read_rows
from agr_ray.schema import PREDICTIONS
from agr_ray.storage import Storage

TASKS = ("age", "gender", "race")
ROWS_AT_ONCE = 250_000
ROWS_PER_PERSON = 3
NUM_RESAMPLES = 1_000
MIN_COMPARED = 300
WITH_INTERVALS = {
    "mae_years": ("age_absolute", "age"),
    "within_5": ("age_within", "age"),
    "gender": ("gender_right", "gender"),
    "race": ("race_right", "race"),
}


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the table (10,000,000)")
    parser.add_argument("--plain-rows", type=int, default=100_000, help="rows for the plain way (100,000); 0: skip it")
    parser.add_argument("--folder", type=Path, help="keep the tables here, and use them if they are there")
    parser.add_argument("--check", action="store_true", help="compare both ways on 20,000 rows")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "TABLE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, table = arguments.measure
        print(json.dumps(measured(way, Path(table))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.check:
            check(table_of(20_000, folder))
            return
        print("rows         way     read, s  measure, s  total, s  CPU, s  peak memory, MiB")
        for way, rows in (("ours", arguments.rows), ("ours", arguments.plain_rows), ("plain", arguments.plain_rows)):
            if rows:
                show(way, rows, in_a_process(way, table_of(rows, folder)))


def show(way: str, rows: int, figures: dict[str, float]) -> None:
    """Print a line."""
    total = figures["read_s"] + figures["measure_s"]
    print(
        f"{rows:<12,} {way:<7} {figures['read_s']:>7.1f}  {figures['measure_s']:>10.1f}  {total:>8.1f}  "
        f"{figures['cpu_s']:>6.1f}  {figures['peak_mib']:>16,.0f}",
        flush=True,
    )


def in_a_process(way: str, table: Path) -> dict[str, float]:
    """Measure in a process of its own, whose peak memory is not that of making the table."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ARROW_NUM_THREADS"), "2")
    command = [sys.executable, __file__, "--measure", way, str(table)]
    output = subprocess.run(command, env=os.environ | limits, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measured(way: str, table: Path) -> dict[str, float]:
    """Read and measure a table; return seconds and the peak memory of this process in MiB."""
    pa.set_cpu_count(2)
    started = time.perf_counter()
    rows = read(table) if way == "ours" else read_whole(table)
    read_s = time.perf_counter() - started
    started = time.perf_counter()
    report(rows) if way == "ours" else plain_report(rows)
    measure_s = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = usage.ru_utime + usage.ru_stime
    return {"read_s": read_s, "measure_s": measure_s, "cpu_s": cpu_s, "peak_mib": usage.ru_maxrss / 1024}


def read(table: Path) -> PredictionRows:
    """Read in batches."""
    storage = Storage()
    batches = storage.read_batches(str(table), MEASURED_COLUMNS)
    return read_rows(batches, storage.read_footer(str(table)).num_rows, TASKS, UTKFACE, UTKFACE)


def read_whole(table: Path) -> PredictionRows:
    """Read at once."""
    rows = pq.read_table(table)
    return read_rows(rows.to_batches(), rows.num_rows, TASKS, UTKFACE, UTKFACE)


def report(rows: PredictionRows) -> dict[str, Any]:
    """Return everything that metrics.json holds about the rows."""
    width = rows.predictions["age"]  # as if intervals widened with age
    return metrics_report(rows.labels, rows.predictions, rows.fallback, persons=rows.persons, age_uncertainty=width)


def plain_report(rows: PredictionRows) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return value and bootstrap interval of means and shares by group, the textbook way."""
    assert rows.persons is not None
    persons = np.unique(rows.persons, return_inverse=True)[1]
    terms = row_terms(rows.labels, rows.predictions)
    cells = Cells(UTKFACE)
    of_row = cells.codes(rows.labels)
    rng = np.random.default_rng(0)
    result: dict[str, dict[str, tuple[float, float, float]]] = {}
    for breakdown in BREAKDOWNS:
        for group, own_cells in zip(cells.groups[breakdown], cells.members(breakdown), strict=True):
            own = own_cells[of_row]
            who = np.unique(persons[own], return_inverse=True)[1]
            num = int(who.max(initial=-1)) + 1
            sums = np.stack(
                [np.bincount(who, terms[name][own], num) for pair in WITH_INTERVALS.values() for name in pair], axis=1
            )
            drawn = np.stack(
                [
                    np.bincount(rng.integers(0, num, num), minlength=num).astype(np.float64) @ sums
                    for _ in range(NUM_RESAMPLES)
                ]
            )
            result[f"{breakdown}/{group.name}"] = {
                name: (
                    float(sums[:, 2 * k].sum() / sums[:, 2 * k + 1].sum()),
                    *(float(end) for end in np.percentile(drawn[:, 2 * k] / drawn[:, 2 * k + 1], (2.5, 97.5))),
                )
                for k, name in enumerate(WITH_INTERVALS)
            }
    return result


def check(table: Path) -> None:
    """Compare both ways: equal values, and intervals of nearly the same width."""
    rows = read(table)
    ours, plain = report(rows), plain_report(rows)
    names = {"mae_years": ("age", "mae_years"), "within_5": ("age", "within_5")}
    names |= {task: (task, "accuracy") for task in ("gender", "race")}
    relative = []
    for name, metrics in plain.items():
        breakdown, _, group = name.partition("/")
        values = ours["groups"][breakdown][group]
        for metric, (value, low, high) in metrics.items():
            task, key = names[metric]
            assert abs(values[task][key] - value) < 1e-9, (name, metric)
            if values["n"] < MIN_COMPARED or value in (0.0, 1.0):
                continue  # a bootstrap of few rows is too narrow, and of no error has no width
            own_low, own_high = values["intervals"][task][key]
            relative.append((own_high - own_low) / (high - low))
    median, lowest, highest = np.median(relative), min(relative), max(relative)
    num_values = sum(map(len, plain.values()))
    width = f"{median:.3f} times as wide ({lowest:.2f} to {highest:.2f})"
    print(f"{num_values} equal values; {len(relative)} of our intervals are {width}")
    assert 0.98 < median < 1.05, median


def table_of(num_rows: int, folder: Path) -> Path:
    """Return a table of this many rows, made if it is not there."""
    path = folder / f"predictions-{num_rows}.parquet"
    if not path.exists():
        unfinished = path.with_suffix(".tmp")
        with pq.ParquetWriter(unfinished, PREDICTIONS, compression="zstd") as writer:
            for first in range(0, num_rows, ROWS_AT_ONCE):
                writer.write_table(made(first, min(ROWS_AT_ONCE, num_rows - first)))
        unfinished.rename(path)
    return path


def made(first: int, num: int) -> pa.Table:
    """Return rows whose errors depend on the group and, a little, on the person."""
    rng = np.random.default_rng(first)
    numbers = np.arange(first, first + num)
    persons = numbers // ROWS_PER_PERSON
    of_person = np.random.default_rng(1).normal(size=(1 << 16, 2))[persons % (1 << 16)]
    gender, race = persons * 7919 % 2, np.minimum(rng.geometric(0.4, num) - 1, 4)
    age = np.clip(rng.gamma(4.0, 8.5, num), 1, 110).round()
    error = of_person[:, 0] * 2 + rng.normal(size=num) * (3 + race + age / 20)
    logit = (2 * gender - 1) * (3.0 - 0.4 * race) + 1.5 * rng.normal(size=num) + of_person[:, 1]
    logits = 3.0 * np.eye(5)[race] + 1.3 * rng.normal(size=(num, 5))
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    texts = pc.cast(pa.array(numbers), pa.string())
    keys = pc.binary_join_element_wise("image-", texts, ".jpg", "")
    columns = {
        "image_id": pc.binary_join_element_wise("0000", texts, "0"),
        "uri": pc.binary_join_element_wise("s3://photographs/", keys, ""),
        "key": keys,
        "source": pa.array(["made"] * num),
        "group_id": pc.binary_join_element_wise("person-", pc.cast(pa.array(persons), pa.string()), ""),
        "split": pa.array(["test"] * num),
        "age": pa.array(np.where(rng.random(num) < 0.02, np.nan, age).astype(np.float32), from_pandas=True),
        "gender": pa.array(GENDERS).take(pa.array(gender)),
        "race": pa.array(UTKFACE.races).take(pa.array(race)),
        "status": pa.array(["ok", "fallback"]).take(pa.array((rng.random(num) < 0.01 + 0.02 * race).astype(np.int8))),
        "num_faces": pa.array(np.ones(num, np.int32)),
        "age_pred": pa.array(np.clip(age + error, 0, 116).astype(np.float32)),
        "p_male": pa.array((1 / (1 + np.exp(-logit))).astype(np.float32)),
        "gender_pred": pa.array(GENDERS).take(pa.array((logit > 0).astype(np.int8))),
        "race_pred": pa.array(UTKFACE.races).take(pa.array(probs.argmax(axis=1))),
        "race_probs": class_probs_column(probs.astype(np.float32), UTKFACE.races),
        "precision": pa.array(["float32"] * num),
    }
    nothing = {field.name: pa.nulls(num, field.type) for field in PREDICTIONS}
    return pa.table(nothing | columns, schema=PREDICTIONS)


if __name__ == "__main__":
    main()
