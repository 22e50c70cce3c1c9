"""A sweep's Optuna study: it proposes trials and records their results.

A sweep resumes from its trials' records, not from the study, which is updated from the records when it is opened. So
the study may be lost, be older than the records (in a bucket it is uploaded after each trial), or hold trials of other
sweeps.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from agr_ray.config import Scalar, TuneConfig
from agr_ray.errors import ConfigError
from agr_ray.redact import redacted
from agr_ray.storage import MissingObject, Storage
from agr_ray.tuning.space import distribution_of, points, suggest
from agr_ray.tuning.trials import Trial, error_names, excesses

JOURNAL: Final = "study.journal"
_MAX_EXCESS: Final = 1e6
"""Excess of an error that was not measured, because Optuna needs a finite one."""
SWEEP: Final = "agr_ray.sweep"
"""Attribute of a trial in the study: the id of its sweep."""
NUMBER: Final = "agr_ray.trial"
"""Attribute: its number in the sweep, which names its training run."""
_STATES: Final = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "unfinished": TrialState.RUNNING,
}


class Study:
    """One sweep's view of a study.

    Args:
        storage: where the sweep is.
        uri: the sweep's folder.
        sweep_id: random id of the sweep.
        config: its settings.
        tasks: of the model.
        name: of the sweep.

    Raises:
        ConfigError: there is no such database, or the study there has other objectives.
    """

    def __init__(
        self, storage: Storage, uri: str, sweep_id: str, config: TuneConfig, tasks: Sequence[str], name: str
    ) -> None:
        self._storage = storage
        self._sweep_id = sweep_id
        self._config = config
        self._errors = error_names(tasks)
        self._uri = "" if config.study else storage.join(uri, JOURNAL)
        self._journal = MemoryJournal(self._saved())
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        name = config.study_name or name
        directions = [optuna.study.StudyDirection.MINIMIZE] * (len(self._errors) if config.mode == "pareto" else 1)
        try:
            self._study = optuna.create_study(
                storage=self._open(), study_name=name, directions=directions, load_if_exists=True
            )
            self._ids = self._known_ids()
        except Exception as error:  # of any database driver
            reason = redacted(" ".join(str(error).split()), config.study)
            raise ConfigError(f"tune.study {redacted(config.study) or JOURNAL}: {reason}") from None
        if len(self._study.directions) != len(directions):
            raise ConfigError(
                f"tune.study_name {name}: the study there has {len(self._study.directions)} objectives and tune.mode "
                f"{config.mode} has {len(directions)}; choose another name"
            )

    def catch_up(self, trials: Sequence[Trial]) -> None:
        """Update the study from the records.

        A proposed trial without a record never started. It is reported to Optuna as failed.
        """
        known = {trial.number for trial in trials}
        frozen = {each._trial_id: each for each in self._study.get_trials(deepcopy=False)}
        for number, trial_id in list(self._ids.items()):
            if number not in known:
                if not frozen[trial_id].state.is_finished():
                    self._study.tell(frozen[trial_id].number, state=TrialState.FAIL)
                del self._ids[number]
        for trial in trials:
            is_over = trial.number in self._ids and frozen[self._ids[trial.number]].state.is_finished()
            if trial.number not in self._ids or (is_over and trial.state == "unfinished"):  # the latter is retried
                self._add(trial)
            elif trial.state != "unfinished" and not is_over:
                self._report(trial)
                self.tell(trial)

    def ask(self, number: int) -> dict[str, Scalar]:
        """Return the parameters of a new trial.

        Raises:
            ConfigError: the study holds trials of another space, in which a key had other choices.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = self._sampler(number)
        asked = self._study.ask()
        try:
            params = suggest(asked, self._config.space)
        except ValueError as error:
            self._study.tell(asked, state=TrialState.FAIL)
            raise ConfigError(
                f"tune.study_name {self._study.study_name}: the study there has trials of another space: {error}"
            ) from None
        asked.set_user_attr(NUMBER, number)
        asked.set_user_attr(SWEEP, self._sweep_id)  # last, so that every trial with it also has its number
        self._ids[number] = asked._trial_id
        return params

    def report(self, number: int, epoch: int, objective: float | None) -> None:
        """Report the objective after an epoch. Optuna does not accept this for several objectives."""
        if objective is None or self._config.mode == "pareto":
            return
        self._live(number).report(objective, epoch)

    def tell(self, trial: Trial) -> None:
        """Report how a trial ended, unless it has not ended or was reported before."""
        if trial.state == "unfinished" or self._frozen(trial.number).state.is_finished():
            return
        live = self._live(trial.number)
        for name, excess in self._excesses(trial).items():
            live.set_constraint(name, excess)
        values = self._values(trial)
        # A trial without a measured objective does not count as complete.
        state = _STATES[trial.state] if values is not None or trial.state != "complete" else TrialState.FAIL
        self._study.tell(live, values, state=state)

    def save(self) -> None:
        """Upload the journal if the sweep is in a bucket."""
        if "://" in self._uri:
            self._storage.write(self._uri, self._journal.to_bytes())

    def _saved(self) -> bytes:
        """Return the journal in the bucket; empty if there is none."""
        if "://" in self._uri:
            with contextlib.suppress(MissingObject):
                return self._storage.read(self._uri)
        return b""

    def _open(self) -> BaseStorage:
        if "://" in self._config.study:
            return RDBStorage(self._config.study)
        if "://" in self._uri:
            return JournalStorage(self._journal)
        path = Path(self._config.study or self._uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._config.study:  # only the sweep's own, because another may be in use
            _drop_unfinished_line(path)
        return JournalStorage(JournalFileBackend(str(path)))

    def _sampler(self, number: int) -> BaseSampler:
        # A new sampler for each trial, because one that is seeded once would repeat its first draws after a resume.
        seed = int(np.random.SeedSequence([self._config.seed, number]).generate_state(1)[0])
        sampler: BaseSampler = TPESampler(n_startup_trials=self._config.random_trials, seed=seed)
        given = points(self._config)
        return PartialFixedSampler(given[number], sampler) if number < len(given) else sampler

    def _live(self, number: int) -> optuna.Trial:
        return optuna.Trial(self._study, self._ids[number])

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study._storage.get_trial(self._ids[number])

    def _known_ids(self) -> dict[int, int]:
        """Return the ids of this sweep's trials by number; for a retried trial, the last."""
        return {
            each.user_attrs[NUMBER]: each._trial_id
            for each in self._study.get_trials(deepcopy=False)
            if each.user_attrs.get(SWEEP) == self._sweep_id and NUMBER in each.user_attrs
        }

    def _report(self, trial: Trial) -> None:
        """Report the epochs that the study lacks."""
        reported = self._frozen(trial.number).intermediate_values
        for row, objective in zip(trial.epochs, trial.curve, strict=True):
            if row["epoch"] not in reported:
                self.report(trial.number, row["epoch"], objective)

    def _add(self, trial: Trial) -> None:
        values, intermediate = self._values(trial), self._intermediate(trial)
        state = _STATES[trial.state] if values is not None or trial.state != "complete" else TrialState.FAIL
        if trial.state == "pruned" and intermediate:
            values = [intermediate[max(intermediate)]]  # as Optuna does for a trial that it has pruned itself
        added: FrozenTrial = create_trial(
            state=state,
            values=values,
            params=dict(trial.params),
            distributions={key: distribution_of(self._config.space[key]) for key in trial.params},
            user_attrs={SWEEP: self._sweep_id, NUMBER: trial.number},
            intermediate_values=intermediate,
            constraints=dict(self._excesses(trial)) or None,
        )
        self._study.add_trial(added)
        self._ids[trial.number] = self._known_ids()[trial.number]

    def _intermediate(self, trial: Trial) -> dict[int, float]:
        if self._config.mode == "pareto":
            return {}
        rows = zip(trial.epochs, trial.curve, strict=True)
        return {row["epoch"]: objective for row, objective in rows if objective is not None}

    def _excesses(self, trial: Trial) -> Mapping[str, float]:
        measured = excesses(trial, self._config.constraints) if trial.state in ("complete", "pruned") else {}
        return {name: min(excess, _MAX_EXCESS) for name, excess in measured.items()}

    def _values(self, trial: Trial) -> list[float] | None:
        """Return the minimised values of a complete trial; None: it is not complete or was not measured."""
        if trial.state != "complete":
            return None
        errors: list[float | None] = (
            [trial.error(name) for name in self._errors] if self._config.mode == "pareto" else [trial.objective]
        )
        measured = [value for value in errors if value is not None]
        return measured if len(measured) == len(errors) else None


class MemoryJournal(BaseJournalBackend):
    """A journal in memory, which leaves nothing on the disk when the driver is killed.

    Args:
        body: written by `to_bytes` or a `JournalFileBackend`, one JSON document per line. A last line without a newline
            comes from a killed writer and is dropped.
    """

    def __init__(self, body: bytes = b"") -> None:
        self._lines = body[: body.rfind(b"\n") + 1].splitlines()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the entries, starting with this number."""
        for line in self._lines[log_number_from:]:
            yield json.loads(line)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add entries."""
        self._lines += [json.dumps(log, separators=(",", ":")).encode() for log in logs]

    def to_bytes(self) -> bytes:
        """Return the journal in the format of `JournalFileBackend`."""
        return b"".join(line + b"\n" for line in self._lines)


def _drop_unfinished_line(path: Path) -> None:
    """Remove an unfinished last line of a killed writer. Optuna would append to it, and fail."""
    if path.exists():
        body = path.read_bytes()
        whole = body[: body.rfind(b"\n") + 1]
        if whole != body:
            path.write_bytes(whole)


def study_address(storage: Storage, uri: str, config: TuneConfig) -> str:
    """Return the address of the study, without a password."""
    return redacted(config.study) or storage.join(uri, JOURNAL)
