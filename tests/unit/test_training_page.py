"""The page of a training run: curves of what was measured, the best epoch, and how far it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outlines import words

from agr_ray.config import ReportJob
from agr_ray.errors import ConfigError
from agr_ray.report.report import report
from agr_ray.schema import HISTORY


def epoch(number: int, objective: float | None, **changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(HISTORY.names)
    needed = {"epoch": number, "step": 10 * number, "lr": 1e-3, "train_loss": 5.0 / number, "num_train_rows": 100}
    timing = {"epoch_s": 2.0, "samples_per_s": 50.0, "data_wait_share": 0.1}
    return {**row, **needed, **timing, "val_objective": objective, **changes}


def write_run(folder: Path, history: list[dict[str, Any]], finished: str = "early_stopping") -> Path:
    folder.mkdir()
    config = {"train": {"lr": 0.001, "out": "runs"}, "loss": {"age_weight": 1.0}}
    record = {"finished": finished, "config": config, "data": {"uri": "data/x"}, "git_commit": ""}
    (folder / "run.json").write_text(json.dumps(record))
    pq.write_table(pa.Table.from_pylist(history, HISTORY), folder / "history.parquet")
    return folder


def page_of(folder: Path) -> str:
    return words(Path(report(ReportJob(folders=[str(folder)]), quiet=True)).read_text())


def test_the_best_epoch_is_marked(tmp_path: Path) -> None:
    history = [epoch(1, 0.9), epoch(2, 0.4, val_age_mae_years=6.25, val_gender_accuracy=0.9), epoch(3, 0.6)]

    text = page_of(write_run(tmp_path / "lite", history))

    assert "3 epochs; the best is epoch 2, with age MAE 6.25 years, gender 90.0 % on validation." in text
    assert "The run stopped early." in text
    rows = re.findall(r"^\| \**(\d+)\** \|", (tmp_path / "lite" / "report.md").read_text(), flags=re.MULTILINE)
    assert rows == ["1", "2", "3"]
    assert "| **2** |" in (tmp_path / "lite" / "report.md").read_text()


def test_a_running_run_without_validation_has_a_page(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "lite", [epoch(1, None)], finished=""))

    assert "The run has not ended." in text
    assert "Not validated." in text
    names = sorted(path.name for path in (tmp_path / "lite" / "report-figures").glob("*.png"))
    assert names == ["curve-loss.png", "curve-rate.png", "curve-speed.png", "curve-waiting.png"]


def test_a_run_without_an_epoch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no epoch has been finished"):
        page_of(write_run(tmp_path / "lite", []))


@pytest.mark.parametrize("damage", ["", "[]", '{"finished": ""}'])
def test_a_damaged_record_is_one_line(tmp_path: Path, damage: str) -> None:
    folder = write_run(tmp_path / "lite", [epoch(1, 0.5)])
    (folder / "run.json").write_text(damage)

    with pytest.raises(ConfigError, match=r"(not written by agr-ray train, or damaged|a file is damaged)"):
        page_of(folder)
