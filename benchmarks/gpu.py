"""Measure training and scoring on one GPU within a time budget, and write the results into one JSON file.

    benchmarks/gpu.sh --site site.tar.xz --out gpu.json
    benchmarks/gpu.sh --device cpu --smoke

The machine needs Python 3.11 or newer and PyTorch, and no network. --site is an archive of the other packages, as
`pip install --target` lays them out; without it they must be installed. Each measurement runs in its own process with a
time limit (gpu_measures.py says what it measures), on generated faces. Its result, or its error with the last lines of
its output, is in the JSON file as soon as it ends. The others run anyway, unless `prepare` fails.

Exit status: 0 if all measurements succeeded, 1 if one failed or there was no time left for it, 2 for a bad argument.

--smoke runs all of it at a tiny size, on a GPU or on the CPU: it tests that everything works, and its figures mean
nothing.
"""

# Only the standard library, because other packages may be in the archive.
from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

HERE: Final = Path(__file__).resolve().parent
SCRIPT: Final = HERE / "gpu_measures.py"
PREPARE: Final = "prepare"
MINUTES: Final = 12.0
NUM_LAST_LINES: Final = 15
MIN_S: Final = 10.0
"""Time left below which no measurement is started."""
STOP_S: Final = 10.0
"""Time for a process to end after SIGTERM."""


class Measurement(NamedTuple):
    """A function of gpu_measures.py."""

    name: str
    limit_s: float
    """Time limit if everything has MINUTES; with other --minutes it is longer or shorter in proportion."""
    baseline: str = ""
    """Name of the measurement that the table compares it with."""


MEASUREMENTS: Final = (
    # The most important come first, in case the time runs out.
    Measurement(PREPARE, 120),
    Measurement("train_one_batch_compiled", 180, "train_one_batch"),
    Measurement("train_pipeline_compiled", 180, "train_one_batch_compiled"),
    Measurement("predict_bfloat16", 90, "predict_float32"),
    Measurement("score", 150, "decode"),
    Measurement("train_one_batch", 90),
    Measurement("train_pipeline", 150, "train_one_batch"),
    Measurement("train_reference", 120, "train_one_batch"),
    Measurement("predict_float32", 90),
    Measurement("predict_float16", 90, "predict_float32"),
    Measurement("predict_bfloat16_compiled", 120, "predict_bfloat16"),
    Measurement("predict_float16_compiled", 120, "predict_float16"),
    Measurement("decode", 60),
    Measurement("train_reference_compiled", 150, "train_one_batch_compiled"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all measurements; return the exit status."""
    started = time.monotonic()
    options, fail = parse(arguments)
    record: dict[str, Any] = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": options.device,
        "smoke": options.smoke,
        "finished": False,
        "measurements": {},
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the running measurement, too
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        folder = Path(temporary)
        environment = environment_of(folder, options.site, fail)
        results: dict[str, Any] = record["measurements"]
        for each in MEASUREMENTS:
            if options.only and each.name not in {PREPARE, *options.only}:
                continue
            left_s = options.minutes * 60 - (time.monotonic() - started)
            if "error" in results.get(PREPARE, {}):
                results[each.name] = {"error": f"not run, because {PREPARE} failed"}
            elif left_s < MIN_S:
                results[each.name] = {"error": f"not run, because less than {MIN_S:.0f} s were left"}
            else:
                command = [SCRIPT, each.name, folder, options.device, "smoke" if options.smoke else "full"]
                limit_s = min(each.limit_s * options.minutes / MINUTES, left_s)
                results[each.name] = measure(each.name, command, limit_s, folder, environment)
            record["seconds"] = round(time.monotonic() - started, 1)
            write(options.out, record)
            print(f"{record['seconds']:.0f} s  {each.name}: {told(results[each.name])}", flush=True)
    record["finished"] = True
    write(options.out, record)
    failed = [name for name, result in results.items() if "error" in result]
    print("\n".join(["", *table(results), *machine(results), f"{options.out}: {len(results)} measurements"]))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Callable[[str], Any]]:
    """Return the options, and a function that ends the program with a message about one of them."""
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--site", type=Path, help="tar archive of packages that the machine lacks")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to compute (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to test that everything works")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for everything (%(default)g)")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON file to write (%(default)s)")
    names = [each.name for each in MEASUREMENTS]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)}; {PREPARE} runs, too"
    )
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes {options.minutes:g}: must be greater than 0")
    if options.site and not options.site.is_file():
        parser.error(f"--site {options.site}: no such file")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: its folder does not exist")
    return options, parser.error


def commit() -> str:
    """Return the commit of this checkout; empty if it is none."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", HERE, "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return ""


def environment_of(folder: Path, site: Path | None, fail: Callable[[str], Any]) -> dict[str, str]:
    """Return the environment of the measurements, with the packages of the archive, unpacked into the folder."""
    paths = [str(HERE.parent)]
    if site is not None:
        packages = folder / "site"
        try:
            with tarfile.open(site) as archive:
                archive.extractall(packages, filter="data")
        except (tarfile.TarError, lzma.LZMAError, OSError, EOFError) as error:
            fail(f"--site {site}: {error}")
        paths.append(str(packages))
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    # Compiled kernels are shared by the measurements, and never come from an earlier run.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    return {**os.environ, **cache, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def measure(
    name: str, command: Sequence[str | Path], limit_s: float, folder: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run a measurement in a new process; return its result, with `error` and `last_lines` if it failed."""
    started = time.monotonic()
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
            problem = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit_s:.0f} s"
        finally:
            end(process)
    result: dict[str, Any] = {}
    try:
        result = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        problem = problem or "it wrote no result"
    if not problem and name != PREPARE and not result.get("images_per_s", 0.0) > 0.0:
        problem = "it measured no speed"
    result["seconds"] = round(time.monotonic() - started, 1)
    if problem:
        lines = log.read_text(errors="replace").splitlines()
        result |= {"error": problem, "last_lines": [line for line in lines if line.strip()][-NUM_LAST_LINES:]}
    return result


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it still runs, and all that it has started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Replace the JSON file by a complete new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    new.replace(path)


def told(result: Mapping[str, Any]) -> str:
    """Return a result in one line."""
    if "error" in result:
        return f"failed: {result['error']}" + "".join(f"\n    {line}" for line in result.get("last_lines", ()))
    speed = f"{result['images_per_s']:,.1f} images/s, " if "images_per_s" in result else ""
    return f"{speed}took {result['seconds']:.0f} s"


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of all results."""
    rows = [("measurement", "images/s", "share of its baseline", "waits for data", "GPU MiB", "host MiB")]
    speeds = {name: each.get("images_per_s") for name, each in results.items() if "error" not in each}
    for each in MEASUREMENTS:
        result, speed, base = results.get(each.name, {}), speeds.get(each.name), speeds.get(each.baseline)
        if result and each.name != PREPARE:
            rows.append(
                (
                    each.name,
                    f"{speed:,.1f}" if speed else "failed",
                    f"{speed / base:.1%} of {each.baseline}" if speed and base else "",
                    f"{result['wait_share']:.1%}" if "wait_share" in result else "",
                    *(f"{result[key]:,.0f}" if result.get(key) else "" for key in ("peak_gpu_mib", "peak_host_mib")),
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def machine(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line about the machine, if it is known."""
    found = results.get(PREPARE, {}).get("machine", {})
    return [", ".join(f"{name} {value}" for name, value in found.items() if value)] if found else []


if __name__ == "__main__":
    sys.exit(main())
