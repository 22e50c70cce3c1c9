"""Compare two evaluations on the same images: paired.json and a table on the terminal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from agr_ray.console import make_table
from agr_ray.errors import ConfigError
from agr_ray.evaluation.comparison import METRICS, Estimate, Paired, compare_pair
from agr_ray.evaluation.disparities import MIN_ROWS
from agr_ray.labels import Labels, LabelSpace
from agr_ray.predict.prediction_rows import MEASURED_COLUMNS, PredictionRows, read_rows
from agr_ray.report.evaluation_folder import METRICS_FILE, PREDICTIONS_FILE
from agr_ray.schema import LABEL_COLUMNS
from agr_ray.storage import MissingObject, Storage

PAIR_FILE: Final = "paired.json"
FORMAT_VERSION: Final = 1
_TITLES: Final = {
    "age_mae_years": ("age MAE", 1.0, " years"),
    "age_within_5": ("age within 5 years", 100.0, " %"),
    "age_one_off": ("in the right age group or the next", 100.0, " %"),
    "gender_accuracy": ("gender accuracy", 100.0, " %"),
    "race_accuracy": ("race accuracy", 100.0, " %"),
}
"""Title, and the factor and unit of the figures."""
_LOWER_IS_BETTER: Final = ("age_mae_years",)
_NUM_SHOWN: Final = 20


@dataclass(frozen=True)
class _Evaluation:
    """An evaluation's record and predictions."""

    uri: str
    record: Mapping[str, Any]
    """The section `evaluation` of metrics.json."""
    space: LabelSpace
    """Of the network."""
    measured_in: LabelSpace
    """Of the labels."""
    table: pa.Table
    """Sorted by `image_id`."""

    def rows(self, tasks: list[str], image_ids: pa.Array) -> PredictionRows:
        """Return the rows of these images."""
        table = self.table.filter(pc.is_in(self.table["image_id"], value_set=image_ids))
        batches = table.select(MEASURED_COLUMNS).to_batches()
        return read_rows(batches, table.num_rows, tasks, self.space, self.measured_in)


def write_pair(storage: Storage, first_uri: str, second_uri: str, out: str, console: Console) -> dict[str, Any]:
    """Compare two evaluations, write paired.json, print a table and a verdict; return the file's content.

    Args:
        storage: of both.
        first_uri: folder of the first evaluation.
        second_uri: of the second.
        out: folder of paired.json; empty: beside the first evaluation.
        console: gets the table.

    Raises:
        ConfigError: an evaluation can't be read, they share no image or no task, or labels of an image differ.
    """
    first, second = (_read(storage, uri) for uri in (first_uri, second_uri))
    image_ids = _shared(first, second)
    tasks = [task for task in first.record["tasks"] if task in second.record["tasks"]]
    if first.measured_in.races != second.measured_in.races:
        tasks = [task for task in tasks if task != "race"]
        console.print("race is not compared, because the races of the two label spaces differ")
    if not tasks:
        raise ConfigError(f"evaluate.compare: {first.uri} and {second.uri} have no task in common")
    rows, other = (each.rows(tasks, image_ids) for each in (first, second))
    paired = compare_pair(rows.predictions, other.predictions, _labels(rows, first, second), rows.persons)
    content = {
        "format_version": FORMAT_VERSION,
        "first": {"evaluation": first.uri, **_identity(first)},
        "second": {"evaluation": second.uri, **_identity(second)},
        "n": len(image_ids),
        "n_first_only": first.table.num_rows - len(image_ids),
        "n_second_only": second.table.num_rows - len(image_ids),
        "num_units": paired.num_units,
        "min_group_rows": MIN_ROWS,
        "num_group_comparisons": paired.num_comparisons,
        "tasks": tasks,
        **pair_json(paired),
    }
    if not out:
        out = f"{first.uri}-against-{hashlib.sha256(second.uri.encode()).hexdigest()[:8]}"
    uri = storage.join(storage.absolute(out).rstrip("/"), PAIR_FILE)
    storage.write(uri, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    _print(content, console)
    console.print(uri)
    return content


def _read(storage: Storage, uri: str) -> _Evaluation:
    try:
        metrics = json.loads(storage.read(storage.join(uri, METRICS_FILE)))
        record, names = metrics["evaluation"], metrics["labels"]
        space = LabelSpace.from_json(record["label_space"])
        measured_in = replace(space, races=tuple(names["race"]), age_groups=tuple(names["age_group"]))
        uris = record["checkpoint"], record["data"], record["split"], record["tasks"]
    except (ValueError, KeyError, TypeError, MissingObject):
        raise ConfigError(
            f"evaluate.compare {uri}: its {METRICS_FILE} is not of this version; evaluate the checkpoint again"
        ) from None
    assert all(uris)
    table = storage.read_table(storage.join(uri, PREDICTIONS_FILE), ["image_id", *MEASURED_COLUMNS])
    return _Evaluation(uri, record, space, measured_in, table.sort_by("image_id"))


def _identity(evaluation: _Evaluation) -> dict[str, Any]:
    names = ("checkpoint", "model_digest", "data", "split", "split_manifest_sha256")
    return {name: evaluation.record[name] for name in names}


def _shared(first: _Evaluation, second: _Evaluation) -> pa.Array:
    """Return the images of both evaluations, whose labels are equal.

    Raises:
        ConfigError: there is none, or labels differ.
    """
    image_ids = first.table["image_id"].combine_chunks()
    shared = image_ids.filter(pc.is_in(image_ids, value_set=second.table["image_id"].combine_chunks()))
    if not len(shared):
        raise ConfigError(f"evaluate.compare: {first.uri} and {second.uri} have no image in common")
    own, other = (each.table.filter(pc.is_in(each.table["image_id"], value_set=shared)) for each in (first, second))
    for name in LABEL_COLUMNS:
        if name == "race" and first.measured_in.races != second.measured_in.races:
            continue
        is_equal = pc.fill_null(pc.equal(own[name], other[name]), False)
        is_missing = pc.and_(pc.is_null(own[name]), pc.is_null(other[name]))
        num = int(pc.sum(pc.invert(pc.or_(is_equal, is_missing))).as_py() or 0)
        if num:
            raise ConfigError(
                f"evaluate.compare: the {name} of {num:,} images differs between {first.uri} and {second.uri}; "
                "evaluate both models on the same prepared set"
            )
    return shared


def _labels(rows: PredictionRows, first: _Evaluation, second: _Evaluation) -> Labels:
    """Return the labels, in the first evaluation's label space; without races where the two spaces differ in them."""
    if first.measured_in.races == second.measured_in.races:
        return rows.labels
    space = replace(first.measured_in, races=())
    labels = rows.labels
    return Labels(space, labels.age, labels.gender, np.full(len(labels), -1), labels.age_low, labels.age_high)


def pair_json(paired: Paired) -> dict[str, Any]:
    """Return plain values: `metrics`, `groups` and `verdict`.

    Each metric has `first` and `second` (values), `difference` (second - first), `interval` (95 %),
    `adjusted_interval` (95 % for all comparisons together), and `better`: `first` or `second` if the adjusted interval
    excludes 0, else None.
    """
    metrics = {name: _metric_json(name, paired.first[name], each) for name, each in paired.overall.items()}
    groups = {
        breakdown: {
            name: {"n": paired.num_rows[breakdown][name]}
            | {
                metric: _metric_json(metric, paired.group_firsts[breakdown][name][metric], each)
                for metric, each in of_group.items()
            }
            for name, of_group in members.items()
        }
        for breakdown, members in paired.groups.items()
    }
    return {"metrics": metrics, "groups": groups, "verdict": verdict(metrics, groups)}


def _metric_json(name: str, first: float, estimate: Estimate) -> dict[str, Any]:
    assert estimate.difference is not None
    assert estimate.difference_interval is not None
    assert estimate.adjusted_interval is not None
    better = None
    if estimate.differs:
        is_second = (estimate.difference < 0.0) == (name in _LOWER_IS_BETTER)
        better = "second" if is_second else "first"
    return {
        "first": first,
        "second": estimate.value,
        "difference": estimate.difference,
        "interval": list(estimate.difference_interval),
        "adjusted_interval": list(estimate.adjusted_interval),
        "better": better,
    }


def verdict(metrics: Mapping[str, Any], groups: Mapping[str, Any]) -> list[str]:
    """Return the conclusions in plain sentences.

    Args:
        metrics: as in `pair_json`.
        groups: as in `pair_json`.
    """
    found = [
        f"{_TITLES[name][0]}: the {each['better']} model is better by {_figure(name, abs(each['difference']))}"
        for name, each in metrics.items()
        if each["better"]
    ]
    lines = found or ["Overall, these images show no difference between the two models."]
    differing = [
        f"{_TITLES[metric][0]} of {name}: the {each['better']} model is better by "
        f"{_figure(metric, abs(each['difference']))}"
        for members in groups.values()
        for name, of_group in members.items()
        for metric, each in of_group.items()
        if metric != "n" and each["better"]
    ]
    return [*lines, *(differing or ["In no group do these images show a difference."])]


def _figure(metric: str, value: float, form: str = ".2f") -> str:
    _, scale, unit = _TITLES[metric]
    return f"{value * scale:{form}}{unit if scale == 1.0 else ' percentage points'}"


def _print(content: Mapping[str, Any], console: Console) -> None:
    for side in ("first", "second"):
        own = content[side]
        console.print(f"{side}: {own['checkpoint']}, split {own['split']} of {own['data']}")
    table = make_table("metric", "first", "second", "difference", "95 % interval")
    for name, each in content["metrics"].items():
        title, scale, unit = _TITLES[name]
        low, high = (end * scale for end in each["interval"])
        table.add_row(
            title,
            f"{each['first'] * scale:.2f}{unit}",
            f"{each['second'] * scale:.2f}{unit}",
            f"{each['difference'] * scale:+.2f}",
            f"{low:+.2f} to {high:+.2f}",
        )
    console.print(table)
    alone = {side: content[f"n_{side}_only"] for side in ("first", "second")}
    without = "".join(f"; left out: {num:,} of the {side} only" for side, num in alone.items() if num)
    console.print(f"{content['n']:,} images in both evaluations{without}")
    lines = content["verdict"]
    for line in lines[:_NUM_SHOWN]:
        console.print(line)
    if len(lines) > _NUM_SHOWN:
        console.print(f"and {len(lines) - _NUM_SHOWN:,} more, which are in {PAIR_FILE}")


assert tuple(_TITLES) == tuple(METRICS)
