"""Find the crop rows that are still valid after the source has been listed again, and write them to the prepared set.

A row is valid while its image has the etag with which it was read. Its hash, status and crop then need no new
download; labels, group and split come from the manifest, so a corrected label needs no new crop. Rows of images that
are gone, changed or failed are dropped. If several parts hold the same image, only its first row is kept. The remaining
rows equal those of a fresh run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from agr_ray.data.manifest import Content
from agr_ray.schema import CROP_STATUSES, CROPS, FINGERPRINT_FIELDS, MANIFEST, RETRIED_STATUSES, Status
from agr_ray.storage import Storage
from agr_ray.storage.parts import KILLED_ITS_WORKER
from agr_ray.storage.retry import Retry

COPIED: Final = tuple(name for name in MANIFEST.names if name not in ("status", "error"))
"""Columns of crop rows that are copied from the manifest."""
FINGERPRINT: Final = tuple(field.name for field in FINGERPRINT_FIELDS)
_NUM_THREADS: Final = 8
"""Number of parts that are read or rewritten at a time."""


@dataclass(frozen=True)
class StandingPart:
    """One Parquet part of crop rows, compared with the listing of its source."""

    uri: str
    is_staged: bool
    """Whether the part is not among the set's crops yet."""
    rows: pa.Table
    """The part's rows, with the columns of schema.MANIFEST and schema.FINGERPRINT_FIELDS."""
    indices: pa.Array
    """(rows,) each row's place in the listing, int64; null for an image that is not in it."""
    keeps: NDArray[np.bool_]
    """(rows,) whether each row is valid."""

    def truth(self, manifest: pa.Table) -> pa.Table:
        """Return the manifest's row for each valid row."""
        return manifest.take(self.indices.filter(pa.array(self.keeps)))

    def differs(self, manifest: pa.Table) -> NDArray[np.bool_]:
        """Return whether each valid row differs from the manifest in the manifest's columns."""
        rows, truth = self.rows.filter(pa.array(self.keeps)), self.truth(manifest)
        differs = pc.invert(_equal(rows["error"], _errors(rows, truth)))
        for name in COPIED:
            differs = pc.or_(differs, pc.invert(_equal(rows[name], truth[name])))
        return np.asarray(differs.combine_chunks())


def find_standing(
    storage: Storage,
    listing: pa.Table,
    crops: Sequence[str] = (),
    staged: Sequence[str] = (),
    *,
    retry_failed: bool = True,
) -> tuple[StandingPart, ...]:
    """Compare crop rows with the listing of their source.

    Args:
        storage: of the parts.
        listing: schema.MANIFEST, each image_id once; hash, group and split are ignored.
        crops: URIs of the set's Parquet parts, of schema.CROPS.
        staged: URIs of parts that are not in the set yet; of an image in both, the set's row is kept.
        retry_failed: whether rows of images that could not be read (schema.RETRIED_STATUSES) are invalid.

    Raises:
        NotParquet: a part is not a Parquet file with these columns.
    """
    index_of = {image_id: index for index, image_id in enumerate(listing["image_id"].to_pylist())}
    seen: set[int] = set()
    parts = []
    uris = [*crops, *staged]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        tables = pool.map(lambda uri: storage.read_table(uri, [*MANIFEST.names, *FINGERPRINT]), uris)
        for number, (uri, rows) in enumerate(zip(uris, tables, strict=True)):
            indices = pa.array([index_of.get(each) for each in rows["image_id"].to_pylist()], pa.int64())
            keeps = np.array(_stands(rows, listing.take(indices), retry_failed=retry_failed))
            for place, index in enumerate(indices.to_pylist()):
                if keeps[place]:
                    keeps[place] = index not in seen
                    seen.add(index)
            parts.append(StandingPart(uri, number >= len(crops), rows, indices, keeps))
    return tuple(parts)


def standing_rows(parts: Sequence[StandingPart]) -> pa.Table:
    """Return the valid rows of all parts, with the columns of schema.MANIFEST."""
    valid = (part.rows.select(MANIFEST.names).filter(pa.array(part.keeps)) for part in parts)
    return pa.concat_tables([MANIFEST.empty_table(), *valid])


def with_fingerprints(manifest: pa.Table, parts: Sequence[StandingPart]) -> pa.Table:
    """Return the columns key, split, perceptual_hash and thumbnail of the manifest's images that have valid rows."""
    tables = []
    for part in parts:
        truth, rows = part.truth(manifest), part.rows.filter(pa.array(part.keeps))
        columns = {name: truth[name] for name in ("key", "split")} | {name: rows[name] for name in FINGERPRINT}
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def contents(rows: pa.Table) -> Iterator[tuple[str, Content]]:
    """Yield the image_id of each crop row and what reading the image gave."""
    columns = [rows[name].to_pylist() for name in ("image_id", "content_hash", "status", "error")]
    for image_id, digest, status, error in zip(*columns, strict=True):
        yield image_id, Content(digest) if digest is not None else Content(None, status, error)


def write_crop_rows(
    storage: Storage,
    folder: str,
    parts: Sequence[StandingPart],
    manifest: pa.Table,
    check: Callable[[], None],
    retry: Retry,
) -> None:
    """Make the set's crops agree with its manifest. Can be repeated after a kill.

    A part of the crops is rewritten, or deleted, if any of its rows is invalid or differs from the manifest. The valid
    rows of a staged part are written to the crops, under a name hashed from their ids.

    Args:
        storage: of the parts.
        folder: of the set's crops.
        parts: result of `find_standing`.
        manifest: schema.MANIFEST with hashes, groups and splits, in the order of the listing.
        check: called before every few parts; raises if this job may no longer write.
        retry: for each request to storage.
    """

    def write(part: StandingPart) -> None:
        if not part.keeps.any():
            if not part.is_staged:
                retry.call(lambda: storage.delete(part.uri))
            return
        if not part.is_staged and part.keeps.all() and not part.differs(manifest).any():
            return
        rows, truth = retry.call(lambda: storage.read_table(part.uri)), part.truth(manifest)
        rows = rows.filter(pa.array(part.keeps))
        columns = {name: truth[name] for name in COPIED} | {"error": _errors(rows, truth)}
        edited = pa.table({name: columns.get(name, rows[name]) for name in CROPS.names}, schema=CROPS)
        name = hashlib.sha256("\n".join(rows["image_id"].to_pylist()).encode()).hexdigest()[:16]
        uri = storage.join(folder, f"part-{name}.parquet") if part.is_staged else part.uri
        retry.call(lambda: storage.write_table(edited, uri))

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        # A staged part may get the name of a part that is deleted: staged parts wait until that is done.
        for is_staged in (False, True):
            group = [part for part in parts if part.is_staged == is_staged]
            for start in range(0, len(group), _NUM_THREADS):
                check()
                list(pool.map(write, group[start : start + _NUM_THREADS]))


def _stands(rows: pa.Table, listed: pa.Table, *, retry_failed: bool) -> pa.Array:
    """Return whether each crop row is what reading the listed image would give."""
    is_read = pc.and_(pc.equal(listed["status"], str(Status.OK)), pc.not_equal(rows["status"], str(Status.BAD_LABEL)))
    is_read = pc.and_(is_read, pc.equal(rows["etag"], listed["etag"]))
    if retry_failed:
        may_pass = pc.is_in(rows["status"], value_set=pa.array([*RETRIED_STATUSES]))
        is_given_up = pc.fill_null(pc.equal(rows["error"], KILLED_ITS_WORKER), False)
        is_read = pc.and_(is_read, pc.invert(pc.and_not(may_pass, is_given_up)))
    # An image that is not read has one row with the listing's rejection.
    same_reject = pc.and_(
        pc.not_equal(listed["status"], str(Status.OK)),
        pc.and_(pc.equal(rows["status"], listed["status"]), _equal(rows["error"], listed["error"])),
    )
    return pc.fill_null(pc.or_kleene(is_read, same_reject), False).combine_chunks()


def _errors(rows: pa.Table, truth: pa.Table) -> pa.ChunkedArray:
    """Return the errors of crop rows: the manifest's, unless reading the image raised its own error."""
    has_crop = pc.is_in(rows["status"], value_set=pa.array([*CROP_STATUSES]))
    return pc.if_else(has_crop, truth["error"], rows["error"])


def _equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> pa.ChunkedArray:
    """Compare columns; two nulls are equal, and so are two NaNs."""
    both_null = pc.and_(pc.is_null(one, nan_is_null=True), pc.is_null(other, nan_is_null=True))
    return pc.or_(pc.fill_null(pc.equal(one, other), False), both_null)
