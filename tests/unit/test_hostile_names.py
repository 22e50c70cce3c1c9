"""Names from elsewhere (keys, classes, sources) steer no terminal, run nothing in a page, and lead nowhere."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from test_card import evaluation, meta
from test_inventory import objects
from test_splits import make_manifest, make_row
from this_process import model

from agr_ray import cli
from agr_ray.config.command_line import fail
from agr_ray.console import make_console, make_table
from agr_ray.data.inventory import InventoryError
from agr_ray.data.rendered import render_chip
from agr_ray.data.splits import split_manifest_text
from agr_ray.models.card import model_card, with_measured
from agr_ray.models.card_tables import escaped, unescaped
from agr_ray.report.explanations import Face, Row, faces_sheet
from agr_ray.storage import ObjectInfo, Storage, StorageFailed
from agr_ray.storage.trees import download_objects
from agr_ray.vision.decode import encode_jpeg

__all__ = ["model"]  # a fixture
ROOT = Path(__file__).parents[2]
NAMES = (
    "\x1b[2J\x1b]0;owned\x07.jpg",
    "a\nerror: forged.jpg",
    "\x9b31m\x7f.jpg",
    "\u202egpj.exe.jpg",
    "=cmd|' calc'!A0.jpg",
    "<script>alert(1)<script>.jpg",
    "![x](http:evil) `b` [c](javascript:alert(1)).jpg",
    "[bold]|$x^$.jpg",
)
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
HOSTILE = 'a_b <script>alert(1)</script> ![x](http://evil.example) | `c` [d](javascript:alert(1)) *e* $f^$ "g'


# Terminals and logs


@pytest.mark.parametrize("name", NAMES)
def test_no_name_steers_the_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    table = make_table("key")
    table.add_row(name)

    make_console(out).print(f"scored {name}", table)
    with pytest.raises(SystemExit):
        fail(f"score.input {name}: no such file")

    assert CONTROL.search(out.getvalue()) is None
    said = capsys.readouterr().err
    assert (CONTROL.search(said), said.count("\n")) == (None, 1)


def test_predict_prints_and_writes_nothing_that_a_name_chose(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    body = encode_jpeg(render_chip(0, 16).image_rgb)
    for name in NAMES:
        (tmp_path / "in" / name).write_bytes(body)
    (tmp_path / "in" / "bad\x1b[5m.jpg").write_bytes(b"no image")

    cli.main(["predict", "--checkpoint", str(model), str(tmp_path / "in"), "--out", str(tmp_path / "out")])

    captured = capsys.readouterr()
    assert CONTROL.search(captured.out + captured.err) is None
    assert "\\x1b[2J\\x1b]0;owned\\x07.jpg" in captured.out.replace("\n", "")
    assert len(list((tmp_path / "out").iterdir())) == len(NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


# Spreadsheets


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t=", "\r=", '"='])
def test_no_cell_of_the_split_manifest_is_a_formula(first: str) -> None:
    key = f"{first}cmd|' /C calc'!A0.jpg"

    text = split_manifest_text(make_manifest([make_row(key, f"subject:{key}", split="train")]))

    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        ((*cells, _),) = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=quoting)
        assert len(cells) == 2
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    other = split_manifest_text(make_manifest([make_row(f"\\{key}", f"subject:{key}", split="train")]))
    assert other != text  # escaping can be undone


def test_the_split_manifest_is_the_only_table_in_text_that_we_write() -> None:
    writers = ("csv.writer", "csv.DictWriter", "to_csv", "write_csv", "savetxt")
    found = [
        f"{path.relative_to(ROOT)}: {ast.unparse(node.func)}"
        for path in sorted((ROOT / "agr_ray").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(writers)
    ]
    written = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "agr_ray").rglob("*.py"))
        for name in re.findall(r'write\w*\([^()]*\([^()]*"([\w.]+\.[ct]sv)"', path.read_text())
    }

    assert found == []
    assert written == {"agr_ray/data/preparation.py: splits.tsv"}


# Pages, cards and sheets


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(markdown: str) -> Tags:
    tags = Tags()
    tags.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    return tags


def hostile_card() -> str:
    def renamed(values: Any) -> Any:
        if isinstance(values, dict):
            return {HOSTILE if key == "indian" else key: renamed(value) for key, value in values.items()}
        if isinstance(values, list | tuple):
            return [renamed(value) for value in values]
        return HOSTILE if values == "indian" else values

    content = renamed(meta())
    content["data"] |= dict.fromkeys(("source", "uri", "detector", "licence", "weights"), HOSTILE)
    content["config"]["train"] |= {"optimizer": HOSTILE}
    content |= {"git_commit": HOSTILE, "created": HOSTILE}
    measured = renamed(evaluation())
    mapping = {"from": HOSTILE, "races": {HOSTILE: "others"}}
    measured["evaluation"] |= {"source": HOSTILE, "data": HOSTILE, "label_mapping": mapping}
    measured["calibration"] = {"warning": HOSTILE, "age": None, "gender": None, "race": None, "notes": [HOSTILE]}
    measured["calibration"]["num_calibrated_on"] = 7
    return with_measured(model_card(content), measured)


def test_hostile_names_have_no_meaning_in_a_model_card() -> None:
    card = hostile_card()
    page, plain = rendered(card), rendered(with_measured(model_card(meta()), evaluation()))

    assert page.tags == plain.tags  # no link, picture or script
    assert page.text.count(HOSTILE) > 15
    assert with_measured(card, {**evaluation(), "calibration": None}) != card


def test_a_card_is_measured_again_in_place() -> None:
    card = with_measured(model_card(meta()), evaluation())

    assert with_measured(card, evaluation()) == card


def test_escaping_can_be_undone() -> None:
    assert unescaped(escaped(HOSTILE)) == HOSTILE
    assert escaped("latino_hispanic") == "latino_hispanic"


def test_class_names_with_dollar_signs_are_drawn_on_sheets() -> None:
    face = Face(np.zeros((8, 8, 3), np.uint8), "label $x^$\nmodel $\\frac$")

    assert faces_sheet([Row("$y_$", [face])], "title $\\nope$", 2).startswith(b"\x89PNG")


# Paths


@pytest.mark.parametrize("key", ["../x", "/x", "a/../../x", "..", "a\0b"])
def test_no_key_of_a_tree_leads_out_of_its_folder(key: str, tmp_path: Path) -> None:
    def fetch(info: ObjectInfo, path: str) -> None:
        Path(path).write_text(info.key)

    with pytest.raises(StorageFailed, match="would be written outside"):
        download_objects([ObjectInfo(f"s3://b/{key}", key, "", 1)], str(tmp_path / "in" / "tree"), fetch)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("key", ["../secret.parquet", "/etc/passwd", "inv/../../x", "a\0b"])
def test_no_data_file_of_an_inventory_is_outside_its_folder(key: str, tmp_path: Path) -> None:
    manifest = {"sourceBucket": "b", "fileFormat": "Parquet", "fileSchema": "", "files": [{"key": key}]}
    (tmp_path / "inv").mkdir()
    pq.write_table(pa.table({"key": ["a"], "size": [1], "e_tag": ["e"]}), tmp_path / "secret.parquet")
    (tmp_path / "inv" / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(InventoryError, match=r"^data file .* would be read outside the inventory's folder$"):
        objects(str(tmp_path / "inv" / "manifest.json"))


@pytest.mark.parametrize("key", ["../in/0.jpg", "/etc/hostname", "a\0b"])
def test_a_label_table_names_no_file_outside_its_folder(key: str, tmp_path: Path) -> None:
    from agr_ray.data.sources.folder import source_rows
    from agr_ray.labels import UTKFACE

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.jpg").write_bytes(b"x")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    lines = [["key", "age"], ["0.jpg", "3"], *[[each, "4"] for each in (key, "../secret.jpg")]]
    (tmp_path / "set" / "labels.csv").write_text("\n".join(map(",".join, lines)))

    rows = source_rows(
        Storage(), str(tmp_path / "set"), str(tmp_path / "set" / "labels.csv"), space=UTKFACE, note=lambda _: None
    )

    assert [row.key for row in rows if not row.missing] == ["0.jpg"]
