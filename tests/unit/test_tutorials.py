"""The Python, the SQL and the small scoring commands of the guides run on rendered faces, without Ray."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluations import write_evaluation
from this_process import ThisProcess

sys.path.append(str(Path(__file__).parents[1] / "ray"))
from sets import checkpoint, prepared_set

import agr_ray
from agr_ray import cli
from agr_ray.config import ScoreConfig, ScoreJob
from agr_ray.console import make_console
from agr_ray.data.rendered import render_photograph
from agr_ray.schema import TRIALS
from agr_ray.scoring.driver import score_input
from agr_ray.vision.decode import encode_jpeg

DOCS = Path(__file__).parents[2] / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the demo and the tutorials' commands write, made from a few images."""
    folder = tmp_path_factory.mktemp("tutorials")
    out = folder / "demo-out"
    prepared_set(out / "prepared", {"train": 4, "val": 2, "test": 2})
    model = checkpoint(out / "runs" / "first" / "best")
    write_evaluation(out / "runs" / "first" / "best-eval-test-1", calibrated=True)
    (out / "runs" / "first" / "best-eval-test-1-against-2").mkdir()  # of `evaluate --compare`
    photographs = out / "faces" / "photographs"
    photographs.mkdir(parents=True)
    for index in range(2):
        image = render_photograph(0, index, 640, 480, 2).image_rgb
        (photographs / f"photograph-{index:06d}.jpg").write_bytes(encode_jpeg(image))
    (photographs / "photograph-000002.jpg").write_bytes(b"no image")
    score = ScoreConfig(checkpoint=str(model), input=str(photographs), out=str(out / "scored"))
    score_input(ScoreJob(score=score), ThisProcess(), make_console(io.StringIO()))
    trial: dict[str, Any] = dict.fromkeys(TRIALS.names, 0) | {"state": "complete", "why": ""}
    trial |= dict.fromkeys(("is_feasible", "is_best", "is_on_front"), True)
    (folder / "sweeps" / "mine").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([trial], TRIALS), folder / "sweeps" / "mine" / "trials.parquet")
    return folder


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_the_python_of_a_tutorial_runs(
    page: Path, demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(block.replace('"scored"', '"demo-out/scored"'), names)  # `scored` is what the pages' commands write
        assert len(capsys.readouterr().out.splitlines()) > 1, block


def test_there_is_python_and_sql_on_the_pages() -> None:
    numbers = {page.stem: (len(blocks(page, "python")), len(blocks(page, "sql"))) for page in TUTORIALS}

    assert numbers == {
        "auditing_a_model": (2, 0),
        "better_settings": (1, 0),
        "index": (0, 0),
        "nightly_scoring": (1, 0),
        "reading_the_tables": (1, 7),
        "your_own_data": (2, 0),
    }


@pytest.mark.parametrize("sql", blocks(DOCS / "tutorials" / "reading_the_tables.md", "sql"), ids=lambda sql: sql[:30])
def test_a_query_finds_rows(sql: str, demo: Path) -> None:
    assert agr_ray.open_scores(demo / "demo-out" / "scored").query(sql).fetchall() != []


def test_the_scoring_commands_of_the_pages_run(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    (demo / "private").mkdir()
    (demo / "private" / "pseudonym.key").write_bytes(bytes(32))
    text = "".join((DOCS / name).read_text() for name in ("tutorials/nightly_scoring.md", "responsible_use.md"))
    joined = re.sub(r"\\\n\s*", "", text)
    commands = re.findall(r"^agr-ray (score --checkpoint demo-out.*)$", joined, re.MULTILINE)
    first, again, counts = (shlex.split(command) for command in commands)

    cli.main(first)
    cli.main(again)  # publishes nothing, because nothing is new
    cli.main(counts)

    assert len(list((demo / "scored" / "_SUCCESS").iterdir())) == 1
    published = sorted(path.name for path in (demo / "private" / "counts").iterdir())
    assert published == ["_SUCCESS", "demographics", "views.sql"]


def test_deleted_photographs_are_found_hidden_and_erased(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find, erase = blocks(DOCS / "operations.md", "python")
    photographs = tmp_path / "uploads"
    shutil.copytree(demo / "demo-out" / "faces" / "photographs", photographs)
    command = ["score", "--checkpoint", str(demo / "demo-out" / "runs" / "first" / "best"), "--out", "scored"]
    monkeypatch.chdir(tmp_path)
    cli.main([*command, "--input", "uploads"])
    first, *others = [path.name for path in sorted(photographs.iterdir())]
    (photographs / first).unlink()
    Path("listed.txt").write_text("".join(f"uploads/{name}\n" for name in others))

    def names(sql: str) -> list[str]:
        return [Path(uri).name for (uri,) in agr_ray.open_scores("scored").query(sql).fetchall()]

    def stored(table: str) -> list[str]:
        return [Path(uri).name for uri in pq.read_table(f"scored/{table}", partitioning=None)["uri"].to_pylist()]

    faces = "SELECT DISTINCT uri FROM faces ORDER BY uri"
    assert names(faces) == [first, others[0]]
    exec(find.replace("s3://photographs/", f"{tmp_path}/"), {})
    assert pq.read_table("gone.parquet")["uri"].to_pylist() == [str(photographs / first)]

    cli.main([*command, "--input", "gone.parquet", "--max_refused", "1"])
    assert names(faces) == [others[0]]
    assert names("SELECT uri FROM images WHERE status = 'missing'") == [first]
    assert first in stored("faces")

    exec(erase, {})
    assert names(faces) == [others[0]]
    assert [first in stored(table) for table in ("images", "faces", "rejects")] == [False] * 3
    assert sorted(stored("images")) == others
    capsys.readouterr()
    cli.main([*command, "--input", "uploads"])
    assert "nothing new since run" in capsys.readouterr().out


def test_the_arithmetic_of_sizing_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    page = DOCS / "sizing.md"
    ((code, table),) = re.findall(
        r"^```python\n(.*?)^```\n\n```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
    )

    exec(code, {})

    assert capsys.readouterr().out == table
