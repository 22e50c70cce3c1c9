"""Tables, settings, errors and the import of `storage`."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from agr_ray.config import StorageConfig
from agr_ray.schema import Status
from agr_ray.storage import (
    ChangedObject,
    Connection,
    MissingObject,
    NotParquet,
    Storage,
)


@pytest.fixture
def storage() -> Storage:
    return Storage()


def test_errors_survive_pickling_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ChangedObject("s3://b/k changed")))

    assert (type(error), str(error), error.status) == (ChangedObject, "s3://b/k changed", Status.CHANGED)


def test_impossible_settings_are_rejected() -> None:
    with pytest.raises(ValueError, match="max_attempts is 0"):
        Connection(max_attempts=0)
    with pytest.raises(ValueError, match="timeout_s is 0"):
        Connection(timeout_s=0)


def test_a_table_is_read_as_it_was_written(storage: Storage, tmp_path: Path) -> None:
    table = pa.table({"key": ["a", None], "age": pa.array([1.5, None], pa.float32())})
    uri = str(tmp_path / "run=7" / "manifest.parquet")

    storage.write_table(table, uri)

    assert storage.read_table(uri).equals(table)
    assert storage.read_table(uri, ["age"]).column_names == ["age"]
    assert storage.read_table(str(tmp_path)).equals(table)  # with no column `run`


def test_a_missing_or_non_parquet_table_is_named_in_the_error(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("not a table")

    with pytest.raises(NotParquet, match=r"text\.parquet"):
        storage.read_table(str(tmp_path / "text.parquet"))
    with pytest.raises(MissingObject, match=r"none\.parquet"):
        storage.read_table(str(tmp_path / "none.parquet"))


def test_a_table_that_cannot_be_written_leaves_the_old_one(storage: Storage, tmp_path: Path) -> None:
    uri = str(tmp_path / "t.parquet")
    storage.write_table(pa.table({"a": [1]}), uri)
    unwritable = pa.table({"a": pa.array([], pa.null())}).append_column(
        "u", pa.UnionArray.from_sparse(pa.array([], pa.int8()), [])
    )

    with pytest.raises(pa.ArrowException):
        storage.write_table(unwritable, uri)

    assert storage.read_table(uri).column("a").to_pylist() == [1]
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_storage_without_settings_equals_an_empty_configuration() -> None:
    assert Storage.from_config(StorageConfig()) == Storage()


HEAVY = ["aiobotocore", "boto3", "botocore", "fsspec", "pyarrow.fs", "pyarrow.parquet", "s3fs"]


def test_importing_storage_loads_no_client() -> None:
    code = f"import sys, agr_ray.storage; print([name for name in {HEAVY} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout == "[]\n"
