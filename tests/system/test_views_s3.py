"""`duckdb -init views.sql`, as a user types it, with an S3 server that needs keys.

DuckDB's S3 extension is no part of its Python wheel. It comes as a wheel of its own for one version of DuckDB, so it is
installed beside that version's command, into a folder of the test's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from seaweedfs import READ_ONLY, S3Server

sys.path += [str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "ray")]
from sets import checkpoint
from this_process import ThisProcess

from agr_ray.config import ScoreConfig, ScoreJob, VisionConfig
from agr_ray.console import make_console
from agr_ray.data.rendered import render_chip
from agr_ray.scoring.driver import score_input
from agr_ray.storage import Storage
from agr_ray.vision.decode import encode_jpeg

DUCKDB_VERSION = "1.5.5"
WHEELS = ("duckdb-cli", "duckdb-extension-httpfs", "duckdb-extension-aws")
NUM_PHOTOGRAPHS = 5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def duckdb_command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Install the duckdb command and its S3 extension; return how it is called."""
    folder = tmp_path_factory.mktemp("duckdb")
    install = [
        str(Path(sys.executable).with_name("uv")),
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
    ]
    subprocess.run([*install, *(f"{name}=={DUCKDB_VERSION}" for name in WHEELS)], check=True)
    home = {"HOME": str(folder)}  # extensions lie below it
    command = [str(folder / "duckdb_cli" / "duckdb"), "-csv", "-noheader"]
    for name in ("httpfs", "aws"):
        (file,) = folder.glob(f"duckdb_extension_{name}/extensions/*/{name}.duckdb_extension")
        subprocess.run([*command, ":memory:", f"INSTALL '{file}'"], env=home, check=True)
    return ["env", f"HOME={folder}", *command]


def test_the_views_open_with_only_keys_in_the_environment(
    s3_root: str, s3_server: S3Server, duckdb_command: list[str], tmp_path: Path
) -> None:
    photographs = tmp_path / "in"
    photographs.mkdir()
    for number in range(NUM_PHOTOGRAPHS):
        (photographs / f"it's {number}.jpg").write_bytes(encode_jpeg(render_chip(0, number).image_rgb))
    model = checkpoint(tmp_path / "model")
    out = f"{s3_root}/it's an out"
    job = ScoreJob(
        vision=VisionConfig(detector="haar"),
        score=ScoreConfig(checkpoint=str(model), input=str(photographs), out=out, rows_per_file=2),
    )
    record = score_input(job, ThisProcess.of(model), make_console())
    views = tmp_path / "views.sql"
    views.write_bytes(Storage().read(f"{out}/views.sql"))
    keys = {name: value for name, value in s3_server.environment().items() if name != "AWS_ENDPOINT_URL"}

    def query(sql: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = [*duckdb_command, "-init", str(views), ":memory:", sql]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    answer = query("SELECT status, count(*) AS n FROM images GROUP BY ALL ORDER BY ALL", keys)

    assert answer.returncode == 0, answer.stderr
    expected = [f"{status},{count}" for status, count in sorted(record["counts"].items())]
    assert answer.stdout.split("┘\n")[-1].splitlines() == expected  # a table before it says that the secret was made
    totals = query("SELECT run_id, num_images FROM runs", keys)
    assert totals.stdout.split("┘\n")[-1].splitlines() == [f"{record['run_id']},{NUM_PHOTOGRAPHS}"]
    for name, value in keys.items():
        assert "KEY" not in name or value not in views.read_text()
    assert query("SELECT count(*) FROM images", keys | dict(READ_ONLY)).returncode == 0
    assert query("SELECT count(*) FROM images", {}).returncode != 0
