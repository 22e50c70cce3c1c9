"""What is rejected before a scoring run does any work."""

from __future__ import annotations

import os
from typing import Final

from agr_ray.config import ScoreConfig, ScoreJob
from agr_ray.errors import ConfigError
from agr_ray.scoring.grouping import check_grouping
from agr_ray.scoring.lakehouse import check_table
from agr_ray.storage import MissingObject, Storage
from agr_ray.storage.uri import is_bucket

MIN_KEY_BYTES: Final = 32


def checked_key(job: ScoreJob, storage: Storage, out: str) -> bytes:
    """Reject settings that can't work; return the secret key, empty if none is configured."""
    config = job.score
    if is_bucket(out):
        raise ConfigError(
            f"score.out {config.out}: is a whole bucket; give a prefix in it, such as {out}/scores, because unfinished "
            "work is stored beside it, at PREFIX-work"
        )
    if "://" not in out and os.path.ismount(out):
        raise ConfigError(
            f"score.out {config.out}: is a mount point; give a folder in it, such as {out}/scores, because unfinished "
            "work is stored beside it, at FOLDER-work, on the same disk"
        )
    key = b""
    if config.pseudonymise:
        try:
            key = storage.read(config.pseudonymise)
        except MissingObject:
            raise ConfigError(f"score.pseudonymise {config.pseudonymise}: there is no such file") from None
        if len(key) < MIN_KEY_BYTES:
            raise ConfigError(
                f"score.pseudonymise {config.pseudonymise}: holds {len(key)} bytes; a key needs at least "
                f"{MIN_KEY_BYTES}; `head -c 32 /dev/urandom > FILE` makes one"
            )
    if config.near_duplicates == "publish" and config.pseudonymise:
        raise ConfigError(
            "score.near_duplicates publish: with score.pseudonymise, anyone who has a photograph could find its row by "
            "the hash; use count"
        )
    if config.aggregate_only:
        for name in ("pseudonymise", "ledger"):
            if not getattr(config, name):
                raise ConfigError(
                    f"score.aggregate_only needs score.{name}, so that the next run can skip scored images"
                )
        if f"{storage.absolute(config.ledger).rstrip('/')}/".startswith(f"{out}/"):
            raise ConfigError(f"score.ledger {config.ledger}: is inside score.out {out}, which others may read")
    elif config.ledger:
        raise ConfigError(f"score.ledger {config.ledger}: is only used with score.aggregate_only")
    check_grouping(config)
    return key


def probe(config: ScoreConfig, storage: Storage, out: str) -> None:
    """Make one cheap request to each location that the job reads or writes, to fail before any work.

    Raises:
        ConfigError: a request is refused.
        StorageUnavailable: a location can't be reached.
    """
    storage.probe(config.input, "score.input")
    storage.probe(config.checkpoint, "score.checkpoint")
    storage.probe(out, "score.out", write=True)
    if config.ledger:
        storage.probe(config.ledger, "score.ledger", write=True)
    if config.metadata:
        storage.probe(config.metadata, "score.metadata")
    check_table(storage, config, out)
