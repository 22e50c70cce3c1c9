"""Which sweep a command starts or resumes."""

from __future__ import annotations

import dataclasses
import json
import uuid
from typing import Final

from agr_ray.config import TuneConfig, TuneJob, digest
from agr_ray.errors import ConfigError
from agr_ray.storage import MissingObject, Storage

RECORD: Final = "sweep.json"


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


def plan_sweep(storage: Storage, job: TuneJob, training_digest: str) -> Plan:
    """Return the sweep that this configuration names. Nothing is written yet.

    Args:
        storage: where it is.
        job: what is searched.
        training_digest: digest of all that the trials have in common, including the data.

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
            raise ConfigError(
                f"tune.name {name}: the sweep {uri} has other settings or data (digest {record['settings_digest']}, "
                f"not {settings}); choose another name, or the same settings"
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


def sweep_digest(config: TuneConfig, training_digest: str) -> str:
    """Return the digest of all settings that define a trial and how trials are compared."""
    ignored = {
        "out",
        "name",
        "trials",
        "max_epochs",
        "max_hours",
        "max_concurrent",
        "max_failures",
        "study",
        "study_name",
    }
    fields = TuneConfig.model_fields
    settings = {name: fields[name].default for name in ignored} | {"name": training_digest}
    return digest(config.model_copy(update=settings))
