"""The `agr-ray` command. `jobs/*.py` call it too, so that a submitted job takes the same arguments.

Nothing heavy is imported before the command line is read, so `--help` and mistakes answer at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pkgutil import resolve_name
from types import FrameType
from typing import NamedTuple, NoReturn, TypeVar

from agr_ray import __version__
from agr_ray.config import (
    CompareJob,
    CrossValidateJob,
    EvaluateJob,
    ImportJob,
    Job,
    PredictJob,
    PrepareJob,
    QuantizeJob,
    RenderJob,
    ReportJob,
    ScoreJob,
    StatusJob,
    StorageConfig,
    TrainJob,
    TuneJob,
    built_in_recipes,
    did_you_mean,
    fail,
    load,
    read_local,
    wants_json,
)
from agr_ray.errors import ConfigError, JobError
from agr_ray.json_log import json_log, print_at_once

J = TypeVar("J", bound=Job)


class Command(NamedTuple):
    """A command: `agr-ray NAME`."""

    summary: str
    job: type[Job]
    work: str
    """`module:function` that runs the job."""


COMMANDS = {
    "prepare": Command(
        "labelled photographs -> a prepared set: aligned face crops, labels and splits",
        PrepareJob,
        "agr_ray.runtime.prepare:prepare",
    ),
    "train": Command("a prepared set -> a checkpoint", TrainJob, "agr_ray.runtime.train:train"),
    "tune": Command("search for better settings by training many times", TuneJob, "agr_ray.runtime.tune:tune"),
    "compare": Command(
        "train presets (named networks) on the same data, and compare them",
        CompareJob,
        "agr_ray.runtime.compare:compare",
    ),
    "cross-validate": Command(
        "train and test a network for each fold", CrossValidateJob, "agr_ray.runtime.cross_validate:cross_validate"
    ),
    "evaluate": Command(
        "measure a checkpoint on labelled images, or calibrate it", EvaluateJob, "agr_ray.runtime.evaluate:evaluate"
    ),
    "quantize": Command(
        "a checkpoint -> the same in int8, faster on CPUs", QuantizeJob, "agr_ray.predict.quantize:quantize"
    ),
    "score": Command("a folder or bucket of photographs -> Parquet tables", ScoreJob, "agr_ray.runtime.score:score"),
    "predict": Command("a few photographs -> a table and annotated copies", PredictJob, "agr_ray.report.faces:predict"),
    "report": Command(
        "results of evaluate, train, compare, cross-validate, tune or score -> a report",
        ReportJob,
        "agr_ray.report.report:report",
    ),
    "status": Command(
        "say what is published, running and stuck in an output", StatusJob, "agr_ray.report.status:status"
    ),
    "import": Command(
        "FairFace's published weights -> a checkpoint", ImportJob, "agr_ray.models.fairface:import_fairface"
    ),
    "render": Command("draw synthetic faces with known labels", RenderJob, "agr_ray.runtime.render:render"),
}
_OUT_OF_MEMORY = (
    "Ray ended a process because this machine is low on memory: close other programs, or use fewer workers "
    "(num_workers) or smaller batches (batch_size); the same command resumes"
)
_USAGE = """usage: agr-ray COMMAND [--config RECIPE] [--OPTION VALUE ...]

Estimate perceived age, gender and race from photographs of faces: train, tune, evaluate and run models.

{commands}

A RECIPE is a TOML file of settings: a built-in one by its name, or your own by its path or URI. agr-ray COMMAND --help
shows a command's most important options, --help-all all of them.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `agr-ray`.

    Args:
        argv: the command and its options; None: those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(_usage(), end="")
    elif name in ("--version", "version"):
        print(__version__)
    elif name == "recipes":
        _recipes(rest)
    elif name == "models":
        _models(rest)
    elif name == "demo":
        _demo(rest)
    elif name in COMMANDS:
        command = COMMANDS[name]
        run(command.job, lambda job: resolve_name(command.work)(job), rest, prog=f"agr-ray {name}")
    else:
        known = [*COMMANDS, "demo", "recipes", "models"]
        fail(f"{name}: there is no such command{did_you_mean(name, known)}; allowed: {', '.join(known)}")


def run(
    job_class: type[J], work: Callable[[J], object], argv: Sequence[str] | None = None, prog: str | None = None
) -> None:
    """Read a command line and run the job.

    Args:
        job_class: configuration that the command line sets.
        work: runs the job.
        argv: the options; None: those of this process.
        prog: the command's name in its help; None: that of the script.
    """
    words = sys.argv[1:] if argv is None else argv
    name = (prog or "").rpartition(" ")[2]
    # Before the command line is read, so that its mistakes are logged, too.
    with json_log(name) if wants_json(words) else nullcontext():
        job = load(job_class, words, read=read_recipe, prog=prog)
        with one_line_errors():
            work(job)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """If the block fails, end the process with one line on stderr: status 1 for `JobError` and `LockLost`, else 2.

    Ctrl-C and SIGTERM are confirmed at once, and end it with status 130 and 143, as shells report them. If Ray's memory
    monitor killed a process, the line says what helps. Errors that are not ours, which are bugs, keep their traceback.
    """
    stopped_by: list[int] = []
    try:
        with _confirmed_signals(stopped_by):
            yield
    except KeyboardInterrupt:
        signum = stopped_by[0] if stopped_by else signal.SIGINT
        event = "interrupted" if signum == signal.SIGINT else "stopped by SIGTERM"
        fail(f"{event}; run the same command again to resume it", status=128 + signum)
    except Exception as error:
        from agr_ray.storage import StorageError, StorageUnavailable
        from agr_ray.storage.lock import LockLost

        cause: BaseException | None = error
        ray_errors = sys.modules.get("ray.exceptions")
        if ray_errors is not None and isinstance(error, ray_errors.OutOfMemoryError):
            fail(_OUT_OF_MEMORY, status=1)
        if ray_errors is not None and isinstance(error, ray_errors.RayTaskError):
            # It is also an instance of its cause's class, with the traceback as its message.
            cause = error.cause
            if not isinstance(cause, StorageUnavailable | StorageError):
                raise
            # Ray Data appends a paragraph to the one line.
            cause = type(cause)(str(cause).partition("\n")[0])
        if not isinstance(cause, ConfigError | StorageUnavailable | StorageError | JobError | LockLost):
            raise
        fail(str(cause), status=1 if isinstance(cause, JobError | LockLost) else 2)


@contextmanager
def _confirmed_signals(stopped_by: list[int]) -> Iterator[None]:
    """In this block, print a line at SIGINT and SIGTERM, because Ray's processes take seconds to end, and append which.

    SIGTERM, by which Kubernetes, Ray and systemd stop a process, then acts as SIGINT does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        stopped_by.append(signum)
        print_at_once("stopping")
        signal.default_int_handler(signum, frame)
        raise AssertionError

    def terminate(signum: int, frame: FrameType | None) -> None:
        stopped_by.append(signum)
        on_sigint = signal.getsignal(signal.SIGINT)  # by now, it may be another one, such as that of a sweep
        (on_sigint if callable(on_sigint) else interrupt)(signum, frame)

    before = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGTERM, terminate)
    if before[0] is signal.default_int_handler:  # a shell's background jobs ignore SIGINT
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for signum, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(signum, handler)


def read_recipe(path: str, storage: StorageConfig) -> bytes:
    """Return the bytes of a recipe, given its name, path or URI.

    Raises:
        ConfigError: the recipe can't be read.
    """
    if "://" not in path:
        return read_local(path, storage)
    from agr_ray.storage import MissingObject, Storage, StorageError, StorageUnavailable

    try:
        return Storage.from_config(storage).read(path)
    except MissingObject:
        raise ConfigError(f"--config {path}: No such file") from None
    except (StorageError, StorageUnavailable, ConfigError) as error:
        raise ConfigError(f"--config {path}: {error}") from None


def _recipes(argv: Sequence[str]) -> None:
    """Print the names of the built-in recipes, or one recipe."""
    if argv[:1] in (["--help"], ["-h"]):
        print("usage: agr-ray recipes [NAME]\n\nList the built-in recipes, or print one as a start for your own.")
        return
    if len(argv) > 1:
        fail(f"recipes {' '.join(argv)}: expected at most one name")
    recipes = built_in_recipes()
    if argv:
        if argv[0] not in recipes:
            meant = did_you_mean(argv[0], [*recipes])
            fail(f"recipes {argv[0]}: there is no such recipe{meant}; allowed: {', '.join(recipes)}")
        print(recipes[argv[0]].read_text(), end="")
        return
    for name, file in recipes.items():
        print(f"{name:14} {file.read_text().partition(chr(10))[0].removeprefix('# ')}")


def _models(argv: Sequence[str]) -> None:
    if argv[:1] in (["--help"], ["-h"]):
        print(
            "usage: agr-ray models\n\nList the presets of `agr-ray train --preset NAME`, and the parts of networks,\n"
            "with parameters, multiply-adds and sources."
        )
        return
    if argv:
        fail(f"models {' '.join(argv)}: takes no options")
    resolve_name("agr_ray.report.model_list:models")()


def _demo(argv: Sequence[str]) -> None:
    if argv[:1] in (["--help"], ["-h"]):
        print(
            "usage: agr-ray demo [--out FOLDER]\n\nRender faces, then prepare, train, calibrate, evaluate and score. "
            "It takes a few minutes.\nAll results are written to FOLDER (default: demo-out)."
        )
        return
    match [word for each in argv for word in each.split("=", 1)]:
        case []:
            out = "demo-out"
        case ["--out", out] if "://" not in out:
            pass
        case _:
            fail(f"demo {' '.join(argv)}: the only option is --out FOLDER, a local folder")
    with json_log("demo") if wants_json([]) else nullcontext(), one_line_errors():
        resolve_name("agr_ray.demo:demo")(out)


def _usage() -> str:
    rows = {name: command.summary for name, command in COMMANDS.items()} | {
        "demo": "render, prepare, train, evaluate and score: the whole pipeline in a few minutes",
        "recipes": "list or print the built-in recipes",
        "models": "list the presets, and the parts that networks are made of",
    }
    return _USAGE.format(commands="\n".join(f"  {name:14} {summary}" for name, summary in rows.items()))
