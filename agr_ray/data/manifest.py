"""From the rows of a labelled source to its manifest: one row per image, whatever its status."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS
from agr_ray.schema import LABEL_COLUMNS, MANIFEST, Status
from agr_ray.storage import ObjectInfo

IMAGE_SUFFIXES: Final = (
    *(".jpg", ".jpeg", ".jfif", ".mpo"),
    *(".heic", ".heif", ".avif"),
    *(".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
)
"""Suffixes, in upper or lower case, of the files of a source that become rows."""

SUBJECT_PREFIX: Final = "subject:"
"""Prefix of the group_id of a subject."""
CONFLICT_PREFIX: Final = "conflict:"
"""Prefix of the group_id of a subject with two copies of one image under different labels."""


@dataclass(frozen=True, slots=True)
class ParsedLabel:
    """The labels of one image, or why they can't be used.

    A label that is None is missing, which is allowed. With an `error` everything else is None.

    At most one of `age` and the range `age_low` to `age_high` is given.
    """

    age: float | None = None
    """Years."""
    gender: str | None = None
    """One of the label space's genders."""
    race: str | None = None
    """One of the label space's races."""
    subject: str | None = None
    """The person shown, as named by the source."""
    split: str | None = None
    """One of `schema.SPLITS`, if the source has its own splits."""
    error: str | None = None
    age_low: float | None = None
    """Years; first of a range."""
    age_high: float | None = None
    """Years; last of a range."""
    fold: int | None = None
    """Number of the fold, from 0, if the source has its own folds for cross-validation."""
    dropped: str | None = None
    """Which labels were given and dropped, and why; the others can be used."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One image of a labelled source: where it is and what its label says."""

    uri: str
    key: str
    label: ParsedLabel
    etag: str | None = None
    size_bytes: int | None = None
    missing: bool = False
    """Whether the source labels an image that does not exist."""

    @classmethod
    def listed(cls, info: ObjectInfo, label: ParsedLabel) -> SourceRow:
        """Return the row of a listed image."""
        return cls(info.uri, info.key, label, info.etag, info.size_bytes)


@dataclass(frozen=True, slots=True)
class Content:
    """Result of reading one image: the hash of its bytes, or why there is none."""

    digest: str | None
    status: str = str(Status.OK)
    error: str | None = None


def image_id(uri: str) -> str:
    """Return a labelled image's id: 32 hex digits of the URI's BLAKE2b hash. Scoring: `planning.photograph_id`."""
    return hashlib.blake2b(uri.encode(), digest_size=16).hexdigest()


def content_hash(data: bytes) -> str:
    """Return the SHA-256 of the bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def check_age(years: float) -> str | None:
    """Return the error in an age, or None if it is valid."""
    if math.isfinite(years) and AGE_MIN_YEARS <= years <= AGE_MAX_YEARS:
        return None
    return f"age {years:g} is outside {AGE_MIN_YEARS:g} to {AGE_MAX_YEARS:g} years"


def in_key_order(rows: Iterable[SourceRow], source: str) -> list[SourceRow]:
    """Return a source's rows, sorted by key.

    Raises:
        ValueError: one key occurs twice.
    """
    ordered = sorted(rows, key=lambda row: row.key)
    for before, after in itertools.pairwise(ordered):
        if before.key == after.key:
            raise ValueError(f"source {source!r} has the key {after.key!r} twice")
    return ordered


def build_manifest(rows: Sequence[SourceRow], source: str, contents: Mapping[str, Content]) -> pa.Table:
    """Return the manifest of a source: a row for each image, whatever its status, in the order of `rows`.

    `group_id` is `subject:<name>` if the subject is known, else `sha256:<hash of the content>`. Images of equal
    content share one group, even under the names of two subjects. No split is assigned here.

    Args:
        rows: result of `in_key_order`.
        source: the source's name.
        contents: the content of each image that has been read, by image_id. An image that is not among them has no
            content_hash and no group; it is `ok` unless its label can't be used or the source says that it is missing.

    Returns:
        A table of `schema.MANIFEST`, the same for the same source on every machine, except for URIs and etags.
    """
    row_contents = [_content(row, contents) for row in rows]
    groups = group_ids([row.label for row in rows], [content.digest for content in row_contents])
    records = [
        {
            "image_id": image_id(row.uri),
            "uri": row.uri,
            "key": row.key,
            "etag": row.etag,
            "size_bytes": row.size_bytes,
            "source": source,
            "content_hash": content.digest,
            "group_id": group,
            "split": row.label.split,
            "fold": row.label.fold,
            "age": row.label.age,
            "gender": row.label.gender,
            "race": row.label.race,
            "age_low": row.label.age_low,
            "age_high": row.label.age_high,
            "status": content.status,
            "error": content.error or row.label.dropped,
        }
        for row, content, group in zip(rows, row_contents, groups, strict=True)
    ]
    return pa.Table.from_pylist(records, schema=MANIFEST)


def _content(row: SourceRow, contents: Mapping[str, Content]) -> Content:
    if row.label.error is not None:
        return Content(None, str(Status.BAD_LABEL), row.label.error)
    if row.missing:
        return Content(None, str(Status.MISSING), f"{row.key} is labelled but does not exist")
    return contents.get(image_id(row.uri), Content(None))


def labels_digest(manifest: pa.Table) -> str:
    """Return the SHA-256, in hex, of each image's key, content, labels and split, independent of its URI."""
    names = ("key", "content_hash", "split", *LABEL_COLUMNS, "status")
    rows = sorted(zip(*(manifest.column(name).to_pylist() for name in names), strict=True), key=lambda row: str(row[0]))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def group_ids(labels: Sequence[ParsedLabel], digests: Sequence[str | None]) -> list[str | None]:
    """Return the group of each image: a set of images that must be in the same split.

    Images belong together if they show one subject or have equal content, or if a chain of such links connects them.
    The group is named after the first of its subjects in sorted order, else after its content. An image without a
    digest, which was not read, has no group.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    of_content: dict[str, list[ParsedLabel]] = defaultdict(list)
    for label, digest in zip(labels, digests, strict=True):
        if digest is not None:
            of_content[digest].append(label)
            content = root(f"sha256:{digest}")
            if label.subject is not None:
                # The smallest subject must name the group, but "subject:" sorts after "sha256:".
                ends = sorted(
                    (content, root(f"{SUBJECT_PREFIX}{label.subject}")), key=lambda each: (each[:3] != "sub", each)
                )
                parent[ends[1]] = ends[0]

    # Within a group named after its content, every difference is a conflict, which splits.py detects. The ages of one
    # subject may differ, so only images of equal content can conflict.
    conflicting = {
        root(f"sha256:{digest}") for digest, twins in of_content.items() if labels_conflict([_values(t) for t in twins])
    }
    names: list[str | None] = []
    for digest in digests:
        name = None if digest is None else root(f"sha256:{digest}")
        if name in conflicting and name.startswith(SUBJECT_PREFIX):
            name = CONFLICT_PREFIX + name
        names.append(name)
    return names


def labels_conflict(labels: Sequence[Sequence[object]]) -> bool:
    """Return whether any label has two different values; a missing label agrees with every value."""
    return any(len({value for value in column if value is not None}) > 1 for column in zip(*labels, strict=True))


def _values(label: ParsedLabel) -> tuple[float | str | None, ...]:
    return (label.age, label.age_low, label.age_high, label.gender, label.race)
