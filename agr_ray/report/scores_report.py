"""Read a results folder of `agr-ray score` for its page."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

from agr_ray.errors import ConfigError
from agr_ray.report.page import Page
from agr_ray.report.scores_page import ScoredBucket, scores_page
from agr_ray.scoring.publish import SUCCESS, published_runs
from agr_ray.scoring.scores import Scores, open_scores
from agr_ray.storage import Storage

_QUALITY: Final = {
    "face size, pixels": "least(box[3] - box[1], box[4] - box[2])",
    "detector score": "detector_score",
    "sharpness": "sharpness",
    "yaw, degrees": "abs(yaw)",
    "pitch, degrees": "abs(pitch)",
}
"""What is measured of faces, in DuckDB's SQL, which counts from 1."""


def is_scored(storage: Storage, uri: str) -> bool:
    """Return whether the folder holds published scoring runs."""
    return storage.exists(storage.join(uri, SUCCESS))


def scores_report(storage: Storage, uri: str, run_id: str = "") -> Page:
    """Return the page of a results folder.

    Args:
        storage: of the folder.
        uri: of the folder, `score.out`.
        run_id: the run to show in detail; empty: the latest that scored an image, or else the latest.

    Raises:
        ConfigError: there is no published run, or not this one.
    """
    records = list(published_runs(storage, uri))
    if not records:
        raise ConfigError(f"{uri}: there is no published scoring run")
    record = _chosen(records, uri, run_id)
    scores = open_scores(uri, storage=storage)
    demographics = storage.read_table(storage.join(uri, "demographics", f"run={record['run_id']}"))
    has_rows = not record["aggregate_only"]
    return scores_page(
        ScoredBucket(
            uri=uri,
            record=record,
            demographics=demographics,
            runs=records,
            over_time=_over_time(storage, uri, records),
            quality=_quality(scores, record["run_id"]) if has_rows else [],
            examples=_examples(scores, record["run_id"]) if has_rows else None,
            num_images=_num_images(scores) if has_rows and not record["min_cell"] else None,
        )
    )


def _chosen(records: list[dict[str, Any]], uri: str, run_id: str) -> dict[str, Any]:
    if run_id:
        for record in records:
            if record["run_id"] == run_id:
                return record
        known = ", ".join(record["run_id"] for record in records[-3:])
        raise ConfigError(f"report.run {run_id}: no such published run in {uri}; the latest are {known}")
    # With score.min_cell, a record has no counts.
    with_images = [record for record in records if record.get("num_images") != 0]
    return (with_images or records)[-1]


def _over_time(storage: Storage, uri: str, records: list[dict[str, Any]]) -> pa.Table:
    """Return the totals of every run that scored an image."""
    tables = []
    for record in records:
        table = storage.read_table(storage.join(uri, "demographics", f"run={record['run_id']}"))
        totals = table.filter(table["is_total"]).drop_columns(list(record["group_by"]))
        tables.append(totals.append_column("run", pa.array([record["run_id"]] * totals.num_rows, pa.string())))
    return pa.concat_tables(tables, promote_options="default")


def _quality(scores: Scores, run_id: str) -> list[dict[str, Any]]:
    rows = []
    for name, expression in _QUALITY.items():
        ((low, median, high),) = scores.connection.execute(
            f"SELECT quantile_cont({expression}, 0.1), quantile_cont({expression}, 0.5), "
            f"quantile_cont({expression}, 0.9) FROM faces WHERE run_id = ?",
            [run_id],
        ).fetchall()
        if median is not None:
            rows.append({"name": name, "low": low, "median": median, "high": high})
    return rows


def _examples(scores: Scores, run_id: str) -> dict[str, str]:
    """Return an error for each status."""
    found = scores.connection.execute(
        "SELECT status, min(error) FROM rejects WHERE run_id = ? AND error IS NOT NULL GROUP BY status", [run_id]
    ).fetchall()
    return dict(found)


def _num_images(scores: Scores) -> int:
    ((number,),) = scores.query("SELECT count(*) FROM images").fetchall()
    return int(number)
