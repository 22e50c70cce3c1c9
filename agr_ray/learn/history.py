"""The training history: rows of schema.HISTORY, one per epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from agr_ray.evaluation.groups import worst_group_age_mae
from agr_ray.evaluation.metrics import objective
from agr_ray.schema import HISTORY

Row: TypeAlias = dict[str, Any]
"""One row of `schema.HISTORY`."""

_VALIDATION = "val_"


def best_row(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row with the lowest objective; None: no epoch has one."""
    judged = [row for row in history if row["val_objective"] is not None]
    return min(judged, key=lambda row: float(row["val_objective"])) if judged else None


def history_row(values: Mapping[str, Any], metrics: Mapping[str, Any], tasks: Sequence[str]) -> Row:
    """Return a row of schema.HISTORY.

    Args:
        values: the columns that are not validation metrics.
        metrics: validation metrics, as in `EpochReport.metrics`. A column `val_TASK_METRIC` is `metrics[TASK][METRIC]`,
            or null if there is no such task.
        tasks: of the network; tasks that are not in `metrics` are ignored.
    """
    tasks = tuple(task for task in tasks if task in metrics)
    row = {
        **values,
        "val_objective": objective(metrics, metrics["baseline"], tasks),
        "val_balanced_objective": objective(metrics, metrics["baseline"], tasks, balanced=True),
        "val_worst_group_age_mae_years": worst_group_age_mae(metrics["groups"]),
    }
    for column in HISTORY.names:
        if column not in row:
            task = next((task for task in tasks if column.startswith(f"{_VALIDATION}{task}_")), None)
            row[column] = None if task is None else metrics[task][column.removeprefix(f"{_VALIDATION}{task}_")]
    assert len(row) == len(HISTORY.names), sorted({*row} - {*HISTORY.names})
    return {column: row[column] for column in HISTORY.names}
