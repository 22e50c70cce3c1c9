"""A recipe in a bucket: `--config s3://...`, with connection settings from the command line or environment."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from seaweedfs import Bucket, S3Server

from agr_ray.cli import run
from agr_ray.config import TrainJob

RECIPE = b'[storage]\nendpoint_url = "http://127.0.0.1:9"\nmax_attempts = 9\n[train]\ndata = "d"\nepochs = 7\n'


def taken(monkeypatch: pytest.MonkeyPatch, *argv: str) -> TrainJob:
    jobs: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", *argv])
    run(TrainJob, jobs.append)
    (job,) = jobs
    return job


@pytest.fixture
def recipe(s3_server: S3Server) -> str:
    bucket = Bucket(s3_server, "tests")
    bucket.put("recipes/a b.toml", RECIPE)
    bucket.put("recipes/broken.toml", b"[train")
    return f"{bucket.uri}/recipes/a b.toml"


@pytest.mark.usefixtures("s3_environment")
def test_a_recipe_is_read_from_a_bucket_that_the_command_line_names(
    recipe: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    job = taken(monkeypatch, "--config", recipe, "--storage.endpoint_url", s3_server.endpoint_url)

    assert (job.train.epochs, job.storage.max_attempts) == (7, 9)
    assert job.storage.endpoint_url == s3_server.endpoint_url


@pytest.mark.usefixtures("s3_environment")
def test_a_recipe_is_read_from_a_bucket_that_the_environment_names(
    recipe: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGR_RAY_STORAGE__ENDPOINT_URL", s3_server.endpoint_url)

    assert taken(monkeypatch, f"--config={recipe}").train.epochs == 7


@pytest.mark.usefixtures("s3_environment", "recipe")
@pytest.mark.parametrize(
    ("uri", "endpoint", "said"),
    [
        ("s3://tests/recipes/gone.toml", "", "--config s3://tests/recipes/gone.toml: No such file"),
        ("s3://tests/recipes/broken.toml", "", "--config s3://tests/recipes/broken.toml: not valid TOML"),
        ("s3://nowhere/a.toml", "", "--config s3://nowhere/a.toml: bucket 'nowhere' does not exist"),
        ("s3://tests", "", "--config s3://tests: "),
        ("ftp://tests/a.toml", "", "--config ftp://tests/a.toml: "),
        ("s3://tests/a.toml", "http://127.0.0.1:9", "S3 endpoint http://127.0.0.1:9 can't be reached"),
    ],
)
def test_an_unreadable_recipe_gives_one_line(
    uri: str,
    endpoint: str,
    said: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--storage.endpoint_url", endpoint or s3_server.endpoint_url, "--storage.max_attempts", "1")
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "--config", uri, *options])

    with pytest.raises(SystemExit) as exit_:
        run(TrainJob, lambda job: None)

    error = capsys.readouterr().err
    assert (exit_.value.code, error.count("\n")) == (2, 1)
    assert said in error
