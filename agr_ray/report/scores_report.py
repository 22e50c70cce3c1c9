"""Read a results folder of `agr-ray score` for its page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.errors import ConfigError
from agr_ray.evaluation.shift import QUANTITIES, quality_values
from agr_ray.report.page import Page
from agr_ray.report.scores_page import ScoredBucket, scores_page
from agr_ray.schema import DEMOGRAPHIC_ATTRIBUTES
from agr_ray.scoring.publish import published_runs
from agr_ray.storage import Storage

MAX_RUNS: Final = 100
"""Runs in the charts over time: the latest."""
MAX_FACES: Final = 1_000_000
"""Faces of which the quality is measured: the first of the run."""
_QUALITY_COLUMNS: Final = ("box", "detector_score", "sharpness", "yaw", "pitch")
_SHARES: Final = ("share", "share_corrected", "share_low", "share_high")


def scores_report(storage: Storage, uri: str, run_id: str = "") -> Page:
    """Return the page of a results folder.

    Args:
        storage: of the folder.
        uri: of the folder, `score.out`.
        run_id: the run to show in detail; empty: the latest that scored an image, or else the latest.

    Raises:
        ConfigError: there is no published run, or not this one.
    """
    records = published_runs(storage, uri)
    if not records:
        raise ConfigError(f"{uri}: there is no published scoring run")
    record = _chosen(records, uri, run_id)
    has_rows = not record["aggregate_only"]
    return scores_page(
        ScoredBucket(
            uri=uri,
            record=record,
            demographics=storage.read_table(_demographics(storage, uri, record)),
            runs=records,
            over_time=_over_time(storage, uri, record, records),
            mean_width_years=_mean_width_years(storage, uri, record["run_id"]) if has_rows else None,
            quality=_quality(storage, uri, record["run_id"]) if has_rows else [],
            examples=_examples(storage, uri, record["run_id"]) if has_rows else {},
        )
    )


def _chosen(records: Sequence[dict[str, Any]], uri: str, run_id: str) -> dict[str, Any]:
    if run_id:
        for record in records:
            if record["run_id"] == run_id:
                return record
        known = ", ".join(record["run_id"] for record in records[-3:])
        raise ConfigError(f"report.run {run_id}: no such published run in {uri}; the latest are {known}")
    # With score.min_cell, a record has no counts.
    with_images = [record for record in records if record.get("num_images") != 0]
    return (with_images or records)[-1]


def _demographics(storage: Storage, uri: str, record: dict[str, Any]) -> str:
    return storage.join(uri, "demographics", f"run={record['run_id']}")


def _over_time(storage: Storage, uri: str, shown: dict[str, Any], records: Sequence[dict[str, Any]]) -> pa.Table:
    """Return the shares over all groups in the latest runs of the shown run's model and settings."""
    names = ["is_total", "breakdown", *DEMOGRAPHIC_ATTRIBUTES, *_SHARES]
    tables = []
    keys = ("model_digest", "config_digest")
    for record in [record for record in records if all(record[key] == shown[key] for key in keys)][-MAX_RUNS:]:
        totals = storage.read_table(_demographics(storage, uri, record), columns=names)
        totals = totals.filter(totals["is_total"])
        tables.append(totals.append_column("run", pa.array([record["run_id"]] * totals.num_rows, pa.string())))
    return pa.concat_tables(tables)


def _mean_width_years(storage: Storage, uri: str, run_id: str) -> float | None:
    """Return the mean width of the age intervals of the run's faces; None if they have none."""
    widths, num_faces = 0.0, 0
    for batch in _batches(storage, storage.join(uri, "faces", f"run={run_id}"), ("age_low", "age_high")):
        own = pc.drop_null(pc.subtract(batch["age_high"], batch["age_low"]))
        widths += pc.sum(own).as_py() or 0.0
        num_faces += len(own)
        if num_faces >= MAX_FACES:
            break
    return widths / num_faces if num_faces else None


def _quality(storage: Storage, uri: str, run_id: str) -> list[dict[str, Any]]:
    """Return quantiles of the quality of the run's faces."""
    batches, num_faces = [], 0
    for batch in _batches(storage, storage.join(uri, "faces", f"run={run_id}"), _QUALITY_COLUMNS):
        batches.append(batch)
        num_faces += batch.num_rows
        if num_faces >= MAX_FACES:
            break
    if not num_faces:
        return []
    values = quality_values(pa.Table.from_batches(batches))
    rows = []
    for quantity in QUANTITIES:
        known = values.get(quantity.name)
        if known is not None and np.isfinite(known).any():
            known = np.abs(known) if quantity.name in ("yaw", "pitch") else known
            low, median, high = np.nanquantile(known, (0.1, 0.5, 0.9))
            name = f"|{quantity.words}|" if quantity.name in ("yaw", "pitch") else quantity.words
            rows.append({"name": name, "low": float(low), "median": float(median), "high": float(high)})
    return rows


def _batches(storage: Storage, folder: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a folder of Parquet files."""
    for info in storage.list(folder, (".parquet",)):
        yield from storage.read_batches(info.uri, columns)


def _examples(storage: Storage, uri: str, run_id: str) -> dict[str, str]:
    """Return an error for each status of the run's rejected images; pseudonymised runs have none."""
    found: dict[str, str] = {}
    for batch in _batches(storage, storage.join(uri, "rejects", f"run={run_id}"), ("status", "error")):
        for row in batch.to_pylist():
            if row["error"]:
                found.setdefault(row["status"], row["error"])
    return found
