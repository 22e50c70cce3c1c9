"""Score the same photographs, broken ones among them, with several pipelines; kill each halfway and run it again.

    python benchmarks/peers.py --photographs FOLDER --checkpoint RUN/best [--copies 5] [--broken 0.05] [--json FILE]

    loop          a loop that writes one table at its end             peer_loop.py
    ray_data      Ray Data as its guide to images teaches it          peer_ray_data.py
    ray_tolerant  the same with checkpoints and dropped blocks        peer_ray_data.py --tolerant
    daft          Daft as its guide to images begins                  peer_daft.py
    daft_bytes    the same in several processes                       peer_daft.py --bytes
    agr_ray       `agr-ray score`

All use the network of the checkpoint. The peers find faces with facenet-pytorch's MTCNN and predict in float32. Ours
finds, aligns and predicts as it always does, each face twice if the checkpoint averages with mirror images. Its parts
are small, because the photographs are few. Ray's actors, the processes of daft_bytes and our workers are --workers in
number; loop and daft have one process.

The folder holds --copies of each photograph under different names, and broken files: noise after the first bytes
(corrupt), the first half of a photograph (truncated), nothing (empty), HTML (not_an_image). All are called .jpg or
.png. A peer runs three times, each time in processes of its own:

1. To its end: images/s with and without the time until the first photograph is scored, peak memory (proportional set
   sizes of all processes, summed), photographs lost, broken files unreported. A peer that crashes on a broken file
   runs again without broken files, and its other figures are without them.
2. Until SIGKILL of all its processes, when about half of the photographs are scored.
3. With the same command and the same output, to its end. Then lost and doubled photographs are counted.

lost        sound photographs without a scored row
doubled     files with several rows
unreported  broken files without a row, or with a row like that of a sound photograph
unreadable  files of the output that are not complete Parquet files
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from memory import descendants, peak, watched_memory
from rich import box
from score_throughput import ROWS_PER_PART, repeat

from agr_ray.console import make_console, make_table
from agr_ray.device import cpu_name
from agr_ray.schema import SCORED_STATUSES

HERE: Final = Path(__file__).parent
SUFFIXES: Final = (".jpg", ".jpeg", ".png")
"""All peers read these."""
BROKEN: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "corrupt": lambda data: data[:4] + random.Random(0).randbytes(len(data) - 4),
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "not_an_image": lambda _: b"<html><body>404 Not Found</body></html>\n",
}
"""How a photograph's bytes become a broken file's."""
VERSIONS: Final = ("agr_ray", "ray", "daft", "facenet-pytorch", "torch", "pyarrow")


@dataclasses.dataclass(frozen=True)
class Job:
    """What a peer works on."""

    photographs: Path
    checkpoint: Path
    out: Path
    num_workers: int

    @property
    def progress(self) -> Path:
        """Return the file to which `CheckpointScorer` adds a byte for each photograph."""
        return self.out.with_name(f"{self.out.name}.progress")


def script(name: str, *options: str, takes_workers: bool = True) -> Callable[[Job], list[str]]:
    """Return the function that makes the command of a script beside this one."""

    def command(job: Job) -> list[str]:
        workers = [str(job.num_workers)] if takes_workers else []
        places = map(str, (job.photographs, job.checkpoint, job.out))
        return [sys.executable, str(HERE / name), *places, *workers, *options]

    return command


def agr_ray(job: Job) -> list[str]:
    """Return our command."""
    options = {
        "--cluster.address": "local",
        "--score.checkpoint": job.checkpoint,
        "--score.input": job.photographs,
        "--score.out": job.out,
        "--score.num_workers": job.num_workers,
        "--score.rows_per_file": ROWS_PER_PART,
    }
    command = [str(Path(sys.executable).with_name("agr-ray")), "score"]
    return command + [str(word) for option in options.items() for word in option]


PEERS: Final[Mapping[str, Callable[[Job], list[str]]]] = {
    "loop": script("peer_loop.py", takes_workers=False),
    "ray_data": script("peer_ray_data.py"),
    "ray_tolerant": script("peer_ray_data.py", "--tolerant"),
    "daft": script("peer_daft.py"),
    "daft_bytes": script("peer_daft.py", "--bytes"),
    "agr_ray": agr_ray,
}


def main() -> None:
    """Run all peers, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs: .jpg, .jpeg, .png")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint: age, gender and race")
    parser.add_argument("--copies", type=int, default=5, help="how often each photograph occurs; default: 5")
    parser.add_argument("--broken", type=float, default=0.05, help="broken files per photograph; default: 0.05")
    parser.add_argument("--workers", type=int, default=2, help="processes of each peer that has any; default: 2")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="default: all, in this order")
    parser.add_argument("--json", type=Path, default=Path("peers.json"), help="results; default: peers.json")
    arguments = parser.parse_args()
    console = make_console()
    results = {}
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        work = Path(temporary)
        sound, broken = fill(arguments.photographs, arguments.copies, arguments.broken, work)
        console.print(f"{len(sound)} photographs and {len(broken)} broken files")
        for name in arguments.peers:
            job = Job(work / "all", arguments.checkpoint.resolve(), work / name, arguments.workers)
            results[name] = measure(name, job, work / "sound", sound, broken)
            console.print(f"{name}: {json.dumps(results[name])}")
    show(results)
    record = {
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "num_photographs": len(sound),
        "num_broken": len(broken),
        "cpus": f"{os.cpu_count()} x {cpu_name()}",
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "peers": results,
    }
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")


# The photographs


def fill(photographs: Path, num_copies: int, broken_share: float, work: Path) -> tuple[set[str], set[str]]:
    """Fill the folders `sound`, and `all` with broken files, too; return the names of sound and of broken files."""
    paths = sorted(path for path in photographs.iterdir() if path.suffix.lower() in SUFFIXES)
    for name in ("sound", "all"):
        repeat(paths, num_copies, work / name)
    sound, broken = {path.name for path in (work / "all").iterdir()}, set()
    chosen = random.Random(0).choices(sorted(sound), k=round(broken_share * len(sound)))
    for number, name in enumerate(chosen):
        kind = list(BROKEN)[number % len(BROKEN)]
        copy, _, photograph = name.partition("-")
        path = work / "all" / f"{copy}-{number:05d}-{kind}-{photograph}"
        path.write_bytes(BROKEN[kind]((work / "all" / name).read_bytes()))
        broken.add(path.name)
    return sound, broken


# The runs


def measure(name: str, job: Job, sound_folder: Path, sound: Collection[str], broken: Collection[str]) -> dict[str, Any]:
    """Run a peer to its end, kill it in the middle of another run, and run it again."""
    result: dict[str, Any] = {"crash": ""}
    command = PEERS[name]
    job = dataclasses.replace(job, out=job.out / "whole")
    job.out.parent.mkdir()
    run = Run(command, job)
    result["with_broken"] = dataclasses.asdict(counts(job.out, sound, broken))
    if run.returncode:
        result["crash"] = run.error
        broken = ()
        job = dataclasses.replace(job, photographs=sound_folder, out=job.out.with_name("sound"))
        run = Run(command, job).checked()
    times = scored_at(job.out)
    startup_s = times[0] - run.started
    num_files = len(sound) + len(broken)
    result |= {
        "seconds": run.seconds,
        "startup_s": startup_s,
        "images_per_s": num_files / run.seconds,
        "images_per_s_without_startup": num_files / (run.seconds - startup_s),
        "peak_mib": run.peak_mib.total(),
        "peak_mib_by_process": dict(run.peak_mib.most_common()),
    }
    job = dataclasses.replace(job, out=job.out.with_name("killed"))
    killed = Run(command, job, kill_at=num_files // 2)
    if killed.returncode != -signal.SIGKILL:
        raise SystemExit(f"{name} ended before it could be killed: give more --copies\n{killed.error}")
    at_kill = counts(job.out, sound, broken)
    second = Run(command, job)
    return result | {
        "killed_after_s": killed.seconds,
        "num_rows_at_kill": at_kill.num_rows,
        "second_run_s": second.seconds,
        "second_run_error": second.error if second.returncode else "",
        "after_kill": dataclasses.asdict(counts(job.out, sound, broken)),
    }


class Run:
    """One run of a command in a session of its own, to its end or until `kill_at` photographs are scored."""

    def __init__(self, command: Callable[[Job], list[str]], job: Job, kill_at: int | None = None) -> None:
        with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as ray_folder, tempfile.TemporaryFile() as log:
            job.progress.write_bytes(b"")
            variables = environment(ray_folder) | {"PEERS_PROGRESS": str(job.progress)}
            self.started = time.time()
            process = subprocess.Popen(command(job), stdout=log, stderr=log, env=variables, start_new_session=True)
            with watched_memory(process.pid) as samples_mib:
                try:
                    while process.poll() is None and (kill_at is None or num_scored(job) < kill_at):
                        time.sleep(0.1)
                finally:
                    kill(process)
            self.seconds = time.time() - self.started
            log.seek(0)
            self._output = log.read().decode(errors="replace")
        self.returncode = process.returncode
        self.peak_mib = peak(samples_mib)

    @property
    def error(self) -> str:
        """Return the last error in its output, or its last line."""
        errors = re.findall(r"\w*Error: .*", self._output)
        return (errors or self._output.strip().splitlines() or ["no output"])[-1]

    def checked(self) -> Run:
        """Return this run if it succeeded."""
        if self.returncode:
            raise SystemExit(f"exit status {self.returncode}:\n{self._output[-3000:]}")
        return self


def num_scored(job: Job) -> int:
    """Return how many photographs have been scored: by a peer, or in finished parts of ours."""
    parts = sum(1 for _ in Path(f"{job.out}-work").rglob("parts/part-*"))
    return job.progress.stat().st_size + parts * ROWS_PER_PART


def environment(ray_folder: str) -> dict[str, str]:
    """Return the environment of a peer: nothing points to another cluster, and nothing is reported to anybody."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "AGR_RAY_"))}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(HERE), kept.get("PYTHONPATH", "")]),  # for Daft's processes
        "RAY_TMPDIR": ray_folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "DO_NOT_TRACK": "true",
    }


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all its descendants, unless it has ended; wait until all are gone."""
    if process.poll() is not None:
        return
    victims = descendants(process.pid)
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    process.wait()
    while any(is_running(victim) for victim in victims):
        time.sleep(0.1)


def is_running(process: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The tables


@dataclasses.dataclass(frozen=True)
class Counts:
    """What is wrong with a peer's output."""

    num_rows: int
    lost: int
    """Sound photographs without a scored row."""
    doubled: int
    """Files with several rows."""
    unreported: int
    """Broken files without a row, or with a row that says that they are scored."""
    unreported_kinds: list[str]
    unreadable: int
    """Files of the output that are not complete Parquet files."""


def counts(out: Path, sound: Collection[str], broken: Collection[str]) -> Counts:
    """Compare a peer's output with the names of the files that it was given."""
    tables, unreadable = read_tables(out)
    rows = [row for table in tables for row in zip(names(table), is_scored(table), strict=True)]
    times = Counter(name for name, _ in rows)
    scored = {name for name, is_scored in rows if is_scored}
    unreported = [name for name in broken if name in scored or not times[name]]
    return Counts(
        num_rows=len(rows),
        lost=len(set(sound) - scored),
        doubled=sum(number > 1 for number in times.values()),
        unreported=len(unreported),
        unreported_kinds=sorted({kind for kind in BROKEN for name in unreported if f"-{kind}-" in name}),
        unreadable=unreadable,
    )


def read_tables(out: Path) -> tuple[list[pa.Table], int]:
    """Return the tables of a peer's output, and how many files can't be read."""
    folder = out / "images" if (out / "images").is_dir() else out  # ours has tables of faces, too
    tables, unreadable = [], 0
    for path in sorted(folder.rglob("*.parquet")):
        try:
            tables.append(pq.ParquetFile(path).read())
        except pa.ArrowInvalid:
            unreadable += 1
    return tables, unreadable


def names(table: pa.Table) -> list[str]:
    """Return the file name of each row."""
    return [path.rpartition("/")[2] for path in table["uri" if "uri" in table.column_names else "path"].to_pylist()]


def is_scored(table: pa.Table) -> list[bool]:
    """Return whether each row says that its photograph was scored, even if it has no face."""
    if "status" in table.column_names:
        return [status in SCORED_STATUSES for status in table["status"].to_pylist()]
    return pc.is_valid(table["faces"]).to_pylist()


def scored_at(out: Path) -> list[float]:
    """Return the times at which photographs were scored, in order."""
    times = [time for table in read_tables(out)[0] for time in table["scored_at"].to_pylist()]
    return sorted(time if isinstance(time, float) else time.timestamp() for time in times)


# The report


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table in Markdown."""
    table = make_table(
        "", "images/s", "without start-up", "start-up, s", "peak MiB", "lost", "broken, unreported",
        "after a kill: lost", "doubled", "unreadable files", "second run, s",
    )  # fmt: skip
    table.box = box.MARKDOWN
    for name, result in results.items():
        first, after = result["with_broken"], result["after_kill"]
        kinds = f" ({', '.join(first['unreported_kinds'])})" if first["unreported"] else ""
        wrong = ["all: it crashes", ""] if result["crash"] else [str(first["lost"]), f"{first['unreported']}{kinds}"]
        table.add_row(
            name,
            f"{result['images_per_s']:.2f}",
            f"{result['images_per_s_without_startup']:.2f}",
            f"{result['startup_s']:.0f}",
            f"{result['peak_mib']:,.0f}",
            *wrong,
            *(str(after[name]) for name in ("lost", "doubled", "unreadable")),
            "fails" if result["second_run_error"] else f"{result['second_run_s']:.0f} of {result['seconds']:.0f}",
        )
    console = make_console()
    console.print(table)
    for name, result in results.items():
        if result["crash"]:
            console.print(f"{name} crashes on broken files, so its other figures are without any: {result['crash']}")
        if result["second_run_error"]:
            console.print(f"{name} fails after a kill: {result['second_run_error']}")


if __name__ == "__main__":
    main()
