"""What is looked at before the first step of training: labels, splits and detector of a prepared set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.config import ConfigError, VisionConfig
from agr_ray.runtime.prepared import PreparedSet
from agr_ray.storage import Storage


def check_no_overlap(train: pa.Table, crops: pa.Table, prepared: PreparedSet, storage: Storage) -> None:
    """Refuse a set that has, byte for byte, one image both in training and in another split.

    `prepare` keeps an image's copies together, unless they are labelled as different subjects.

    Args:
        train: the rows trained on.
        crops: the rows of all splits; both have content_hash and split.
        prepared: where they are from.
        storage: it is on; the name of an image is read only where there is something to say.

    Raises:
        ConfigError: with how many images, and the name of one.
    """
    others = crops.filter(pc.and_(pc.is_valid(crops["split"]), pc.not_equal(crops["split"], "train")))
    seen = pc.is_in(others["content_hash"], value_set=pc.unique(train["content_hash"]).drop_null())
    shared = others.filter(seen)
    if not shared.num_rows:
        return
    named = storage.read_table(prepared.crops(storage), columns=["content_hash", "split", "key"])
    named = named.filter(pc.equal(named["content_hash"], shared["content_hash"][0]))
    where = ", ".join(
        f"{key} in {split}" for key, split in zip(*named.select(["key", "split"]).to_pydict().values(), strict=True)
    )
    raise ConfigError(
        f"train.data {prepared.uri}: {shared.num_rows:,} images of {_listed(shared['split'])} are, byte for byte, in "
        f"train too, such as {where}; give copies the same subject, or leave them out, and prepare again"
    )


def class_warnings(counts: Mapping[str, Mapping[str, int]], tasks: Sequence[str], prepared: PreparedSet) -> list[str]:
    """Say which classes of a gender or race head no training row has: it will never learn to say them.

    Args:
        counts: of training's labels, by `learn.metrics.class_counts`.
        tasks: that have a head.
        prepared: where the labels are from.
    """
    warnings = []
    for task in ("gender", "race"):
        missing = [name for name, count in counts[task].items() if not count]
        if task in tasks and missing:
            has = ", ".join(f"{name} {count:,}" for name, count in counts[task].items())
            warnings.append(
                f"train.data {prepared.uri}: no training row has {task} {' or '.join(missing)}, which the model will "
                f"not learn to tell; it has {has}"
            )
    return warnings


def detector_warnings(prepared: PreparedSet) -> list[str]:
    """Say if scoring would by default find faces, and so cut crops, by another detector than was used here."""
    default = VisionConfig().detector
    if prepared.detector == default:
        return []
    remedy = (
        "prepare it with mtcnn or haar if photographs are to be scored"
        if prepared.detector == "none"
        else f"score with --vision.detector {prepared.detector}"
    )
    return [
        f"train.data {prepared.uri}: its crops were made with vision.detector {prepared.detector}, and jobs/score.py "
        f"uses {default} unless told otherwise; {remedy}"
    ]


def _listed(column: pa.ChunkedArray) -> str:
    return " and ".join(sorted(pc.unique(column).to_pylist()))
