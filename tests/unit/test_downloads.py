"""Image files from storage: in batches of limited bytes, and one at a time after a worker died."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agr_ray.predict import downloads
from agr_ray.predict.downloads import Downloads
from agr_ray.predict.face_finder import MIB
from agr_ray.storage import Storage
from agr_ray.storage.parts import MAX_DEATHS, Parts


def rows_of(folder: Path, sizes: list[int | None]) -> list[dict[str, Any]]:
    """Write a file for each row, and return rows with these sizes."""
    for number in range(len(sizes)):
        (folder / str(number)).write_bytes(b"%d" % number)
    return [
        {"image_id": f"id-{number}", "uri": str(folder / str(number)), "etag": None, "size_bytes": size}
        for number, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1] * 7, [3, 3, 1]),
        ([5, 5, 1, 9], [2, 2]),
        ([5, 6, 20, 1], [1, 1, 1, 1]),
        ([None] * 4, [3, 1]),
        ([9 * MIB, 1, 1], [1, 2]),  # it is not read
        ([], []),
    ],
)
def test_a_batch_has_few_files_and_few_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int | None], expected: list[int]
) -> None:
    monkeypatch.setattr(downloads, "MAX_BATCH_BYTES", 10)
    storage = Storage()
    reader = Downloads(storage, max_mib=1, batch_size=3, outage_s=0.0)

    batches = list(reader.read(rows_of(tmp_path, sizes), Parts(storage, str(tmp_path / "work")).begin(0)))

    assert [len(batch) for batch in batches] == expected
    assert [each for batch in batches for each in batch] == [(n, b"%d" % n) for n in range(len(sizes))]


def test_after_a_death_each_image_is_noted_while_it_is_processed_and_no_longer(tmp_path: Path) -> None:
    storage = Storage()
    parts = Parts(storage, str(tmp_path / "work"))
    reader = Downloads(storage, max_mib=1, batch_size=2, outage_s=0.0)
    rows = rows_of(tmp_path, [1] * 3)
    parts.begin(0)  # an attempt that dies

    for num_deaths in range(MAX_DEATHS):
        attempts = parts.begin(0)
        assert attempts.deaths == ({"id-1": num_deaths} if num_deaths else {})
        batches = reader.read(rows, attempts)
        assert [next(batches), next(batches)] == [[(0, b"0")], [(1, b"1")]]  # and dies

    attempts = parts.begin(0)
    bodies = [body for batch in reader.read(rows, attempts) for _, body in batch]
    assert [isinstance(body, bytes) for body in bodies] == [True, False, True]
    assert parts.begin(0).deaths == {"id-1": MAX_DEATHS}  # the last image is not to blame for what comes after it


def test_torch_has_one_thread_wherever_it_is_imported() -> None:
    code = (
        "import os; {first}; from agr_ray.predict.downloads import use_one_cpu; use_one_cpu(); "
        "import torch; print(torch.get_num_threads())"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    environ |= {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    for first in ("import torch", "pass"):
        command = [sys.executable, "-c", code.format(first=first)]
        assert subprocess.check_output(command, text=True, env=environ) == "1\n"
