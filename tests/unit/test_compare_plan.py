"""What `agr-ray compare` checks before it starts anything."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prepared_sets import SIDE_PX, prepared_set
from pydantic import ValidationError

from agr_ray.config import AugmentConfig, CompareConfig, CompareJob, TrainConfig
from agr_ray.config.presets import PRESETS
from agr_ray.data.prepared import open_prepared
from agr_ray.errors import ConfigError
from agr_ray.models.backbones.inception_resnet import InceptionResNet
from agr_ray.report.comparison_page import RECORD
from agr_ray.runtime.compare import plan_runs, store_settings
from agr_ray.storage import Storage


def planned(
    data: Path, train: dict[str, Any] | None = None, augment: AugmentConfig | None = None, **compare: Any
) -> tuple[list[str], dict[str, str]]:
    """Return the names of the runs, and why presets are left out."""
    job = CompareJob(
        augment=augment or AugmentConfig(),
        compare=CompareConfig(out=str(data.parent / "out"), **compare),
        train=TrainConfig(data=str(data), **(train or {})),
    )
    storage = Storage()
    runs, skipped = plan_runs(job, storage, job.compare.out, open_prepared(storage, str(data), "train.data"))
    return list(runs), skipped


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
    store("cbam", "vgg16_transfer")
    record = json.loads((out / RECORD).read_bytes())
    assert list(record["presets"]) == ["paper", "cbam", "vgg16_transfer"]
    record["presets"]["cbam"]["model"]["dropout"] = 0.125
    (out / RECORD).write_text(json.dumps(record))

    store("paper")
    with pytest.raises(ConfigError, match=r"holds a comparison with presets\.cbam\.model\.dropout 0\.125, not "):
        store("paper", "cbam")


def test_all_presets_with_the_first_seed_come_first(tmp_path: Path) -> None:
    data = prepared_set(tmp_path / "set", detector="mtcnn", race="white")

    names, skipped = planned(data, seeds=2, image_size=100)

    presets = [name for name in PRESETS if name != "domain_adapt"]
    assert names == [f"{name}-0" for name in presets] + [f"{name}-1" for name in presets]
    assert skipped == {}


def test_presets_that_cannot_be_trained_are_left_out_of_the_default_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ConfigError("the backbone inception_resnet_v1 needs a package")

    monkeypatch.setattr(InceptionResNet, "check_available", staticmethod(missing))
    data = prepared_set(tmp_path / "set", detector="haar")  # no race labels

    names, skipped = planned(data)

    assert list(skipped) == ["single_task_race", "head_pose", "facenet_bias", "faceage"]
    assert skipped["single_task_race"] == "it predicts race, and the training images are labelled with age, gender"
    assert "finds no landmarks" in skipped["head_pose"]
    assert [name for name in names if name.rpartition("-")[0] in skipped] == []
    assert len(names) == len(PRESETS) - 1 - len(skipped)


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
        ({}, {"presets": ("paper", "domain_adapt")}, "domain_adapt needs several prepared sets"),
    ],
)
def test_settings_that_cannot_be_compared_are_rejected(
    tmp_path: Path, train: dict[str, Any], compare: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        planned(prepared_set(tmp_path / "set", side_px=SIDE_PX), train, **compare)
