"""A fold of a cross-validation as a prepared set of its own: the images of the whole set, with the fold's splits."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.data.manifest import labels_digest
from agr_ray.data.prepared import PreparedSet
from agr_ray.data.splits import split_digest, split_manifest_text
from agr_ray.data.standing import FINGERPRINT
from agr_ray.schema import CROP_STATUSES, CROPS, MANIFEST, SPLITS
from agr_ray.storage import Storage


def read_images(storage: Storage, prepared: PreparedSet) -> pa.Table:
    """Return the images of a set that have a crop and a split, in the order of their ids.

    The columns are those of schema.MANIFEST and schema.FINGERPRINT_FIELDS.
    """
    rows = storage.read_table(prepared.crops(storage), [*MANIFEST.names, *FINGERPRINT])
    usable = pc.is_in(rows["status"], value_set=pa.array([str(status) for status in CROP_STATUSES]))
    return rows.filter(pc.and_(usable, pc.is_valid(rows["split"]))).sort_by("image_id")


def write_fold_set(storage: Storage, prepared: PreparedSet, split_of: pa.Table, uri: str) -> PreparedSet:
    """Write a prepared set of the images that have a split in a fold. Can be repeated after a kill.

    Args:
        storage: of both sets.
        prepared: the whole set.
        split_of: image_id and split in the fold; images with a null split are left out.
        uri: folder or prefix of the new set.
    """
    split_of = split_of.filter(pc.is_valid(split_of["split"])).combine_chunks()
    index = CROPS.get_field_index("split")
    tables = []
    for number, part in enumerate(prepared.parts(storage)):
        rows = storage.read_table(part)
        places = pc.index_in(rows["image_id"], value_set=split_of["image_id"].combine_chunks())
        rows = rows.set_column(index, CROPS.field("split"), split_of["split"].take(places))
        rows = rows.filter(pc.is_valid(rows["split"]))
        if rows.num_rows:
            storage.write_table(rows, storage.join(uri, "crops", f"part-{number:06d}.parquet"))
            tables.append(rows.select(MANIFEST.names))
    manifest = pa.concat_tables(tables)
    fold = prepared.model_copy(
        update={
            "split_manifest_sha256": split_digest(split_manifest_text(manifest)),
            "labels_sha256": labels_digest(manifest),
            "splits": {name: manifest.filter(pc.equal(manifest["split"], name)).num_rows for name in SPLITS},
            "counts": dict(sorted(Counter(manifest["status"].to_pylist()).items())),
            "near_duplicates": {},
            "uri": uri,
        }
    )
    fold.write(storage)
    return fold
