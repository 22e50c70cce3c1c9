"""`agr-ray report` recognises what a folder holds, and says what is wrong in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluations import write_evaluation

from agr_ray.cli import main
from agr_ray.config import ReportJob
from agr_ray.errors import ConfigError
from agr_ray.report import faces
from agr_ray.report.report import report
from agr_ray.storage import Storage, StorageUnavailable


def test_the_page_can_be_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_evaluation(tmp_path / "eval", tasks=("age",))

    main(["report", str(tmp_path / "eval"), "--out", str(tmp_path / "page")])

    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "page" / "report.html")
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["report-figures", "report.html", "report.md"]
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["metrics.json", "predictions.parquet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"nothing: holds no results of evaluate, train, compare, cross-validate, tune or score"),
        ({"faces": True}, r"report\.faces: .*nothing is not an evaluation"),
        ({"run": "x"}, r"report\.run x: .*nothing does not hold scoring results"),
    ],
)
def test_a_folder_without_results_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "nothing").mkdir()

    with pytest.raises(ConfigError, match=message):
        report(ReportJob(folders=[str(tmp_path / "nothing")], **options), quiet=True)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"report\.folders .*gone"):
        report(ReportJob(folders=[str(tmp_path / "gone")]), quiet=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not written by agr-ray evaluate, or damaged"),
        ('{"evaluation": {"format_version": 1}}', "has format_version 1, expected 3; evaluate again"),
    ],
)
def test_damaged_metrics_are_one_line(tmp_path: Path, content: str, message: str) -> None:
    write_evaluation(tmp_path / "eval", tasks=("age",))
    (tmp_path / "eval" / "metrics.json").write_text(content)

    with pytest.raises(ConfigError, match=message):
        report(ReportJob(folders=[str(tmp_path / "eval")]), quiet=True)


def test_an_evaluation_has_no_runs(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "eval", tasks=("age",))

    with pytest.raises(ConfigError, match="only scoring results have runs"):
        report(ReportJob(folders=[str(tmp_path / "eval")], run="x"), quiet=True)


def test_a_key_that_may_be_read_in_a_bucket_that_may_not_be_listed_is_a_photograph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> bool:
        raise StorageUnavailable("bucket 'b': AccessDenied")

    monkeypatch.setattr(Storage, "is_folder", refuse)
    assert faces._files("s3://b/5f3a9c", Storage()) == ["s3://b/5f3a9c"]
