"""Ray Tune's callbacks during a sweep: the next trial, whether a trial continues, and how it ended."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ray import tune as ray_tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from agr_ray.config import TuneJob
from agr_ray.progress_bar import ShowStatus
from agr_ray.redact import redacted
from agr_ray.storage.lock import RunLock
from agr_ray.tuning.sweep import Sweep
from agr_ray.tuning.trials import JUDGED_BY


@contextmanager
def kept_problem(sweep: Sweep) -> Iterator[None]:
    """Store an error raised in this block, so that `Budget` ends the sweep; Tune would log it and continue training."""
    try:
        yield
    except Exception as error:  # raised when Tune has ended
        sweep.problem = sweep.problem or error


class NotPickled:
    """Base of objects with the sweep's storage and study. Tune pickles them to resume by itself, which we never do."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class NextTrials(NotPickled, Searcher):
    """Hands the sweep's next trial to Tune; `Watcher` reports its outcome."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._sweep = sweep

    def suggest(self, trial_id: str) -> Any:
        """Return the trial's configuration, or `Searcher.FINISHED`."""
        following = None
        if self._sweep.problem is None:
            with kept_problem(self._sweep):
                following = self._sweep.next()
        if following is None:
            return Searcher.FINISHED
        number, values = following
        # In a dictionary of its own, because Tune splits dotted keys.
        return {"number": number, "values": values}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing."""

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file: a sweep is resumed from its own records."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class _StandIn:
    """Stands in for a trial of Tune, whose own id differs between commands."""

    trial_id: int


class Halving(NotPickled, ASHAScheduler):
    """ASHA that counts the trials of earlier commands, knows trials by number, and never stops one at its last epoch.

    Ray's own may stop a trial at its last epoch, before it publishes its best checkpoint.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self.pruned: dict[int, str] = {}
        """Why each trial was stopped, by number."""
        super().__init__(
            time_attr="epoch",
            metric=JUDGED_BY,
            mode="min",
            max_t=max(sweep.job.train.epochs, sweep.config.grace_epochs),
            grace_period=sweep.config.grace_epochs,
            reduction_factor=sweep.config.reduction,
        )
        for number, trial in sorted(sweep.trials.items()):
            stand_in = _StandIn(number)
            super().on_trial_add(None, stand_in)  # type: ignore[arg-type]  # it uses only the id
            for row in trial.epochs:
                self._judge(stand_in, row, trial.params)

    def on_trial_add(self, tune_controller: Any, trial: RayTrial) -> None:
        """Start or continue watching a trial."""
        super().on_trial_add(tune_controller, _StandIn(trial.config["number"]))  # type: ignore[arg-type]  # as above

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """Return whether the trial continues."""
        number = trial.config["number"]
        if self._judge(_StandIn(number), result, trial.config["values"]) != TrialScheduler.STOP:
            return str(TrialScheduler.CONTINUE)
        self.pruned[number] = (
            f"after epoch {result['epoch']} not among the best 1 of {self._sweep.config.reduction}, at "
            f"{result[JUDGED_BY]:.4f}"
        )
        return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> None:
        """Do nothing: the last epoch has been judged."""

    def on_trial_remove(self, tune_controller: Any, trial: RayTrial) -> None:
        """Do nothing."""

    def _judge(self, stand_in: _StandIn, row: Mapping[str, Any], values: Mapping[str, Any]) -> str:
        if row.get(JUDGED_BY) is None or row["epoch"] >= last_epoch(self._sweep.job, values):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(None, stand_in, dict(row)))  # type: ignore[arg-type]  # as above


class Budget(NotPickled, ray_tune.Stopper):
    """Ends the sweep when a budget is spent or a callback has failed."""

    def __init__(self, sweep: Sweep, lock: RunLock) -> None:
        self._sweep = sweep
        self._lock = lock

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stop a single trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether to end the sweep."""
        if self._lock.lost:
            with kept_problem(self._sweep):
                self._lock.check()
        return self._sweep.problem is not None or bool(self._sweep.spent)


class Watcher(NotPickled, ray_tune.Callback):
    """Passes Tune's events on to the sweep.

    Args:
        sweep: that the trials belong to.
        scheduler: ASHA; None: no trial is stopped early.
        show_status: shows the state of the sweep.
        folder: the current folder when the command began.
    """

    def __init__(self, sweep: Sweep, scheduler: Halving | None, show_status: ShowStatus, folder: str) -> None:
        self._sweep = sweep
        self._scheduler = scheduler
        self._show_status = show_status
        self._folder = folder

    def on_experiment_end(self, trials: list[RayTrial], **info: Any) -> None:
        """Enter the current folder again, because Tune reads it next.

        Nodes that share a machine each replace a submitted job's folder.
        """
        os.chdir(self._folder)

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Pass the event on."""
        self._tell(lambda: self._sweep.started(trial.config["number"]), trials)

    def on_trial_result(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Pass the event on."""
        if "epoch" in result:
            self._tell(lambda: self._sweep.reported(trial.config["number"], result), trials)

    def on_trial_recover(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Pass the event on."""
        self._tell(lambda: self._sweep.failed_once(trial.config["number"], why_failed(trial)), trials)

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Pass the event on."""
        self._tell(lambda: self._sweep.failed(trial.config["number"], why_failed(trial)), trials)

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Pass the event on, with the reason if the scheduler stopped the trial."""
        number = trial.config["number"]
        pruned = self._scheduler.pruned.get(number, "") if self._scheduler else ""
        self._tell(lambda: self._sweep.ended(number, pruned), trials)

    def _tell(self, event: Callable[[], None], trials: list[RayTrial]) -> None:
        """Tell the sweep, unless a callback has failed: then the sweep is ending, and the same command resumes it."""
        if self._sweep.problem is None:
            with kept_problem(self._sweep):
                event()
                self._show(trials)

    def _show(self, trials: list[RayTrial]) -> None:
        """Update the terminal's last line."""
        sweep = self._sweep
        running = []
        for each in trials:
            if each.status == RayTrial.RUNNING:
                trial = sweep.trials[each.config["number"]]
                whole = last_epoch(sweep.job, trial.params)
                running.append(f"trial {trial.number}: epoch {len(trial.epochs)} of {whole}")
        best = f"; best: trial {sweep.best.number}, {sweep.best.objective:.4f}" if sweep.best else ""
        line = f"{sweep.num_ended} of {sweep.plan.num_trials} trials ended{best}; {', '.join(running)}"
        self._show_status(line)


def last_epoch(job: TuneJob, values: Mapping[str, Any]) -> int:
    """Return the maximum number of epochs of a trial with these values."""
    return int(values.get("train.epochs", job.train.epochs))


def why_failed(trial: RayTrial) -> str:
    """Return one line that says why a trial ended, from the text that Tune wrote.

    Tune also pickles the error, but a pickle may hold code, and others can write to Ray's folders.
    """
    text = Path(trial.error_file or os.devnull).read_text(errors="replace")
    if _ACTOR_DIED.search(text):
        return "killed: its process died"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Messages of our own errors need no class name.
    return (
        f"raised: {redacted(re.sub(r'^agr_ray[.a-zA-Z_]*: ', '', lines[-1]))}" if lines else "raised an unknown error"
    )


_ACTOR_DIED: Final = re.compile(
    r"^(?:[\w.]+Error: )?The actor (?:died|experienced an error|\S+ is unavailable)", re.MULTILINE
)
"""Matches the message of Ray's `RayActorError`."""
