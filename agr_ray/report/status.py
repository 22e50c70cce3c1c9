"""`agr-ray status`: what is published, running and stuck in a folder of results."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Final

from agr_ray.config import StatusJob
from agr_ray.console import make_console, make_table
from agr_ray.errors import ConfigError
from agr_ray.json_log import print_result
from agr_ray.report.status_folders import Status, read_status
from agr_ray.storage import Storage

STUCK: Final = 3
"""Exit status if something is stuck."""


def status(job: StatusJob) -> Status:
    """Print the status of a folder and return it; end the process with status `STUCK` if something is stuck.

    Raises:
        ConfigError: the folder holds no output that `read_status` knows, or it is damaged.
        StorageFailed, StorageUnavailable: it can't be read.
    """
    storage = Storage.from_config(job.storage)
    storage.probe(job.folder, "folder")
    uri = storage.absolute(job.folder).rstrip("/")
    try:
        found = read_status(storage, uri)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"folder {uri}: a file is damaged, or was written by another version of agr_ray "
            f"({type(error).__name__}: {error})"
        ) from error
    if found is None:
        problem = (
            "there is no such folder"
            if not storage.exists(uri)
            else "it holds nothing of score, prepare, train, tune, compare or cross-validate"
        )
        raise ConfigError(
            f"folder {uri}: {problem}; give OUT of score, prepare, compare or cross-validate, or OUT/NAME of train or "
            "tune"
        )
    if job.as_json:
        print_result(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        _print(found)
    if found.stuck:
        raise SystemExit(STUCK)
    return found


def _print(found: Status) -> None:
    console = make_console()
    console.print(f"{found.kind} {found.uri}")
    console.print(f"published: {len(found.published):,}" if found.published else "published: nothing yet")
    if found.published:
        table = make_table(*(name.replace("_", " ") for name in found.published[-1]))
        for each in found.published:
            table.add_row(*map(_shown, each.values()))
        console.print(table)
    if found.running:
        holder = found.running
        console.print(
            f"running: {holder['owner']}, process {holder['pid']} on {holder['host']} since {holder['since']}, last "
            f"heartbeat {holder['last_heartbeat']}"
        )
    for work in found.unfinished:
        console.print(f"unfinished: {work}")
    for sentence in found.stuck:
        console.print(f"stuck: {sentence}")
    if not found.stuck:
        console.print("nothing is stuck")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(each)}" for key, each in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
