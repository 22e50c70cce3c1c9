"""Scoring in one worker: images that kill it, storage outages, flags, attributes, pseudonyms."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from sets import checkpoint, chip_jpeg
from this_process import PROVENANCE, scoring_of

from agr_ray.config import GatesConfig, ScoreConfig, VisionConfig
from agr_ray.data.rendered import render_chip
from agr_ray.labels import GENDERS, UTKFACE
from agr_ray.predict import attributes
from agr_ray.predict.face_finder import FaceFinder
from agr_ray.schema import IMAGES
from agr_ray.scoring import scorer
from agr_ray.scoring.planning import plan
from agr_ray.scoring.publish import pseudonymised
from agr_ray.scoring.scorer import (
    Found,
    PartScorer,
    RowPredictor,
    Scoring,
    flags,
)
from agr_ray.storage import ServerFailed, Storage, StorageFailed, retry
from agr_ray.storage.parts import MAX_DEATHS, Parts
from agr_ray.vision.decode import encode_jpeg


class Killed(BaseException):
    """Like SIGKILL for a worker process: none of its code runs any more."""


@pytest.fixture
def scoring(tmp_path: Path) -> Scoring:
    """Plan a run over six grey images, in one part."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(6):
        image = np.full((64, 64, 3), 40 * number, np.uint8)
        (photographs / f"{number}.jpg").write_bytes(encode_jpeg(image))
    storage, model = Storage(), checkpoint(tmp_path / "model")
    plan(storage, ScoreConfig(input=str(photographs)), Parts(storage, str(tmp_path / "work")).manifest)
    return scoring_of(model, tmp_path / "work", attributes=("age", "gender"), outage_s=60.0)


def test_a_sideways_face_has_its_rotation_in_its_row_and_its_box_in_original_pixels(scoring: Scoring) -> None:
    photograph = np.full((300, 500, 3), 128, np.uint8)
    photograph[20:220, 20:220] = np.asarray(render_chip(0, 16).image_rgb)
    sideways = np.ascontiguousarray(np.rot90(photograph, -1))  # clockwise: the face is at the top right
    (Path(scoring.work).parent / "photographs" / "2.jpg").write_bytes(encode_jpeg(sideways))
    work = str(Path(scoring.work).parent / "second")
    photographs = ScoreConfig(input=str(Path(scoring.work).parent / "photographs"))
    plan(scoring.storage, photographs, Parts(scoring.storage, work).manifest)
    vision = VisionConfig(detector="haar", try_rotations=True)
    scoring = dataclasses.replace(scoring, work=work, vision=vision)

    list(PartScorer(scoring)({"part": np.array([0])}))

    rows = {Path(row["uri"]).stem: row for row in scoring.storage.read_table(scoring.parts.uri(0)).to_pylist()}
    assert {name: row["rotation_degrees"] for name, row in rows.items()} == dict.fromkeys("01345", 0) | {"2": 270}
    assert (rows["2"]["width_px"], rows["2"]["height_px"]) == (300, 500)
    (face,) = rows["2"]["faces"]
    x0, y0, x1, y1 = face["box"]
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((180, 120), abs=30)


def test_an_image_that_kills_its_worker_fails_and_the_rest_is_done(
    scoring: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = FaceFinder.find
    deaths: Counter[int] = Counter()

    def find_or_die(finder: FaceFinder, bodies: Any) -> Any:
        if killer in bodies:
            deaths[len(bodies)] += 1
            raise Killed
        return find(finder, bodies)

    killer = (Path(scoring.work).parent / "photographs" / "2.jpg").read_bytes()
    monkeypatch.setattr(FaceFinder, "find", find_or_die)
    num_attempts = 1
    while num_attempts < 10:
        try:
            list(PartScorer(scoring)({"part": np.array([0])}))  # a new process each time
            break
        except Killed:
            num_attempts += 1

    rows = scoring.storage.read_table(scoring.parts.uri(0)).to_pylist()
    assert [(Path(row["uri"]).stem, row["status"]) for row in rows] == [
        (name, "failed" if name == "2" else "no_face") for name in "012345"
    ]
    assert rows[2]["error"] == "killed its worker 3 times"
    assert deaths == {4: 1, 1: MAX_DEATHS}  # in its batch, then three times alone
    assert not any(path.is_file() for path in Path(scoring.work, "attempts").rglob("*"))


def test_requests_that_a_starting_server_rejects_are_retried_once_it_accepts_writes(
    scoring: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = Storage.read, Storage.write
    num_notes = 0
    asked: Counter[str] = Counter()

    def write_note(storage: Storage, uri: str, data: bytes) -> str:
        nonlocal num_notes
        num_notes += 1
        if num_notes in (2, 3):
            raise StorageFailed("InternalError")
        return write(storage, uri, data)

    def read_photograph(storage: Storage, uri: str, **kwargs: Any) -> bytes:
        name = Path(uri).stem
        if uri.endswith(".jpg"):
            asked[name] += 1
            if name == "3" or num_notes < 4:
                raise ServerFailed(f"{uri}: InternalError")
        return read(storage, uri, **kwargs)

    monkeypatch.setattr(retry, "_RETRY_S", 0.0)
    monkeypatch.setattr(Storage, "write", write_note)
    monkeypatch.setattr(Storage, "read", read_photograph)
    list(PartScorer(scoring)({"part": np.array([0])}))

    rows = scoring.storage.read_table(scoring.parts.uri(0)).to_pylist()
    assert [(Path(row["uri"]).stem, row["status"]) for row in rows] == [
        (name, "failed" if name == "3" else "no_face") for name in "012345"
    ]
    assert asked == dict.fromkeys("012345", 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"box": [0, 0, 60, 39]}, ["small"]),
        ({"sharpness": 4.0}, ["blurred"]),
        ({"yaw": -50.0}, ["turned"]),
        ({"pitch": 50.0}, ["turned"]),
        ({"yaw": None, "pitch": None}, []),
        ({"detector_score": 0.9, "sharpness": 1.0}, ["blurred", "unsure"]),
    ],
)
def test_faces_beyond_a_limit_are_flagged(changes: dict[str, Any], expected: list[str]) -> None:
    gates = GatesConfig(min_side_px=40, min_sharpness=5, max_turn_degrees=45, min_detector_score=0.95)
    face = {"box": [0, 0, 40, 40], "sharpness": 5.0, "yaw": 45.0, "pitch": -45.0, "detector_score": 0.95}

    assert flags(face | changes, gates) == expected
    assert flags(face | changes, GatesConfig()) == []


def test_only_requested_attributes_are_filled_in(scoring: Scoring) -> None:
    faces = [{"box": [float(x), 0.0, 9.0, 9.0], "flags": []} for x in range(3)]
    rows = [image_row("a", faces[:2]), image_row("b", []), image_row("c", faces[2:])]
    images = pa.Table.from_pylist(rows, schema=IMAGES)
    side_px = scoring.stored_side_px
    crops = np.random.default_rng(0).integers(0, 256, (3, side_px, side_px, 3), np.uint8)

    filled = RowPredictor(scoring).fill(Found(np.arange(3), images, crops))

    assert filled.schema.equals(IMAGES)
    made = [face for row in filled.to_pylist() for face in row["faces"]]
    assert [len(row["faces"]) for row in filled.to_pylist()] == [2, 0, 1]
    assert [face["box"][0] for face in made] == [0.0, 1.0, 2.0]
    assert all(face["age"] is not None and face["gender"] == GENDERS[int(face["p_male"] > 0.5)] for face in made)
    assert all(face["race"] is None and face["race_probs"] is None and face["abstain"] == [] for face in made)


def test_a_nan_prediction_has_no_gender_and_no_race(scoring: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = {
        "age": np.array([30.0, np.nan], np.float32),
        "gender": np.array([0.9, np.nan], np.float32),
        "race": np.array([[0.1, 0.6, 0.1, 0.1, 0.1], [np.nan] * 5], np.float32),
    }
    monkeypatch.setattr(attributes, "predict", lambda *_: predictions)
    scoring = dataclasses.replace(scoring, attributes=("age", "gender", "race"))
    side_px = scoring.stored_side_px
    faces = [{"box": [float(x), 0.0, 9.0, 9.0], "flags": []} for x in range(2)]
    images = pa.Table.from_pylist([image_row("a", faces)], schema=IMAGES)

    (row,) = (
        RowPredictor(scoring)
        .fill(Found(np.arange(1), images, np.zeros((2, side_px, side_px, 3), np.uint8)))
        .to_pylist()
    )

    assert [face["age"] for face in row["faces"]] == [30.0, None]
    assert [face["p_male"] for face in row["faces"]] == [pytest.approx(0.9), None]
    assert [name for name, probability in row["faces"][1]["race_probs"] if probability is None] == [*UTKFACE.races]
    assert [face["gender"] for face in row["faces"]] == ["male", None]
    assert [face["race"] for face in row["faces"]] == ["black", None]
    assert [face["abstain"] for face in row["faces"]] == [[], ["gender", "race"]]


class Deferred:
    """Predicts only when the result is requested, like a busy process."""

    def __init__(self, scoring: Scoring) -> None:
        self._predictor = RowPredictor(scoring)
        self.num_pending = 0
        self.sizes: list[tuple[int, int]] = []

    def submit(self, found: Found) -> Any:
        self.num_pending += 1
        self.sizes.append((len(found.crops), self.num_pending))

        def wait() -> pa.Table:
            self.num_pending -= 1
            return self._predictor.fill(found)

        return wait


def chips_for(scoring: Scoring, refused: str = "") -> Scoring:
    """Make a new plan over six rendered chips, most of which have a face."""
    photographs = Path(scoring.work).parent / "photographs"
    for number in range(6):
        (photographs / f"{number}.jpg").write_bytes(chip_jpeg(number))
    scoring = dataclasses.replace(scoring, work=f"{scoring.work}-chips{refused}")
    plan(scoring.storage, ScoreConfig(input=str(photographs)), scoring.parts.manifest)
    return scoring


def assert_equal_rows(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for left, right in zip(one, other, strict=True):
        for name in ("age", "p_male"):
            assert [face.pop(name) for face in left["faces"]] == pytest.approx(
                [face.pop(name) for face in right["faces"]]
            )
        assert left == right


@pytest.mark.parametrize("batch_size", [1, 2, 4, 6])
@pytest.mark.parametrize("make_predictor", [None, Deferred])
def test_a_retried_photograph_returns_to_its_place_with_its_faces(
    scoring: Scoring, monkeypatch: pytest.MonkeyPatch, make_predictor: Any, batch_size: int
) -> None:
    scoring = dataclasses.replace(chips_for(scoring), batch_size=batch_size)
    list(PartScorer(scoring)({"part": np.array([0])}))
    undisturbed = scoring.storage.read_table(scoring.parts.uri(0)).drop("scored_at").to_pylist()
    read = Storage.read
    refusals = 0

    def refuse_one_once(storage: Storage, uri: str, **kwargs: Any) -> bytes:
        nonlocal refusals
        if uri.endswith("/2.jpg") and not refusals:
            refusals += 1
            raise ServerFailed(f"{uri}: SlowDown")
        return read(storage, uri, **kwargs)

    monkeypatch.setattr(Storage, "read", refuse_one_once)
    scorer_ = PartScorer(scoring, make_predictor(scoring) if make_predictor else None)
    list(scorer_({"part": np.array([0])}))

    rows = scoring.storage.read_table(scoring.parts.uri(0)).drop("scored_at").to_pylist()
    manifest = scoring.parts.rows(0)["image_id"].to_pylist()
    assert refusals == 1
    assert [row["image_id"] for row in rows] == manifest
    assert sum(len(row["faces"]) for row in rows) >= 3
    assert_equal_rows(rows, undisturbed)


def test_few_crops_are_held_however_many_faces_a_part_has(scoring: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    scoring = chips_for(scoring)
    monkeypatch.setattr(scorer, "MAX_CROPS", 1)
    predictor = Deferred(scoring)

    list(PartScorer(scoring, predictor)({"part": np.array([0])}))

    rows = scoring.storage.read_table(scoring.parts.uri(0)).to_pylist()
    num_faces = [len(row["faces"]) for row in rows]
    assert sum(num_faces) > scorer.MAX_PENDING + 1
    assert sum(size for size, _ in predictor.sizes) == sum(num_faces)
    assert max(size for size, _ in predictor.sizes) == max(num_faces)
    assert max(pending for _, pending in predictor.sizes) == scorer.MAX_PENDING + 1


def test_faces_of_all_batches_are_predicted_together_unless_a_worker_died(scoring: Scoring) -> None:
    scoring = dataclasses.replace(chips_for(scoring), batch_size=2)
    together, alone = Deferred(scoring), Deferred(scoring)

    PartScorer(scoring, together).score(0)
    rows = scoring.storage.read_table(scoring.parts.uri(0)).to_pylist()
    scoring.parts.begin(0)  # an attempt that never ended
    PartScorer(scoring, alone).score(0)

    assert [size for size, _ in together.sizes] == [sum(len(row["faces"]) for row in rows)]
    assert [size for size, _ in alone.sizes] == [len(row["faces"]) for row in rows]  # each image while it is suspected
    again = scoring.storage.read_table(scoring.parts.uri(0)).drop(["scored_at"]).to_pylist()
    assert again == [{key: value for key, value in row.items() if key != "scored_at"} for row in rows]


def test_a_pseudonym_hides_every_name_of_an_image() -> None:
    rows = [image_row("a", []) | {"etag": "e", "size_bytes": 7, "status": "missing", "error": "s3://bucket/a is gone"}]
    images = pa.Table.from_pylist([*rows, image_row("b", [])], schema=IMAGES)

    started_at = datetime.datetime(2025, 12, 31, tzinfo=datetime.UTC)
    (one, other), (again, _), (elsewhere, _) = (
        pseudonymised(images, key, started_at).to_pylist() for key in (b"1" * 32, b"1" * 32, b"2" * 32)
    )

    assert "bucket" not in str(one)
    assert (one["etag"], one["size_bytes"], one["error"]) == (None, None, None)
    assert [one["scored_at"], other["scored_at"]] == [started_at, started_at]
    assert one == again
    assert len({one["uri"], other["uri"], elsewhere["uri"]}) == 3
    assert len({one["image_id"], other["image_id"], elsewhere["image_id"], "a", "b"}) == 5


def image_row(name: str, faces: list[dict[str, Any]]) -> dict[str, Any]:
    scored_at = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    row = {"image_id": name, "uri": f"s3://bucket/{name}", "status": "ok", "detector": "haar", "scored_at": scored_at}
    return row | PROVENANCE | {"faces": faces}


def test_phone_formats_are_scored_with_the_others(scoring: Scoring) -> None:
    folder = Path(scoring.work).parent / "photographs"
    heic = (Path(__file__).parent / "heic" / "plain.heic").read_bytes()
    (folder / "phone.HEIC").write_bytes(heic)
    (folder / "cut.heif").write_bytes(heic[:-500])
    work = str(folder.parent / "second")
    plan(scoring.storage, ScoreConfig(input=str(folder)), Parts(scoring.storage, work).manifest)
    scoring = dataclasses.replace(scoring, work=work)

    list(PartScorer(scoring)({"part": np.array([0])}))

    rows = {Path(row["uri"]).name: row for row in scoring.storage.read_table(scoring.parts.uri(0)).to_pylist()}
    statuses = {f"{number}.jpg": "no_face" for number in range(6)} | {"phone.HEIC": "no_face", "cut.heif": "unreadable"}
    assert {name: row["status"] for name, row in rows.items()} == statuses
    assert (rows["phone.HEIC"]["width_px"], rows["cut.heif"]["rotation_degrees"]) == (120, None)
