"""Training on several prepared sets: which rows are read and drawn, and what is recorded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from prepared_sets import SIDE_PX, prepared_set

from agr_ray.config import ModelConfig, TrainConfig, TrainJob, digest
from agr_ray.data.crops import Slice, deal_parts, read_slices, take_turns, training_arrays, usable_statuses
from agr_ray.data.prepared import TERMS, PreparedSet, describe_sets, open_prepared
from agr_ray.errors import ConfigError
from agr_ray.labels import UTKFACE
from agr_ray.learn.run import Run
from agr_ray.models.card import model_card
from agr_ray.models.checkpoint_network import content_codes
from agr_ray.models.transform import Transform
from agr_ray.registry import HEADS, Registry
from agr_ray.runtime.train import settings_digest, train
from agr_ray.schema import CROPS
from agr_ray.storage import Storage

STORAGE = Storage()
STATUSES = usable_statuses(use_fallback=True)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """Return a set without races."""
    return prepared_set(tmp_path / "one")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Return one of other images, all of whom are white."""
    return prepared_set(tmp_path / "two", keys=("d.jpg", "e.jpg", "f.jpg"), race="white")


def opened(*folders: Path) -> list[PreparedSet]:
    return [open_prepared(STORAGE, str(folder), "train.data") for folder in folders]


def job(*folders: Path, **changes: Any) -> TrainJob:
    settings = {"data": [str(folder) for folder in folders], "out": str(folders[0].parent / "runs"), "batch_size": 4}
    return TrainJob(
        model=ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX),
        train=TrainConfig.model_validate(settings | changes),
        dry_run=True,
    )


def planned(monkeypatch: pytest.MonkeyPatch, *folders: Path, **changes: Any) -> Run:
    """Return the workers' task."""
    told: list[Run] = []
    monkeypatch.setattr("agr_ray.runtime.train.dry_run", lambda run, *_: told.append(run))
    train(job(*folders, **changes))
    return told[0]


# Reading


def test_the_parts_of_one_set_are_read_one_by_one() -> None:
    assert deal_parts([["a", "b"]]) == [[Slice("a", 0, 1)], [Slice("b", 0, 1)]]


def test_every_group_has_rows_of_every_set_and_every_row_is_read_once() -> None:
    num_rows = {"a": 10, "b": 7, "c": 3, "d": 9, "e": 8, "x": 11, "y": 5, "z": 20}
    groups = deal_parts([["a", "b", "c", "d", "e"], ["x", "y"], ["z"]])

    assert [[each.uri for each in group] for group in groups] == [
        ["a", "x", "z"],
        ["b", "x", "z"],
        ["c", "x", "z"],
        ["d", "y", "z"],
        ["e", "y", "z"],
    ]
    read = [(uri, row) for group in groups for uri, first, step in group for row in range(first, num_rows[uri], step)]
    assert sorted(read) == [(uri, row) for uri, num in num_rows.items() for row in range(num)]


def test_rows_of_several_tables_are_interleaved_in_order() -> None:
    order = take_turns([4, 2, 0])

    assert order.tolist() == [0, 4, 1, 2, 5, 3]
    assert take_turns([3]).tolist() == [0, 1, 2]
    every_tenth = take_turns([900, 100]) >= 900
    assert all(part.sum() == 10 for part in np.split(every_tenth, 10))


def test_rows_record_their_set_and_missing_labels(one: Path, two: Path) -> None:
    slices = [Slice(str(folder / "crops" / "part-0.parquet"), 0, 1) for folder in (one, two)]

    arrays = training_arrays(read_slices(STORAGE, slices, "train", STATUSES), SIDE_PX, UTKFACE)

    assert arrays["image_id"].tolist() == ["a.jpg", "d.jpg", "c.jpg", "f.jpg"]
    assert arrays["set_index"].tolist() == [0, 1, 0, 1]
    assert arrays["set_index"].dtype == np.int64
    assert arrays["race"].tolist() == [-1, 0, -1, 0]


def test_a_slice_contains_rows_of_its_split(one: Path) -> None:
    part = str(one / "crops" / "part-0.parquet")

    found = [read_slices(STORAGE, [Slice(part, first, 2)], "train", STATUSES) for first in (0, 1, 2)]

    assert [table["image_id"].to_pylist() for table in found] == [["a.jpg"], ["c.jpg"], []]


# Plans


def test_the_record_of_a_single_set_has_no_fields_for_several_sets(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned(monkeypatch, two)

    assert run.sampler is None
    assert set(run.data) == {
        *("uri", "source", "licence", "detector", "template", "split_manifest_sha256", "splits", "num_train_rows"),
        "num_val_rows",
        *("num_train_fallback", "train_labels", "baseline"),
    }
    assert (run.data["uri"], run.data["split_manifest_sha256"]) == (str(two), "0" * 64)


def with_validation(folder: Path) -> Path:
    """Turn the test split into validation, and add images to it and to training of which there is no crop."""
    part = folder / "crops" / "part-0.parquet"
    rows = pq.read_table(part).to_pylist()
    for row in rows:
        row["split"] = "val" if row["split"] == "test" else row["split"]
    rows[0]["status"] = "fallback"
    lost = [(split, status) for split in ("train", "val") for status in ("unreadable", "failed", "too_large")]
    for split, status in lost:
        key = f"{split}-{status}.jpg"
        rows.append(rows[1] | {"image_id": key, "key": key, "split": split, "status": status, "crop": None})
    pq.write_table(pa.Table.from_pylist(rows, schema=CROPS), part)
    record = json.loads((folder / "prepare.json").read_text()) | {
        "splits": {"train": 5, "val": 4, "test": 0},
        "counts": {"ok": 2, "fallback": 1, "unreadable": 2, "failed": 2, "too_large": 2},
    }
    (folder / "prepare.json").write_text(json.dumps(record))
    return folder


def test_images_without_a_crop_are_no_rows_of_training_or_validation(
    one: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = (with_validation(one), with_validation(two))

    alone, both = planned(monkeypatch, folders[1]), planned(monkeypatch, *folders)
    without = planned(monkeypatch, *folders, use_fallback=False, batch_size=2)

    assert (alone.num_train_rows, alone.num_val_rows) == (2, 1)
    assert (both.num_train_rows, both.num_val_rows) == (4, 2)
    assert (without.num_train_rows, without.num_val_rows) == (2, 2)
    for run in (alone, both, without):
        assert (run.data["num_train_rows"], run.data["num_val_rows"]) == (run.num_train_rows, run.num_val_rows)
        assert sum(run.data["train_labels"]["gender"].values()) == run.num_train_rows
    assert [each["num_val_rows"] for each in both.data["sets"]] == [1, 1]
    card = model_card(
        {"model": {"tasks": ["age"], "backbone": "resnet18", "age_head": "linear", "pretrained": "none"}}
        | {
            "transform": Transform(SIDE_PX, SIDE_PX).to_json(),
            "label_space": UTKFACE.to_json(),
            "data": dict(both.data),
        }
    )
    assert "| trained on | 4 |" in card
    assert "| validated on | 2 |" in card


def test_a_val_split_without_crops_means_no_validation(two: Path) -> None:
    part = with_validation(two) / "crops" / "part-0.parquet"
    table = pq.read_table(part)
    rows = [row | {"status": "failed" if row["split"] == "val" else row["status"]} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=CROPS), part)

    with pytest.raises(ConfigError, match=r"train\.schedule plateau needs validation, and .* has no crop in its val"):
        train(job(two, schedule="plateau"))


def test_training_uses_the_images_and_labels_of_all_sets(one: Path, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned(monkeypatch, one, two, data_shares=[3, 1], balance="gender")

    assert run.num_train_rows == 4
    assert run.data["train_labels"]["race"]["white"] == 2
    hashes = [
        row["content_hash"]
        for folder in (one, two)
        for row in pq.read_table(folder / "crops").to_pylist()
        if row["split"] == "train"
    ]
    assert torch.equal(run.train_images, content_codes(hashes))
    assert run.sampler is not None
    assert run.sampler.table.sum(axis=(1, 2, 3)).tolist() == pytest.approx([3.0, 1.0])  # two cells of weight 1 a set
    assert [said["share"] for said in run.data["sets"]] == [0.75, 0.25]


def test_a_dry_run_prints_the_contribution_of_each_set(
    one: Path, two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(job(one, two, data_shares=[3, 1], epochs=1, threads_per_worker=1))

    said = capsys.readouterr().out
    assert f"data: {one} + {two}: 4 training crops, 0 validation crops" in said
    assert f"of them {one}: 2 training crops, 75.0 % of those drawn; 0 validation crops" in said
    assert f"of them {two}: 2 training crops, 25.0 % of those drawn" in said
    assert "images per step each; including reading" in said
    assert "training labels, race: white 2, black 0" in said
    assert "dry run: nothing was written" in said


def test_a_label_that_no_set_has_is_rejected(one: Path, tmp_path: Path) -> None:
    other = prepared_set(tmp_path / "other", keys=("d.jpg", "e.jpg", "f.jpg"))

    with pytest.raises(ConfigError, match=r"model.tasks: no training row of .*one \+ .*other has a label of race"):
        train(job(one, other))


def test_an_added_task_without_a_label_is_rejected(one: Path, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS, "smile", Registry("smile head", {"square": "toy_parts:Smile"}))
    smiling = job(one, two).model_copy(update={"model": ModelConfig(image_size=SIDE_PX, tasks=("age", "smile"))})

    with pytest.raises(ConfigError, match=r"model.tasks: no training row of .*one \+ .*two has a label of smile"):
        train(smiling)


def test_a_domain_head_needs_several_sets(one: Path, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX, tasks=("age", "domain"))

    train(job(one, two, epochs=1, threads_per_worker=1).model_copy(update={"model": model}))
    assert "heads age, domain" in capsys.readouterr().out

    with pytest.raises(ConfigError, match=r"model\.tasks domain: needs two prepared sets or more"):
        train(job(one).model_copy(update={"model": model}))


def test_head_pose_needs_a_detector_that_finds_landmarks(one: Path, two: Path) -> None:
    model = ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX, head_pose=True)

    with pytest.raises(ConfigError, match=r"model\.head_pose: .*one \+ .*two was prepared with vision\.detector none,"):
        train(job(one, two).model_copy(update={"model": model}))


@pytest.mark.parametrize("detector", ["mtcnn", "mtcnn_int8"])
def test_head_pose_is_trained_with_landmarks_of_either_cascade(tmp_path: Path, detector: str) -> None:
    model = ModelConfig(backbone="mobilenet_v3_small", image_size=SIDE_PX, head_pose=True)

    train(job(prepared_set(tmp_path / "set", detector=detector, race="white")).model_copy(update={"model": model}))


def test_a_set_without_training_rows_is_rejected(one: Path, two: Path) -> None:
    crops = two / "crops" / "part-0.parquet"
    rows = [row | {"split": "test"} for row in pq.read_table(crops).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=CROPS), crops)

    with pytest.raises(ConfigError, match=rf"train.data {two}: no crop in its train split"):
        train(job(one, two))


def test_an_image_of_another_sets_test_split_is_rejected(one: Path, tmp_path: Path) -> None:
    other = prepared_set(tmp_path / "other", keys=("d.jpg", "c.jpg", "f.jpg"), race="white")

    with pytest.raises(ConfigError, match=rf"train.data {other}: 1 images of test .* in train of {one}, such as c"):
        train(job(one, other))


def test_the_same_set_twice_is_rejected(one: Path) -> None:
    with pytest.raises(ConfigError, match="are the same set; name it once"):
        train(job(one, Path(f"{one}/")))


def test_drawing_by_shares_needs_the_crops_in_memory(one: Path, two: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"train.data_shares \[3.0, 1.0\] draws from crops in memory, and train.cache"
    ):
        train(job(one, two, data_shares=[3, 1], cache_mib=0))


# Records


def test_a_folder_without_a_name_is_called_by_the_folder_of_its_set(tmp_path: Path) -> None:
    (prepared,) = opened(prepared_set(tmp_path / "mine"))
    settings = prepared.settings | {"source": {"kind": "folder", "name": ""}}

    assert prepared.model_copy(update={"settings": settings}).source == "mine"
    named = prepared.settings | {"source": {"kind": "utkface", "name": ""}}
    assert prepared.model_copy(update={"settings": named}).source == "utkface"


def test_the_record_of_several_sets_has_joint_and_separate_entries(one: Path, two: Path) -> None:
    sets = opened(one, two)
    sets[1] = sets[1].model_copy(update={"split_manifest_sha256": "1" * 64})

    said, swapped = describe_sets(sets, [30, 10], [3, 1]), describe_sets(sets[::-1], [10, 30], [1, 3])

    assert (said["uri"], said["source"], said["detector"]) == (f"{one} + {two}", "one + two", "none")
    assert said["splits"] == {"train": 4, "val": 0, "test": 2}
    assert said["num_train_rows"] == 40
    expected = hashlib.sha256(("0" * 64 + "\n" + "1" * 64 + "\n").encode()).hexdigest()
    assert said["split_manifest_sha256"] == swapped["split_manifest_sha256"] == expected
    assert [(each["uri"], each["num_train_rows"], each["share"]) for each in said["sets"]] == [
        (str(one), 30, 0.75),
        (str(two), 10, 0.25),
    ]
    assert said["sets"][1]["split_manifest_sha256"] == "1" * 64
    assert said["licence"] == ""
    kinds = ("utkface", "folder", "utkface", "fairface")
    settings = [sets[0].settings | {"source": sets[0].settings["source"] | {"kind": kind}} for kind in kinds]
    known = [sets[0].model_copy(update={"settings": each}) for each in settings]
    assert describe_sets(known, [1] * 4, [1] * 4)["licence"] == f"{TERMS['utkface']}; {TERMS['fairface']}"
    assert json.loads(json.dumps(said)) == said


def test_the_digest_of_a_run_on_one_set_has_no_settings_of_several(one: Path, two: Path) -> None:
    first, both = opened(one), opened(one, two)
    alone = job(one).train.model_dump(mode="json") | {"data": first[0].digest}
    moot = ("out", "name", "max_failures", "cache_mib", "threads_per_worker", "cpus_per_worker", "mlflow_uri")
    plain = TrainConfig(**alone | {name: TrainConfig.model_fields[name].default for name in moot})
    settings = job(one)

    assert settings_digest(settings, first) == digest(
        settings.labels, settings.model, settings.loss, settings.augment, plain, settings.predict
    )
    digests = {
        settings_digest(job(one), first),
        settings_digest(job(one, two), both),
        settings_digest(job(one, two, data_shares=[1, 1]), both),
        settings_digest(job(one, two, data_shares=[1, 2]), both),
    }
    assert len(digests) == 4


def test_races_of_a_set_are_mapped_as_it_is_read(two: Path) -> None:
    slices = [Slice(str(two / "crops" / "part-0.parquet"), 0, 1)]
    mapping = {"white": "others"}

    rows = read_slices(STORAGE, slices, "train", STATUSES, [mapping])

    assert rows["race"].to_pylist() == [
        mapping.get(race) for race in read_slices(STORAGE, slices, "train", STATUSES)["race"].to_pylist()
    ]
    assert "others" in rows["race"].to_pylist()
