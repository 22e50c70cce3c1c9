"""A sweep's state: its trials, the next trial, and the files of each. Does not depend on Ray.

A sweep is a folder, OUT/NAME:

    sweep.json          configuration, number of trials, and whether the sweep has finished
    lock.json           lock of the active driver
    records/0000.json   record of each trial: tuning.trials.Trial
    trials/0000/        the trial's training run (runtime.train); only the best trial, or the front, keeps checkpoints
    study.journal       Optuna's study, unless tune.study names another
    best.toml  best/    the best trial as a recipe, and its checkpoint
    trials.parquet      schema.TRIALS and the searched keys, a row for each trial
    provenance.json     data and study of the trials, for the page
    report.html         the page; report.md, report-figures/

The records are what a sweep is resumed from. A trial whose record says that it has not ended resumes from the last
checkpoint of its training run; one that failed before its first epoch is retried.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console

from agr_ray.config import Scalar, TuneJob
from agr_ray.errors import ConfigError, JobError
from agr_ray.learn.run import CHECKPOINTS, FAILURE
from agr_ray.storage import MissingObject, Storage
from agr_ray.storage.lock import RunLock
from agr_ray.storage.retry import Retry
from agr_ray.tuning.plan import RECORD, Plan, recorded
from agr_ray.tuning.space import base_job, values_of, with_values
from agr_ray.tuning.study import Study
from agr_ray.tuning.trials import DIVERGED, REFUSED, Trial, best_trial, front, read_trials

_WEIGHTS: Final = (CHECKPOINTS, "best", "last", "initial")
"""Parts of a trial's run that are deleted unless the trial is the best."""
_FIRST: Final = 3
"""If none of this many ended trials has finished an epoch, the sweep ends."""


class Sweep:
    """The driver's view of its trials. Each method records one event.

    Args:
        storage: where the sweep is.
        plan: which it is.
        job: its configuration.
        console: for messages about trials.
        lock: the sweep's lock, checked before each write. None: no other process writes, as in tests.
    """

    def __init__(
        self, storage: Storage, plan: Plan, job: TuneJob, console: Console, lock: RunLock | None = None
    ) -> None:
        self.storage = storage
        self.plan = plan
        self.job = job
        self.config = job.tune
        self.trials: dict[int, Trial] = {}
        self.problem: Exception | None = None
        """Exception in one of Tune's callbacks, which ends the sweep."""
        self._console = console
        self._lock = lock
        self._retry = Retry(job.train.outage_s)
        self._began = time.monotonic()
        self._started: dict[int, float] = {}
        self._queue: deque[int] = deque()
        self._cleaned: set[int] = set()
        self.trials |= {trial.number: trial for trial in read_trials(storage, plan.uri)}
        self.study = Study(storage, plan.uri, plan.sweep_id, job.tune, job.model.tasks, plan.name)

    def check_lock(self) -> None:
        """Check that this driver may still write to the sweep.

        Raises:
            LockLost: another driver has taken over the sweep.
        """
        if self._lock is not None:
            self._lock.check()

    def join(self, *parts: str) -> str:
        """Return the URI of an entry of the sweep's folder."""
        return self.storage.join(self.plan.uri, *parts)

    def trial_uri(self, number: int) -> str:
        """Return the folder of a trial's training run."""
        return self.join("trials", trial_name(number))

    @property
    def best(self) -> Trial | None:
        """The best trial so far; None: no trial is complete."""
        return best_trial(list(self.trials.values()), self.config.constraints)

    @property
    def num_ended(self) -> int:
        """Number of complete, pruned and failed trials."""
        return sum(trial.state != "unfinished" for trial in self.trials.values())

    def begin(self) -> None:
        """Write sweep.json, settle trials that ended while no driver was running, and queue the trials to run."""
        self.write_record("")
        for number, trial in sorted(self.trials.items()):
            if trial.never_learnt:
                # It starts from scratch, because its initial weights may have been deleted.
                self.check_lock()
                self.storage.delete(self.storage.join(self.trial_uri(number), "run.json"))
                trial = dataclasses.replace(trial, state="unfinished", why="")
            if trial.state == "unfinished":
                settled = self._settled(trial.with_epochs(self._history(number)))
                self._keep(settled)
                if settled.state == "unfinished":
                    self._queue.append(number)
        self.study.catch_up(list(self.trials.values()))
        self._retry.call(self._save_study)
        self._retry.call(self.clean)
        if self.trials:
            resumed = f"; {len(self._queue)} unfinished, to be resumed" if self._queue else ""
            self._say(f"{len(self.trials)} of {self.plan.num_trials} trials were started before{resumed}")

    def next(self) -> tuple[int, dict[str, Any]] | None:
        """Return the number and values of the next trial; None: no trial is left.

        A trial whose combination of values the configuration rejects fails at once, with the reason in its record.
        """
        while not self.spent:
            self.check_lock()
            if self._queue:
                trial = self.trials[self._queue.popleft()]
            elif len(self.trials) < self.plan.num_trials:
                number = max(self.trials, default=-1) + 1
                trial = Trial(number, self.study.ask(number))
                self._keep(trial)
            else:
                return None
            values = values_of(self.config.space, trial.params)
            try:
                with_values(base_job(self.job), values)
            except ConfigError as error:
                self._end(dataclasses.replace(trial, state="failed", why=f"{REFUSED}{error}"))
            else:
                return trial.number, values
        return None

    @property
    def num_left(self) -> int:
        """Number of trials that `next` will return, unless the sweep ends earlier."""
        return len(self._queue) + max(self.plan.num_trials - len(self.trials), 0)

    @property
    def spent(self) -> str:
        """Name of the exhausted budget; empty: none."""
        config = self.config
        if config.max_hours is not None and time.monotonic() - self._began > 3600.0 * config.max_hours:
            return f"tune.max_hours {config.max_hours:g}"
        epochs = sum(len(trial.epochs) for trial in self.trials.values())
        if config.max_epochs is not None and epochs >= config.max_epochs:
            return f"tune.max_epochs {config.max_epochs}"
        return ""

    def started(self, number: int) -> None:
        """Record that a trial is running."""
        again = bool(self.trials[number].epochs or self.trials[number].failures)
        self._started[number] = time.monotonic()
        shown = ", ".join(f"{key} {shown_value(value)}" for key, value in self.trials[number].params.items())
        self._say(f"trial {number} {'resumes' if again else 'begins'}: {shown}")

    def reported(self, number: int, row: Mapping[str, Any]) -> None:
        """Record an epoch: a row of schema.HISTORY, as the trial reports it."""
        trial = self.trials[number].with_epochs([row])
        if len(trial.epochs) > len(self.trials[number].epochs):
            self.check_lock()
            self.study.report(number, int(row["epoch"]), trial.curve[-1])
        self.trials[number] = trial

    def failed_once(self, number: int, why: str) -> None:
        """Record that a trial failed and will be retried."""
        trial = self._timed(number)
        self._keep(dataclasses.replace(trial, failures=(*trial.failures, why)))
        self._say(f"trial {number} failed ({why}); it resumes from its last checkpoint")

    def failed(self, number: int, why: str) -> None:
        """Record that a trial failed for good."""
        trial = self._timed(number).with_epochs(self._history(number))
        self._end(dataclasses.replace(trial, state="failed", why=why, failures=(*trial.failures, why)))

    def ended(self, number: int, pruned: str = "") -> None:
        """Record that a trial was stopped, with the reason, or finished by itself."""
        trial = self._timed(number).with_epochs(self._history(number))
        if pruned:
            self._end(dataclasses.replace(trial, state="pruned", why=pruned))
            return
        settled = self._settled(trial)
        if settled.state == "unfinished":
            self._keep(settled)
        else:
            self._end(settled)

    def keep_unfinished(self) -> None:
        """Write the records of the trials that have not ended, with the epochs reported so far."""
        for trial in self.trials.values():
            if trial.state == "unfinished":
                self._keep(trial)

    def write_record(self, finished: str) -> None:
        """Write sweep.json."""
        record = {
            "finished": finished,
            "id": self.plan.sweep_id,
            "settings_digest": self.plan.settings_digest,
            "trials": self.plan.num_trials,
            "added": 0 if finished else self.plan.added,
            "config": recorded(self.job),
        }
        self._write(RECORD, record)

    def clean(self, but: int | None = None) -> None:
        """Delete the checkpoints of ended trials that are neither the best nor on the Pareto front.

        Args:
            but: a trial whose workers may still be writing, which is skipped. None: clean all trials again.
        """
        if but is None:
            self._cleaned.clear()
        best, trials = self.best, list(self.trials.values())
        kept = {best.number} if best else set()
        if self.config.mode == "pareto":
            kept |= {trial.number for trial in front(trials, self.config.constraints, self.job.model.tasks)}
        for number in [trial.number for trial in trials if trial.state != "unfinished"]:
            if number in kept or number == but or number in self._cleaned:
                continue
            self.check_lock()
            with contextlib.suppress(OSError):  # ending workers may still write there; the next call tries again
                for name in _WEIGHTS:
                    self.storage.delete_tree(self.storage.join(self.trial_uri(number), name))
                self._cleaned.add(number)

    def _settled(self, trial: Trial) -> Trial:
        """Return the record of a trial that was not stopped, from its training run's files."""
        failure = self._read_file(trial.number, FAILURE)
        if failure is not None:
            return dataclasses.replace(trial, state="failed", why=DIVERGED + failure.partition("\n")[0])
        record = self._read_file(trial.number, "run.json")
        is_complete = record is not None and json.loads(record)["finished"]
        return dataclasses.replace(trial, state="complete") if is_complete else trial

    def _read_file(self, number: int, name: str) -> str | None:
        """Return the contents of a file of a trial's run; None: it does not exist."""
        uri = self.storage.join(self.trial_uri(number), name)
        try:
            return self._retry.call(lambda: self.storage.read(uri)).decode()
        except MissingObject:
            return None

    def _end(self, trial: Trial) -> None:
        before = self.best
        self._keep(trial)
        self.study.tell(trial)
        self._retry.call(self._save_study)
        self._retry.call(lambda: self.clean(but=trial.number))
        best = self.best
        judged = "" if trial.objective is None else f", objective {trial.objective:.4f}"
        outcome = {"complete": "is complete", "pruned": "was stopped", "failed": "failed"}[trial.state]
        why = f" ({trial.why})" if trial.why else ""
        so_far = f"; best so far: trial {best.number}, {best.objective:.4f}" if best else ""
        if best is not None and (before is None or best.number != before.number):
            so_far += " (new)"
        self._say(
            f"trial {trial.number} {outcome} after {len(trial.epochs)} epochs{judged}{why}; "
            f"{self.num_ended} of {self.plan.num_trials} ended{so_far}"
        )
        self._check_something_works()

    def _check_something_works(self) -> None:
        """End the sweep early if its trials fail for a reason other than their values.

        Raises:
            JobError: the first trials to end, or all, failed before their first epoch.
        """
        refused = sum(trial.was_refused for trial in self.trials.values())
        tried = [trial for trial in self.trials.values() if trial.state != "unfinished" and not trial.was_refused]
        enough = min(_FIRST, self.plan.num_trials - refused)
        if tried and len(tried) >= enough and all(trial.never_learnt for trial in tried):
            raise JobError(
                f"{self.plan.uri}: all {len(tried)} trials that have ended failed before their first epoch "
                f"({tried[-1].why}); fix the cause and run the same command again to retry them"
            )

    def _timed(self, number: int) -> Trial:
        trial, started = self.trials[number], self._started.pop(number, None)
        if started is None:
            return trial
        return dataclasses.replace(trial, wall_s=trial.wall_s + time.monotonic() - started)

    def _history(self, number: int) -> list[dict[str, Any]]:
        uri = self.storage.join(self.trial_uri(number), "history.parquet")
        try:
            rows: list[dict[str, Any]] = self._retry.call(lambda: self.storage.read_table(uri)).to_pylist()
        except MissingObject:
            return []
        return rows

    def _keep(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        self._write(f"records/{trial_name(trial.number)}.json", trial.to_json())

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        body = (json.dumps(record, indent=2) + "\n").encode()
        self._retry.call(self.check_lock)
        self._retry.call(lambda: self.storage.write(self.join(*name.split("/")), body))

    def _save_study(self) -> None:
        self.check_lock()
        self.study.save()

    def _say(self, line: str) -> None:
        self._console.print(line)


def trial_name(number: int) -> str:
    """Return the name of a trial's training run."""
    return f"{number:04d}"


def shown_value(value: Scalar) -> str:
    """Return a parameter's value as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
