"""Text is printed verbatim: it is not parsed as markup, truncated or wrapped."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console
from test_progress import PROGRESS

from agr_ray import progress_bar as log_progress
from agr_ray.console import make_console, make_table
from agr_ray.data import preparation
from agr_ray.data.prepared import PreparedSet
from agr_ray.data.set_splits import Splits
from agr_ray.progress_bar import progress, status_line
from agr_ray.runtime.training.board import TrainingBars
from agr_ray.schema import CROPS, MANIFEST, NEAR_DUPLICATES, Status
from agr_ray.scoring import messages

ROOT = Path(__file__).parents[2]
ODD = "/data/[bold]x[/nope]/[1]/:key:/" + "0123456789" * 12
"""A path that rich would read as markup and as an emoji, and would break at 80 columns."""


class Terminal(io.StringIO):
    """The output on a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def test_only_one_place_makes_consoles_tables_and_texts_of_bars() -> None:
    makers = re.compile(r"(?<![\w.])(?:\w+\.)?(?:Console|TextColumn)\(|from rich\.table |rich\.table\.|from_markup")
    folders = ("agr_ray", "jobs", "cluster", "benchmarks")

    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text().splitlines()
        if makers.search(line) and not (folder == "benchmarks" and "Table" in line)  # their words are their own
    ]

    assert sorted({line.partition(":")[0] for line in found}) == ["agr_ray/console.py"], found


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_a_line_is_printed_verbatim(file: type[io.StringIO]) -> None:
    out = file()

    make_console(out).print(f"warning: {ODD}: no such file\nrun [1] [/]")

    assert out.getvalue() == f"warning: {ODD}: no such file\nrun [1] [/]\n"


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", "/data/\\udcff/\\xe9"), ("utf-8", "/data/\\udcff/\u00e9")]
)
def test_characters_that_the_log_cannot_hold_are_escaped(encoding: str, expected: str) -> None:
    log = io.BytesIO()
    file = io.TextIOWrapper(log, encoding)

    make_console(file).print("/data/\udcff/\u00e9")

    file.flush()
    assert log.getvalue().decode(encoding) == f"{expected}\n"


def test_a_table_in_a_log_has_each_row_in_one_line() -> None:
    out = io.StringIO()
    table = make_table("[red]status", "reasons")
    table.add_row("ok", f"3 x {ODD}")

    make_console(out).print(table)

    assert "[red]status" in out.getvalue()
    assert f"3 x {ODD}" in out.getvalue()


def test_a_table_on_a_narrow_terminal_loses_nothing() -> None:
    out = Terminal()
    table = make_table("status", "reasons")
    table.add_row("ok", ODD)

    make_console(out).print(table)

    lines = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()
    cells = [line.split("│")[2].strip() for line in lines if line.count("│") == 3]
    assert max(map(len, lines)) <= 80
    assert "".join(cells) == ODD


def test_the_summary_of_score_names_its_run_in_one_line() -> None:
    out = io.StringIO()
    totals = {
        "num_images": 3,
        "num_faces": 2,
        "num_flagged": 0,
        "num_abstained": 0,
        "num_unique": 1,
        "counts": {"ok": 2, "unreadable": 1},
    }

    messages.print_summary(make_console(out), totals, f"{ODD} run=5")

    assert f"{ODD} run=5" in out.getvalue().splitlines()


def test_the_summary_of_prepare_has_its_folder_and_reasons() -> None:
    out = io.StringIO()
    prepared = PreparedSet(
        format_version=1,
        finished=True,
        settings={"split": {"near_duplicates": "count"}},
        split_manifest_sha256="0" * 64,
        labels_sha256="0" * 64,
        splits={"train": 1},
        counts={"ok": 1, "bad_label": 1},
        near_duplicates={"train": 1},
        uri=ODD,
    )
    rows = pa.Table.from_pylist(
        [
            {"status": Status.OK, "split": "train", "age": 30.0, "gender": "male"},
            {"status": Status.BAD_LABEL, "error": f"age {ODD} is not a number", "gender": "female"},
        ],
        CROPS.remove_metadata(),
    )

    crossing = {"key": ODD, "split": "train", "near_key": "b", "near_split": "test"}
    crossings = pa.Table.from_pylist([crossing | {"distance_bits": 2, "likeness": 0.99}], NEAR_DUPLICATES)
    manifest = pa.Table.from_pylist([], MANIFEST)
    preparation._print_summary(make_console(out), prepared, rows, Splits(manifest, manifest, crossings), "")

    assert ODD in out.getvalue().splitlines()
    assert f"1 x age {ODD} is not a number" in out.getvalue()
    assert f"such as {ODD} (train) and b (test)" in out.getvalue()
    assert "gender labels: 1 (male 1)" in out.getvalue()  # of the images in the set


def test_progress_on_a_terminal_shows_labels_and_remarks_verbatim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()

    with progress(make_console(out), "reading [/nope]", 4) as update:
        update(2, "[bold]part[1] :key:")

    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "reading [/nope]" in shown
    assert "[bold]part[1] :key:" in shown


def test_progress_in_a_log_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_progress, "LOG_EVERY_S", 0.0)
    out = io.StringIO()

    with progress(make_console(out), f"reading {ODD}", 4) as update:
        update(2, "[/nope]")

    (line,) = out.getvalue().splitlines()
    assert line.startswith(f"reading {ODD}: 2 of 4, ")
    assert line.endswith("[/nope]")


def test_a_log_has_a_line_a_minute_though_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_progress, "LOG_AT_LEAST_EVERY_S", 0.01)
    monkeypatch.setattr(log_progress, "LOG_EVERY_S", 0.009)
    steps, runs = io.StringIO(), io.StringIO()

    with progress(make_console(steps), "scoring", 4), status_line(make_console(runs)) as show_status:
        show_status("1 of 2 runs ended")
        time.sleep(0.2)

    assert set(steps.getvalue().splitlines()) == {"scoring: 0 of 4, 0 s"}
    assert set(runs.getvalue().splitlines()) == {"1 of 2 runs ended"}


def test_training_bars_show_texts_verbatim() -> None:
    bars = TrainingBars()
    bars.show(PROGRESS)
    bars._bars.update(bars._bars.task_ids[0], description="[/nope]")
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)

    with console.capture() as captured:
        console.print(bars)

    assert captured.get().startswith("[/nope]")
