"""Reading predictions.parquet in batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from agr_ray.labels import UTKFACE
from agr_ray.models.predictions import class_probs_array, class_probs_column
from agr_ray.predict.prediction_rows import MEASURED_COLUMNS, read_rows
from agr_ray.schema import PREDICTIONS
from agr_ray.storage import MissingObject, Storage
from agr_ray.storage.errors import NotParquet

NUM = 10
PROBS = np.random.default_rng(0).dirichlet(np.ones(5), NUM).astype(np.float32)


def table(group_ids: list[str | None]) -> pa.Table:
    columns = {
        "image_id": pa.array([str(number) for number in range(NUM)]),
        "group_id": pa.array(group_ids, pa.string()),
        "age": pa.array([None, *range(1, NUM)], pa.float32()),
        "age_low": pa.array([20.0] + [None] * (NUM - 1), pa.float32()),
        "age_high": pa.array([29.0] + [None] * (NUM - 1), pa.float32()),
        "gender": pa.array(["male", None, "female"] + ["male"] * (NUM - 3)),
        "race": pa.array(["asian", "white", None] + ["unheard of"] * (NUM - 3)),
        "status": pa.array(["ok", "fallback"] * (NUM // 2)),
        "age_pred": pa.array(np.arange(NUM), pa.float32()),
        "race_probs": class_probs_column(PROBS, UTKFACE.races),
    }
    return pa.table({field.name: pa.nulls(NUM, field.type) for field in PREDICTIONS} | columns)


@pytest.mark.parametrize("batch_rows", [1, 3, NUM])
def test_rows_are_the_same_in_batches_of_any_size(batch_rows: int, tmp_path: Path) -> None:
    uri, storage = str(tmp_path / "predictions.parquet"), Storage()
    storage.write_table(table([f"person-{number // 2}" for number in range(NUM)]), uri)
    batches = storage.read_batches(uri, MEASURED_COLUMNS, batch_rows)
    rows = read_rows(batches, storage.read_footer(uri).num_rows, ("age", "race"), UTKFACE, UTKFACE)

    assert list(rows.predictions) == ["age", "race"]
    assert rows.predictions["age"].tolist() == list(range(NUM))
    np.testing.assert_array_equal(rows.predictions["race"], PROBS)
    assert rows.labels.gender.tolist() == [1, -1, 0] + [1] * (NUM - 3)
    assert rows.labels.race.tolist() == [2, 0, -1] + [-1] * (NUM - 3)
    np.testing.assert_array_equal(rows.labels.age, [np.nan, *range(1, NUM)])
    assert rows.labels.age_range[1].tolist() == [29.0, *range(1, NUM)]
    assert rows.fallback.tolist() == [False, True] * (NUM // 2)
    assert rows.persons is not None
    np.testing.assert_array_equal(rows.persons[::2], rows.persons[1::2])
    assert len(np.unique(rows.persons)) == NUM // 2


def test_one_row_without_a_person_makes_all_images_independent() -> None:
    for place in (0, NUM - 1):
        group_ids: list[str | None] = [str(number) for number in range(NUM)]
        group_ids[place] = None
        batches = table(group_ids).to_batches(max_chunksize=4)
        assert read_rows(batches, NUM, ("age",), UTKFACE, UTKFACE).persons is None


def test_slices_of_probabilities_are_read_and_other_classes_rejected() -> None:
    column = pa.chunked_array([class_probs_column(PROBS, UTKFACE.races)])
    np.testing.assert_array_equal(class_probs_array(column.slice(3, 4), UTKFACE.races), PROBS[3:7])
    assert class_probs_array(column.slice(0, 0), UTKFACE.races).shape == (0, 5)
    with pytest.raises(ValueError, match="expected probabilities of white, asian, black, indian, others, found others"):
        class_probs_array(column, ("white", "asian", "black", "indian", "others"))


def test_files_that_are_no_table_of_predictions_are_named(tmp_path: Path) -> None:
    storage, uri = Storage(), str(tmp_path / "some.parquet")
    storage.write_table(pa.table({"age": [1.0]}), uri)
    with pytest.raises(NotParquet, match=r"some\.parquet has no column group_id, status$"):
        list(storage.read_batches(uri, ("age", "group_id", "status")))
    (tmp_path / "text.parquet").write_text("no table")
    for call in (storage.read_footer, lambda uri: list(storage.read_batches(uri, ("age",)))):
        with pytest.raises(NotParquet, match=r"text\.parquet can't be read as Parquet"):
            call(str(tmp_path / "text.parquet"))
        with pytest.raises(MissingObject):
            call(str(tmp_path / "none.parquet"))
