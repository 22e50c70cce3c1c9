"""Read a sweep's folder for its page."""

from __future__ import annotations

import json
from typing import Any, Final

from agr_ray.config import TrialError, TuneJob
from agr_ray.errors import ConfigError
from agr_ray.models.checkpoint import META
from agr_ray.report.page import Page
from agr_ray.report.sweep_page import SweepReport, sweep_page
from agr_ray.report.trial_rows import TrialRow
from agr_ray.storage import MissingObject, Storage
from agr_ray.tuning.plan import BEST_RECIPE, PROVENANCE, RECORD
from agr_ray.tuning.space import distribution_of, is_papers
from agr_ray.tuning.trials import Trial, best_trial, front, is_feasible, read_trials

_UNITS: Final[dict[TrialError, str]] = {"age_mae_years": " years", "worst_group_age_mae_years": " years"}


def sweep_report(storage: Storage, uri: str) -> Page:
    """Return the page of the sweep in a folder.

    Raises:
        ConfigError: the folder holds no sweep, or a file of it is damaged.
    """
    try:
        report = _read(storage, uri.rstrip("/"))
    except MissingObject:
        raise ConfigError(f"{uri}: no sweep; there is no {RECORD}") from None
    except (ValueError, KeyError, TypeError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{uri}: not written by this version of agr-ray tune, or damaged ({why})") from None
    return sweep_page(report)


def _read(storage: Storage, uri: str) -> SweepReport:
    record = json.loads(storage.read(storage.join(uri, RECORD)))
    job = TuneJob.model_validate(record["config"])
    trials = read_trials(storage, uri)
    best = best_trial(trials, job.tune.constraints)
    on_front = {trial.number for trial in front(trials, job.tune.constraints, job.model.tasks)}
    provenance = json.loads(_read_or(storage, storage.join(uri, PROVENANCE), "{}"))
    return SweepReport(
        title=f"Sweep {uri.rpartition('/')[2]}",
        mode=job.tune.mode,
        trials=[_row(job, trial, is_on_front=trial.number in on_front) for trial in trials],
        space={key: distribution_of(parameter) for key, parameter in job.tune.space.items()},
        best_number=None if best is None else best.number,
        recipe_toml="" if best is None else _read_or(storage, storage.join(uri, BEST_RECIPE), ""),
        constraints=[f"{name} at most {limit:g}{_UNITS.get(name, '')}" for name, limit in job.tune.constraints.items()],
        provenance={
            **provenance,
            "seed of the search": str(job.tune.seed),
            "seed of each training": str(job.train.seed),
            "configuration": record["settings_digest"],
            "epochs of all trials": str(sum(len(trial.epochs) for trial in trials)),
            "time of all trials": f"{sum(trial.wall_s for trial in trials):.0f} s",
        },
        baseline=_baseline(json.loads(_read_or(storage, storage.join(uri, "best", META), "{}")) if best else {}),
    )


def _read_or(storage: Storage, uri: str, default: str) -> str:
    try:
        return storage.read(uri).decode()
    except MissingObject:
        return default


def _row(job: TuneJob, trial: Trial, *, is_on_front: bool) -> TrialRow:
    return TrialRow(
        number=trial.number,
        state=trial.state,
        why=trial.why,
        params=trial.params,
        objective=trial.curve[-1] if trial.state == "pruned" and trial.curve else trial.objective,
        age_mae_years=trial.error("age_mae_years"),
        gender_error=trial.error("gender_error"),
        race_error=trial.error("race_error"),
        worst_group_mae_years=trial.error("worst_group_age_mae_years"),
        epochs=len(trial.epochs),
        duration_s=trial.wall_s,
        is_feasible=is_feasible(trial, job.tune.constraints),
        curve=trial.curve,
        is_reference=is_papers(job, trial.params),
        is_on_front=is_on_front,
    )


def _baseline(meta: dict[str, Any]) -> dict[str, float | None]:
    """Return the errors of the constant baseline, by field of a row, from the best trial's meta.json."""
    constant = meta.get("metrics", {}).get("val", {}).get("baseline", {})

    def error(task: str) -> float | None:
        accuracy = constant.get(task, {}).get("balanced_accuracy")
        return None if accuracy is None else 1.0 - accuracy

    return {
        "objective": 1.0 if constant else None,
        "age_mae_years": constant.get("age", {}).get("mae_years"),
        "gender_error": error("gender"),
        "race_error": error("race"),
    }
