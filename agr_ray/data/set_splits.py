"""The splits of a prepared set: content keeps its split while the set grows, and near-duplicates can be left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.config import PrepareJob
from agr_ray.data.near_duplicates import find_crossings
from agr_ray.data.sources.registry import split_fractions
from agr_ray.data.splits import assign_splits, check_no_leak, crossing_copies
from agr_ray.data.standing import StandingPart, with_fingerprints
from agr_ray.schema import MANIFEST
from agr_ray.storage import Storage

SPLIT_MEMORY: Final = "split_memory.parquet"
"""Splits of all content that the set has ever held."""


@dataclass(frozen=True)
class Splits:
    """Manifests with their splits."""

    assigned: pa.Table
    """As assigned: what the split memory remembers."""
    final: pa.Table
    """Without the near-duplicates that `split.near_duplicates` excludes."""
    crossings: pa.Table
    """schema.NEAR_DUPLICATES of the assigned splits."""


def assigned_splits(
    job: PrepareJob,
    manifest: pa.Table,
    before: pa.Table | None,
    split_of: Mapping[str, str],
    standing: Sequence[StandingPart],
) -> Splits:
    """Assign splits. Content that already had a split keeps it.

    Args:
        job: says how to split.
        manifest: of the set; its splits are those that the source assigns.
        before: the set's earlier manifest.
        split_of: `remembered` splits.
        standing: the set's valid crop rows.

    Raises:
        SplitLeakError: images that must share a split were assigned to different splits.
    """
    manifest = _with_earlier_splits(manifest, split_of)
    drawn = None if before is None else _drawn(manifest, before, split_of)
    excludes = job.split.near_duplicates == "exclude"
    copies = crossing_copies(manifest) if excludes else pa.array(np.zeros(manifest.num_rows, bool))
    assigned = _without(manifest, copies, "group_id", "split")
    fractions = split_fractions(job.source, job.split)
    assigned = assign_splits(assigned, fractions, job.split.seed, job.split.sample, drawn)
    assigned = _replaced(assigned, "group_id", manifest["group_id"])
    crossings = find_crossings(with_fingerprints(_with_split_of(assigned, manifest, copies), standing))
    final = assigned
    if excludes:
        leaks = pc.is_in(assigned["key"], value_set=crossings["key"].combine_chunks())
        final = _without(assigned, leaks, "split")
    check_no_leak(final)
    return Splits(assigned, final, crossings)


def remembered(storage: Storage, out: str) -> dict[str, str]:
    """Return the split of each content that ever had one in this set, by content hash.

    The manifest alone would forget images that are temporarily mislabelled, unreadable or deleted.
    """
    uri = storage.join(out, SPLIT_MEMORY)
    if not storage.exists(uri):
        return {}
    table = storage.read_table(uri)
    return dict(zip(table["content_hash"].to_pylist(), table["split"].to_pylist(), strict=True))


def remember(storage: Storage, out: str, table: pa.Table) -> None:
    """Add the splits of a manifest to the split memory; call this before writing the manifest."""
    rows = table.filter(pc.is_valid(table["split"]))
    now = dict(zip(rows["content_hash"].to_pylist(), rows["split"].to_pylist(), strict=True))
    split_of = dict(sorted((remembered(storage, out) | now).items()))
    memory = pa.table({"content_hash": [*split_of], "split": [*split_of.values()]})
    storage.write_table(memory, storage.join(out, SPLIT_MEMORY))


def _with_earlier_splits(table: pa.Table, split_of: Mapping[str, str]) -> pa.Table:
    """Assign content that had a split to it again, unless the source assigns one itself."""
    values = pa.array([split_of.get(each) for each in table["content_hash"].to_pylist()], pa.string())
    index = table.schema.get_field_index("split")
    return table.set_column(index, MANIFEST.field("split"), pc.coalesce(table["split"], values))


def _drawn(table: pa.Table, before: pa.Table, split_of: Collection[str]) -> dict[str, bool]:
    """Return whether each group that shares content with the earlier manifest was drawn for it.

    Args:
        table: the manifest.
        before: the earlier one.
        split_of: content that had a split, even if it was excluded as a near-duplicate.
    """
    known = before.filter(pc.is_valid(before["content_hash"]))["content_hash"].to_pylist()
    was_drawn = {content: content in split_of for content in known}
    drawn: dict[str, bool] = {}
    for group, content in zip(table["group_id"].to_pylist(), table["content_hash"].to_pylist(), strict=True):
        if group is not None and content in was_drawn:
            drawn[group] = drawn.get(group, False) or was_drawn[content]
    return drawn


def _replaced(manifest: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    return manifest.set_column(manifest.schema.get_field_index(name), MANIFEST.field(name), values)


def _without(manifest: pa.Table, rows: pa.Array, *names: str) -> pa.Table:
    """Return the manifest with nulls in these columns of these rows."""
    for name in names:
        manifest = _replaced(manifest, name, pc.if_else(rows, None, manifest[name]))
    return manifest


def _with_split_of(manifest: pa.Table, other: pa.Table, rows: pa.Array) -> pa.Table:
    """Return the manifest with the other manifest's split in these rows."""
    return _replaced(manifest, "split", pc.if_else(rows, other["split"], manifest["split"]))
