"""Which sweep a command starts or resumes."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Collection
from typing import Any, Final

from agr_ray.config import TuneConfig, TuneJob, digest, other_settings
from agr_ray.errors import ConfigError
from agr_ray.storage import MissingObject, Storage

RECORD: Final = "sweep.json"
BEST_RECIPE: Final = "best.toml"
PROVENANCE: Final = "provenance.json"
"""Names and values that a page shows and no other file of the sweep holds: of the data and the study."""
_IGNORED: Final = (
    *("out", "name", "trials", "max_epochs", "max_hours", "max_concurrent", "max_failures", "study", "study_name"),
)
"""Keys of `[tune]` that define neither a trial nor how trials are compared."""
_NOT_IN_DIGEST: Final = frozenset(f"tune.{key}" for key in _IGNORED)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sweep that a command starts or resumes."""

    uri: str
    name: str
    sweep_id: str
    """Random id, by which the sweep recognises its trials in a shared study."""
    settings_digest: str
    num_trials: int
    """Total number of trials."""
    added: int
    """Value of --add until the sweep has finished, so that repeating the command adds no more."""


def plan_sweep(storage: Storage, job: TuneJob, training_digest: str, without_effect: Collection[str] = ()) -> Plan:
    """Return the sweep that this configuration names. Nothing is written yet.

    Args:
        storage: where it is.
        job: what is searched.
        training_digest: digest of all that the trials have in common, including the data.
        without_effect: sections and dotted keys that this digest leaves out.

    Raises:
        ConfigError: the sweep has finished and no trials are added, or it was started with other settings.
    """
    settings = sweep_digest(job.tune, training_digest)
    name = job.tune.name or f"sweep-{settings}"
    out = storage.absolute(job.tune.out)
    number = 1
    while True:
        numbered = name if number == 1 else f"{name}-{number}"
        uri = storage.join(out, numbered)
        try:
            record = json.loads(storage.read(storage.join(uri, RECORD)))
        except MissingObject:
            if job.add:
                raise ConfigError(f"add {job.add}: there is no sweep {uri} yet; leave --add out") from None
            return Plan(uri, numbered, uuid.uuid4().hex, settings, job.tune.trials, 0)
        if record["finished"] and job.new_run:
            number += 1
            continue
        if record["settings_digest"] != settings:
            theirs = other_settings(record["config"], recorded(job), {*without_effect, *_NOT_IN_DIGEST})
            raise ConfigError(
                f"tune.name {name}: the sweep {uri} has {theirs}; choose another name, or the same settings and data"
            )
        wanted, added = max(record["trials"], job.tune.trials), record["added"]
        if job.add and (record["finished"] or job.add != added):
            wanted, added = wanted + job.add, job.add
        if record["finished"] and wanted == record["trials"]:
            raise ConfigError(
                f"the sweep {uri} has finished ({record['finished']}); --add 10 adds 10 trials, "
                "--new-run starts another sweep beside it"
            )
        return Plan(uri, numbered, record["id"], settings, wanted, added)


def recorded(job: TuneJob) -> dict[str, Any]:
    """Return the configuration as sweep.json holds it: without addresses, which may hold passwords."""
    exclude: Any = {
        **dict.fromkeys(("new_run", "dry_run", "log_format", "add"), True),
        "train": {"mlflow_uri"},
        "tune": {"study"},
    }
    return job.model_dump(mode="json", exclude=exclude)


def sweep_digest(config: TuneConfig, training_digest: str) -> str:
    """Return the digest of all settings that define a trial and how trials are compared."""
    fields = TuneConfig.model_fields
    settings = {name: fields[name].default for name in _IGNORED} | {"name": training_digest}
    return digest(config.model_copy(update=settings))
