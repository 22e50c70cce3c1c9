"""Retries while storage is unavailable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agr_ray.storage import NotParquet, Storage, StorageUnavailable, retry
from agr_ray.storage.retry import Retry


def test_work_is_retried_while_storage_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(retry, "_RETRY_S", 0.0)

    assert Retry(60.0).call(fails(3)) == "done"
    assert capsys.readouterr().err == "warning: storage is unavailable; retrying for up to 60 s\n"


@pytest.mark.parametrize("outage_s", [0.0, 1e-9])
def test_an_error_that_outlasts_the_limit_is_raised(monkeypatch: pytest.MonkeyPatch, outage_s: float) -> None:
    monkeypatch.setattr(retry, "_RETRY_S", 0.0)

    with pytest.raises(StorageUnavailable):
        Retry(outage_s).call(fails(100))


def test_a_file_that_is_not_parquet_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.time, "sleep", lambda _: pytest.fail("retried"))
    (tmp_path / "text.parquet").write_text("text")

    with pytest.raises(NotParquet, match=r"text\.parquet can't be read as Parquet"):
        Retry(60.0).call(lambda: Storage().read_table(str(tmp_path / "text.parquet")))


def fails(times: int) -> Callable[[], str]:
    left = [times]

    def work() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise StorageUnavailable("gone")
        return "done"

    return work
