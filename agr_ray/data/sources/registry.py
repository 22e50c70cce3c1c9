"""The module and the label space of each kind of source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from agr_ray.config import LabelsConfig, SourceConfig, SplitConfig
from agr_ray.data.manifest import SourceRow
from agr_ray.data.sources import adience, fairface, fgnet, folder, morph2, utkface, utkface_lists
from agr_ray.data.sources.label_table import find_labels, given_labels
from agr_ray.data.sources.label_values import LabelCodeError, LabelParser
from agr_ray.errors import ConfigError
from agr_ray.labels import ADIENCE, FAIRFACE, FGNET, MORPH2, UTKFACE, LabelSpace
from agr_ray.storage import Storage

LABEL_SPACES: Final = {
    "utkface": UTKFACE,
    "fairface": FAIRFACE,
    "adience": ADIENCE,
    "morph2": MORPH2,
    "fgnet": FGNET,
}
"""Label space of each kind of source that has its own; for the others, the configuration sets it."""


def label_space(source: SourceConfig, labels: LabelsConfig) -> LabelSpace:
    """Return the label space of a source.

    Raises:
        ConfigError: the configuration names a different one from the source's own.
    """
    own, configured = LABEL_SPACES.get(source.kind), labels.label_space
    if own is not None and configured not in (None, own):
        raise ConfigError(
            f"labels: source.kind {source.kind} has the label space {own.name}; leave out [labels]. To train in "
            "another one, set labels.space for agr-ray train"
        )
    return own or configured or UTKFACE


def check_codes(source: SourceConfig, labels: LabelsConfig) -> None:
    """Check the codes of genders and races.

    Raises:
        ConfigError: one stands for a word that the label space does not have, or for two words.
    """
    try:
        LabelParser(label_space(source, labels), source.gender_codes, source.race_codes)
    except LabelCodeError as error:
        raise ConfigError(f"source: {error}") from None


def split_fractions(source: SourceConfig, split: SplitConfig) -> dict[str, float]:
    """Return the split fractions for images without a split of their own."""
    if (source.kind == "fairface" and source.published_splits) or (source.kind == "utkface" and source.labels):
        return {"train": round(1.0 - split.val, 9), "val": split.val, "test": 0.0}
    return split.fractions


def source_rows(
    source: SourceConfig, space: LabelSpace, storage: Storage, note: Callable[[str], None]
) -> Iterator[SourceRow]:
    """Yield the images of a source with their labels.

    Args:
        source: kind and place.
        space: of the labels.
        storage: where it is.
        note: called with a line for each kind of thing that is dropped or ignored.

    Raises:
        LabelTableError: the labels can't be used.
        StorageUnavailable: the folder or bucket can't be listed.
    """
    uri = storage.absolute(source.uri)
    if source.kind == "utkface":
        rows = utkface.source_rows(storage, uri)
        return utkface_lists.listed_rows(storage, storage.absolute(source.labels), rows) if source.labels else rows
    if source.kind == "fairface":
        return fairface.source_rows(storage, uri, published_splits=source.published_splits, note=note)
    if source.kind == "adience":
        return adience.source_rows(storage, uri, note=note)
    if source.kind == "morph2":
        labels_uri = storage.absolute(source.labels) if source.labels else ""
        return morph2.source_rows(storage, uri, labels_uri, note=note)
    if source.kind == "fgnet":
        return fgnet.source_rows(storage, uri)
    return folder.source_rows(
        storage,
        uri,
        given_labels(storage, uri, source.labels) if source.labels else find_labels(storage, uri),
        space=space,
        columns={str(name): theirs for name, theirs in source.columns.items()},
        gender_codes=source.gender_codes,
        race_codes=source.race_codes,
        missing_values=source.missing_values,
        note=note,
    )
