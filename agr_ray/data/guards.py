"""Checks of prepared sets before the first step of training: labels, splits and detectors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from agr_ray.config import LabelsConfig
from agr_ray.config.pipeline import Pipeline
from agr_ray.data.prepared import PreparedSet
from agr_ray.errors import ConfigError
from agr_ray.labels import LabelSpace, race_mapping
from agr_ray.storage import Storage
from agr_ray.vision.detect import CASCADES


def check_sets(sets: Sequence[PreparedSet]) -> None:
    """Reject sets that can't be combined: crops of different size or template, or one set twice.

    Raises:
        ConfigError: names both sets.
    """
    first = sets[0]
    for number, other in enumerate(sets[1:], 1):
        for key in ("crop_side_px", "template"):
            if other.settings[key] != first.settings[key]:
                raise ConfigError(
                    f"train.data: the crops of {first.uri} have {key} {first.settings[key]}, those of {other.uri} "
                    f"{other.settings[key]}; prepare one of them again with the same value"
                )
        for earlier in sets[:number]:
            if earlier.digest == other.digest:  # also if one is a copy of the other
                raise ConfigError(f"train.data: {earlier.uri} and {other.uri} are the same set; name it once")


def training_space(sets: Sequence[PreparedSet], config: LabelsConfig) -> LabelSpace:
    """Return the label space to train in: the configured one, else that of the sets.

    Raises:
        ConfigError: the sets have different label spaces and none is configured, or the races of a set do not map onto
            those of the configured one.
    """
    space = config.label_space
    if space is None:
        space = sets[0].label_space
        for other in sets[1:]:
            for key in ("races", "age_groups"):
                ours, theirs = (", ".join(getattr(each, key)) or "none" for each in (space, other.label_space))
                if ours != theirs:
                    raise ConfigError(
                        f"train.data: {sets[0].uri} has the {key} {ours}; {other.uri} has {theirs}; name the label "
                        "space to train in, such as --labels.space utkface"
                    )
    for prepared in sets:
        try:
            race_mapping(prepared.label_space, space)
        except ValueError as error:
            raise ConfigError(f"train.data {prepared.uri}: {error}") from None
    return space


def check_no_overlaps(
    trained: Sequence[pa.Table], crops: Sequence[pa.Table], sets: Sequence[PreparedSet], storage: Storage
) -> None:
    """Call `check_no_overlap` within each set and between any two; the tables are in the order of the sets."""
    for rows, table, prepared in zip(trained, crops, sets, strict=True):
        check_no_overlap(rows, table, prepared, storage)
    for i, j in itertools.permutations(range(len(sets)), 2):
        check_no_overlap(trained[i], crops[j], sets[j], storage, sets[i])


def check_no_overlap(
    train: pa.Table, crops: pa.Table, prepared: PreparedSet, storage: Storage, trained: PreparedSet | None = None
) -> None:
    """Reject a set with an image in val or test that is byte for byte in train.

    Within a set, `prepare` keeps an image's copies together, unless they are labelled as different subjects.

    Args:
        train: the training rows.
        crops: the rows of all splits; both have content_hash and split.
        prepared: the set that `crops` are from.
        storage: where the set is; the name of an image is read only for an error.
        trained: the set that `train` is from; None: the same set.

    Raises:
        ConfigError: there is an overlap; the message gives the number of images and the name of one.
    """
    others = crops.filter(pc.and_(pc.is_valid(crops["split"]), pc.not_equal(crops["split"], "train")))
    seen = pc.is_in(others["content_hash"], value_set=pc.unique(train["content_hash"]).drop_null())
    shared = others.filter(seen)
    if not shared.num_rows:
        return
    copies = storage.read_table(prepared.crops(storage), columns=["content_hash", "split", "key"])
    copies = copies.filter(pc.equal(copies["content_hash"], shared["content_hash"][0]))
    where = ", ".join(
        f"{key} in {split}" for key, split in zip(*copies.select(["key", "split"]).to_pydict().values(), strict=True)
    )
    of = "" if trained is None else f" of {trained.uri}"
    remedy = (
        "give copies the same subject, or leave them out," if trained is None else "leave them out of one of the two"
    )
    raise ConfigError(
        f"train.data {prepared.uri}: {shared.num_rows:,} images of {_listed(shared['split'])} are also, byte for byte, "
        f"in train{of}, such as {where}; {remedy} and prepare again"
    )


def copies_warnings(trained: Sequence[pa.Table], sets: Sequence[PreparedSet]) -> list[str]:
    """Return a warning if images are in train of several sets: they count more than once, perhaps with other labels.

    Args:
        trained: the training rows of each set, with content_hash.
        sets: the sets, in the same order.
    """
    contents = [pc.unique(rows["content_hash"]).drop_null() for rows in trained]
    counted = pa.chunked_array(contents, pa.string()).value_counts()
    num_copies = pc.sum(pc.greater(counted.field("counts"), 1)).as_py() or 0
    if not num_copies:
        return []
    return [
        f"train.data {_uris(sets)}: {num_copies:,} images are, byte for byte, in train of more than one set, and "
        "count once for each"
    ]


def class_warnings(
    counts: Mapping[str, Mapping[str, int]], tasks: Sequence[str], sets: Sequence[PreparedSet]
) -> list[str]:
    """Return warnings about classes of a gender or race head that no training row has: the head can't learn them.

    Args:
        counts: the training labels, counted by `evaluation.groups.class_counts`.
        tasks: the tasks that have a head.
        sets: the sets that the labels are from.
    """
    warnings = []
    for task in ("gender", "race"):
        missing = [name for name, count in counts[task].items() if not count]
        if task in tasks and missing:
            has = ", ".join(f"{name} {count:,}" for name, count in counts[task].items())
            warnings.append(
                f"train.data {_uris(sets)}: no training row has {task} {' or '.join(missing)}, so the model can't "
                f"learn to predict it; the rows have {has}"
            )
    return warnings


def vision_warnings(sets: Sequence[PreparedSet]) -> list[str]:
    """Return warnings about crops that were made without a detector, or with settings that differ between sets.

    A checkpoint stores the vision settings of its first set. If crops differ between sets, a network can recognise the
    set by the crop, and learn the distribution of its labels.
    """
    warnings = [
        f"train.data {prepared.uri}: its crops were made with vision.detector none, which scoring can't use; prepare "
        "the source with mtcnn or haar if photographs are to be scored"
        for prepared in sets
        if prepared.detector == "none"
    ]
    first = Pipeline(vision=sets[0].vision).decisive()
    for prepared in sets[1:]:
        other = Pipeline(vision=prepared.vision).decisive()
        if {sets[0].detector, prepared.detector} <= {*CASCADES}:  # their crops are nearly the same
            other["vision.detector"] = first["vision.detector"]
        different = [f"{key} {first[key]} and {other[key]}" for key in first if first[key] != other[key]]
        if different:
            warnings.append(
                f"train.data: crops of {sets[0].uri} and {prepared.uri} were made with different settings: "
                f"{', '.join(different)}; the model may learn to tell the sets apart by them, and its checkpoint "
                "stores those of the first, with which scoring finds faces"
            )
    return warnings


def size_warnings(sets: Sequence[PreparedSet], image_size: int) -> list[str]:
    """Return a warning if the network's input, `image_size` pixels, is larger than the crops."""
    first = sets[0]
    if image_size <= first.crop_side_px:
        return []
    recipe = f"; --config {first.recipe}, with which the set was prepared, may fit" if first.recipe else ""
    return [
        f"the crops of train.data {_uris(sets)} are {first.crop_side_px} px, and model.image_size {image_size} is "
        f"larger: it takes more time, but shows no more detail{recipe}"
    ]


def _listed(column: pa.ChunkedArray) -> str:
    return " and ".join(sorted(pc.unique(column).to_pylist()))


def _uris(sets: Sequence[PreparedSet]) -> str:
    return " + ".join(prepared.uri for prepared in sets)
