"""Split a manifest into train, val and test: by group, stratified, and the same on every machine.

The split depends on the groups' ids, their labels and the seed, but not on paths or the order of rows.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from agr_ray.data.manifest import CONFLICT_PREFIX, SUBJECT_PREFIX, labels_conflict
from agr_ray.schema import LABEL_COLUMNS, MANIFEST, SPLITS, Status

TRAIN: Final = "train"
DECADE_YEARS: Final = 10
_MOST: Final = 0.8
"""Largest part of train's fraction that subjects with contradictory labels may fill."""

_FORMULA: Final = ("=", "+", "-", "@", '"')
"""First characters of a formula in a spreadsheet, and of a quoted one; others, such as a tab, are escaped anyway."""

Stratum = tuple[int, str, str]
"""Age decade, gender and race; -1 or "" if the label is missing."""


class SplitLeakError(ValueError):
    """A group is in two splits. The message names an image of each."""


@dataclass(frozen=True, slots=True)
class _Group:
    """The images that must stay together."""

    group_id: str
    num_images: int
    stratum: Stratum
    conflicting: bool
    given: str | None
    """The split that the source assigned."""


def assign_splits(
    manifest: pa.Table,
    fractions: Mapping[str, float],
    seed: int,
    sample: int | None = None,
    drawn: Mapping[str, bool] | None = None,
) -> pa.Table:
    """Return the manifest with its column `split` filled in.

    Groups are assigned stratum by stratum (age decade x gender x race), in an order hashed from the seed, each to
    the split that is furthest behind its fraction. The surplus or deficit of a stratum is carried into the next, so
    that the totals are right however small the strata are.

    - Groups with equal images under different labels go to train, or to no split if train has no fraction. So do
      subjects whose images differ in gender or race, unless these are most of train's fraction: then the labels, not
      single mistakes, contradict the subjects, and they are assigned like all others.
    - A split that the source assigned is kept and counts towards its fraction; the rest of the group joins it. Only a
      conflicting group that the source assigned to val or test is left out.
    - With `sample`, a stratified sample of that many images is drawn first, and the rest has no split. If there
      are fewer images, all are taken.
    - Rows that are not ok have no split.

    Args:
        fractions: fractions of the images by split; a split that is not named gets none. Their sum is 1.
        drawn: with `sample`, whether each known group was drawn for an earlier version of the manifest. These groups
            stay in or out; new groups are drawn only until the sample is full.

    Raises:
        ValueError: fractions or sample are impossible.
        SplitLeakError: the source assigned one group to two splits.
    """
    _check_fractions(fractions)
    if sample is not None and sample < 1:
        raise ValueError(f"sample is {sample}: at least 1 image is needed")
    groups = _groups(manifest)
    if sample is not None:
        groups = _draw_more(groups, sample, seed, drawn or {})
    split_of = _deal(groups, fractions, seed)
    splits = [
        split_of.get(group) if status == Status.OK and group is not None else None
        for group, status in zip(
            manifest.column("group_id").to_pylist(), manifest.column("status").to_pylist(), strict=True
        )
    ]
    index = manifest.schema.get_field_index("split")
    return manifest.set_column(index, MANIFEST.field("split"), pa.array(splits, pa.string()))


def check_no_leak(manifest: pa.Table) -> None:
    """Check that no group is in two splits.

    Raises:
        SplitLeakError: a group is; the message names the first, and an image of each split.
    """
    _given_splits(zip(*(manifest.column(name).to_pylist() for name in ("group_id", "key", "split")), strict=True))


def deal_groups(images: pa.Table, shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Return the share of each group: stratified like splits, but no group has a split yet, and none is left out.

    Args:
        images: rows of schema.MANIFEST, of any status; those without a group are ignored.
        shares: fraction of the images by name; their sum is 1.
        seed: of the order.
    """
    index, status = images.schema.get_field_index("split"), images.schema.get_field_index("status")
    images = images.set_column(index, "split", pa.nulls(images.num_rows, pa.string()))
    images = images.set_column(status, "status", pa.array([str(Status.OK)] * images.num_rows, pa.string()))
    dealer = _Dealer(shares)
    return {group.group_id: dealer.deal(group.num_images) for group in _shuffled(_groups(images), seed, "folds")}


def shuffled_order(names: Iterable[str], seed: int, purpose: str) -> list[str]:
    """Return names in an order that depends only on the names, the seed and the purpose."""
    return sorted(names, key=lambda name: _order(seed, purpose, name))


def crossing_copies(manifest: pa.Table) -> pa.Array:
    """Return whether each image, (n,) bool, is byte for byte in a split that is held out from its own.

    Val and test are held out from train, and test from val.
    """
    contents, splits = (manifest.column(name).to_pylist() for name in ("content_hash", "split"))
    rank = {split: number for number, split in enumerate(SPLITS)}
    highest: dict[str, int] = {}
    for content, split in zip(contents, splits, strict=True):
        if content is not None and split is not None:
            highest[content] = max(highest.get(content, 0), rank[split])
    crosses = [
        content is not None and split is not None and rank[split] < highest[content]
        for content, split in zip(contents, splits, strict=True)
    ]
    return pa.array(crosses, pa.bool_())


def _given_splits(rows: Iterable[tuple[str | None, str, str | None]]) -> dict[str, str]:
    """Return the split of each group that has one, from rows of group, key and split.

    Raises:
        SplitLeakError: a group has two.
    """
    first: dict[str, tuple[str, str]] = {}
    for group, key, split in rows:
        if group is None or split is None:
            continue
        other_key, other_split = first.setdefault(group, (key, split))
        if other_split != split:
            kind, _, name = group.removeprefix(CONFLICT_PREFIX).partition(":")
            why = (
                f"show the subject {name!r}, or are copies of its images"
                if kind == "subject"
                else "are the same image, byte for byte"
            )
            raise SplitLeakError(f"{other_key} in {other_split} and {key} in {split} {why}")
    return {group: split for group, (_, split) in first.items()}


def contradicting_subjects(manifest: pa.Table) -> list[tuple[str, list[str]]]:
    """Return the subjects whose images in the splits differ in gender or race, and the keys of two such images each."""
    seen: dict[str, list[tuple[str, str | None, str | None]]] = defaultdict(list)
    columns = (manifest.column(name).to_pylist() for name in ("group_id", "split", "key", "gender", "race"))
    for group, split, key, gender, race in zip(*columns, strict=True):
        if split is not None and group is not None and group.startswith(SUBJECT_PREFIX):
            seen[group].append((key, gender, race))
    found = []
    for group, images in sorted(seen.items()):
        for index in (1, 2):  # gender, race
            known = {image[index]: image[0] for image in reversed(images) if image[index] is not None}
            if len(known) > 1:
                found.append((group.removeprefix(SUBJECT_PREFIX), list(known.values())[:-3:-1]))
                break
    return found


def split_manifest_text(manifest: pa.Table) -> str:
    """Return the split manifest: sorted lines of group, key and split, separated by tabs.

    Rows without a split are left out. Backslash, tab and line breaks in a key are escaped as in C. So is a first
    character with which a spreadsheet would take the key for a formula.
    """
    columns = [manifest.column(name).to_pylist() for name in ("group_id", "key", "split")]
    lines = [
        f"{_escape(group)}\t{_escape(key)}\t{split}\n"
        for group, key, split in zip(*columns, strict=True)
        if split is not None
    ]
    return "".join(sorted(lines))


def split_digest(text: str) -> str:
    """Return the SHA-256 of a split manifest, in hex: the name by which checkpoints and reports know it."""
    return hashlib.sha256(text.encode()).hexdigest()


def _groups(manifest: pa.Table) -> list[_Group]:
    """Return the groups of the rows that are ok, in the order of their ids."""
    members: dict[str, list[tuple[float | None, str | None, str | None]]] = defaultdict(list)
    names = ("group_id", "key", "split", *LABEL_COLUMNS, "status")
    rows = list(zip(*(manifest.column(name).to_pylist() for name in names), strict=True))
    given = _given_splits(row[:3] for row in rows if row[-1] == Status.OK)
    for group, _, _, age, low, high, gender, race, status in rows:
        if status != Status.OK or group is None:
            continue
        if age is None and low is not None:
            age = (low + high) / 2
        members[group].append((age, gender, race))
    return [
        _Group(group, len(labels), _stratum(labels), _conflicts(group, labels), given.get(group))
        for group, labels in sorted(members.items())
    ]


def _stratum(labels: list[tuple[float | None, str | None, str | None]]) -> Stratum:
    """Return the stratum of a group: that of its smallest label, so that the order of rows does not matter."""
    strata = [
        (-1 if age is None else int(age // DECADE_YEARS), gender or "", race or "") for age, gender, race in labels
    ]
    return min(strata, key=lambda stratum: (stratum[0] < 0, stratum[1] == "", stratum[2] == "", stratum))


def _conflicts(group: str, labels: list[tuple[float | None, str | None, str | None]]) -> bool:
    if group.startswith(CONFLICT_PREFIX):
        return True
    # One person's photographs may differ in age.
    return labels_conflict([label[1:] if group.startswith(SUBJECT_PREFIX) else label for label in labels])


def _is_contradicting_subject(group: _Group) -> bool:
    """Return whether a subject's images differ in gender or race, but no two of them are equal."""
    return group.conflicting and group.group_id.startswith(SUBJECT_PREFIX)


def _order(*parts: object) -> bytes:
    """Return a hash to sort by: a shuffle that depends only on its arguments."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()


def _shuffled(groups: list[_Group], seed: int, purpose: str) -> list[_Group]:
    """Return the groups stratum by stratum, strata and the groups within them in an order hashed from the seed."""
    return sorted(
        groups,
        key=lambda group: (
            _order(seed, purpose, "stratum", *group.stratum),
            group.stratum,
            _order(seed, purpose, "group", group.group_id),
        ),
    )


class _Dealer:
    """Keeps several shares of a growing total as close to their fractions as whole groups allow."""

    def __init__(self, fractions: Mapping[str, float]) -> None:
        self._fractions = fractions
        self._dealt = dict.fromkeys(fractions, 0)

    def give(self, share: str | None, num_images: int) -> None:
        """Count a group whose share is already decided."""
        if share in self._dealt:
            self._dealt[share] += num_images

    def deal(self, num_images: int) -> str:
        """Return the share that is furthest behind once the group counts, and give the group to it."""
        total = sum(self._dealt.values()) + num_images
        # They sum to num_images, so the largest is above 0. A share without a fraction is never above 0.
        behind = {share: fraction * total - self._dealt[share] for share, fraction in self._fractions.items()}
        share = max(behind, key=lambda each: behind[each])  # the first of equal ones, in the order of `fractions`
        self._dealt[share] += num_images
        return share


def _deal(groups: list[_Group], fractions: Mapping[str, float], seed: int) -> dict[str, str | None]:
    """Return the split of each group."""
    dealer = _Dealer({split: fractions.get(split, 0.0) for split in SPLITS})
    conflict_split = TRAIN if fractions.get(TRAIN, 0.0) > 0 else None
    num_contradicting = sum(group.num_images for group in groups if _is_contradicting_subject(group))
    too_many = num_contradicting > _MOST * fractions.get(TRAIN, 0.0) * sum(group.num_images for group in groups)
    is_apart = {
        group.group_id
        for group in groups
        if group.conflicting and not (too_many and conflict_split and _is_contradicting_subject(group))
    }
    by_stratum: dict[Stratum, list[_Group]] = defaultdict(list)
    for group in _shuffled(groups, seed, "split"):
        by_stratum[group.stratum].append(group)
    splits: dict[str, str | None] = {}
    for members in by_stratum.values():
        # Groups with a fixed split come first, so that the rest of their stratum makes up for them.
        for group in members:
            if group.group_id in is_apart:
                splits[group.group_id] = conflict_split if group.given in (None, TRAIN) else None
            elif group.given is not None:
                splits[group.group_id] = group.given
            else:
                continue
            dealer.give(splits[group.group_id], group.num_images)
        for group in members:
            if group.group_id not in splits:
                splits[group.group_id] = dealer.deal(group.num_images)
    return splits


def _draw_more(groups: list[_Group], sample: int, seed: int, drawn: Mapping[str, bool]) -> list[_Group]:
    """Return the groups that were drawn before, and as many new ones as the sample lacks."""
    earlier = [group for group in groups if drawn.get(group.group_id)]
    missing = sample - sum(group.num_images for group in earlier)
    new = [group for group in groups if group.group_id not in drawn]
    return earlier + (_draw(new, missing, seed) if missing > 0 else [])


def _draw(groups: list[_Group], sample: int, seed: int) -> list[_Group]:
    """Return a stratified sample of groups with `sample` images, or as close to it as whole groups allow."""
    total = sum(group.num_images for group in groups)
    if sample >= total:
        return groups
    dealer = _Dealer({"in": sample / total, "out": 1 - sample / total})
    shuffled = _shuffled(groups, seed, "sample")
    taken = {group.group_id: dealer.deal(group.num_images) == "in" for group in shuffled}
    surplus = sum(group.num_images for group in shuffled if taken[group.group_id]) - sample
    for group in sorted(shuffled, key=lambda each: _order(seed, "adjust", each.group_id)):
        # The total is now off by less than one group; groups that fit into the difference correct it.
        if surplus > 0 and taken[group.group_id] and group.num_images <= surplus:
            taken[group.group_id] = False
            surplus -= group.num_images
        elif surplus < 0 and not taken[group.group_id] and group.num_images <= -surplus:
            taken[group.group_id] = True
            surplus += group.num_images
    return [group for group in groups if taken[group.group_id]]


def _check_fractions(fractions: Mapping[str, float]) -> None:
    unknown = sorted(set(fractions) - set(SPLITS))
    if unknown:
        raise ValueError(f"fractions has unknown keys {', '.join(unknown)}: expected {', '.join(SPLITS)}")
    shown = ", ".join(f"{split} {fraction:g}" for split, fraction in fractions.items())
    if not all(0 <= fraction <= 1 for fraction in fractions.values()):
        raise ValueError(f"fractions are {shown}: each must be between 0 and 1")
    if not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"fractions are {shown}: their sum is {sum(fractions.values()):g} and must be 1")


def _escape(text: str) -> str:
    text = text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    return f"\\{text}" if text.startswith(_FORMULA) else text
