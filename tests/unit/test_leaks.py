"""Planted leaks: the same bytes under two names, the same subject, and a re-encoded, slightly cropped copy."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from cropping_here import CroppingHere
from pictures import picture

from agr_ray.config import PrepareConfig, PrepareJob, SourceConfig, SplitConfig, VisionConfig
from agr_ray.console import make_console
from agr_ray.data.preparation import prepare_set
from agr_ray.data.standing import FINGERPRINT
from agr_ray.errors import ConfigError
from agr_ray.vision.decode import encode_jpeg
from agr_ray.vision.perceptual_hash import hash_distance, perceptual_hash
from agr_ray.vision.thumbnail import thumbnail

NUM_IMAGES = 12


class Planted:
    """A folder of different pictures, whose labels assign splits: the first half to train, the rest to test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.splits = {f"{n:02d}.jpg": "train" if n < NUM_IMAGES / 2 else "test" for n in range(NUM_IMAGES)}
        self.subjects = {key: key for key in self.splits}
        for n, key in enumerate(self.splits):
            (folder / key).write_bytes(encode_jpeg(cv2.cvtColor(picture(n), cv2.COLOR_GRAY2RGB)))

    def job(self, out: str = "out", near_duplicates: str = "count", **split: float) -> PrepareJob:
        lines = [f"{key},30,male,{self.subjects[key]},{name}" for key, name in self.splits.items()]
        (self.folder / "labels.csv").write_text("\n".join(["key,age,gender,subject,split", *lines]))
        return PrepareJob(
            source=SourceConfig(uri=str(self.folder)),
            split=SplitConfig(near_duplicates=near_duplicates, **split),  # type: ignore[arg-type]
            vision=VisionConfig(detector="none"),
            prepare=PrepareConfig(out=str(self.folder.parent / out), crop_side_px=64, rows_per_file=5),
        )

    def prepare(self, out: str = "out", near_duplicates: str = "count", **split: float) -> tuple[dict[str, str], str]:
        """Return the split of each image and the console's text."""
        shown = io.StringIO()
        job = self.job(out, near_duplicates, **split)
        prepare_set(job, CroppingHere(job), make_console(shown))
        rows = pq.read_table(self.folder.parent / out / "crops", columns=["key", "split"]).to_pylist()
        return {row["key"]: row["split"] for row in rows}, " ".join(shown.getvalue().split())

    def plant_copy(self, key: str, of: str) -> None:
        """Replace an image by a re-encoded, slightly cropped copy of another one, of 60 % of its size."""
        rgb = cv2.imread(str(self.folder / of))
        copy = cv2.resize(rgb[2:-1, 1:-2], (120, 120), interpolation=cv2.INTER_AREA)
        (self.folder / key).write_bytes(encode_jpeg(np.asarray(copy, np.uint8), 60))


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    (tmp_path / "in").mkdir()
    return Planted(tmp_path / "in")


def test_the_same_bytes_in_two_splits_are_an_error_that_names_both_files(planted: Planted) -> None:
    planted.subjects = dict.fromkeys(planted.splits, "")
    (planted.folder / "02.jpg").write_bytes((planted.folder / "09.jpg").read_bytes())

    with pytest.raises(ConfigError, match=r"02.jpg in train and 09.jpg in test are the same image, byte for byte$"):
        planted.prepare()


def test_a_subject_in_two_splits_is_an_error_that_names_both_files(planted: Planted) -> None:
    planted.subjects["10.jpg"] = planted.subjects["03.jpg"]

    with pytest.raises(ConfigError, match=r"03.jpg in train and 10.jpg in test show the subject '03.jpg', or are copi"):
        planted.prepare(near_duplicates="exclude")


def test_a_re_encoded_slightly_cropped_copy_is_counted_and_listed(planted: Planted) -> None:
    planted.plant_copy("04.jpg", of="08.jpg")

    splits, shown = planted.prepare()

    assert splits == planted.splits
    assert (
        "1 training images are near-copies of held-out images, such as 04.jpg (train) and 08.jpg (test); they are kept"
        in shown
    )
    (row,) = pq.read_table(planted.folder.parent / "out" / "near_duplicates.parquet").to_pylist()
    assert (row["key"], row["split"], row["near_key"], row["near_split"]) == ("04.jpg", "train", "08.jpg", "test")
    assert row["distance_bits"] <= 8
    assert 0.97 <= row["likeness"] <= 1.001


def test_excluded_copies_get_no_split_and_test_stays_as_it_is(planted: Planted) -> None:
    planted.plant_copy("04.jpg", of="08.jpg")
    (planted.folder / "02.jpg").write_bytes((planted.folder / "09.jpg").read_bytes())
    planted.subjects = dict.fromkeys(planted.splits, "")

    splits, shown = planted.prepare(near_duplicates="exclude")

    assert splits == planted.splits | {"04.jpg": None, "02.jpg": None}
    assert "they are left out; near_duplicates.parquet lists all" in shown
    again, shown = planted.prepare(near_duplicates="exclude")
    assert again == splits
    assert "12 done before, 0 to do" in shown


def test_a_code_without_meaning_is_reported_before_the_set_must_be_deleted(planted: Planted) -> None:
    planted.prepare()
    job = planted.job()
    wrong, other = (job.source.model_copy(update={"gender_codes": {"0": word}}) for word in ("man", "male"))

    with pytest.raises(ConfigError, match=r"^source: gender code '0' means 'man': expected one of female, male$"):
        prepare_set(job.model_copy(update={"source": wrong}), CroppingHere(job), make_console(io.StringIO()))
    with pytest.raises(ConfigError, match="choose another folder, or delete this one"):
        prepare_set(job.model_copy(update={"source": other}), CroppingHere(job), make_console(io.StringIO()))


def test_the_summary_names_contradicting_subjects_counts_crops_and_names_the_recipe(planted: Planted) -> None:
    planted.subjects["01.jpg"] = planted.subjects["00.jpg"]
    (planted.folder / "11.jpg").write_bytes(b"no image")
    job = planted.job()
    labels = planted.folder / "labels.csv"
    labels.write_text(labels.read_text().replace("01.jpg,30,male", "01.jpg,30,female"))
    job._recipe = "demo"
    shown = io.StringIO()

    prepare_set(job, CroppingHere(job), make_console(shown))

    lines = shown.getvalue()
    assert "warning: subjects whose images differ in gender or race: 1, such as '00.jpg' in 00.jpg and 01.jpg" in lines
    assert "crops by split: train 6, val 0, test 5; split" in lines
    assert "\nimages with a split but no crop: 1; nothing uses them\n" in lines
    assert "next, train on it: agr-ray train --config demo --data " in lines


def test_the_fingerprint_is_of_the_face_without_its_margin(planted: Planted) -> None:
    planted.prepare()

    rows = pq.read_table(planted.folder.parent / "out" / "crops", columns=["key", *FINGERPRINT]).to_pylist()
    for row in rows:
        grey = picture(int(row["key"][:2]))
        assert int(hash_distance(np.uint64(row["perceptual_hash"]), perceptual_hash(grey))) <= 2
        stored = np.frombuffer(row["thumbnail"], np.uint8).reshape(16, 16).astype(int)
        assert np.abs(stored - thumbnail(grey)).max() <= 6


def test_a_set_without_near_duplicates_reports_none(planted: Planted) -> None:
    assert "near-duplicates" not in planted.prepare()[1]


@pytest.mark.parametrize("sample", [None, 7])
def test_splits_stay_the_same_when_copies_are_excluded_from_a_random_split(
    planted: Planted, sample: int | None
) -> None:
    for n in range(6):
        planted.plant_copy(f"{n:02d}.jpg", of=f"{n + 6:02d}.jpg")
    planted.splits = dict.fromkeys(planted.splits, "")
    settings = {"val": 0.3, "test": 0.3} | ({} if sample is None else {"sample": sample})

    counted, _ = planted.prepare("counted", **settings)
    listed = planted.folder.parent / "out" / "near_duplicates.parquet"
    first, _ = planted.prepare(near_duplicates="exclude", **settings)
    found = pq.read_table(listed)
    second, _ = planted.prepare(near_duplicates="exclude", **settings)

    assert second == first
    assert pq.read_table(listed).equals(found)
    assert {key: split for key, split in first.items() if split} == {
        key: split for key, split in counted.items() if first[key] is not None
    }
    removed = [key for key, split in first.items() if split is None and counted[key] is not None]
    assert removed
    rank = {"train": 0, "val": 1, "test": 2}
    for key in removed:
        twin = f"{(int(key[:2]) + 6) % 12:02d}.jpg"
        assert rank[counted[twin]] > rank[counted[key]]
