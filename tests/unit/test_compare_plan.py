"""What `agr-ray compare` checks before it starts anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from prepared_sets import SIDE_PX, prepared_set
from pydantic import ValidationError

from agr_ray.config import AugmentConfig, CompareConfig, CompareJob, LabelsConfig, TrainConfig, TrainJob
from agr_ray.config.presets import PRESETS
from agr_ray.data.prepared import open_prepared
from agr_ray.errors import ConfigError, JobError
from agr_ray.models.backbones.inception_resnet import InceptionResNet
from agr_ray.report.comparison import reference_preset
from agr_ray.report.comparison_page import RECORD
from agr_ray.runtime import compare
from agr_ray.runtime.compare import plan_runs, store_settings
from agr_ray.storage import Storage
from agr_ray.tuning.concurrency import Room


def planned(
    data: Path,
    train: dict[str, Any] | None = None,
    augment: AugmentConfig | None = None,
    labels: LabelsConfig | None = None,
    **compare: Any,
) -> tuple[dict[str, TrainJob], dict[str, str]]:
    """Return the runs by name, and why presets are left out."""
    job = CompareJob(
        labels=labels or LabelsConfig(),
        augment=augment or AugmentConfig(),
        compare=CompareConfig(out=str(data.parent / "out"), **compare),
        train=TrainConfig(data=str(data), **(train or {})),
    )
    storage = Storage()
    return plan_runs(job, storage, job.compare.out, open_prepared(storage, str(data), "train.data"))


def test_new_presets_join_a_comparison_but_one_with_a_changed_definition_is_rejected(tmp_path: Path) -> None:
    data = prepared_set(tmp_path / "set", race="white")
    storage, out = Storage(), tmp_path / "out"

    def store(*presets: str) -> None:
        job = CompareJob(
            compare=CompareConfig(out=str(out), presets=presets), train=TrainConfig(data=str(data), epochs=3)
        )
        prepared = open_prepared(storage, str(data), "train.data")
        store_settings(job, storage, str(out), prepared, plan_runs(job, storage, str(out), prepared)[0])

    store("paper")
    store("vgg16_transfer", "cbam")
    record = json.loads((out / RECORD).read_bytes())
    assert list(record["presets"]) == ["paper", "vgg16_transfer", "cbam"]  # in the user's order
    assert record["runs"] == ["vgg16_transfer-0", "cbam-0"]  # of the latest command
    record["presets"]["cbam"]["model"]["dropout"] = 0.125
    (out / RECORD).write_text(json.dumps(record))

    store("paper")
    assert json.loads((out / RECORD).read_bytes())["runs"] == ["paper-0"]
    with pytest.raises(ConfigError, match=r"holds a comparison with presets\.cbam\.model\.dropout 0\.125, not "):
        store("paper", "cbam")


def test_all_presets_with_the_first_seed_come_first(tmp_path: Path) -> None:
    data = prepared_set(tmp_path / "set", detector="mtcnn", race="white")

    runs, skipped = planned(data, seeds=2, image_size=100)

    presets = [name for name in PRESETS if name != "domain_adapt"]
    assert list(runs) == [f"{name}-0" for name in presets] + [f"{name}-1" for name in presets]
    assert skipped == {}


def test_presets_that_cannot_be_trained_are_left_out_of_the_default_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ConfigError("the backbone inception_resnet_v1 needs a package")

    monkeypatch.setattr(InceptionResNet, "check_available", staticmethod(missing))
    data = prepared_set(tmp_path / "set", detector="haar")  # no race labels

    runs, skipped = planned(data)

    assert list(skipped) == ["single_task_race", "head_pose", "facenet_bias", "faceage"]
    assert skipped["single_task_race"] == "it predicts race, and training has labels of age and gender"
    assert "finds no landmarks" in skipped["head_pose"]
    assert [name for name in runs if name.rpartition("-")[0] in skipped] == []
    assert len(runs) == len(PRESETS) - 1 - len(skipped)


def test_a_task_that_the_label_space_does_not_have_is_left_out_alone(tmp_path: Path) -> None:
    data = prepared_set(tmp_path / "set", detector="mtcnn", race="white")

    runs, skipped = planned(data, labels=LabelsConfig(space="adience"))

    assert skipped == {"single_task_race": "it predicts race, and training has labels of age and gender"}
    assert runs["paper-0"].model.tasks == ("age", "gender")


def test_differences_are_relative_to_paper_or_to_the_first_preset_that_the_user_names() -> None:
    assert reference_preset(["swin", "cbam", "paper"], ["paper", "cbam", "swin"]) == "paper"
    assert reference_preset(["swin", "cbam", "se"], ["se", "cbam", "swin"]) == "swin"
    assert reference_preset(["swin", "cbam", "se"], ["se", "cbam"]) == "cbam"
    assert reference_preset(["swin"], []) == "paper"


@pytest.mark.parametrize("is_synchronised", [False, True])
def test_runs_with_another_number_of_workers_are_not_compared(tmp_path: Path, is_synchronised: bool) -> None:
    data = prepared_set(tmp_path / "set", race="white")
    shared = {"sync_batch_norm": True, "use_gpu": True} if is_synchronised else {}

    def store(num_workers: int) -> None:
        job = CompareJob(
            compare=CompareConfig(out=str(tmp_path / "out"), presets=("paper",)),
            train=TrainConfig(data=str(data), num_workers=num_workers, **shared),
        )
        prepared = open_prepared(Storage(), str(data), "train.data")
        runs = plan_runs(job, Storage(), job.compare.out, prepared)[0]
        store_settings(job, Storage(), job.compare.out, prepared, runs)

    store(1)
    if is_synchronised:
        store(2)
    else:
        with pytest.raises(ConfigError, match=r"holds a comparison with train\.num_workers 1, not 2"):
            store(2)


def test_a_failure_is_told_until_its_run_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, told = prepared_set(tmp_path / "set", race="white"), []

    def command(*presets: str, **outcomes: str) -> None:
        """Run a command of which each run has an outcome; empty: it is complete."""

        def run_all(starts: dict[str, Any], *_: object) -> Iterator[tuple[str, str]]:
            for name in starts:
                problem = outcomes[name.rpartition("-")[0]]
                if not problem:
                    Storage().write(str(tmp_path / "out" / "evaluations" / name / "metrics.json"), b"{}")
                yield name, problem

        monkeypatch.setattr(compare, "run_all", run_all)
        config = CompareConfig(out=str(tmp_path / "out"), presets=presets)
        compare.compare(CompareJob(compare=config, train=TrainConfig(data=str(data))))

    monkeypatch.setattr(compare, "cluster", lambda _, **__: nullcontext())
    monkeypatch.setattr(compare, "room", lambda *_: Room(num_trials=1, threads_per_worker=1))
    monkeypatch.setattr(compare, "write_comparison", lambda *given: told.append(dict(given[3])))

    with pytest.raises(JobError, match="1 of 2 runs failed: vit-0: loss nan"):
        command("paper", "vit", paper="", vit="loss nan")
    command("se", se="")
    with pytest.raises(JobError, match="1 of 1 runs failed: vit-0: out of memory"):
        command("vit", vit="out of memory")
    command("vit", vit="")
    assert told == [{"vit-0": "loss nan"}, {"vit-0": "loss nan"}, {"vit-0": "out of memory"}, {}]


def test_presets_that_the_settings_do_not_fit_are_left_out_too(tmp_path: Path) -> None:
    data = prepared_set(tmp_path / "set", detector="mtcnn", race="white")

    _, skipped = planned(data, augment=AugmentConfig(mixup_alpha=0.2))

    assert list(skipped) == ["head_pose"]
    assert skipped["head_pose"].startswith("model.head_pose: images mixed by augment.mixup_alpha")


@pytest.mark.parametrize(
    ("preset", "message"),
    [("single_task_race", "it predicts race"), ("head_pose", "was prepared with vision.detector haar")],
)
def test_a_chosen_preset_that_cannot_be_trained_is_an_error(tmp_path: Path, preset: str, message: str) -> None:
    data = prepared_set(tmp_path / "set", detector="haar")

    with pytest.raises(ConfigError, match=re.escape(f"compare.presets {preset}: ") + ".*" + re.escape(message)):
        planned(data, presets=("paper", preset))


@pytest.mark.parametrize(
    ("train", "compare", "message"),
    [
        ({"batch_size": 1}, {}, "batch_size 1 is too small"),
        ({"data_shares": (1.0, 2.0)}, {}, "needs several sets"),
        ({"image_sizes": (32, 64)}, {}, "no progressive resizing"),
        ({"num_workers": (1, 2)}, {}, r"train\.num_workers \[1, 2\]: the runs of a comparison need a fixed number"),
        ({}, {"presets": ("paper", "domain_adapt")}, "domain_adapt needs several prepared sets"),
    ],
)
def test_settings_that_cannot_be_compared_are_rejected(
    tmp_path: Path, train: dict[str, Any], compare: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        planned(prepared_set(tmp_path / "set", side_px=SIDE_PX), train, **compare)
