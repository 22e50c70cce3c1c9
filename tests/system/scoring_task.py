"""A prefix of a bucket whose photographs are scored, and what must be published then."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from commands import ROOT, Cluster, job_command
from seaweedfs import Bucket

from agr_ray.data.rendered import render_photograph
from agr_ray.vision.decode import encode_jpeg

sys.path.append(str(ROOT / "tests" / "unit"))
import bad_images

NUM_PHOTOGRAPHS = 48
ROWS_PER_PART = 4
PARTS_BEFORE_KILL = 2
ODD_KEYS = ["a b.jpg", "e=1/f+g.JPEG", "h#h.jpg", "p%20q%.jpg", "q?x&y.jpg", "two//slashes.jpg", "ünï/日本.jpg"]
BAD_FILES = {**bad_images.REJECTED, "nobody.jpg": (bad_images.jpeg, "no_face")}
FACE = encode_jpeg(render_photograph(0, 0, 640, 480, 1).image_rgb)


def photograph(number: int) -> bytes:
    """Return one face after a moment, each time as a new object: images after the end are not decoded."""
    return FACE + number.to_bytes(4)


@dataclass(frozen=True)
class Task:
    """A prefix of a bucket with photographs in `in/`, and how they are scored into `out/`."""

    bucket: Bucket
    prefix: str
    model: str

    @property
    def out(self) -> str:
        return f"{self.bucket.uri}/{self.prefix}/out"

    def fill(self, num_photographs: int = NUM_PHOTOGRAPHS) -> Task:
        """Put photographs, odd keys, bad files and what is no image at all."""
        keys = [*(f"{number:03d}.jpg" for number in range(num_photographs)), *ODD_KEYS]
        bodies = {key: photograph(number) for number, key in enumerate(keys)}
        bodies |= {key: make() for key, (make, _) in BAD_FILES.items()}
        for key, body in bodies.items():
            self.put(key, body)
        assert len(self.expected()) == len(bodies)
        self.put("notes.txt", b"no photograph")
        return self

    def put(self, key: str, body: bytes) -> None:
        self.bucket.put(f"{self.prefix}/in/{key}", body)

    def uri(self, key: str) -> str:
        return f"{self.bucket.uri}/{self.prefix}/in/{key}"

    def expected(self) -> dict[str, str]:
        """Return the status that each photograph must get, by URI, as the server lists them now."""
        listed = [key.removeprefix(f"{self.prefix}/in/") for key in self.bucket.keys(f"{self.prefix}/in/")]
        return {self.uri(key): BAD_FILES[key][1] if key in BAD_FILES else "ok" for key in listed if key != "notes.txt"}

    def command(
        self, cluster: Cluster | None, *more: object, endpoint_url: str = "", num_workers: int = 2
    ) -> list[str]:
        """Return the command that scores, on a cluster or on the one that it is submitted to."""
        return job_command(
            "score",
            *(("--cluster.address", cluster.address) if cluster else ()),
            *("--storage.endpoint_url", endpoint_url or self.bucket.server.endpoint_url),
            *("--score.checkpoint", self.model, "--score.out", self.out),
            *("--score.input", f"{self.bucket.uri}/{self.prefix}/in"),
            *("--score.num_workers", num_workers),
            *("--score.rows_per_file", ROWS_PER_PART, "--score.batch_size", ROWS_PER_PART),
            *more,
        )

    def parts(self) -> list[str]:
        """Return the keys of the parts that are done and not published yet."""
        return [key for key in self.bucket.keys(f"{self.prefix}/out-work/") if "/parts/part-" in key]

    def is_under_way(self) -> bool:
        return len(self.parts()) >= PARTS_BEFORE_KILL

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the published runs, oldest first."""
        return [self.bucket.json(key) for key in sorted(self.bucket.keys(f"{self.prefix}/out/_SUCCESS/"))]

    @contextlib.contextmanager
    def published(self, folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
        """Copy what is published into `folder` and open it: views.sql's views, and `rows`, all images of all runs."""
        self.bucket.download(f"{self.prefix}/out", folder)
        with duckdb.connect() as database:
            sql = (folder / "views.sql").read_text().replace(self.out, str(folder))
            secret, create_runs, views = sql.partition("CREATE OR REPLACE VIEW runs")  # a copy needs no secret
            assert "CREATE OR REPLACE SECRET" in secret
            database.execute(create_runs + views)
            database.execute(f"CREATE VIEW rows AS SELECT * FROM read_parquet('{folder}/images/run=*/*.parquet')")
            yield database


def assert_each_once(task: Task, folder: Path, expected: dict[str, str]) -> None:
    """Check that one run is published with one row for each URI, with its status, and that nothing else is left."""
    (record,) = task.records()
    num_ok = sum(status == "ok" for status in expected.values())
    with task.published(folder) as database:
        rows = database.sql("SELECT uri, status FROM rows").fetchall()
        seen = database.sql("SELECT uri, status FROM images").fetchall()
        faces = database.sql("SELECT uri FROM faces").fetchall()
        rejects = database.sql("SELECT uri FROM rejects").fetchall()
        (counted,) = database.sql("SELECT sum(n) FROM demographics WHERE breakdown = 'gender'").fetchall()
    assert sorted(rows) == sorted(seen) == sorted(expected.items())
    assert sorted(faces) == sorted((uri,) for uri, status in expected.items() if status == "ok")
    assert sorted(rejects) == sorted((uri,) for uri, status in expected.items() if status not in ("ok", "no_face"))
    assert counted == (num_ok,)
    assert record["counts"] == Counter(expected.values())
    assert record["plan"]["num_to_do"] == record["num_images"] == len(expected)
    assert record["num_faces"] == num_ok
    assert not task.bucket.keys(f"{task.prefix}/out-work/")
