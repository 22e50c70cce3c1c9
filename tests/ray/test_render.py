"""Rendered faces as files, with the table of their labels."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from agr_ray.config import RenderConfig, RenderJob
from agr_ray.data.rendered import render_chip
from agr_ray.errors import ConfigError
from agr_ray.runtime.render import render
from agr_ray.storage import Storage
from agr_ray.storage.lock import run_lock
from agr_ray.vision.decode import encode_jpeg

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_CHIPS = 23


def job(out: Path, *, seed: int = 5) -> RenderJob:
    return RenderJob(render=RenderConfig(out=str(out), num_chips=NUM_CHIPS, num_photographs=2, seed=seed))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(render(job(tmp_path_factory.mktemp("render") / "faces")))


def test_there_is_one_label_row_for_every_chip(faces: Path) -> None:
    labels = pq.read_table(faces / "chips" / "labels.parquet")

    assert labels["key"].to_pylist() == [f"chip-{index:06d}.jpg" for index in range(NUM_CHIPS)]
    assert {path.name for path in (faces / "chips").glob("*.jpg")} == set(labels["key"].to_pylist())


def test_a_chip_is_determined_by_its_seed_and_index(faces: Path) -> None:
    chip = render_chip(5, 21)
    label = pq.read_table(faces / "chips" / "labels.parquet").to_pylist()[21]

    assert (faces / "chips" / "chip-000021.jpg").read_bytes() == encode_jpeg(chip.image_rgb)
    assert (label["gender"], label["race"]) == (chip.gender, chip.race)
    assert label["age"] == pytest.approx(chip.age_years)


def test_every_photograph_has_one_to_six_faces(faces: Path) -> None:
    keys = pq.read_table(faces / "photographs" / "faces.parquet")["key"].to_pylist()

    assert {path.name for path in (faces / "photographs").glob("*.jpg")} == set(keys)
    assert len(set(keys)) == 2
    assert all(1 <= keys.count(key) <= 6 for key in keys)


def test_existing_files_are_not_rendered_again(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chip = faces / "chips" / "chip-000000.jpg"
    before = chip.stat().st_mtime_ns

    assert render(job(faces)) == str(faces)
    assert "already exists" in capsys.readouterr().out.replace("\n", " ")
    assert chip.stat().st_mtime_ns == before


def test_a_killed_rendering_is_completed_and_a_foreign_folder_not_changed(faces: Path, tmp_path: Path) -> None:
    marker = faces / "render.json"
    marker.write_text(marker.read_text().replace("true", "false"))
    (faces / "chips" / "labels.parquet").unlink()

    render(job(faces))

    assert (faces / "chips" / "labels.parquet").exists()
    (tmp_path / "mine.jpg").write_bytes(b"a photograph")
    with pytest.raises(ConfigError, match="exists and holds no rendered faces"):
        render(job(tmp_path))


def test_other_faces_need_another_folder(faces: Path) -> None:
    with pytest.raises(ConfigError, match="other settings"):
        render(job(faces, seed=6))


def test_a_folder_that_another_job_renders_into_is_rejected(tmp_path: Path) -> None:
    lock = tmp_path / "lock.json"
    with (
        run_lock(Storage(), str(lock), "another", expiry_s=1.0, console=Console(quiet=True)),
        pytest.raises(ConfigError, match=r"lock\.json is held by another"),
    ):
        render(job(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == []
