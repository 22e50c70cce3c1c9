"""Turn image rows into a row for each face and for each reject, and count images and faces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.evaluation.shift import quality_values
from agr_ray.evaluation.terms import FloatArray
from agr_ray.labels import LabelSpace
from agr_ray.schema import ABSTAINED, DEMOGRAPHIC_ATTRIBUTES, FACE, FACES, REJECTS, SCORED_STATUSES, Status

_SCORED = pa.array([*SCORED_STATUSES])


def explode_faces(images: pa.Table, carried: Sequence[str] = ()) -> pa.Table:
    """Return a row of schema.FACES for each face, in the order of the images, plus the image's columns `carried`."""
    lists = images["faces"].combine_chunks()
    parents = pc.list_parent_indices(lists)
    faces = lists.flatten()
    columns = {field.name: faces.field(field.name) for field in FACE}
    first_face = pa.array(np.asarray(lists.offsets))[0 : len(lists)]
    columns["face_index"] = pc.subtract(pa.array(np.arange(len(faces)), pa.int64()), first_face.take(parents)).cast(
        pa.int32()
    )
    of_image = {name: images[name].take(parents) for name in FACES.names if name not in columns}
    rows = pa.table({name: (columns | of_image)[name] for name in FACES.names}, schema=FACES)
    for name in carried:
        rows = rows.append_column(name, images[name].take(parents))
    return rows


def select_rejects(images: pa.Table) -> pa.Table:
    """Return a row of schema.REJECTS for each image that could not be scored."""
    rejected = images.filter(pc.invert(pc.is_in(images["status"], value_set=_SCORED)))
    return rejected.select(REJECTS.names).cast(REJECTS)


def shift_values(faces: pa.Table, space: LabelSpace) -> dict[str, FloatArray]:
    """Return the values of n faces that `evaluation.shift` compares; `race` as indices, NaN where there is no value."""
    races = pc.cast(pc.index_in(faces["race"], value_set=pa.array(space.races, pa.string())), pa.float64())
    columns = {"age": faces["age"], "p_male": faces["p_male"], "race": races}
    predicted = {name: np.asarray(pc.cast(column, pa.float64()), np.float64) for name, column in columns.items()}
    return quality_values(faces) | predicted


def count_faces(faces: pa.Table, keys: Sequence[str], space: LabelSpace) -> pa.Table:
    """Count the faces without a flag by the columns `keys`, age group of the label space, gender and race.

    An attribute on which the model abstains, or that is null or NaN, counts as `schema.ABSTAINED`: no face is left out.

    Returns:
        `keys`, age_group, gender, race, n (int64).
    """
    accepted = _accepted(faces)
    columns = {key: accepted[key] for key in keys} | _classes(accepted, space)
    table = pa.table(columns).group_by([*keys, *DEMOGRAPHIC_ATTRIBUTES]).aggregate([([], "count_all")])
    return table.rename_columns({"count_all": "n"})


def hashed_faces(faces: pa.Table, keys: Sequence[str], space: LabelSpace) -> pa.Table:
    """Return a row for each face that `count_faces` counts: perceptual_hash, `keys`, age_group, gender, race."""
    accepted = _accepted(faces)
    columns = {name: accepted[name] for name in ("perceptual_hash", *keys)}
    return pa.table(columns | _classes(accepted, space))


def _accepted(faces: pa.Table) -> pa.Table:
    """Return the faces without a flag."""
    return faces.filter(pc.equal(pc.list_value_length(faces["flags"]), 0))


def _classes(faces: pa.Table, space: LabelSpace) -> dict[str, pa.Array]:
    """Return the columns by which faces are counted, besides grouping columns."""
    columns = {"age_group": pc.fill_null(_age_groups(faces["age"], space), ABSTAINED)}
    for name in ("gender", "race"):
        columns[name] = pc.if_else(_abstains(faces, name), ABSTAINED, pc.fill_null(faces[name], ABSTAINED))
    return columns


def count_images(images: pa.Table, faces: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Count image rows and their faces by the columns `keys`, which both tables have.

    Returns:
        `keys`, num_images, num_no_face, num_rejected, num_faces, num_flagged, num_abstained (int64). Abstained are
        faces without a flag on which the model abstains in any attribute.
    """
    status = images["status"]
    ones = {
        "num_images": pa.array(np.ones(images.num_rows, np.int64)),
        "num_no_face": pc.equal(status, str(Status.NO_FACE)).cast(pa.int64()),
        "num_rejected": pc.invert(pc.is_in(status, value_set=_SCORED)).cast(pa.int64()),
    }
    is_flagged = pc.greater(pc.list_value_length(faces["flags"]), 0)
    abstains = pc.and_(pc.greater(pc.list_value_length(faces["abstain"]), 0), pc.invert(is_flagged))
    more = {
        "num_faces": pa.array(np.ones(faces.num_rows, np.int64)),
        "num_flagged": is_flagged.cast(pa.int64()),
        "num_abstained": pc.fill_null(abstains, False).cast(pa.int64()),
    }
    parts = [
        pa.table({key: images[key] for key in keys} | ones | {name: _zeros(images.num_rows) for name in more}),
        pa.table({key: faces[key] for key in keys} | {name: _zeros(faces.num_rows) for name in ones} | more),
    ]
    return sum_counts(parts, keys)


def sum_counts(tables: Sequence[pa.Table], keys: Sequence[str]) -> pa.Table:
    """Add up one or more tables of counts by the columns `keys`; all other columns are counts."""
    table = pa.concat_tables(tables)
    names = [name for name in table.column_names if name not in keys]
    added = table.group_by([*keys], use_threads=False).aggregate([(name, "sum") for name in names])
    sums = {name: pc.fill_null(added[f"{name}_sum"], 0) for name in names}  # without keys, the sum of no rows is null
    return pa.table({key: added[key] for key in keys} | sums)


def _zeros(num_rows: int) -> pa.Array:
    return pa.array(np.zeros(num_rows, np.int64))


def _abstains(faces: pa.Table, attribute: str) -> pa.Array:
    """Return a boolean for each face: whether the model abstains on an attribute."""
    lists = faces["abstain"].combine_chunks()
    mask = np.zeros(len(lists), bool)
    mask[np.asarray(pc.list_parent_indices(lists))[np.asarray(pc.equal(lists.flatten(), attribute))]] = True
    return pa.array(mask)


def _age_groups(ages: pa.ChunkedArray, space: LabelSpace) -> pa.Array:
    """Return the age group of each age; null if the age is null or NaN."""
    codes = space.age_group(np.asarray(pc.fill_null(ages, np.nan)).astype(np.float64))
    return pa.array(np.asarray(space.age_groups)[codes], mask=codes < 0)


def without_hashes(images: pa.Table) -> pa.Table:
    """Return image rows whose faces have a null perceptual hash."""
    lists = images["faces"].combine_chunks()
    fields = {field.name: lists.flatten().field(field.name) for field in FACE}
    fields["perceptual_hash"] = pa.nulls(len(lists.flatten()), FACE.field("perceptual_hash").type)
    faces = pa.StructArray.from_arrays(list(fields.values()), fields=list(FACE))
    offsets = pa.array(np.asarray(lists.offsets) - np.asarray(lists.offsets)[0])
    place = images.schema.get_field_index("faces")
    return images.set_column(place, images.schema.field(place), pa.ListArray.from_arrays(offsets, faces))
