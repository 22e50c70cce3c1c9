"""No password or key reaches a message, a log or a file that a job writes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.train.v2._internal.state.schema import RunSettings
from rich.console import Console
from sweeps import STORAGE, complete, opened, tune_job

from agr_ray.cli import one_line_errors, run
from agr_ray.config import EvaluateJob, Job, PrepareJob, RenderJob, ScoreJob, TrainConfig, TrainJob, TuneJob, load
from agr_ray.errors import ConfigError, JobError
from agr_ray.learn.run import Run, settings
from agr_ray.learn.tracking import check_mlflow
from agr_ray.redact import redacted
from agr_ray.report.sweep_results import write_results
from agr_ray.runtime.tuning.hooks import why_failed

SECRET = "hunter2-swordfish"
SECRETS = {
    "AGR_RAY_TRAIN__MLFLOW_URI": f"http://me:{SECRET}@tracking:5000",
    "AGR_RAY_TUNE__STUDY": f"postgresql://me:{SECRET}@database/studies?sslpassword={SECRET}",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": SECRET,
    "MLFLOW_TRACKING_PASSWORD": SECRET,
}
JOBS: tuple[type[Job], ...] = (RenderJob, PrepareJob, TrainJob, TuneJob, EvaluateJob, ScoreJob)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://u:p@h:5000/x", "http://u:***@h:5000/x"),
        ("see https://TOKEN@host/a.", "see https://***@host/a."),
        ("postgresql://me:p@s/s@host/db?sslpassword=abc&x=1", "postgresql://me:***@host/db?sslpassword=***&x=1"),
        ("'http://a:b@c' and http://d:e@f", "'http://a:***@c' and http://d:***@f"),
        ('{"mlflow_uri": "http://u:p@h', '{"mlflow_uri": "http://u:***@h'),
        ("https://b/k?X-Amz-Signature=abc&a=1", "https://b/k?X-Amz-Signature=***&a=1"),
        ("AWS_SECRET_ACCESS_KEY=abc", "AWS_SECRET_ACCESS_KEY=***"),
        # What is none of it stays.
        ("s3://bucket/a@b.jpg", "s3://bucket/a@b.jpg"),
        ("sqlite:////shared/a@b.db", "sqlite:////shared/a@b.db"),
        ("train.lr: -1 is not allowed", "train.lr: -1 is not allowed"),
        ("the lock's token is another's", "the lock's token is another's"),
    ],
)
def test_only_secrets_in_a_text_are_hidden(text: str, said: str) -> None:
    assert redacted(text, environ={}) == said


@pytest.mark.parametrize("word", ["x", "1", "a.b-", "a://", "s3://a:", "1://", "token", "token.", "='", "token:"])
def test_a_long_word_takes_no_quadratic_time(word: str) -> None:
    long = word * (300_000 // len(word))  # quadratic: minutes
    assert redacted(f"{long} token=abc", environ={}) == f"{long} token=***"


def test_fragments_quoted_by_a_parser_are_hidden_too() -> None:
    assert "fish" not in redacted("invalid port 'fish' in URL", "http://me:sword:fish@host", environ={})


BROKEN = (
    {"AGR_RAY_TUNE__SPACE": "{"},
    {"AGR_RAY_TUNE__CONSTRAINTS": "no JSON"},
    {"AGR_RAY_TUNE__POINTS_TO_EVALUATE": "["},
    {"AGR_RAY_TUNE": f'{{"study": "postgresql://me:{SECRET}@h/db"'},
    {"AGR_RAY_TUNE": f'{{"study": ["postgresql://me:{SECRET}@h/db"]}}'},
    {"AGR_RAY_TUNE": f'{{"study": "s3://me:{SECRET}@h/db"}}'},
    {"AGR_RAY_TRAIN": f'{{"mlflow_uri": "http://me:{SECRET}@h"'},
    {"AGR_RAY_TRAIN": f'[{{"mlflow_uri": "http://me:{SECRET}@h"}}]'},
    {"AGR_RAY_TRAIN": f'{{"mlflow_url": "http://me:{SECRET}@h"}}'},
    {"AGR_RAY_TRAIN__TASKS": f"http://me:{SECRET}@h"},
    {"AGR_RAY_TRAIN__LR": f"http://me:{SECRET}@h"},
    {"AGR_RAY_TRAIN__LR": SECRET},
    {"AGR_RAY_MODEL__TASKS": f"http://me:{SECRET}@h"},
    {"AGR_RAY_SCORE__INCLUDE": f"http://me:{SECRET}@h"},
    {"AGR_RAY_STORAGE__ENDPOINT_URL": f"http://me:{SECRET}@h"},
)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("broken", BROKEN)
def test_an_error_about_a_variable_shows_neither_others_nor_its_secret(
    job: type[Job], broken: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)  # what AWS's are is known from the process's own environment

    with pytest.raises(SystemExit) as exit_:
        load(job, [], SECRETS | broken)

    said = capsys.readouterr().err
    assert (exit_.value.code, said.count("\n")) == (2, 1)
    assert SECRET not in said
    assert [name for name in SECRETS if name in said] == []


@pytest.mark.parametrize(
    "argv",
    [
        [f"http://me:{SECRET}@tracking:5000"],
        [f"--train.mlflow_url=http://me:{SECRET}@tracking:5000"],
        ["--train.mlflow_url", f"http://me:{SECRET}@tracking:5000"],
        ["--train.lr", f"http://me:{SECRET}@tracking:5000"],
        ["--train.data_shares", f"http://me:{SECRET}@tracking:5000"],
        ["--storage.endpoint_url", f"http://me:{SECRET}@tracking:5000"],
        ["--config", f"https://me:{SECRET}@tracking/recipe.toml"],
    ],
)
def test_a_wrong_command_line_shows_no_secret(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", *argv])

    with pytest.raises(SystemExit) as exit_:
        run(TrainJob, lambda job: None)

    said = capsys.readouterr().err
    assert (exit_.value.code, said.count("\n")) == (2, 1)
    assert SECRET not in said


@pytest.mark.parametrize("failure", [ConfigError, JobError])
def test_an_error_that_ends_a_job_shows_no_secret(
    failure: Callable[[str], Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), one_line_errors():
        raise failure(f"API request to http://me:{SECRET}@tracking:5000 failed\nTraceback: {SECRET[:0]}")

    said = capsys.readouterr().err
    assert SECRET not in said
    assert said.count("\n") == 1


def test_what_ray_shows_of_a_run_contains_no_secret() -> None:
    job = TrainJob(train=TrainConfig(data="d", mlflow_uri=SECRETS["AGR_RAY_TRAIN__MLFLOW_URI"]))
    fields = {field.name: None for field in dataclasses.fields(Run)} | {"job": job}

    shown = RunSettings._sanitize_train_loop_config({"run": Run(**fields), "job": job})

    assert "Run(job=TrainJob(" in str(shown)
    assert SECRET not in str(shown)
    space = {"train.lr": {"choice": [0.1, 0.2]}}
    assert SECRET not in repr(TuneJob(tune={"study": SECRETS["AGR_RAY_TUNE__STUDY"], "space": space}))


def test_the_tracking_server_is_named_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"train\.mlflow_uri http://me:\*\*\*@tracking:5000: needs"):
        check_mlflow(f"http://me:{SECRET}@tracking:5000")


def test_the_reason_of_a_failed_trial_contains_no_secret(tmp_path: Path) -> None:
    error = tmp_path / "error.txt"
    error.write_text(f"Traceback\nagr_ray.config.ConfigError: http://me:{SECRET}@tracking:5000 refuses\n")
    trial = cast(Any, SimpleNamespace(error_file=str(error)))

    assert why_failed(trial) == "raised: http://me:***@tracking:5000 refuses"


def test_files_of_a_run_and_a_sweep_contain_no_secret(tmp_path: Path) -> None:
    train = TrainConfig(data="d", mlflow_uri=SECRETS["AGR_RAY_TRAIN__MLFLOW_URI"])
    assert SECRET not in json.dumps(settings(TrainJob(train=train)))
    study = f"sqlite:///{tmp_path}/studies.db?password={SECRET}"
    job = tune_job(tmp_path, trials=1).model_copy(update={"train": train})
    sweep = opened(job)
    number = complete(sweep, [0.9])
    (Path(sweep.trial_uri(number)) / "best" / "meta.json").write_text(json.dumps({"metrics": {"val": {}}}))
    sweep.job = job.model_copy(update={"tune": job.tune.model_copy(update={"study": study})})
    shown = SimpleNamespace(
        data={"uri": "/faces", "split_manifest_sha256": "ab"}, num_train_rows=2, num_val_rows=1, git_commit=""
    )

    write_results(sweep, cast(Run, shown), Console(file=(tmp_path / "printed").open("w")))
    sweep.write_record("1 trials")

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"sweep.json", "report.html", "best.toml", "trials.parquet"} <= {path.name for path in files}
    assert [path.name for path in files if SECRET.encode() in path.read_bytes()] == []
    assert STORAGE.exists(sweep.join("best.toml"))


def test_a_short_password_of_the_environment_hides_no_other_words() -> None:
    environ = {"DATABASE_URL": "postgresql://app:app@db/app", "PROXY": "http://me:correct-horse@proxy"}

    assert redacted("/srv/app/out, correct-horse", environ=environ) == "/srv/app/out, ***"
