"""Preparing: every input becomes one row, and finished work is never repeated."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bad_images
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sets import SIDE_PX, chip_label, iou, write_chips, write_labels

from agr_ray.config import PrepareConfig, PrepareJob, SourceConfig, SplitConfig, VisionConfig
from agr_ray.data.prepared import PreparedSet
from agr_ray.data.rendered import RenderedChip
from agr_ray.errors import ConfigError
from agr_ray.predict.crop_maker import CropMaker
from agr_ray.runtime.prepare import prepare
from agr_ray.schema import CROPS
from agr_ray.storage.parts import KILLED_ITS_WORKER
from agr_ray.vision.align import stored_side_px
from agr_ray.vision.decode import decode_crop

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_CHIPS = 40
LABEL = {"age": 30, "gender": "male", "race": "white"}
FILES = {
    **bad_images.REJECTED,
    "corrupt.png": (bad_images.corrupt_png, "unreadable"),
    "truncated.webp": (lambda: bad_images.truncated("WEBP"), "unreadable"),
    "truncated.bmp": (lambda: bad_images.truncated("BMP"), "unreadable"),
    "truncated.gif": (lambda: bad_images.truncated("GIF"), "unreadable"),
    "truncated.tif": (lambda: bad_images.truncated("TIFF"), "unreadable"),
    "animated.gif": (bad_images.animated_gif, "fallback"),
    "cmyk.jpg": (bad_images.cmyk_jpeg, "fallback"),
    "grey16.png": (bad_images.png_16_bit_grey, "fallback"),
    "rgb16.png": (bad_images.png_16_bit_rgb, "fallback"),
    "palette.png": (bad_images.palette_png, "fallback"),
    "rgba.png": (bad_images.rgba_png, "fallback"),
    "grey-alpha.png": (bad_images.grey_alpha_png, "fallback"),
    "grey.jpg": (bad_images.grey_jpeg, "fallback"),
    "turned.jpg": (lambda: bad_images.oriented_jpeg(6), "fallback"),
    "large.JPG": (bad_images.large_jpeg, "fallback"),
    "ein Bild (1) #2 100%.jpeg": (lambda: bad_images.jpeg(90, 90), "fallback"),
    "sub/写真.png": (lambda: bad_images.encoded(bad_images.Image.new("RGB", (50, 70), "teal"), "PNG"), "fallback"),
}
DROPPED_LABELS = {
    "too-old.jpg": ({"age": 130}, "age 130 is outside"),
    "no-number.jpg": ({"age": "old"}, "is not a number"),
    "no-gender.jpg": ({"gender": "x"}, "gender 'x' is not understood"),
    "no-race.jpg": ({"race": "7"}, "race '7' is not understood"),
}
BAD_LABELS = {
    "no-label.jpg": ({"age": "old", "gender": "x", "race": "7"}, "age 'old' is not a number"),
}


def prepare_job(source: Path, out: Path, **changes: Any) -> PrepareJob:
    return PrepareJob(
        source=SourceConfig(uri=str(source), name=changes.pop("name", "")),
        split=SplitConfig(val=0.2, test=0.2, seed=changes.pop("seed", 0)),
        vision=VisionConfig(detector=changes.pop("detector", "mtcnn"), min_face_px=changes.pop("min_face_px", 40)),
        prepare=PrepareConfig(
            **{"out": str(out), "num_workers": 2, "batch_size": 8, "rows_per_file": 16, "crop_side_px": SIDE_PX}
            | changes
        ),
    )


def crop_rows(out: str | Path) -> dict[str, dict[str, Any]]:
    """Return the crop rows by key."""
    rows = pq.read_table(Path(out) / "crops").to_pylist()
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def parts(out: str | Path) -> dict[str, int]:
    """Return the parts and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (Path(out) / "crops").iterdir()}


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RenderedChip]:
    return write_chips(tmp_path_factory.getbasetemp() / "faces", range(NUM_CHIPS))


@pytest.fixture(scope="module")
def source(chips: dict[str, RenderedChip], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of rendered chips, every bad file and every bad label."""
    folder = tmp_path_factory.getbasetemp() / "faces"
    labels = [chip_label(key, chip) for key, chip in chips.items()]
    (folder / "sub").mkdir()
    for key, (make, _) in FILES.items():
        (folder / key).write_bytes(make())
        labels.append({"key": key, **LABEL})
    for key, (wrong, _) in BAD_LABELS.items():
        shutil.copy(folder / "chip-000.jpg", folder / key)
        labels.append({"key": key, **LABEL, **wrong})
    shutil.copy(folder / "chip-000.jpg", folder / "unlabelled.jpg")
    # The same pictures under other names: as they are, and under a label that contradicts.
    for index in range(1, 6):
        shutil.copy(folder / f"chip-00{index}.jpg", folder / f"twin-{index}.jpg")
        labels.append(chip_label(f"twin-{index}.jpg", chips[f"chip-00{index}.jpg"]))
    shutil.copy(folder / "chip-006.jpg", folder / "liar.jpg")
    labels.append(chip_label("liar.jpg", chips["chip-006.jpg"], age=chips["chip-006.jpg"].age_years + 1))
    for key, wrong in [*((key, wrong) for key, (wrong, _) in DROPPED_LABELS.items()), ("range.jpg", {"age": "70+"})]:
        # Each has a content of its own: what follows the image is not decoded.
        (folder / key).write_bytes((folder / "chip-008.jpg").read_bytes() + key.encode())
        labels.append({"key": key, **LABEL, **wrong})
    labels.append({"key": "gone.jpg", **LABEL})
    labels.append({"key": "unknown.jpg"})
    shutil.copy(folder / "chip-007.jpg", folder / "unknown.jpg")
    write_labels(folder, labels)
    (folder / "notes.txt").write_text("no image, and no row")
    return folder


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return prepare(prepare_job(source, tmp_path_factory.mktemp("prepared") / "out"))


@pytest.fixture(scope="module")
def rows(prepared: PreparedSet) -> dict[str, dict[str, Any]]:
    return crop_rows(prepared.uri)


def test_every_input_is_one_row(prepared: PreparedSet, rows: dict[str, dict[str, Any]], source: Path) -> None:
    files = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and path.name not in ("labels.csv", "notes.txt")
    }

    assert set(rows) == files | {"gone.jpg"}
    assert len({row["image_id"] for row in rows.values()}) == len(rows)
    assert sum(prepared.counts.values()) == len(rows)
    assert pq.read_schema(next((Path(prepared.uri) / "crops").iterdir())).equals(CROPS)


@pytest.mark.parametrize("key", FILES)
def test_each_file_gets_the_right_status(rows: dict[str, dict[str, Any]], key: str) -> None:
    row, status = rows[key], FILES[key][1]

    assert row["status"] == status
    assert bool(row["error"]) == (status != "fallback")


@pytest.mark.parametrize("key", BAD_LABELS)
def test_a_bad_label_is_a_reject_with_its_reason(rows: dict[str, dict[str, Any]], key: str) -> None:
    assert rows[key]["status"] == "bad_label"
    assert BAD_LABELS[key][1] in rows[key]["error"]


@pytest.mark.parametrize("key", DROPPED_LABELS)
def test_only_an_unreadable_label_is_dropped(rows: dict[str, dict[str, Any]], key: str) -> None:
    wrong, error = DROPPED_LABELS[key]
    row = rows[key]

    assert row["status"] == "ok"
    assert error in row["error"]
    assert {name: row[name] for name in LABEL} == LABEL | dict.fromkeys(wrong)


def test_an_age_range_is_kept_without_an_age(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["range.jpg"]

    assert [row[name] for name in ("status", "error", "age", "age_low", "age_high", "gender")] == [
        *("ok", None, None, 70.0, 116.0, "male"),
    ]


def test_unlabelled_and_absent_images_are_rejected(rows: dict[str, dict[str, Any]]) -> None:
    assert (rows["unlabelled.jpg"]["status"], rows["gone.jpg"]["status"]) == ("bad_label", "missing")
    assert "no label row" in rows["unlabelled.jpg"]["error"]
    assert "does not exist" in rows["gone.jpg"]["error"]


def test_blank_labels_are_missing_and_not_errors(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["unknown.jpg"]

    assert row["status"] == "ok"
    assert (row["age"], row["gender"], row["race"]) == (None, None, None)


def test_the_faces_of_chips_are_found_in_the_right_place(
    rows: dict[str, dict[str, Any]], chips: dict[str, RenderedChip]
) -> None:
    found = [key for key in chips if rows[key]["status"] == "ok"]

    assert len(found) >= 0.9 * NUM_CHIPS
    for key in found:
        row, chip = rows[key], chips[key]
        assert iou(row["box"], chip.box_xyxy) >= 0.5
        assert np.abs(np.reshape(row["landmarks"], (5, 2)) - chip.landmarks).max() < 20
        assert (row["gender"], row["race"], row["error"]) == (chip.gender, chip.race, None)
        assert row["age"] == pytest.approx(chip.age_years)


def test_only_rows_that_are_ok_or_fallback_carry_a_crop(rows: dict[str, dict[str, Any]]) -> None:
    side = stored_side_px(SIDE_PX)

    for row in rows.values():
        assert (row["crop"] is not None) == (row["status"] in ("ok", "fallback"))
        if row["crop"] is not None:
            assert decode_crop(row["crop"]).shape == (side, side, 3)


def test_no_group_lies_in_two_splits(rows: dict[str, dict[str, Any]]) -> None:
    groups: dict[str, set[str | None]] = {"train": set(), "val": set(), "test": set()}
    for row in rows.values():
        if row["split"] is not None:
            groups[row["split"]].add(row["group_id"])

    assert all(groups.values())
    assert groups["train"].isdisjoint(groups["val"] | groups["test"])
    assert groups["val"].isdisjoint(groups["test"])
    for index in range(1, 6):
        assert rows[f"twin-{index}.jpg"]["group_id"] == rows[f"chip-00{index}.jpg"]["group_id"]
    assert (rows["liar.jpg"]["split"], rows["chip-006.jpg"]["split"]) == ("train", "train")


def test_the_split_manifest_matches_the_crops(prepared: PreparedSet, rows: dict[str, dict[str, Any]]) -> None:
    text = (Path(prepared.uri) / "splits.tsv").read_bytes()

    assert hashlib.sha256(text).hexdigest() == prepared.split_manifest_sha256
    listed = {(key, split) for _, key, split in (line.split("\t") for line in text.decode().splitlines())}
    assert listed == {(key, row["split"]) for key, row in rows.items() if row["split"] is not None}
    assert prepared.splits == {
        name: sum(row["split"] == name for row in rows.values()) for name in ("train", "val", "test")
    }


def test_preparing_again_changes_nothing(
    prepared: PreparedSet, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = parts(prepared.uri)

    again = prepare(prepare_job(source, Path(prepared.uri)))

    assert again == prepared
    assert parts(prepared.uri) == before
    assert ", 0 to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_face_px": 20}, "vision.min_face_px = 40, not 20"),
        ({"detector": "haar"}, "vision.detector = 'mtcnn', not 'haar'"),
        ({"seed": 1}, "split.seed = 0, not 1"),
        ({"crop_side_px": 48}, "crop_side_px = 32, not 48"),
        ({"jpeg_quality": 80}, "jpeg_quality = 95, not 80"),
        ({"name": "other"}, "source.name = '', not 'other'"),
    ],
    ids=str,
)
def test_other_settings_are_rejected_by_name(
    prepared: PreparedSet, source: Path, changes: dict[str, Any], said: str
) -> None:
    before = parts(prepared.uri)

    with pytest.raises(ConfigError) as error:
        prepare(prepare_job(source, Path(prepared.uri), **changes))

    assert said in str(error.value)
    assert parts(prepared.uri) == before


def test_a_lost_part_is_rebuilt_and_new_images_are_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces, out = tmp_path / "faces", tmp_path / "out"
    chips = write_chips(faces, range(20))
    write_labels(faces, [chip_label(key, chip) for key, chip in chips.items()])
    job = prepare_job(faces, out, detector="none", num_workers=1)
    first = prepare(job)
    before, old_parts = crop_rows(out), parts(out)

    lost = sorted(old_parts)[0]
    num_lost = pq.read_table(out / "crops" / lost).num_rows
    (out / "crops" / lost).unlink()
    capsys.readouterr()
    second = prepare(job)

    assert f"{20 - num_lost} done before, {num_lost} to do" in capsys.readouterr().out
    assert second == first
    assert crop_rows(out) == before
    # What is made again may be cut into other parts.
    assert {name: when for name, when in old_parts.items() if name != lost}.items() <= parts(out).items()

    # A failed row is retried, for example one whose storage was down.
    part = out / "crops" / sorted(parts(out))[0]
    rows = pq.read_table(part).to_pylist()
    rows[0] |= {"status": "failed", "error": "503", "crop": None}
    pq.write_table(pa.Table.from_pylist(rows, schema=CROPS), part)
    prepare(job)

    assert "19 done before, 1 to do" in capsys.readouterr().out
    assert crop_rows(out) == before

    more = write_chips(faces, range(20, 26))
    write_labels(faces, [chip_label(key, chip) for key, chip in (chips | more).items()])
    old_parts = parts(out)
    capsys.readouterr()
    third = prepare(job)

    after = crop_rows(out)
    assert "20 done before, 6 to do" in capsys.readouterr().out
    assert set(after) == set(chips) | set(more)
    assert {key: after[key] for key in chips} == before
    assert all(after[key]["split"] for key in more)
    assert old_parts.items() <= parts(out).items()
    assert sum(third.splits.values()) == 26
    assert third.split_manifest_sha256 != first.split_manifest_sha256

    write_labels(faces, [chip_label(key, chip, age=chip.age_years + 1) for key, chip in (chips | more).items()])
    fourth = prepare(job)
    assert "the source has changed: 26 rows get new labels" in capsys.readouterr().out
    relabelled = crop_rows(out)
    assert [row["age"] for row in relabelled.values()] == pytest.approx([row["age"] + 1 for row in after.values()])
    assert [row["crop"] for row in relabelled.values()] == [row["crop"] for row in after.values()]
    assert fourth.split_manifest_sha256 == third.split_manifest_sha256
    assert fourth.labels_sha256 != third.labels_sha256


def test_the_manifest_contains_the_rejects_too(prepared: PreparedSet, rows: dict[str, dict[str, Any]]) -> None:
    manifest = pq.read_table(Path(prepared.uri) / "manifest.parquet")

    assert sorted(manifest["key"].to_pylist()) == sorted(rows)
    assert manifest.filter(pc.equal(manifest["status"], "bad_label")).num_rows == len(BAD_LABELS) + 1


def test_an_image_that_kills_its_worker_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Here, so that it is pickled with its code: workers can't import this file.
    class Deadly(CropMaker):
        """Dies of one image, as a decoder that crashes does."""

        def crops(self, bodies: Any) -> Iterator[dict[str, Any]]:
            if killer in bodies:
                os._exit(1)
            return super().crops(bodies)

    chips = write_chips(tmp_path / "faces", range(6))
    write_labels(tmp_path / "faces", [chip_label(key, chip) for key, chip in chips.items()])
    killer = (tmp_path / "faces" / "chip-003.jpg").read_bytes()
    monkeypatch.setattr("agr_ray.runtime.prepare.CropMaker", Deadly)

    prepared = prepare(prepare_job(tmp_path / "faces", tmp_path / "out", detector="none", num_workers=1))

    assert prepared.counts == {"failed": 1, "fallback": 5}
    assert crop_rows(tmp_path / "out")["chip-003.jpg"]["error"] == KILLED_ITS_WORKER
