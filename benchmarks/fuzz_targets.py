"""The targets of `fuzz.py`: what makes an input from a generator, what reads it, and which errors are allowed."""

from __future__ import annotations

import gzip
import io
import json
import string
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from agr_ray.cli import COMMANDS
from agr_ray.config import Job, PredictJob, ScoreConfig, parse, parsing
from agr_ray.config.command_line import CommandParser
from agr_ray.config.jobs import SECTIONS
from agr_ray.data.inventory import InventoryError, read_inventory
from agr_ray.data.rendered import render_chip
from agr_ray.data.sources.folder import source_rows
from agr_ray.data.sources.label_table import LabelTableError
from agr_ray.errors import ConfigError
from agr_ray.labels import UTKFACE
from agr_ray.scoring.grouping import check_grouping
from agr_ray.scoring.listing import Listing, glob_expression
from agr_ray.storage import Storage, StorageError, StorageUnavailable
from agr_ray.vision.decode import ImageError, decode_image

HEICS: Final = Path(__file__).parents[1] / "tests" / "unit" / "heic"
ODD: Final = (0, 1, 2, 127, 128, 255, 256, 32_767, 32_768, 65_535, 2**31 - 1, 2**31, 2**32 - 1)
TEXTS: Final = (
    *("", " ", "a", "..", "../../etc/passwd", "/", "\0", "\x1b[2J", "é", "日本", "\ud800", "\u202e", "true", "null"),
    *("nan", "inf", "-1", "0", "1e999", "9" * 400, "[", "]", "[[", "{}", '{"a": 1}', "[1, 2]", "'", '"', "=1+1", "%s"),
    *("s3://b/k", "s3://", "s3:/b", "file:///x", "http://u:p@h", "*", "**", "**/*.jpg", "(?P<a>x)", "(", "a" * 3000),
)


@dataclass(frozen=True)
class Target:
    """One reader of foreign input."""

    share: float
    """Of all inputs."""
    feed: Callable[[Random], object]
    """Make an input and read it."""
    documented: tuple[type[BaseException], ...]
    """Errors that it may raise."""
    warm_up: Callable[[], object] = lambda: None
    """Build what all inputs share."""


# Bytes


def mutated(rng: Random, seeds: Sequence[bytes]) -> bytes:
    """Return one of the seeds with a few changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        size = len(data)
        at = rng.randrange(min(size, 200) if rng.random() < 0.5 else size) if size else 0
        length = rng.choice((1, 1, 2, 4, 4, 16, rng.randrange(1, 200)))
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(ODD))
            case 2:
                data[at : at + 2] = struct.pack(rng.choice("<>") + "H", rng.choice(ODD) % 65_536)
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length] * rng.choice((1, 1, 1, 50))
            case 5:
                data[at:at] = rng.randbytes(length)
            case _:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(data)


# Images


@cache
def images() -> list[bytes]:
    """Return a rendered face in every format, and in every mode that decoding treats in its own way."""
    face = Image.fromarray(render_chip(0, 16).image_rgb).resize((48, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.frombytes("I;16", (48, 40), bytes(range(240)) * 16)
    plain = [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("BMP", {})]
    kinds = [
        (face, *each) for each in (*plain, ("AVIF", {}), ("JPEG", {"progressive": True}), ("JPEG", {"exif": exif}))
    ]
    kinds += [(face, "TIFF", {"compression": name}) for name in (None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg")]
    kinds += [(face.convert(mode), "TIFF", {}) for mode in ("L", "P", "CMYK", "1", "LAB")]
    kinds += [(face.convert(mode), "PNG", {}) for mode in ("RGBA", "P", "LA", "1")] + [(grey16, "PNG", {})]
    kinds += [(face.convert("CMYK"), "JPEG", {}), (face.convert("L"), "JPEG", {}), (grey16, "TIFF", {})]
    kinds += [(face, name, {"save_all": True, "append_images": [face.rotate(90)]}) for name in ("GIF", "WEBP", "AVIF")]
    made = []
    for image, format_name, options in kinds:
        with io.BytesIO() as body:
            image.save(body, format_name, **options)
            made.append(body.getvalue())
    return [*made, *(path.read_bytes() for path in sorted(HEICS.glob("*.heic")))]


def decode(rng: Random) -> object:
    """Decode a mutated image. Half of the PNGs get correct checksums, without which nothing in them is read."""
    data = mutated(rng, images())
    if data.startswith(b"\x89PNG") and rng.random() < 0.5:
        data = with_checksums(data)
    return decode_image(data, max_pixels=1_000_000, max_side_px=rng.choice((None, 20, 1280)))


def with_checksums(png: bytes) -> bytes:
    """Return a PNG with the right checksum of each chunk."""
    data, at = bytearray(png), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


# Text


def text(rng: Random, alphabet: str = string.printable) -> str:
    """Return odd text, or a few characters of the alphabet."""
    if rng.random() < 0.4:
        return rng.choice(TEXTS)
    return "".join(rng.choices(alphabet, k=rng.randrange(1, 12)))


def value(rng: Random, depth: int = 2) -> Any:
    """Return a plain value of any type."""
    kind = rng.randrange(9 if depth else 6)
    if kind < 2:
        return text(rng)
    if kind < 5:
        return rng.choice((True, None, rng.choice(ODD), -rng.choice(ODD), 10**400, rng.random(), 1e308, "age", 0.5))
    if kind == 5:
        return rng.choice((float("nan"), float("inf"), rng.choice(TEXTS)))
    if kind < 8:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {text(rng): value(rng, depth - 1) for _ in range(rng.randrange(4))}


# Configuration

JOBS: Final = [command.job for command in COMMANDS.values()]


@cache
def parser_of(job: type[Job], prog: str | None = None) -> CommandParser:
    """Return the parser of a job, built once, because that takes a tenth of a second."""
    return CommandParser(job, prog)


@cache
def recipes() -> list[bytes]:
    """Return the built-in recipes."""
    return [file.read_bytes() for file in parsing.built_in_recipes().values()]


def toml(rng: Random) -> bytes:
    """Return a recipe: a changed one, or one of known and unknown sections, keys and values."""
    if rng.random() < 0.4:
        return mutated(rng, recipes())
    lines = []
    for _ in range(rng.randrange(1, 4)):
        section = rng.choice([*SECTIONS]) if rng.random() < 0.9 else text(rng)
        lines.append(f"[{section}]")
        keys = [*SECTIONS[section].model_fields] if section in SECTIONS else ["key"]
        for _ in range(rng.randrange(4)):
            key = rng.choice(keys) if rng.random() < 0.9 else text(rng)
            lines.append(f"{key} = {json.dumps(value(rng)).replace('NaN', 'nan').replace('Infinity', 'inf')}")
    return "\n".join(lines).encode(errors="replace")


def read_toml(rng: Random) -> object:
    """Read a recipe, with a variable of the environment now and then."""
    job, recipe, environ = rng.choice(JOBS), toml(rng), {}
    if rng.random() < 0.2:
        section = rng.choice([*SECTIONS, "new_run"])
        key = rng.choice([*SECTIONS[section].model_fields]) if section in SECTIONS else text(rng)
        name = f"AGR_RAY_{section}__{key}".upper() if rng.random() < 0.8 else f"AGR_RAY_{section.upper()}"
        environ[name] = rng.choice((text(rng), json.dumps(value(rng))))
    return parse(job, ["--config", "./recipe.toml"], environ, lambda *_: recipe)


def read_command_line(rng: Random) -> object:
    """Read a command line of known and unknown options and odd values."""
    job = rng.choice(JOBS)
    flags = [flag for action in parser_of(job)._actions for flag in action.option_strings]
    words = []
    for _ in range(rng.randrange(1, 6)):
        flag = rng.choice(flags) if rng.random() < 0.9 else f"--{text(rng)}"
        given = rng.choice((text(rng), json.dumps(value(rng)), "1", "a,b", "true"))
        words += rng.choice(([f"{flag}={given}"], [flag, given], [flag], [given]))
    return parse(job, [word.replace("\0", "") for word in words], {})  # no command line holds a null character


def share_parsers() -> None:
    """Let `parse` build each parser once."""
    parsing.CommandParser = parser_of  # type: ignore[assignment, misc]
    for job in JOBS:
        parser_of(job)
    PredictJob.model_rebuild()


# Inventories and manifests


@cache
def folder() -> Path:
    """Return this process's folder for files."""
    return Path(tempfile.mkdtemp(dir=Path.cwd()))


def rows_of(rng: Random, columns: Sequence[str], cell: Callable[[Random, str], Any]) -> pa.Table:
    """Return a table of some of the columns, each of one type or, now and then, of another."""
    number = rng.randrange(5)
    arrays = {}
    for name in columns:
        if rng.random() < 0.9:
            values = [cell(rng, name) for _ in range(number)]
            try:
                arrays[name if rng.random() < 0.95 else text(rng).encode(errors="replace").decode()] = pa.array(values)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
                arrays[name] = pa.array([str(each).encode(errors="replace").decode() for each in values])
    return pa.table(arrays)


def parquet(rng: Random, table: pa.Table) -> bytes:
    """Return a table as Parquet, changed now and then."""
    with io.BytesIO() as body:
        try:
            pq.write_table(table, body, compression=rng.choice(("none", "snappy", "zstd")))
        except pa.ArrowNotImplementedError:  # a type that Parquet does not have
            return b"PAR1"
        data = body.getvalue()
    return mutated(rng, [data]) if rng.random() < 0.5 else data


def object_cell(rng: Random, name: str) -> Any:
    """Return a value of a column of an inventory or a manifest."""
    if rng.random() < 0.2:
        return value(rng, 1)
    if name in ("size", "size_bytes"):
        return rng.choice((0, 1, 2**40, -1))
    if name.startswith("is_"):
        return rng.random() < 0.5
    return rng.choice(("a.jpg", "s3://b/a.jpg", "/x/a.jpg", "a%20b+c.jpg", "%ff%00", text(rng).replace("\ud800", "")))


INVENTORY: Final = ("key", "size", "e_tag", "is_latest", "is_delete_marker", "storage_class")
CSV_NAMES: Final = ("Bucket", "Key", "Size", "ETag", "IsLatest", "IsDeleteMarker", "StorageClass", "VersionId")


def list_inventory(rng: Random) -> object:
    """Read an inventory: its manifest or a data file is changed."""
    is_csv = rng.random() < 0.6
    names = [*CSV_NAMES] if rng.random() < 0.8 else rng.sample(CSV_NAMES, rng.randrange(1, len(CSV_NAMES)))
    if is_csv:
        lines = [
            rng.choice((",", ",", ",", ";")).join(f'"{object_cell(rng, "key")}"' for _ in names)
            if rng.random() < 0.3
            else ",".join(csv_cell(rng, name) for name in names)
            for _ in range(rng.randrange(6))
        ]
        raw = rng.choice(("\n", "\r\n")).join(lines).encode(errors="replace")
        data = gzip.compress(mutated(rng, [raw]) if raw and rng.random() < 0.3 else raw, 1)
        data = mutated(rng, [data]) if rng.random() < 0.2 else data
    else:
        data = parquet(rng, rows_of(rng, INVENTORY, object_cell))
    manifest: Any = {
        "sourceBucket": "photos",
        "fileFormat": "CSV" if is_csv else "Parquet",
        "fileSchema": ", ".join(names),
        "files": [{"key": "data", "size": len(data)}],
    }
    if rng.random() < 0.2:
        manifest[rng.choice([*manifest])] = value(rng)
    if rng.random() < 0.1:
        manifest["files"] = [{rng.choice(("key", "MD5checksum", "x")): value(rng, 1)}, {"key": "data"}]
    body = json.dumps(manifest).encode()
    body = mutated(rng, [body]) if rng.random() < 0.1 else body
    body = b"[" * 100_000 if rng.random() < 0.001 else body
    (folder() / "data").write_bytes(data)
    (folder() / "manifest.json").write_bytes(body)
    return [batch.to_pylist() for batch in read_inventory(Storage(), str(folder() / "manifest.json"))]


def csv_cell(rng: Random, name: str) -> str:
    """Return a value of a CSV inventory."""
    if rng.random() < 0.1:
        return text(rng).replace("\ud800", "?")
    plain = {"Size": "12", "IsLatest": "true", "IsDeleteMarker": "false", "ETag": '"abc"'}
    return f'"{plain.get(name, rng.choice(("a.jpg", "a%20b.jpg", "folder/", "%ff")))}"'.replace('""', '"')


def list_manifest(rng: Random) -> object:
    """Read a Parquet manifest of photographs."""
    path = folder() / "manifest.parquet"
    path.write_bytes(parquet(rng, rows_of(rng, ("uri", "etag", "size_bytes", "storage_class"), object_cell)))
    config = ScoreConfig(input=str(path), input_kind="manifest")
    return [batch.to_pylist() for batch in Listing(Storage(), config).kept()]


# Label tables

LABELS: Final = ("key", "age", "gender", "race", "subject", "split", "fold", "age_low", "age_high", "name")
WORDS: Final = ("a.jpg", "30", "3-9", "70+", "(25, 32)", "male", "f", "black", "white", "train", "", "n/a", "1", "x")


def label_cell(rng: Random, _: str = "") -> Any:
    """Return a label."""
    return rng.choice(WORDS) if rng.random() < 0.8 else value(rng, 0)


def read_label_table(rng: Random) -> object:
    """Read a label table."""
    (folder() / "images").mkdir(exist_ok=True)
    (folder() / "images" / "a.jpg").touch()
    columns = rng.sample(LABELS, rng.randrange(2, 8))
    if rng.random() < 0.3:
        path, data = folder() / "labels.parquet", parquet(rng, rows_of(rng, ["key", *columns], label_cell))
    else:
        path, separator = folder() / "labels.csv", rng.choice(",\t;")
        rows = [[label_cell(rng) for _ in columns] for _ in range(rng.randrange(6))]
        header = [name if rng.random() < 0.9 else text(rng) for name in columns]
        lines = [separator.join(map(str, row)) for row in [header if "key" in header else ["key", *header[1:]], *rows]]
        raw = (
            rng.choice(("\n", "\r\n", "\r")).join(lines).encode(rng.choice(("utf-8", "utf-16", "utf-8-sig")), "replace")
        )
        data = mutated(rng, [raw]) if rng.random() < 0.4 else raw
    path.write_bytes(data)
    rows = source_rows(Storage(), str(folder() / "images"), str(path), space=UTKFACE, note=lambda _: None)
    return list(rows)


# Key patterns

GLOBS: Final = (
    "*",
    "**",
    "**/",
    "?",
    "[",
    "]",
    "[!",
    "[a-z]",
    "[z-a]",
    "[^]",
    "\\",
    "/",
    "a",
    ".jpg",
    "(",
    "{2}",
    "+",
    "é",
)
PATTERNS: Final = (
    *("(?P<a>", "(", ")", "[", "]", "*", "+", "{9999}", "{2}", "\\d", "\\", "|", "^", "$", ".", "a", "(?i)", "(?<=a)"),
    *("(?P<a>\\d+)", "/", "'", "\\1", "é"),
)
KEYS: Final = pa.array(
    ["a.jpg", "a/b/c.jpg", "ünï/日本.jpg", "new\nline.jpg", "[x].jpg", "\x1b[2J.png", "", "a" * 3000]
)


def match_glob(rng: Random) -> object:
    """Compile a glob and match keys with it."""
    glob = "".join(rng.choices(GLOBS, k=rng.randrange(1, 9))) if rng.random() < 0.8 else text(rng)
    return pc.match_substring_regex(KEYS, glob_expression(glob.encode(errors="replace").decode()))


def match_pattern(rng: Random) -> object:
    """Check an expression that captures groups."""
    pattern = "".join(rng.choices(PATTERNS, k=rng.randrange(1, 9))).replace("\ud800", "")
    return check_grouping(ScoreConfig(key_pattern=pattern, group_by=(rng.choice(("a", "b", "uri", text(rng))),)))


LISTING: Final = (ConfigError, StorageError, StorageUnavailable)
TARGETS: Final = {
    "decoder": Target(0.35, decode, (ImageError,), images),
    "recipe": Target(0.1, read_toml, (ConfigError,), share_parsers),
    "command line": Target(0.03, read_command_line, (ConfigError, SystemExit), share_parsers),
    "inventory": Target(0.05, list_inventory, (InventoryError, StorageError, StorageUnavailable)),
    "manifest": Target(0.05, list_manifest, LISTING),
    "label table": Target(0.07, read_label_table, (LabelTableError, StorageError, StorageUnavailable)),
    "glob": Target(0.345, match_glob, (ValueError,)),
    "key pattern": Target(0.005, match_pattern, (ConfigError,)),
}
