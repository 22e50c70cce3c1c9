"""Results of a sweep: best.toml, best/, trials.parquet, the page, and the table on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from agr_ray.config import ClusterConfig, LabelsConfig, Section, StorageConfig
from agr_ray.console import make_table, print_next
from agr_ray.learn.run import Run
from agr_ray.models.checkpoint_files import calibration_hint, publish_checkpoint
from agr_ray.report.page import HTML_FILE
from agr_ray.tuning.plan import BEST_RECIPE, PROVENANCE
from agr_ray.tuning.recipe import recipe_toml
from agr_ray.tuning.space import base_job, values_of, with_values
from agr_ray.tuning.study import study_address
from agr_ray.tuning.sweep import Sweep, shown_value
from agr_ray.tuning.trials import Trial, excesses, front, is_feasible, trials_table


def write_results(sweep: Sweep, run: Run, console: Console) -> None:
    """Write all results from the trials so far; replace those of an earlier call.

    Args:
        sweep: with its trials.
        run: the training run that trials are variants of.
        console: for warnings.
    """
    from agr_ray.report.page_files import write_page  # here, because matplotlib takes a while to import
    from agr_ray.report.sweep_report import sweep_report

    storage, job, trials = sweep.storage, sweep.job, list(sweep.trials.values())
    table = trials_table(trials, job.tune.space, job.tune.constraints, job.model.tasks)
    sweep.check_lock()
    storage.write_table(table, sweep.join("trials.parquet"))
    sweep.keep_unfinished()
    best = sweep.best
    if best is not None:
        storage.write(sweep.join(BEST_RECIPE), best_recipe(sweep, best).encode())
        source = storage.join(sweep.trial_uri(best.number), "best")
        with TemporaryDirectory() as temporary:
            storage.download_tree(source, f"{temporary}/best")
            sweep.check_lock()
            if publish_checkpoint(storage, Path(temporary, "best"), sweep.join("best")):
                console.print(calibration_hint(sweep.join("best")))
        if not is_feasible(best, job.tune.constraints):
            beyond = [name for name, excess in excesses(best, job.tune.constraints).items() if excess > 0.0]
            console.print(f"warning: no trial satisfies tune.constraints; the best one violates {', '.join(beyond)}")
    sweep.check_lock()
    storage.write(sweep.join(PROVENANCE), (json.dumps(_provenance(sweep, run), indent=2) + "\n").encode())
    write_page(storage, sweep.plan.uri, sweep_report(storage, sweep.plan.uri))


def best_recipe(sweep: Sweep, best: Trial) -> str:
    """Return a recipe that trains the best trial again."""
    job, uri = sweep.job, sweep.join(BEST_RECIPE)
    values = values_of(job.tune.space, best.params) | {"train.name": f"{sweep.plan.name}-best"}
    retrained = with_values(base_job(job), values)
    sections: dict[str, Section] = {
        # TOML has no null, so keys that are None are not written. The preset `paper` sets none of those.
        "model": retrained.model.model_copy(update={"preset": "paper"}),
        "loss": retrained.loss,
        "augment": retrained.augment,
        "train": retrained.train,
        "predict": retrained.predict,
    }
    if job.labels != LabelsConfig():
        sections = {"labels": job.labels} | sections
    if job.storage != StorageConfig():
        sections = {"storage": job.storage} | sections
    if job.cluster != ClusterConfig():
        sections = {"cluster": job.cluster} | sections
    head = [
        f"Trial {best.number} of the sweep {sweep.plan.uri}: objective {best.objective:.4f} on validation, at epoch "
        f"{best.kept['epoch'] if best.kept else 0} of {len(best.epochs)}.",
        *(f"{key} {shown_value(value)}" for key, value in best.params.items()),
        "",
        f"  agr-ray train --config {uri if '://' not in uri else BEST_RECIPE}",
        "",
        "Its checkpoint is best/ beside this file. Keys that are missing here were None.",
    ]
    return recipe_toml(sections, head, leave_out=("train.mlflow_uri",))


def print_trials(sweep: Sweep, console: Console) -> None:
    """Print the trials: complete ones by objective, then the others."""
    job, best = sweep.job, sweep.best
    tasks, constraints = job.model.tasks, job.tune.constraints
    on_front = {trial.number for trial in front(list(sweep.trials.values()), constraints, tasks)}
    front_key = ", + on the Pareto front" if job.tune.mode == "pareto" else ""
    console.print(f"trials, on validation: * best{front_key}, ! violates a constraint")
    headings = ["", "trial", "state", "epochs", "objective", "age MAE, years", "gender error", "race error"]
    table = make_table(*headings, *(key.partition(".")[2] for key in job.tune.space))

    def rank(trial: Trial) -> tuple[bool, float, int]:
        objective = float("inf") if trial.objective is None else trial.objective
        return trial.state != "complete", objective, trial.number

    for trial in sorted(sweep.trials.values(), key=rank):
        marks = ("*" if best is not None and trial.number == best.number else "") + (
            "+" if job.tune.mode == "pareto" and trial.number in on_front else ""
        )
        figures = [
            trial.objective,
            trial.error("age_mae_years"),
            trial.error("gender_error"),
            trial.error("race_error"),
        ]
        table.add_row(
            marks + ("" if is_feasible(trial, constraints) else "!"),
            str(trial.number),
            trial.state,
            str(len(trial.epochs)),
            *("" if value is None else f"{value:.4f}" for value in figures),
            *(shown_value(trial.params[key]) if key in trial.params else "" for key in job.tune.space),
        )
    console.print(table)
    for trial in sweep.trials.values():
        if trial.state == "failed":
            console.print(f"trial {trial.number} failed: {trial.why}")
    if best is not None:
        console.print(f"best: trial {best.number}: {sweep.join('best')}, {sweep.join(BEST_RECIPE)}")
        print_next(console, "train with its settings", "train", "--config", sweep.join(BEST_RECIPE))
    console.print(f"page: {sweep.join(HTML_FILE)}")


def _provenance(sweep: Sweep, run: Run) -> dict[str, str]:
    return {
        "data": str(run.data["uri"]),
        "training crops": str(run.num_train_rows),
        "validation crops": str(run.num_val_rows),
        "SHA-256 of the split manifest": str(run.data["split_manifest_sha256"]),
        "commit": run.git_commit or "unknown",
        "study": study_address(sweep.storage, sweep.plan.uri, sweep.job.tune),
    }
