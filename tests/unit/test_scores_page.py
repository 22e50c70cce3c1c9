"""The page of a scored bucket, made from what a scoring job has published."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from outlines import words

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from sets import chip_jpeg
from this_process import ThisProcess, model

from agr_ray.config import GatesConfig, ReportJob, ScoreConfig, ScoreJob, VisionConfig
from agr_ray.console import make_console
from agr_ray.errors import ConfigError
from agr_ray.report.report import report
from agr_ray.scoring.driver import score_input

__all__ = ["model"]  # a fixture
DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")
NUM_A_DAY = 8


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three days of photographs, of which one each is broken and named to mislead."""
    folder = tmp_path_factory.mktemp("photographs")
    for place, day in enumerate(DAYS):
        (folder / day).mkdir()
        for number in range(NUM_A_DAY):
            (folder / day / f"{number}.jpg").write_bytes(chip_jpeg(number + NUM_A_DAY * place))
        (folder / day / "<b>|broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    return folder


def score(model: Path, photographs: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"group_by": ("day",), "key_pattern": r"/(?P<day>\d{4}-\d\d-\d\d)/"}
    gates = changes.pop("gates", GatesConfig())
    settings |= {"checkpoint": str(model), "input": str(photographs), "out": str(out), **changes}
    job = ScoreJob(vision=VisionConfig(detector="haar"), gates=gates, score=ScoreConfig(**settings))
    return score_input(job, ThisProcess.of(model), make_console(io.StringIO()))


@pytest.fixture(scope="module")
def scored(
    model: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Two runs, the second of the days that the first did not see."""
    out = tmp_path_factory.mktemp("scored") / "out"
    include = (tuple(f"{day}/*" for day in days) for days in (DAYS[:2], DAYS))
    return out, [score(model, photographs, out, include=each) for each in include]


def page_of(folder: Path, **options: Any) -> str:
    return words(Path(report(ReportJob(folders=[str(folder)], **options), quiet=True)).read_text())


def rows_of(folder: Path, section: str) -> Iterator[list[str]]:
    text = (folder / "report.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip().replace("**", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.usefixtures("blank_figures")
def test_the_latest_run_is_shown_and_all_are_listed(scored: tuple[Path, list[dict[str, Any]]]) -> None:
    out, records = scored
    text = page_of(out)

    assert f"This page shows run {records[1]['run_id']}, one of 2 runs. A run scores only images" in text
    assert "may have scored the same photographs again" not in text
    rows = list(rows_of(out, "All runs"))[2:]
    assert [row[0] for row in rows] == [record["run_id"] for record in records]
    assert [row[4] for row in rows] == ["18", "9"]


@pytest.mark.usefixtures("blank_figures")
def test_counts_are_those_of_the_tables(scored: tuple[Path, list[dict[str, Any]]]) -> None:
    out, records = scored
    run = records[0]["run_id"]
    text = page_of(out, run=run)

    table = pq.read_table(out / "demographics" / f"run={run}", partitioning=None).to_pylist()
    genders = {row["gender"]: row for row in table if row["is_total"] and row["breakdown"] == "gender"}
    shown = {row[0]: row[1] for row in rows_of(out, "Shares") if row[0] in genders}
    assert shown == {name: str(row["n"]) for name, row in genders.items()}
    groups = [row for row in rows_of(out, "By group") if row[0] in DAYS]
    assert [row[0] for row in groups[:2]] == list(DAYS[:2])
    assert [row[1] for row in groups[:2]] == ["9", "9"]
    assert "Not calibrated" in text


@pytest.mark.usefixtures("blank_figures")
def test_rejected_images_are_counted_with_an_example(scored: tuple[Path, list[dict[str, Any]]]) -> None:
    out, _ = scored
    page_of(out)

    rows = {row[0]: row for row in rows_of(out, "Images by status")}
    broken = next(row for status, row in rows.items() if status in ("unreadable", "not an image"))
    assert broken[1] == "1"
    assert broken[3]


def test_the_shares_of_runs_stand_side_by_side(scored: tuple[Path, list[dict[str, Any]]]) -> None:
    out, _ = scored
    page_of(out)

    figures = {path.stem for path in (out / "report-figures").glob("*.svg")}
    assert {"pyramid", "share-gender", "time-gender", "time-age-group", "time-race"} <= figures


def test_an_unknown_run_is_refused(scored: tuple[Path, list[dict[str, Any]]]) -> None:
    with pytest.raises(ConfigError, match=r"report\.run x: no such published run"):
        page_of(scored[0], run="x")


@pytest.mark.usefixtures("blank_figures")
def test_a_page_in_the_results_folder_is_no_result(
    scored: tuple[Path, list[dict[str, Any]]], model: Path, photographs: Path
) -> None:
    out, records = scored
    page_of(out)

    assert score(model, photographs, out) == records[1]
    assert f"run {records[1]['run_id']}" in page_of(out)


@pytest.mark.usefixtures("blank_pngs")
def test_hidden_counts_stay_hidden(model: Path, photographs: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    private = {"aggregate_only": True, "pseudonymise": str(key), "ledger": str(tmp_path / "ledger"), "min_cell": 5}
    score(model, photographs, tmp_path / "out", **private)

    text = page_of(tmp_path / "out")

    assert "Counts are hidden" in text
    assert "broken" not in text
    table = pq.read_table(tmp_path / "out" / "demographics", partitioning=None).to_pylist()
    hidden = [row for row in table if row["is_total"] and row["breakdown"] == "race" and row["n"] is None]
    assert hidden
    shown = {row[0]: row[1] for row in rows_of(tmp_path / "out", "Shares")}
    assert {shown[row["race"]] for row in hidden} == {"hidden"}
    assert "hidden faces" not in text
    assert "font-weight: 700" not in (tmp_path / "out" / "report-figures" / "share-race.svg").read_text()


@pytest.mark.usefixtures("blank_pngs")
def test_a_model_without_gender_has_a_page(model: Path, photographs: Path, tmp_path: Path) -> None:
    score(model, photographs, tmp_path / "out", attributes=("age",), group_by=(), key_pattern="")

    text = page_of(tmp_path / "out")

    figures = {path.stem for path in (tmp_path / "out" / "report-figures").glob("*.svg")}
    assert figures == {"share-age-group"}
    assert "Perceived age in " in text


@pytest.mark.usefixtures("blank_pngs")
def test_a_run_whose_images_were_scored_again_keeps_its_rows(model: Path, photographs: Path, tmp_path: Path) -> None:
    first = score(model, photographs, tmp_path / "out")
    with_limit = GatesConfig(min_side_px=500.0)
    second = score(model, photographs, tmp_path / "out", gates=with_limit)
    assert first["num_images"] == second["num_images"]
    text = page_of(tmp_path / "out")
    assert "one of 2 runs. A run scores only images" in text
    assert "may have scored the same photographs again" in text
    assert not list((tmp_path / "out" / "report-figures").glob("time-*"))  # the runs have other settings

    page_of(tmp_path / "out", run=first["run_id"])

    rows = {row[0]: row for row in rows_of(tmp_path / "out", "Images by status")}
    assert any(row[3] for row in rows.values())
    assert [row[0] for row in rows_of(tmp_path / "out", "Quality of the faces")][2:3] == ["detector score"]


@pytest.mark.parametrize("damage", ["", "{", "{}"])
def test_a_damaged_record_is_one_line(scored: tuple[Path, list[dict[str, Any]]], tmp_path: Path, damage: str) -> None:
    shutil.copytree(scored[0], tmp_path / "out")
    next((tmp_path / "out" / "_SUCCESS").iterdir()).write_text(damage)

    with pytest.raises(ConfigError, match="a file is damaged, or was written by another version"):
        page_of(tmp_path / "out")
