"""Find which crop rows of a prepared set are still valid after its source has been read again.

A row is valid while its image still has the bytes that were cropped. Labels, group and split come from the manifest,
so a corrected label needs no new crop. Rows of images that are gone, changed or failed are dropped. If several parts
hold the same image, only its first row is kept. The remaining rows equal those of a fresh run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from agr_ray.schema import CROP_STATUSES, CROPS, MANIFEST, Status
from agr_ray.storage import Storage

COPIED: Final = tuple(name for name in MANIFEST.names if name not in ("status", "error"))
"""Columns of crop rows that are copied from the manifest."""
RETRIED: Final = (str(Status.FAILED), str(Status.MISSING), str(Status.CHANGED))
"""Statuses of crop rows whose image may have become readable."""


@dataclass(frozen=True)
class PartEdit:
    """How to update one Parquet part of the crops."""

    uri: str
    indices: pa.Array
    """(rows,) each row's place in the manifest, int64; null for an image that is not in it."""
    keeps: NDArray[np.bool_]
    """(rows,) whether each row is valid."""
    is_stale: bool
    """Whether any valid row differs from the manifest in the manifest's columns."""


@dataclass(frozen=True)
class Standing:
    """The rows of a prepared set, compared with a manifest."""

    image_ids: pa.Array
    """Image ids of the valid rows, each once."""
    edits: tuple[PartEdit, ...]
    """Parts that must be rewritten."""
    num_relabelled: int
    """Valid rows whose labels, group or split change."""
    num_dropped: int
    """Rows that are dropped."""


def find_standing(storage: Storage, folder: str, manifest: pa.Table) -> Standing:
    """Compare the crop rows in a folder's parts with the manifest.

    Args:
        storage: of the folder.
        folder: of Parquet parts of schema.CROPS; it need not exist.
        manifest: schema.MANIFEST, each image_id once.

    Raises:
        StorageFailed: a part is no Parquet file of these columns.
    """
    index_of = {image_id: index for index, image_id in enumerate(manifest["image_id"].to_pylist())}
    seen: set[int] = set()
    edits: list[PartEdit] = []
    num_relabelled = num_dropped = 0
    uris = [info.uri for info in storage.list(folder, (".parquet",))] if storage.exists(folder) else []
    for uri in uris:
        rows = storage.read_table(uri, columns=[*MANIFEST.names])
        indices = pa.array([index_of.get(each) for each in rows["image_id"].to_pylist()], pa.int64())
        truth = manifest.take(indices)
        keeps = np.asarray(_stands(rows, truth))
        for place, index in enumerate(indices.to_pylist()):
            if keeps[place]:
                keeps[place] = index not in seen
                seen.add(index)
        differs = np.asarray(_differs(rows, truth)) & keeps
        num_relabelled += int(differs.sum())
        num_dropped += int((~keeps).sum())
        if differs.any() or not keeps.all():
            edits.append(PartEdit(uri, indices, keeps, bool(differs.any())))
    ids = manifest["image_id"].combine_chunks().take(pa.array(sorted(seen), pa.int64()))
    return Standing(ids, tuple(edits), num_relabelled, num_dropped)


def apply_edits(storage: Storage, standing: Standing, manifest: pa.Table, check: Callable[[], None]) -> None:
    """Rewrite the parts that must change, each atomically; safe to repeat after a kill.

    Args:
        storage: of the parts.
        standing: result of `find_standing` for the same manifest.
        manifest: schema.MANIFEST.
        check: called before each part; raises if this job may no longer write.
    """
    for edit in standing.edits:
        check()
        if not edit.keeps.any():
            storage.delete(edit.uri)
            continue
        kept = pa.array(edit.keeps)
        rows = storage.read_table(edit.uri).filter(kept)
        if edit.is_stale:
            truth = manifest.take(edit.indices.filter(kept))
            columns = {name: truth[name] for name in COPIED} | {"error": _errors(rows, truth)}
            rows = pa.table({name: columns.get(name, rows[name]) for name in CROPS.names}, schema=CROPS)
        storage.write_table(rows, edit.uri)


def _stands(rows: pa.Table, truth: pa.Table) -> pa.Array:
    """Return whether each crop row's image is unchanged in the manifest since the row was made."""
    same_bytes = pc.and_(
        pc.equal(truth["status"], str(Status.OK)),
        pc.and_(
            pc.equal(rows["content_hash"], truth["content_hash"]),
            pc.invert(pc.is_in(rows["status"], value_set=pa.array(RETRIED))),
        ),
    )
    # An image that the manifest rejects has one row with the same rejection.
    same_reject = pc.and_(
        pc.not_equal(truth["status"], str(Status.OK)),
        pc.and_(pc.equal(rows["status"], truth["status"]), _equal(rows["error"], truth["error"])),
    )
    was_read = pc.invert(pc.is_in(rows["status"], value_set=pa.array([str(Status.BAD_LABEL)])))
    # An image that was not read has no hash to compare: null or true is true.
    stands = pc.or_kleene(pc.and_(same_bytes, was_read), same_reject)
    return pc.fill_null(stands, False).combine_chunks()


def _differs(rows: pa.Table, truth: pa.Table) -> pa.Array:
    """Return whether any of the manifest's columns has changed, for each crop row."""
    differs = pc.invert(_equal(rows["error"], _errors(rows, truth)))
    for name in COPIED:
        differs = pc.or_(differs, pc.invert(_equal(rows[name], truth[name])))
    return differs.combine_chunks()


def _errors(rows: pa.Table, truth: pa.Table) -> pa.ChunkedArray:
    """Return the errors of crop rows: the manifest's, unless reading the image raised its own error."""
    has_crop = pc.is_in(rows["status"], value_set=pa.array([*CROP_STATUSES]))
    return pc.if_else(has_crop, truth["error"], rows["error"])


def _equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> pa.ChunkedArray:
    """Compare columns; two nulls are equal, and so are two NaNs."""
    both_null = pc.and_(pc.is_null(one, nan_is_null=True), pc.is_null(other, nan_is_null=True))
    return pc.or_(pc.fill_null(pc.equal(one, other), False), both_null)
