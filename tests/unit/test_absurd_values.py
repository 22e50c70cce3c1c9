"""Every knob of every job with absurd values: one line and status 2, or the job gets as far as the cluster."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import ray
from annotated_types import Ge, Gt, Le, Lt
from prepared_sets import prepared_set
from pydantic import ValidationError
from test_jobs_errors import JOBS, TASKS, saved_checkpoint

from agr_ray.cli import run
from agr_ray.config import SECTIONS
from agr_ray.config.parsing import _EVERYTHING, _describe

ABSURD: tuple[Any, ...] = (
    *(10**30, -(10**30), -1, 0, 2**31, 2**63, 1e300, -1e300, 1e-300, math.nan, math.inf, -math.inf),
    *("", " ", "x", "\0", "a\nb", "..", "/", "s3://", "ftp://h/x", "http://u:p@h", "x" * 100_000, "\ud800", "1e400"),
    *(True, None, [], {}, [[]], {"x": 1}, [10**30], ["", ""]),
)
FIELDS = [(name, field) for name, section in SECTIONS.items() for field in section.model_fields]


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_a_value_is_accepted_or_rejected_with_one_line(section: str, field: str) -> None:
    for value in ABSURD:
        try:
            _EVERYTHING(**{section: {field: value}})
        except ValidationError as error:
            said = _describe(error, _EVERYTHING)
            assert len(" ".join(said.split())) < 1500
            assert said.startswith((f"{section}.{field}", f"{section}: "))


def extremes(section: str, field: str) -> list[Any]:
    """Return the smallest and largest numbers that the knob accepts."""
    annotation, metadata = SECTIONS[section].model_fields[field].annotation, []
    for each in (SECTIONS[section].model_fields[field], *get_args(annotation)):
        metadata += list(getattr(each, "metadata", ()) or getattr(each, "__metadata__", ()))
    for each in [part for part in metadata if hasattr(part, "metadata")]:
        metadata += list(each.metadata)
    is_number = annotation in (int, float) or any(
        part in (int, float) or get_args(part)[:1] in ((int,), (float,)) for part in get_args(annotation)
    )
    if not is_number:
        return []
    found: list[Any] = []
    for bound in metadata:
        if isinstance(bound, Ge):
            found.append(bound.ge)
        elif isinstance(bound, Le):
            found.append(bound.le)
        elif isinstance(bound, Gt):
            found.append(1 if annotation is int or int in map(type, found) else 1e-9)
        elif isinstance(bound, Lt):
            found.append(0.999999)
    return found


class Reached(BaseException):
    """The job got as far as starting its cluster, or the process that scores a few photographs."""


KNOBS = [
    (job, section, field, value)
    for job, (job_class, _) in JOBS.items()
    for section in job_class.model_fields
    if section in SECTIONS
    for field in SECTIONS[section].model_fields
    for value in extremes(section, field)
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    prepared_set(folder / "prepared", race="asian")
    saved_checkpoint(folder / "checkpoint")
    (folder / "faces").mkdir()
    (folder / "faces" / "a.jpg").write_bytes(b"no image")
    (folder / "faces" / "labels.csv").write_text("key,age,gender,race\na.jpg,20,male,white\n")
    return folder


def test_the_extremes_of_every_kind_of_number_are_known() -> None:
    assert {(section, field) for _, section, field, _ in KNOBS} >= {
        ("train", "seed"),
        ("train", "threads_per_worker"),
        ("train", "lr"),
        ("storage", "timeout_s"),
        ("train", "lock_expiry_s"),
        ("score", "limit"),
        ("render", "num_chips"),
    }


def prepared_for(monkeypatch: pytest.MonkeyPatch, job: str, inputs: Path, tmp: Path) -> tuple[str, ...]:
    """Make starting the cluster, or another process, end the job, and return the arguments to get that far."""

    def reached(*_: Any, **__: Any) -> None:
        raise Reached

    for name in [name for name in os.environ if name.startswith("AGR_RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp)
    monkeypatch.setattr(ray, "init", reached)
    monkeypatch.setattr(subprocess, "Popen", reached)
    arguments: dict[str, tuple[str, ...]] = {
        "render": (),
        "prepare": ("--source.uri", f"{inputs}/faces"),
        "train": ("--train.data", f"{inputs}/prepared", "--preset", "lightweight", *TASKS),
        "tune": ("--train.data", f"{inputs}/prepared", *TASKS, "--tune.space", '{"train.lr": {"uniform": [0.1, 0.2]}}'),
        "evaluate": ("--evaluate.checkpoint", f"{inputs}/checkpoint", "--evaluate.data", f"{inputs}/prepared"),
        "score": ("--score.checkpoint", f"{inputs}/checkpoint", "--score.input", f"{inputs}/faces"),
    }
    return arguments[job]


@pytest.mark.parametrize("job", JOBS)
def test_extreme_values_end_in_one_line_or_reach_the_cluster(
    job: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    surprises = []
    for number, (_, section, field, value) in enumerate(knob for knob in KNOBS if knob[0] == job):
        out = "train" if job == "train" else job
        argv = [
            *prepared_for(monkeypatch, job, inputs, tmp_path),
            f"--{out}.out",
            str(tmp_path / str(number)),
            f"--{section}.{field}",
            json.dumps(value),
        ]
        outcome = _outcome(job, argv, monkeypatch)
        said = capsys.readouterr().err
        is_one_line = outcome == "refused" and said.count("\n") == 1 and "error: " in said
        if outcome not in ("reached", "done") and not is_one_line:
            surprises.append((section, field, value, outcome, said[-300:]))
    assert surprises == []


def _outcome(job: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *argv])
    work: Callable[..., None] = run
    try:
        work(*JOBS[job])
    except SystemExit as error:
        return "refused" if error.code == 2 else f"status {error.code}"
    except Reached:
        return "reached"
    except Exception as error:
        return repr(error)
    return "done"


PATHS = {
    "render": ("render.out",),
    "prepare": ("source.uri", "source.labels", "prepare.out"),
    "train": ("train.data", "train.out", "train.name", "model.pretrained"),
    "tune": ("train.data", "tune.out", "tune.name", "tune.study"),
    "evaluate": ("evaluate.checkpoint", "evaluate.data", "evaluate.out"),
    "score": ("score.checkpoint", "score.input", "score.out", "score.metadata", "score.pseudonymise", "score.ledger"),
}
ABSURD_PATHS = (
    "s3://",
    "s3:///x",
    "s3:/b/x",
    "ftp://h/x",
    "file://host/x",
    "x" * 5000,
    "/dev/null",
    "/dev/null/x",
    "[",
)


@pytest.mark.parametrize("job", JOBS)
def test_absurd_paths_end_in_one_line_or_reach_the_cluster(
    job: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    surprises = []
    for key in PATHS[job]:
        for number, path in enumerate(ABSURD_PATHS):
            out = "train" if job == "train" else job
            argv = [*prepared_for(monkeypatch, job, inputs, tmp_path), f"--{out}.out", str(tmp_path / f"{key}{number}")]
            outcome = _outcome(job, [*argv, f"--{key}", path], monkeypatch)
            said = capsys.readouterr().err
            is_one_line = outcome in ("refused", "status 1") and said.count("\n") == 1 and said.startswith("error: ")
            if outcome not in ("reached", "done") and not is_one_line:
                surprises.append((key, path[:50], outcome, said[-300:]))
    assert surprises == []
