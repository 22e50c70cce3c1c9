"""Waiting for storage."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agr_ray.storage import StorageUnavailable
from agr_ray.storage import retry as patience
from agr_ray.storage.retry import Patience


def test_storage_that_goes_away_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patience, "_RETRY_S", 0.0)

    assert Patience(60.0).call(fails(3)) == "done"
    assert capsys.readouterr().err == "warning: storage is away; waiting for it, 60 s at most\n"


def test_storage_that_stays_away_is_not() -> None:
    with pytest.raises(StorageUnavailable):
        Patience(-1.0).call(fails(1))


def fails(times: int) -> Callable[[], str]:
    left = [times]

    def work() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise StorageUnavailable("gone")
        return "done"

    return work
