"""What the scripts of all jobs share: the command line, and errors of one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ray.exceptions import RayTaskError

from agr_ray.config import Job, StorageConfig, load, one_line, read_local
from agr_ray.errors import ConfigError, JobError
from agr_ray.storage import MissingObject, Storage, StorageError, StorageUnavailable
from agr_ray.storage.lock import LockLost

J = TypeVar("J", bound=Job)


def run(job_class: type[J], work: Callable[[J], object]) -> None:
    """Read the command line and do the work."""
    job = load(job_class, sys.argv[1:], read=read_recipe)
    with one_line_errors():
        work(job)


def read_recipe(path: str, storage: StorageConfig) -> bytes:
    """Return the bytes of a recipe, given its name, path or URI.

    Raises:
        ConfigError: the recipe can't be read.
    """
    if "://" not in path:
        return read_local(path, storage)
    try:
        return Storage.from_config(storage).read(path)
    except MissingObject:
        raise ConfigError(f"--config {path}: No such file") from None
    except (StorageError, StorageUnavailable, ConfigError) as error:
        raise ConfigError(f"--config {path}: {error}") from None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """If the work fails, end the process with one line on stderr: status 2 if the set-up is at fault, otherwise 1."""
    try:
        yield
    except RayTaskError as error:
        # First, because it is also an instance of its cause's class, with the traceback as its message.
        if not isinstance(error.cause, StorageUnavailable | StorageError):
            raise
        # Ray Data appends a paragraph to the one line.
        _fail(type(error.cause)(str(error.cause).partition("\n")[0]))
    except (ConfigError, StorageUnavailable, StorageError) as error:
        _fail(error)
    except (JobError, LockLost) as error:
        _fail(error, status=1)


def _fail(error: Exception, status: int = 2) -> None:
    print(f"error: {one_line(str(error))}", file=sys.stderr)
    raise SystemExit(status)
