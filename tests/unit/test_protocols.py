"""Protocols of cross-validation: who is tested, on whom its network was trained, and what is refused."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pictures import encoded, picture
from prepared_sets import prepared_set
from pydantic import ValidationError

from agr_ray.config import AugmentConfig, CrossValidateConfig, CrossValidateJob, ModelConfig, TrainConfig
from agr_ray.data.fold_sets import read_images, write_fold_set
from agr_ray.data.prepared import open_prepared
from agr_ray.data.protocols.fold import Partition, ProtocolError, fold_splits
from agr_ray.data.protocols.registry import partitions
from agr_ray.data.splits import SplitLeakError
from agr_ray.evaluation.folds import fold_sums, fold_values, summarise
from agr_ray.labels import UTKFACE, Labels
from agr_ray.schema import FINGERPRINT_FIELDS, FOLD_METRICS, FOLD_SUMMARY, MANIFEST
from agr_ray.storage import Storage
from agr_ray.vision.perceptual_hash import perceptual_hash
from agr_ray.vision.thumbnail import thumbnail

SCHEMA = pa.schema([*MANIFEST, *FINGERPRINT_FIELDS])
PROTOCOLS = ("random_folds", "published_folds", "leave_one_person_out", "balanced_halves")


def image(number: int, person: int, **changes: Any) -> dict[str, Any]:
    key = f"{number:04d}.jpg"
    return {
        "image_id": key,
        "uri": f"/faces/{key}",
        "key": key,
        "source": "made",
        "content_hash": hashlib.sha256(key.encode()).hexdigest(),
        "group_id": f"subject:{person:03d}",
        "split": "train",
        "fold": person % 4,
        "age": float(10 + number * 7 % 60),
        "gender": "female" if person % 4 == 0 else "male",
        "race": "white" if person // 4 % 2 else "black",
        "status": "fallback" if number % 5 == 0 else "ok",
    } | changes


def made(num_people: int = 40, photographs: int = 3) -> list[dict[str, Any]]:
    return [image(person * photographs + n, person) for person in range(num_people) for n in range(photographs)]


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, SCHEMA)


def divided(rows: list[dict[str, Any]], protocol: str, **settings: Any) -> list[Partition]:
    return partitions(table(rows), CrossValidateConfig(protocol=protocol, **settings))  # type: ignore[arg-type]


def people(rows: list[dict[str, Any]], chosen: np.ndarray) -> set[str]:
    return {row["group_id"] for row, is_chosen in zip(rows, chosen, strict=True) if is_chosen}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_person_trains_the_network_that_it_tests(protocol: str) -> None:
    rows = made()
    parts = divided(rows, protocol)

    assert len({part.name for part in parts}) == len(parts) >= 2
    for part in parts:
        assert people(rows, part.train) & people(rows, part.test) == set()
        assert part.train.any()
        assert part.test.any()


@pytest.mark.parametrize("protocol", PROTOCOLS[:3])
def test_each_image_is_tested_once(protocol: str) -> None:
    tested = sum(part.test.astype(int) for part in divided(made(), protocol))
    assert np.asarray(tested).tolist() == [1] * 120


def test_random_folds_are_of_equal_size_and_stratified() -> None:
    rows = made(num_people=200, photographs=1)
    parts = divided(rows, "random_folds", folds=5)

    assert [part.name for part in parts] == [f"fold-{number}" for number in range(5)]
    assert [int(part.test.sum()) for part in parts] == [40] * 5
    for part in parts:
        genders = Counter(row["gender"] for row, tested in zip(rows, part.test, strict=True) if tested)
        assert 6 <= genders["female"] <= 14
    assert not np.array_equal(parts[0].test, divided(rows, "random_folds", folds=5, seed=1)[0].test)


def test_published_folds_keep_their_numbers_and_leave_out_images_without_one() -> None:
    rows = [*made(num_people=8), image(900, 90, fold=None)]

    parts = divided(rows, "published_folds")

    assert [part.name for part in parts] == ["fold-0", "fold-1", "fold-2", "fold-3"]
    for number, part in enumerate(parts):
        folds = [row["fold"] for row, tested in zip(rows, part.test, strict=True) if tested]
        assert folds == [number] * 6
        assert not part.train[-1]


def test_each_person_is_left_out_once() -> None:
    rows = made(num_people=5)
    parts = divided(rows, "leave_one_person_out")

    assert [sorted(people(rows, part.test)) for part in parts] == [[f"subject:{n:03d}"] for n in range(5)]
    assert [int(part.train.sum()) for part in parts] == [12] * 5


def test_halves_have_as_many_white_as_black_faces_and_three_times_as_many_males() -> None:
    rows = made(num_people=120, photographs=2)
    rows += [image(300 + n, 200 + n // 5, race="black", gender="male") for n in range(100)]
    rows += [image(400 + n, 300 + n, race="asian", gender="female") for n in range(10)]
    parts = divided(rows, "balanced_halves")

    assert [part.name for part in parts] == ["S1", "S2"]
    for part in parts:
        pairs = [(row["race"], row["gender"]) for row, chosen in zip(rows, part.train, strict=True) if chosen]
        counts = Counter(pairs)
        females, males = counts["white", "female"], counts["white", "male"]
        assert counts["black", "female"] == females
        assert counts["black", "male"] == pytest.approx(males, abs=4)
        assert len(counts) == 4
        assert males == pytest.approx(3 * females, abs=4)
        assert females >= 10
        assert np.array_equal(part.test, ~part.train)
    assert not (parts[0].train & parts[1].train).any()


@pytest.mark.parametrize(
    ("protocol", "rows", "message"),
    [
        ("random_folds", made(num_people=4), "5 folds need as many people, and the set has 4"),
        ("published_folds", [image(1, 1), image(2, 5)], "the set has 1 published folds and needs two"),
        (
            "leave_one_person_out",
            [*made(3), image(999, 0, group_id="sha256:ab")],
            "1 images have no subject, such as",
        ),
        ("leave_one_person_out", made(2), "the set has 2 people; allowed: 3 to 200"),
        ("leave_one_person_out", made(201, 1), "the set has 201 people; allowed: 3 to 200"),
        ("balanced_halves", [image(n, n, race="asian") for n in range(9)], "white female 0, white male 0, black"),
    ],
)
def test_a_set_that_cannot_be_divided_is_an_error(protocol: str, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        divided(rows, protocol)


def splits_of(rows: list[dict[str, Any]], part: Partition, *, exclude: bool = False) -> tuple[list[str | None], int]:
    splits, num_left_out = fold_splits(table(rows), part, 0.2, 0, exclude=exclude)
    return splits.to_pylist(), num_left_out


def test_validation_is_drawn_from_training_by_person() -> None:
    rows = made()
    part = divided(rows, "random_folds")[0]

    splits, num_left_out = splits_of(rows, part)

    assert num_left_out == 0
    assert [split == "test" for split in splits] == part.test.tolist()
    counts = Counter(splits)
    assert counts["val"] == pytest.approx(0.2 * part.train.sum(), abs=3)
    by_split = {
        name: {row["group_id"] for row, split in zip(rows, splits, strict=True) if split == name} for name in counts
    }
    assert not by_split["train"] & by_split["val"]
    assert len(by_split["val"]) > 3


def test_a_person_in_two_published_folds_is_an_error_or_left_out_of_training() -> None:
    rows = made(num_people=8)
    rows[0]["fold"] = 1  # of person 0, whose other images are in fold 0
    part = divided(rows, "published_folds")[1]

    with pytest.raises(SplitLeakError, match=r"0000.jpg in test and 0001.jpg in train show the subject '000'"):
        splits_of(rows, part)

    splits, num_left_out = splits_of(rows, part, exclude=True)
    assert (splits[:3], num_left_out) == (["test", None, None], 2)


def test_near_duplicates_of_test_images_are_left_out_of_training_if_excluded() -> None:
    rows = made(num_people=8, photographs=1)
    for n, row in enumerate(rows):
        grey = picture(n) if n != 7 else encoded(picture(0)[2:-1, 1:-2], 60)
        row |= {"perceptual_hash": int(perceptual_hash(grey)), "thumbnail": thumbnail(grey).tobytes()}
    part = divided(rows, "published_folds")[0]  # tests 0 and 4

    kept, none = splits_of(rows, part)
    splits, num_left_out = splits_of(rows, part, exclude=True)

    assert kept[7] in ("train", "val")
    assert none == 0
    assert (splits[7], num_left_out) == (None, 1)
    assert splits[:7] == kept[:7]


def test_the_summary_of_folds_is_that_of_a_hand_computed_case() -> None:
    def sums(errors: list[float], right: int) -> Any:
        age = np.full(len(errors), 40.0, np.float32)
        gender = np.zeros(len(errors), np.int64)
        p_male = np.where(np.arange(len(errors)) < right, 0.1, 0.9)
        labels = Labels(UTKFACE, age, gender, np.full(len(errors), -1))
        return fold_sums(labels, {"age": age + np.array(errors), "gender": p_male})

    folds = [sums([1, -3], right=1), sums([6, 6, 6], right=3), sums([0], right=1)]

    assert fold_values(folds[0])["age_mae_years"] == 2.0
    assert fold_values(folds[0])["race_accuracy"] is None
    rows = {row["metric"]: row for row in summarise(folds)}
    mae = rows["age_mae_years"]
    assert (mae["num_folds"], mae["mean"]) == (3, pytest.approx(8 / 3))
    assert mae["std"] == pytest.approx(np.sqrt(((2 - 8 / 3) ** 2 + (6 - 8 / 3) ** 2 + (8 / 3) ** 2) / 2))
    assert mae["standard_error"] == pytest.approx(mae["std"] / np.sqrt(3))
    assert mae["pooled"] == pytest.approx(22 / 6)
    assert rows["gender_accuracy"]["pooled"] == pytest.approx(5 / 6)
    assert rows["age_exact_group"]["mean"] == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert [*rows] == [metric for metric in rows if metric in FOLD_METRICS]
    assert "race_accuracy" not in rows
    assert summarise(folds[:1])[0]["std"] is None
    pa.Table.from_pylist([*rows.values()], FOLD_SUMMARY).validate()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train": TrainConfig(image_sizes=(32, 64))},
            r"train\.image_sizes \[32, 64\] must end with model\.image_size",
        ),
        ({"train": TrainConfig(batch_size=1)}, r"train\.batch_size 1 is too small"),
        (
            {"model": ModelConfig(head_pose=True), "augment": AugmentConfig(mixup_alpha=0.2)},
            r"model\.head_pose: images mixed by",
        ),
    ],
)
def test_settings_that_no_fold_could_be_trained_with_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CrossValidateJob(**settings)


def test_near_duplicates_of_test_images_are_kept_or_excluded_and_never_only_counted() -> None:
    assert CrossValidateConfig().near_duplicates == "keep"
    with pytest.raises(ValidationError, match=r"near_duplicates\n.*'keep' or 'exclude'"):
        CrossValidateConfig(near_duplicates="count")  # type: ignore[arg-type]


def test_a_preset_sets_the_network_of_all_folds() -> None:
    job = CrossValidateJob(model={"preset": "lightweight"})  # type: ignore[arg-type]
    assert job.training.model == job.model
    assert job.training.model.preset == "lightweight"
    assert job.training.train == job.train


def test_a_fold_is_a_prepared_set_of_its_own(tmp_path: Path) -> None:
    storage = Storage()
    whole = open_prepared(
        storage, str(prepared_set(tmp_path / "whole", keys=("c.jpg", "a.jpg", "b.jpg"))), "train.data"
    )
    images = read_images(storage, whole)
    assert images["image_id"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg"]
    split_of = images.select(["image_id"]).append_column("split", pa.array(["val", None, "test"], pa.string()))

    for _ in range(2):  # as after a kill
        fold = write_fold_set(storage, whole, split_of, str(tmp_path / "fold"))

    assert open_prepared(storage, fold.uri, "train.data") == fold
    assert (fold.splits, fold.counts) == ({"train": 0, "val": 1, "test": 1}, {"ok": 2})
    assert fold.digest != whole.digest
    rows = storage.read_table(fold.crops(storage)).to_pylist()
    kept = storage.read_table(whole.crops(storage)).to_pylist()
    assert rows == [
        row | {"split": {"c.jpg": "test", "a.jpg": "val"}[row["key"]]} for row in kept if row["key"] != "b.jpg"
    ]
