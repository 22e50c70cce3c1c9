"""Sweeps whose trials never ran, shared by several test files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from agr_ray.config import TuneJob
from agr_ray.schema import HISTORY
from agr_ray.storage import Storage
from agr_ray.tuning.plan import Plan, plan_sweep
from agr_ray.tuning.sweep import Sweep

STORAGE = Storage()
SPACE = {"loss.race_weight": {"uniform": [0.1, 2.0]}, "train.lr": {"log_uniform": [1e-4, 1e-2]}}


def tune_job(folder: Path, *, add: int = 0, new_run: bool = False, seed: int = 0, **changes: Any) -> TuneJob:
    settings = {"space": SPACE, "out": str(folder), "name": "sweep", "trials": 3, "seed": seed}
    return TuneJob(train={"data": "d", "epochs": 4}, tune=settings | changes, add=add, new_run=new_run)


def planned(job: TuneJob) -> Plan:
    return plan_sweep(STORAGE, job, "of the data")


def opened(job: TuneJob) -> Sweep:
    sweep = Sweep(STORAGE, planned(job), job, Console(quiet=True))
    sweep.begin()
    return sweep


def row(epoch: int, objective: float, **changes: Any) -> dict[str, Any]:
    values = dict.fromkeys(HISTORY.names, 0.5) | {"epoch": epoch, "step": epoch, "num_train_rows": 1, "num_val_rows": 1}
    return values | {"val_objective": objective, "val_balanced_objective": objective} | changes


def train(sweep: Sweep, number: int, objectives: list[float], finished: str = "epochs") -> None:
    """Write the files of a training run, without a driver that reads them."""
    folder = Path(sweep.trial_uri(number))
    (folder / "best").mkdir(parents=True, exist_ok=True)
    (folder / "best" / "weights").write_text("w")
    rows = [row(epoch, value) for epoch, value in enumerate(objectives, 1)]
    STORAGE.write_table(pa.Table.from_pylist(rows, schema=HISTORY), str(folder / "history.parquet"))
    (folder / "run.json").write_text(json.dumps({"finished": finished}))


def complete(sweep: Sweep, objectives: list[float]) -> int:
    following = sweep.next()
    assert following is not None
    number = following[0]
    sweep.started(number)
    for epoch, value in enumerate(objectives, 1):
        sweep.reported(number, row(epoch, value))
    train(sweep, number, objectives)
    sweep.ended(number)
    return number
