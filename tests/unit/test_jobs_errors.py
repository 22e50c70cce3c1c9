"""An unusable set-up ends with status 2 and one line on stderr, before Ray starts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from prepared_sets import SIDE_PX, prepared_set

from agr_ray.cli import run
from agr_ray.config import EvaluateJob, Job, ModelConfig, PrepareJob, RenderJob, ScoreJob, TrainJob, TuneJob
from agr_ray.labels import UTKFACE
from agr_ray.models.checkpoint_network import save_checkpoint
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.transform import Transform
from agr_ray.runtime.evaluate import evaluate
from agr_ray.runtime.prepare import prepare
from agr_ray.runtime.render import render
from agr_ray.runtime.score import score
from agr_ray.runtime.train import train
from agr_ray.runtime.tune import tune
from agr_ray.schema import TEMPLATE
from agr_ray.vision.decode import encode_jpeg

ROOT = Path(__file__).parents[2]
JOBS: dict[str, tuple[type[Job], Callable[[Any], object]]] = {
    "render": (RenderJob, render),
    "prepare": (PrepareJob, prepare),
    "train": (TrainJob, train),
    "tune": (TuneJob, tune),
    "evaluate": (EvaluateJob, evaluate),
    "score": (ScoreJob, score),
}
Complaint = Callable[..., str]


@pytest.fixture
def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Complaint:
    """Return a function that runs a job as its script does, and returns its stderr."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("AGR_RAY_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent/config")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")
    # A job that came so far would otherwise go on and work.
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))

    def complain(job: str, *argv: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *map(str, argv)])
        with pytest.raises(SystemExit) as exit_:
            run(*JOBS[job])
        said = capsys.readouterr().err
        assert exit_.value.code == 2
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    return complain


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Return a folder with two labelled images."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for name, grey in (("a.jpg", 90), ("b.jpg", 160)):
        (folder / name).write_bytes(encode_jpeg(np.full((64, 64, 3), grey, np.uint8)))
    (folder / "labels.csv").write_text("key,age,gender,race\na.jpg,20,male,white\nb.jpg,30,female,asian\n")
    return folder


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Return a prepared set of three crops, in which no label has a race."""
    return prepared_set(tmp_path / "prepared")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved_checkpoint(tmp_path / "checkpoint")


def saved_checkpoint(folder: Path, *, template: str = TEMPLATE) -> Path:
    torch.manual_seed(0)
    model = MultiTaskNet(ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX), UTKFACE)
    save_checkpoint(folder, model, Transform(SIDE_PX, SIDE_PX, template=template))
    return folder


# Options and recipes


@pytest.mark.parametrize("job", JOBS)
def test_every_job_names_an_unknown_option(complaint: Complaint, job: str) -> None:
    assert "--cluster.nmu_cpus: there is no such option; did you mean --cluster.num_cpus?" in complaint(
        job, "--cluster.nmu_cpus", "3"
    )


@pytest.mark.parametrize("job", JOBS)
def test_every_job_names_a_missing_recipe(complaint: Complaint, job: str) -> None:
    assert "--config nowhere.toml: No such file" in complaint(job, "--config", "nowhere.toml")


@pytest.mark.parametrize("uri", ["ftp://host/faces", "s3:/bucket/faces", "s3:///faces", "file://host/faces"])
def test_an_unsupported_uri_is_named_in_the_error(complaint: Complaint, uri: str) -> None:
    assert uri in complaint("prepare", "--source.uri", uri, "--prepare.out", "out")


def test_an_unreachable_endpoint_is_named_in_the_error(complaint: Complaint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    endpoint = "http://127.0.0.1:9"

    said = complaint(
        "prepare",
        *("--source.kind", "utkface", "--source.uri", "s3://photographs/faces", "--prepare.out", "out"),
        *("--storage.endpoint_url", endpoint, "--storage.max_attempts", "1"),
    )

    assert "photographs" in said
    assert endpoint in said


def test_absent_keys_are_named(complaint: Complaint) -> None:
    said = complaint(
        "prepare",
        *("--source.kind", "utkface", "--source.uri", "s3://photographs/faces", "--prepare.out", "out"),
        *("--storage.endpoint_url", "http://127.0.0.1:9", "--storage.max_attempts", "1"),
    )

    assert "AWS_ACCESS_KEY_ID" in said


# prepare


def test_preparing_a_missing_folder(complaint: Complaint, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"

    said = complaint("prepare", "--source.kind", "utkface", "--source.uri", missing, "--prepare.out", "out")

    assert f"folder {missing} can't be listed" in said
    assert not (tmp_path / "out").exists()


def test_preparing_a_folder_without_labels(complaint: Complaint, faces: Path) -> None:
    (faces / "labels.csv").unlink()

    said = complaint("prepare", "--source.uri", faces, "--prepare.out", "out")

    assert f"source.labels: there is no labels.parquet, labels.csv or labels.tsv in {faces}; add one" in said


def test_preparing_with_a_missing_table_of_labels(complaint: Complaint, faces: Path) -> None:
    argv = ("--source.uri", faces, "--source.labels", faces / "gone.csv", "--prepare.out", "out")

    assert f"source.labels: there is no label table at {faces}/gone.csv" in complaint("prepare", *argv)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("name,age\na.jpg,3\n", "'key', the path of the image, is missing"),
        ("", "can't be read as CSV"),
        ("key,age\n,3\n", "row 1"),
        ("key,age\n/etc/a.jpg,3\n", "no key of labels.csv matches an image"),
    ],
)
def test_preparing_with_an_unusable_table(complaint: Complaint, faces: Path, labels: str, said: str) -> None:
    (faces / "labels.csv").write_text(labels)

    assert said in complaint("prepare", "--source.uri", faces, "--prepare.out", "out")


def test_preparing_with_a_table_that_is_not_parquet(complaint: Complaint, faces: Path) -> None:
    (faces / "labels.csv").unlink()
    (faces / "labels.parquet").write_bytes(b"no parquet")

    assert f"{faces}/labels.parquet" in complaint("prepare", "--source.uri", faces, "--prepare.out", "out")


def test_preparing_a_folder_with_two_label_tables(complaint: Complaint, faces: Path) -> None:
    (faces / "labels.parquet").write_bytes(b"no parquet")

    said = complaint("prepare", "--source.uri", faces, "--prepare.out", "out")

    assert f"there are several label tables, {faces}/labels.parquet and {faces}/labels.csv; name the one to use" in said


def test_preparing_with_unknown_codes(complaint: Complaint, faces: Path) -> None:
    argv = ("--source.uri", faces, "--prepare.out", "out", "--source.gender_codes", '{"0": "man"}')

    assert "'man': expected one of female, male" in complaint("prepare", *argv)


def test_preparing_a_folder_without_images(complaint: Complaint, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    said = complaint("prepare", "--source.kind", "utkface", "--source.uri", "empty", "--prepare.out", "out")

    assert "source.uri empty: there is no image below it" in said


def test_preparing_into_a_foreign_folder(complaint: Complaint, faces: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")

    said = complaint("prepare", "--source.uri", faces, "--prepare.out", "out")

    assert f"prepare.out {tmp_path}/out: exists and is not a prepared set" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_preparing_into_a_file(complaint: Complaint, faces: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")

    assert f"{tmp_path}/out" in complaint("prepare", "--source.uri", faces, "--prepare.out", "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_preparing_over_a_damaged_record(complaint: Complaint, faces: Path, prepared: Path) -> None:
    (prepared / "prepare.json").write_text('{"format_version": 1')

    assert f"prepare.out {prepared}: " in complaint("prepare", "--source.uri", faces, "--prepare.out", prepared)


# train


def test_training_without_data(complaint: Complaint, tmp_path: Path) -> None:
    said = complaint("train", "--train.data", "nowhere")

    assert f"train.data {tmp_path}/nowhere: not a prepared set: nothing is there" in said
    assert not (tmp_path / "runs").exists()


def test_training_on_an_unfinished_set(complaint: Complaint, tmp_path: Path) -> None:
    unfinished = prepared_set(tmp_path / "half", finished=False)

    assert f"train.data {unfinished}: preparation has not finished" in complaint("train", "--train.data", unfinished)


@pytest.mark.parametrize("record", ["no json", "{}", "[]", '{"format_version": 99, "finished": true}'])
def test_training_on_a_set_of_another_format(complaint: Complaint, prepared: Path, record: str) -> None:
    (prepared / "prepare.json").write_text(record)

    assert f"train.data {prepared}: " in complaint("train", "--train.data", prepared)


def test_training_a_task_that_no_row_has(complaint: Complaint, prepared: Path) -> None:
    said = complaint("train", "--train.data", prepared)

    assert "has a label of race; train without: --model.tasks age,gender" in said


TASKS = ("--model.tasks", '["age", "gender"]', "--model.backbone", "mobilenet_v3_small")


def test_a_plateau_without_validation(complaint: Complaint, prepared: Path) -> None:
    said = complaint("train", "--train.data", prepared, *TASKS, "--train.schedule", "plateau")

    assert f"train.schedule plateau needs validation, and {prepared} has no crop in its val split" in said


def test_balancing_crops_that_do_not_fit_into_memory(complaint: Complaint, prepared: Path) -> None:
    said = complaint("train", "--train.data", prepared, *TASKS, "--train.balance", "age", "--train.cache_mib", "0")

    assert "train.balance age draws from crops in memory, and train.cache_mib 0 holds 0 of the 2 of each worker" in said


@pytest.mark.parametrize("weights", ["gone.safetensors", "gone.pt", "gone"])
def test_training_from_weights_that_are_missing(
    complaint: Complaint, prepared: Path, tmp_path: Path, weights: str
) -> None:
    said = complaint("train", "--train.data", prepared, *TASKS, "--model.pretrained", tmp_path / weights)

    assert "model.pretrained" in said
    assert weights in said


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.txt"])
def test_training_from_a_file_without_weights(complaint: Complaint, prepared: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no weights at all")

    said = complaint("train", "--train.data", prepared, *TASKS, "--model.pretrained", tmp_path / name)

    assert "model.pretrained" in said


def test_training_from_another_networks_weights(complaint: Complaint, prepared: Path, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pt")

    said = complaint("train", "--train.data", prepared, *TASKS, "--model.pretrained", tmp_path / "other.pt")

    assert "model.pretrained" in said
    assert "other.pt" in said


def test_training_on_images_that_are_also_in_test(complaint: Complaint, tmp_path: Path) -> None:
    copied = prepared_set(tmp_path / "copied", copied=True)

    said = complaint("train", "--train.data", copied, *TASKS)

    assert "1 images of test are also, byte for byte, in train, such as a.jpg in train, b.jpg in test;" in said
    assert not (tmp_path / "runs").exists()


def test_training_on_sets_of_different_crops(complaint: Complaint, prepared: Path, tmp_path: Path) -> None:
    other = prepared_set(tmp_path / "other", keys=("d.jpg", "e.jpg", "f.jpg"), side_px=48)

    said = complaint("train", "--train.data", json.dumps([str(prepared), str(other)]), *TASKS)

    assert f"the crops of {prepared} have crop_side_px 32, those of {other} 48" in said


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is installed")
def test_mlflow_settings_without_mlflow_installed(complaint: Complaint, prepared: Path, tmp_path: Path) -> None:
    said = complaint("train", "--train.data", prepared, *TASKS, "--train.mlflow_uri", "http://tracking:5000")

    assert "train.mlflow_uri http://tracking:5000: needs the package mlflow" in said
    assert "pip install 'mlflow>=3'" in said
    assert not (tmp_path / "runs").exists()


# evaluate


def test_evaluating_no_checkpoint(complaint: Complaint, prepared: Path, tmp_path: Path) -> None:
    said = complaint("evaluate", "--evaluate.checkpoint", tmp_path / "gone", "--evaluate.data", prepared)

    assert f"evaluate.checkpoint {tmp_path}/gone: there is no checkpoint" in said


def test_evaluating_without_data(complaint: Complaint, checkpoint: Path, tmp_path: Path) -> None:
    said = complaint("evaluate", "--evaluate.checkpoint", checkpoint, "--evaluate.data", tmp_path / "gone")

    assert f"evaluate.data {tmp_path}/gone: not a prepared set" in said


def test_evaluating_an_empty_split(complaint: Complaint, checkpoint: Path, prepared: Path) -> None:
    argv = ("--evaluate.checkpoint", checkpoint, "--evaluate.data", prepared, "--evaluate.split", "val")

    assert "evaluate.split val: no crop in it" in complaint("evaluate", *argv)


def test_evaluating_crops_of_another_side(complaint: Complaint, checkpoint: Path, tmp_path: Path) -> None:
    other = prepared_set(tmp_path / "other", side_px=48)

    said = complaint("evaluate", "--evaluate.checkpoint", checkpoint, "--evaluate.data", other)

    assert f"its crops have crop_side_px 48; the checkpoint {checkpoint} needs {SIDE_PX}" in said


def test_evaluating_crops_of_another_template(complaint: Complaint, checkpoint: Path, tmp_path: Path) -> None:
    other = prepared_set(tmp_path / "other", template="five_point_v0")

    said = complaint("evaluate", "--evaluate.checkpoint", checkpoint, "--evaluate.data", other)

    assert "its crops have template five_point_v0" in said


# score


@pytest.mark.parametrize("job", ["evaluate", "score"])
@pytest.mark.parametrize("damage", ["meta", "labels", "no weights", "cut weights", "template"])
def test_a_damaged_checkpoint_is_named_in_the_error(
    complaint: Complaint, checkpoint: Path, prepared: Path, faces: Path, job: str, damage: str
) -> None:
    weights = checkpoint / "weights.safetensors"
    if damage == "meta":
        (checkpoint / "meta.json").write_text("{")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:10_000])
    else:
        meta = json.loads((checkpoint / "meta.json").read_text())
        if damage == "labels":
            meta["label_space"]["genders"] = ["male", "female"]
        else:
            meta["transform"]["template"] = "five_point_v0"
        (checkpoint / "meta.json").write_text(json.dumps(meta))
    others = {
        "evaluate": ("--evaluate.data", prepared),
        "score": ("--score.input", faces, "--score.out", "out"),
    }

    said = complaint(job, f"--{job}.checkpoint", checkpoint, *others[job])

    assert f"{job}.checkpoint {checkpoint}: " in said


def test_scoring_a_missing_folder(complaint: Complaint, checkpoint: Path, tmp_path: Path) -> None:
    said = complaint("score", "--score.checkpoint", checkpoint, "--score.input", "nowhere", "--score.out", "out")

    assert f"score.input {tmp_path}/nowhere: there is no such folder" in said


# render


def test_rendering_over_other_faces(complaint: Complaint, tmp_path: Path) -> None:
    (tmp_path / "render.json").write_text('{"num_chips":1,"num_photographs":0,"seed":7}')

    assert f"render.out {tmp_path}: holds faces drawn with other settings" in complaint(
        "render", "--render.out", tmp_path
    )
