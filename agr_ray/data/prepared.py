"""A prepared set: the folder that `prepare` writes, and that training and evaluation read.

manifest.parquet    schema.MANIFEST: every input with its labels, group and split
splits.tsv          group_id, key and split of every image, sorted: its SHA-256 names the split
split_memory.parquet    content_hash and split of all content that the set ever held, so that images keep their split
crops/*.parquet     schema.CROPS: one row for every manifest row, whatever its status
near_duplicates.parquet    schema.NEAR_DUPLICATES: images with a near-duplicate in a split that is held out from them
prepare.json        the record below; `finished` is true once every row is there
work/               only while the set is made or updated: `data.preparation`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from agr_ray.config import VisionConfig
from agr_ray.errors import ConfigError
from agr_ray.labels import LabelSpace
from agr_ray.storage import MissingObject, Storage

FORMAT_VERSION: Final = 4
NEAR_DUPLICATES_FILE: Final = "near_duplicates.parquet"

RENDERED: Final = "rendered"
"""`source.name` of rendered faces, as in the recipe demo."""

TERMS: Final = {
    "utkface": "UTKFace: for non-commercial research only; copyright belongs to the images' owners",
    "fairface": "FairFace: CC BY 4.0; its images come from YFCC100M and have their own licences",
    "adience": "Adience: as agreed with its publishers",
    "morph2": "MORPH II: as agreed with its publishers; the academic release is for non-commercial research",
    "fgnet": "FG-NET: for research; see its publishers' terms",
}
"""Terms of published data sets by `source.kind`, as their publishers state them. A folder of one's own has none."""


class PreparedSet(BaseModel):
    """The content of `prepare.json`, and the URI of its set."""

    model_config = ConfigDict(frozen=True)

    format_version: int
    finished: bool
    settings: dict[str, Any]
    """Settings that must stay the same while the set grows: source, label space, split, vision, crop."""
    split_manifest_sha256: str
    labels_sha256: str
    """SHA-256 of all images' content, labels and splits."""
    splits: dict[str, int]
    """Images by split; files that turn out not to be images have a row without a crop."""
    counts: dict[str, int]
    """Rows by status; empty until finished."""
    near_duplicates: dict[str, int] = {}
    """Images by split that have a near-duplicate in a split that is held out from it; with `split.near_duplicates`
    `exclude`, these images have no split."""
    recipe: str = ""
    """The recipe that its command named, if any."""
    uri: str = ""

    @property
    def digest(self) -> str:
        """Return the SHA-256, in hex, of all that determines the content: images, labels, splits and settings."""
        text = json.dumps([self.labels_sha256, self.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def label_space(self) -> LabelSpace:
        """Return the label space of the rows."""
        return LabelSpace.from_json(self.settings["label_space"])

    @property
    def crop_side_px(self) -> int:
        """Return the side of the alignment template in the crops, without its margins."""
        return int(self.settings["crop_side_px"])

    @property
    def source(self) -> str:
        """Return the name of the source: `source.name`, else its kind, or, for a plain folder, the set's name."""
        name, kind = self.settings["source"]["name"], self.settings["source"]["kind"]
        return str(name or (self.uri.rpartition("/")[2] if kind == "folder" else "") or kind)

    @property
    def vision(self) -> VisionConfig:
        """Return the settings with which photographs became crops."""
        return VisionConfig(**self.settings["vision"])

    @property
    def detector(self) -> str:
        """Return the detector that found the faces."""
        return self.vision.detector

    def write(self, storage: Storage) -> None:
        """Write `prepare.json`."""
        text = json.dumps(self.model_dump(exclude={"uri"}), indent=2) + "\n"
        storage.write(storage.join(self.uri, "prepare.json"), text.encode())

    def crops(self, storage: Storage) -> str:
        """Return the folder of the crops' Parquet parts."""
        return storage.join(self.uri, "crops")

    def parts(self, storage: Storage) -> list[str]:
        """Return the URIs of these parts."""
        return [info.uri for info in storage.list(self.crops(storage), (".parquet",))]

    def manifest(self, storage: Storage) -> str:
        """Return the manifest's URI."""
        return storage.join(self.uri, "manifest.parquet")


def find_prepared(storage: Storage, uri: str, key: str) -> PreparedSet | None:
    """Return the prepared set at `uri`, finished or not, which the configuration's `key` names; None if there is none.

    Raises:
        ConfigError: `prepare.json` is damaged, or of another format version.
    """
    try:
        record = json.loads(storage.read(storage.join(uri, "prepare.json")))
        if record["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{key} {uri}: format_version {record['format_version']}; this version reads {FORMAT_VERSION}; "
                "prepare the source into another folder"
            )
        return PreparedSet(**record | {"uri": uri})
    except MissingObject:
        return None
    except (ValueError, TypeError, KeyError):  # not JSON, no table, or not this one
        raise ConfigError(f"{key} {uri}: its prepare.json is not what agr-ray prepare writes") from None


def open_prepared(storage: Storage, uri: str, key: str) -> PreparedSet:
    """Return the finished set at `uri`, which the configuration's `key` names.

    Raises:
        ConfigError: there is no set, or it can't be used.
    """
    uri = storage.absolute(uri).rstrip("/")
    prepared = find_prepared(storage, uri, key)
    if prepared is None:
        problem = "it holds no prepare.json" if storage.exists(uri) else "nothing is there"
        raise ConfigError(f"{key} {uri}: not a prepared set: {problem}; agr-ray prepare makes one")
    if not prepared.finished:
        raise ConfigError(f"{key} {uri}: preparation has not finished; the same agr-ray prepare command resumes it")
    ids = storage.read_table(prepared.crops(storage), columns=["image_id"])["image_id"]
    num_images, num_expected = pc.count_distinct(ids).as_py(), sum(prepared.counts.values())
    if not len(ids) == num_images == num_expected:
        raise ConfigError(
            f"{key} {uri}: holds {len(ids):,} crop rows of {num_images:,} images, but should hold {num_expected:,}; "
            "the same agr-ray prepare command repairs it"
        )
    return prepared


def describe_sets(
    sets: Sequence[PreparedSet],
    num_train_rows: Sequence[int],
    num_val_rows: Sequence[int],
    shares: Sequence[float] = (),
) -> dict[str, Any]:
    """Return a checkpoint's record of its training sets: location, source, splits, and number of rows of each.

    For several sets, names are joined by " + " and counts are added up. `split_manifest_sha256` is the SHA-256 of the
    sets' own, sorted, one per line. `sets` has an entry for each set, with its share of the training rows drawn.

    Args:
        sets: in the order of `train.data`.
        num_train_rows: training crops of each set.
        num_val_rows: validation crops of each set; `splits` counts images, some of which have no crop.
        shares: `train.data_shares`.
    """
    if len(sets) == 1:
        return _describe_set(sets[0], num_train_rows[0], num_val_rows[0])
    records = [_describe_set(*each) for each in zip(sets, num_train_rows, num_val_rows, strict=True)]
    parts = shares or num_train_rows
    lines = "".join(f"{sha256}\n" for sha256 in sorted(prepared.split_manifest_sha256 for prepared in sets))
    return {
        **{key: " + ".join(dict.fromkeys(record[key] for record in records)) for key in ("uri", "source", "detector")},
        "licence": "; ".join(dict.fromkeys(record["licence"] for record in records if record["licence"])),
        "split_manifest_sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "splits": {name: sum(prepared.splits[name] for prepared in sets) for name in sets[0].splits},
        "num_train_rows": sum(num_train_rows),
        "num_val_rows": sum(num_val_rows),
        "sets": [record | {"share": part / sum(parts)} for record, part in zip(records, parts, strict=True)],
    }


def _describe_set(prepared: PreparedSet, num_train_rows: int, num_val_rows: int) -> dict[str, Any]:
    return {
        "uri": prepared.uri,
        "source": prepared.source,
        "licence": TERMS.get(str(prepared.settings["source"]["kind"]), ""),
        "detector": prepared.detector,
        "split_manifest_sha256": prepared.split_manifest_sha256,
        "splits": prepared.splits,
        "num_train_rows": num_train_rows,
        "num_val_rows": num_val_rows,
    }
