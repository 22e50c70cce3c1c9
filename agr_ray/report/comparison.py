"""The result of a comparison: comparison.parquet, measured.json and the page."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
from rich.console import Console

from agr_ray.config import ModelConfig, PredictConfig
from agr_ray.config.presets import PRESETS
from agr_ray.console import make_table
from agr_ray.data.crops import read_labels
from agr_ray.data.prepared import PreparedSet
from agr_ray.device import cpu_name
from agr_ray.errors import JobError
from agr_ray.evaluation.comparison import Estimate, compare
from agr_ray.labels import UTKFACE, Labels, LabelSpace
from agr_ray.models.checkpoint import META
from agr_ray.models.checkpoint_files import local_checkpoint
from agr_ray.models.checkpoint_network import given_network
from agr_ray.models.network import MultiTaskNet, preset_config
from agr_ray.models.transform import Transform
from agr_ray.predict.attributes import AttributePredictor
from agr_ray.predict.prediction_rows import read_predictions
from agr_ray.report.comparison_page import MEASURED, RECORD, TABLE, Measurement, comparison_report, history_columns
from agr_ray.report.comparison_rows import LABELS, estimates_of, metric_columns, text
from agr_ray.report.model_list import network_size
from agr_ray.report.page_files import write_page
from agr_ray.schema import COMPARED_METRICS, COMPARISON
from agr_ray.storage import Storage
from agr_ray.vision.align import stored_side_px

_REFERENCE: Final = "paper"
_NUM_TIMED: Final = 32


def write_comparison(
    storage: Storage,
    out: str,
    prepared: PreparedSet,
    failures: Mapping[str, str],
    image_size: int | None,
    console: Console,
) -> str:
    """Write comparison.parquet, measured.json and the page from all evaluations in the folder; return the page's URI.

    Args:
        storage: of the folder.
        out: the comparison's folder, with the settings that all runs share in comparison.json.
        prepared: the data.
        failures: why runs failed, by name.
        image_size: side of all networks' input, pixels; None: each preset's own.
        console: gets the table.
    """
    names = _finished(storage, out)
    by_preset: dict[str, list[str]] = defaultdict(list)
    for name in [*names, *failures]:
        if name not in by_preset[_preset_of(name)]:
            by_preset[_preset_of(name)].append(name)
    presets = [preset for preset in PRESETS if preset in by_preset]
    measured = [preset for preset in presets if any(_preset_of(name) == preset for name in names)]
    reference = reference_preset([*json.loads(storage.read(storage.join(out, RECORD)))["presets"]], measured)
    metas = {name: json.loads(storage.read(storage.join(out, "runs", name, "best", META))) for name in names}
    estimates, num_images = _estimates(storage, out, metas, reference, prepared)
    rows = []
    for preset in presets:
        runs = [name for name in by_preset[preset] if name in names]
        config = preset_config(preset, image_size)
        rows.append(_row(storage, out, config, runs, failures, estimates.get(preset, {})))
    table = pa.Table.from_pylist(rows, COMPARISON)
    storage.write_table(table, storage.join(out, TABLE))
    measurement = Measurement(
        data=prepared.uri,
        split_manifest_sha256=prepared.split_manifest_sha256,
        num_images=num_images,
        reference=reference,
        machine=cpu_name(),
        commits={name: meta["git_commit"] for name, meta in metas.items()},
    )
    storage.write(storage.join(out, MEASURED), json.dumps(asdict(measurement), indent=1).encode())
    page = write_page(storage, out, comparison_report(storage, out))
    _print(table.to_pylist(), console)
    console.print(page)
    return page


def reference_preset(asked: Sequence[str], measured: Sequence[str]) -> str:
    """Return the preset to which differences are relative: `paper` or, if it was not measured, the first that was.

    Args:
        asked: all presets of the comparison, in the order in which the user named them.
        measured: those with a complete run.
    """
    return next((preset for preset in (_REFERENCE, *asked) if preset in measured), _REFERENCE)


def _finished(storage: Storage, out: str) -> list[str]:
    """Return the names of all runs that have been evaluated, in order."""
    folder = storage.join(out, "evaluations")
    if not storage.exists(folder):
        return []
    uris = (info.uri for info in storage.list(folder, (".json",)))
    return sorted(uri.split("/")[-2] for uri in uris if uri.endswith("/metrics.json"))


def _preset_of(name: str) -> str:
    return name.rpartition("-")[0]


def _estimates(
    storage: Storage, out: str, metas: Mapping[str, Mapping[str, Any]], reference: str, prepared: PreparedSet
) -> tuple[dict[str, dict[str, Estimate]], int]:
    """Return the estimates of each preset, from the runs' predictions for the same images, and the number of these.

    Args:
        storage: of the folder.
        out: the comparison's folder.
        metas: meta.json of each run's checkpoint, by the run's name.
        reference: the preset to which differences are relative.
        prepared: the data.
    """
    if not metas:
        return {}, 0
    runs = defaultdict(list)
    labels: Labels | None = None
    first: pa.Table | None = None
    for name, meta in metas.items():
        tasks, space = meta["model"]["tasks"], LabelSpace.from_json(meta["label_space"])
        uri = storage.join(out, "evaluations", name, "predictions.parquet")
        table = storage.read_table(uri).sort_by("image_id")
        if first is not None and not table["image_id"].equals(first["image_id"]):
            raise JobError(f"{uri}: its images are not those of the other evaluations; choose another compare.out")
        if first is None or "race" in tasks:  # an evaluation maps races onto the network's only if it predicts them
            labels = read_labels(table, replace(space, age_groups=prepared.label_space.age_groups))
        first = table
        runs[_preset_of(name)].append(read_predictions(table, tasks, space))
    assert labels is not None
    assert first is not None
    return compare(runs, labels, first["group_id"].to_numpy(), reference), first.num_rows


def _row(
    storage: Storage,
    out: str,
    config: ModelConfig,
    runs: Sequence[str],
    failures: Mapping[str, str],
    estimates: Mapping[str, Estimate],
) -> dict[str, Any]:
    """Return a preset's row of schema.COMPARISON."""
    preset, images_per_s = config.preset, None
    if runs:
        best = storage.join(out, "runs", runs[0], "best")
        with local_checkpoint(storage, best, "compare.out") as loaded:
            network = given_network(loaded, best, "compare.out")
            images_per_s = _images_per_s(network, loaded.transform)
    else:
        network = MultiTaskNet(config, UTKFACE).eval()
    num_parameters, num_multiply_adds = network_size(network)
    return {
        "preset": preset,
        "seeds": [int(name.rpartition("-")[2]) for name in runs],
        "failures": [f"{name}: {problem}" for name, problem in failures.items() if _preset_of(name) == preset],
        "side_px": network.config.image_size,
        "parameters": num_parameters,
        "multiply_adds": num_multiply_adds,
        "train_samples_per_s": _samples_per_s(storage, out, runs),
        "score_images_per_s": images_per_s,
        **metric_columns(preset, estimates),
    }


def _samples_per_s(storage: Storage, out: str, runs: Sequence[str]) -> float | None:
    """Return the median speed of all epochs of the runs."""
    speeds = [speed for run in runs for speed in history_columns(storage, out, run, "samples_per_s")[0]]
    return float(np.median(speeds)) if speeds else None


def _images_per_s(network: MultiTaskNet, transform: Transform) -> float:
    """Return how many crops a second the network scores on this machine's CPU: the best of three tries."""
    predictor = AttributePredictor(network, transform, PredictConfig(precision="auto"))
    side = stored_side_px(transform.crop_side_px, transform.margin)
    crops = np.random.default_rng(0).integers(0, 256, (_NUM_TIMED, side, side, 3), dtype=np.uint8)
    predictor.predict(crops[:1])
    times = []
    for _ in range(3):
        started = time.perf_counter()
        predictor.predict(crops)
        times.append(time.perf_counter() - started)
    return _NUM_TIMED / min(times)


def _print(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = make_table("preset", "runs", *LABELS.values(), "parameters", "images/s, CPU")
    for row in rows:
        estimates = estimates_of(row)
        table.add_row(
            row["preset"],
            str(len(row["seeds"])),
            *(text(metric, estimates.get(metric)) for metric in COMPARED_METRICS),
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['score_images_per_s']:.0f}" if row["score_images_per_s"] else "",
        )
    console.print(table)
