"""Secrets are planted wherever they can be given, and looked for in everything that commands print and write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from prepared_sets import prepared_set
from sets import chip_jpeg
from this_process import model

import agr_ray
from agr_ray import cli
from agr_ray.errors import ConfigError
from agr_ray.storage import Storage, StorageError, StorageUnavailable
from agr_ray.storage.connection import Connection

__all__ = ["model"]  # a fixture
SECRET = "hunter2-sword/fish"
LOGIN = f"http://me:{SECRET}@host:9"
VARIABLES = {
    "AWS_ACCESS_KEY_ID": f"{SECRET}-id",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": f"{SECRET}-token",
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "MLFLOW_TRACKING_TOKEN": SECRET,
    "RAY_AUTH_TOKEN": SECRET,
    "HTTPS_PROXY": f"http://me:{SECRET}@127.0.0.1:9",
    "AGR_RAY_TUNE__STUDY": f"postgresql://me:{SECRET}@database/studies?sslpassword={SECRET}",
}
PARTS = ("hunter2", "sword/fish")
"""Parts of the secret, each of which gives too much away."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with photographs, a broken one among them, in a process whose environment holds the secrets."""
    monkeypatch.chdir(tmp_path)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(chip_jpeg(number))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    return tmp_path


def leaks(folder: Path, captured: pytest.CaptureResult[str] | str, *private: str) -> list[str]:
    """Return the places where a part of the secret is found: files below the folder, names included, and the output."""
    printed = captured if isinstance(captured, str) else captured.out + captured.err
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.name not in private}
    texts = {name: path.read_bytes().decode(errors="replace") for name, path in files.items() if path.is_file()}
    places = [*texts.items(), *((f"name {name}", name) for name in files)]
    places += [(f"printed: {line}", line) for line in printed.splitlines()]
    return [place for place, text in places if any(part in text for part in PARTS)]


def run(*words: object) -> int:
    """Run a command and return its exit status."""
    try:
        cli.main([*map(str, words)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_predicting_leaks_nothing(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("predict", "--checkpoint", model, "in", "--out", "drawn") == 0
    assert run("predict", "--checkpoint", model, "in", "--json_lines") == 0

    assert (folder / "drawn").exists()
    assert leaks(folder, capsys.readouterr()) == []


def test_scoring_and_its_report_leak_nothing(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "key").write_text(SECRET * 3)

    assert run("score", "--checkpoint", model, "--input", "in", "--out", "out", "--pseudonymise", "key") == 0
    assert run("report", "out") == 0

    assert len(list(folder.rglob("out/images/run=*/*.parquet"))) == 1
    assert (folder / "out" / "report.html").exists()
    assert json.loads(next(folder.glob("out/_SUCCESS/*.json")).read_text())["key_id"]
    assert leaks(folder, capsys.readouterr(), "key") == []


def test_a_dry_run_and_a_checkpoint_leak_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared_set(folder / "set")
    options = ("--preset", "lightweight", "--model.image_size", 32, "--model.tasks", "age,gender", "--batch_size", 2)

    run("train", "--data", "set", "--out", "runs", *options, "--mlflow_uri", LOGIN, "--dry_run")

    assert leaks(folder, capsys.readouterr()) == []


COMMANDS = {
    "score": ("--checkpoint", "--input", "--out", "--metadata"),
    "train": ("--data", "--out", "--model.pretrained"),
    "tune": ("--data", "--out", "--study"),
    "prepare": ("--source.uri", "--out", "--source.labels"),
    "evaluate": ("--checkpoint", "--data", "--out"),
    "quantize": ("--checkpoint", "--data", "--out"),
    "compare": ("--data", "--out"),
}
"""Options that name a file, a folder or a server."""
URIS = (
    f"s3://AKIA:{SECRET}@bucket/key",
    "s3://hunter2-token@bucket/key",
    f"http://me:{SECRET}@host:9/x",
    f"https://{SECRET.replace('/', '')}@host/x?X-Amz-Signature={SECRET}",
    f"https://bucket/key?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}",
    f"ftp://host/?password={SECRET}",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_secret_in_an_uri_is_repeated(
    command: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--checkpoint": model, "--data": "set", "--input": "in", "--source.uri": "in", "--out": "out"}
    prepared_set(folder / "set")
    for option in COMMANDS[command]:
        for uri in URIS:
            words = {name: value for name, value in given.items() if name in COMMANDS[command]} | {option: uri}
            options = [word for pair in words.items() for word in pair]

            status = run(command, *options, "--storage.max_attempts", 1, "--storage.timeout_s", 1, "--dry_run")

            said = capsys.readouterr()
            assert status != 0, words
            assert said.err.count("\n") >= 1
            assert leaks(folder, said) == [], words


@pytest.mark.parametrize(
    "words",
    [
        ("--storage.endpoint_url", LOGIN),
        ("--storage.region", f"http://me:{SECRET}@x"),
        ("--config", f"s3://AKIA:{SECRET}@bucket/recipe.toml"),
        ("--config", f"s3://bucket/recipe.toml?X-Amz-Signature={SECRET}"),
        ("--cluster.address", f"ray://me:{SECRET}@host:10001"),
        (f"--storage.options={{'secret': '{SECRET}'}}",),
        ("--storage_options", f'{{"secret_key": "{SECRET}"}}'),
    ],
)
def test_no_secret_of_a_connection_is_repeated(
    words: tuple[str, ...], folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--storage.max_attempts", 1, "--storage.timeout_s", 1)
    given = ("--checkpoint", model, "--input", "s3://bucket/in", "--out", "out")

    assert run("score", *given, *quick, *words) != 0

    assert leaks(folder, capsys.readouterr()) == []


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_with_a_password_in_the_environment_is_rejected_without_it(
    name: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "http://me:hunter2-sword@127.0.0.1:9")

    assert run("score", "--checkpoint", model, "--input", "s3://bucket/in", "--out", "out") == 2
    said = capsys.readouterr()
    assert "must be a URL without user and password" in said.err
    assert leaks(folder, said) == []
    with pytest.raises(StorageUnavailable, match=r"the S3 endpoint http://me:\*\*\*@127\.0\.0\.1:9 must be"):
        Connection().boto3_client()


def test_the_python_api_repeats_no_secret_either(folder: Path) -> None:
    for uri in URIS:
        with pytest.raises((ConfigError, StorageError, StorageUnavailable)) as raised:
            agr_ray.load(uri)
        assert leaks(folder, str(raised.value)) == []
    with pytest.raises((ConfigError, StorageError, StorageUnavailable)) as raised:
        Storage(Connection(timeout_s=1.0, max_attempts=1)).read("s3://bucket/key")
    assert leaks(folder, str(raised.value)) == []
