"""How long scoring takes, what it costs, and what limits it: 1 to 1,000 nodes, 1 to 100 million photographs.

    python benchmarks/scale_model.py measure --checkpoint RUN/best --photographs FOLDER --costs costs.json
    python benchmarks/scale_model.py check --checkpoint RUN/best --photographs FOLDER --costs costs.json
    python benchmarks/scale_model.py table --costs costs.json [--figure hours.svg]

`measure` scores a bucket of SeaweedFS with one worker on one node, and writes what each step costs. `predict` adds the
costs up. `check` compares its sum with the wall time of `jobs/score.py` on running clusters of 1, 2 and 4 node
processes with one worker each, and fails if one is off by more than 20 %. No cost comes from the runs of `check`. Run
both on a quiet machine. `table` prints what to expect of photographs like those that were measured; larger ones take
longer.

The node processes share this machine, so `check` tells the model how many cores it has. Workers that would keep more
cores busy than exist are slower by that factor; how many one worker keeps busy, with the driver, Ray and the S3 server,
is measured with one. So on two cores, `check` tests the start of the workers, the division into parts and the sharing
of cores, but not whether four machines are twice as fast as two. In `table`, each worker has a core of its own.

`table` assumes what can't be measured here: prices, S3's latency and limits, and how long a machine takes to start. Not
modelled: the network's bandwidth, S3's answers above its limits, and what thousands of actors cost Ray.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, inf, log2
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from rich.table import Table

from agr_ray.config import ScoreConfig
from agr_ray.console import make_console
from agr_ray.predict.downloads import NUM_DOWNLOADS
from agr_ray.report.figure import COLOURS, SERIES, figure_style, figure_svg, new_figure
from agr_ray.runtime.part_runner import MAX_BLOCKS
from agr_ray.scoring.publish import MAX_FACES, NUM_READS
from agr_ray.storage.parts import PARTS_PER_FILE
from agr_ray.storage.trees import NUM_COPIES

GETS_PER_S: Final = 5500
PUTS_PER_S: Final = 3500
"""S3's limits for a prefix; DELETE and COPY count as PUT (Amazon S3 User Guide, Optimizing performance)."""
GET_USD: Final = 0.0004 / 1000
PUT_USD: Final = 0.005 / 1000
"""Prices of S3 Standard in us-east-1, 2026; COPY and LIST are billed as PUT, DELETE is free."""
DISTINCT_S: Final = 26.0
"""Seconds to find the near-duplicates among a million faces (docs/results.md)."""
DISTINCT_BYTES: Final = 100
"""Memory that this takes for each face."""
PLANNING_BYTES: Final = 2**30
"""Memory limit of DuckDB while planning (`scoring.planning.MEMORY_LIMIT`)."""
COPIED_TABLES: Final = 3
KEYS_PER_REQUEST: Final = 1000
"""Of LIST."""
MAX_ERROR: Final = 0.2
TABLE_NODES: Final = (1, 10, 100, 1000)
FIGURE_NODES: Final = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000)
MILLIONS: Final = (1, 10, 100)


@dataclass(frozen=True)
class Requests:
    """Number of requests to S3."""

    get: int = 0
    put: int = 0
    list: int = 0
    delete: int = 0


@dataclass(frozen=True)
class Costs:
    """What scoring costs, measured with one worker on one node; seconds of wall time unless said otherwise."""

    node_start_s: float
    """`ray start`, until the cluster has the node."""
    start_s: float
    """From the start of the job's process until it starts workers, plan included."""
    plan_key_s: float
    """For each photograph, from an S3 Inventory to the plan."""
    worker_start_s: float
    """Until a worker begins its first part, and how much longer than others that part takes."""
    worker_start_cores: float
    """Cores that all processes of the machine keep busy meanwhile."""
    stages_s: Mapping[str, float]
    """For each photograph, by stage of the worker's stopwatch."""
    part_s: float
    """For each part, beside its photographs."""
    scoring_cores: float
    """Cores that all processes of the machine keep busy while one worker scores."""
    driver_part_s: float
    """CPU seconds of the driver for each part."""
    publish_start_s: float
    """From the last part until the first row is published."""
    publish_row_s: float
    """For each photograph, to write its rows of all tables."""
    finish_s: float
    """From the last table of a small run to the exit of the job's process."""
    faces_per_image: float
    driver_mib: float
    """Peak memory of the driver in a small run."""
    part_requests: Requests
    """Of a worker for each part, without those for its photographs."""
    file_requests: Requests
    """For a file of 256 parts of all tables, without those that copy it and delete the parts."""

    @classmethod
    def read(cls, path: Path) -> Costs:
        """Read the costs that `measure` wrote."""
        fields = json.loads(path.read_text())
        return cls(**fields | {name: Requests(**fields[name]) for name in ("part_requests", "file_requests")})


@dataclass(frozen=True)
class Load:
    """How much is scored."""

    num_images: int
    rows_per_part: int = ScoreConfig().rows_per_file

    @property
    def num_parts(self) -> int:
        """Return the number of parts."""
        return ceil(self.num_images / self.rows_per_part)

    @property
    def num_files(self) -> int:
        """Return the number of files of each table."""
        return ceil(self.num_parts / PARTS_PER_FILE)

    def num_faces(self, costs: Costs) -> float:
        """Return the number of faces among which near-duplicates are looked for."""
        num_faces = self.num_images * costs.faces_per_image
        return num_faces if num_faces <= MAX_FACES else 0.0


@dataclass(frozen=True)
class Cluster:
    """Where the photographs are scored."""

    workers: int
    cores: float = inf
    """Cores that exist; infinite: each worker has one of its own."""
    latency_s: float = 0.0
    """How much longer a request takes than it did when the costs were measured."""
    prefixes: int = 1
    """Prefixes of the photographs that S3 serves at its full rate each."""
    pages_per_s: float = inf
    """LIST requests, of which each returns 1,000 keys; infinite: the input is an S3 Inventory."""

    def slower(self, workers: int, cores_each: float) -> float:
        """Return the factor by which these workers are slower than one of them."""
        return max(1.0, workers * cores_each / self.cores)


@dataclass(frozen=True)
class Prediction:
    """What a run needs."""

    steps_s: Mapping[str, float]
    """Seconds by step. Scoring is named after its limit: `workers`, `driver`, `S3 reads` or `S3 writes`."""
    gets_per_s: float
    """GET of photographs while they are scored."""
    puts_per_s: float
    """PUT and DELETE of the workers meanwhile."""
    usd: float
    """Price of all requests."""
    driver_mib: float

    @property
    def seconds(self) -> float:
        """Return the time from the start of the job's process to its exit."""
        return sum(self.steps_s.values())

    @property
    def bottleneck(self) -> str:
        """Return the longest step."""
        return max(self.steps_s, key=self.steps_s.__getitem__)


def predict(costs: Costs, load: Load, cluster: Cluster) -> Prediction:
    """Predict a run on a cluster that is already running."""
    part = costs.part_requests
    num_puts = load.num_parts * (part.put + part.delete)
    worker_start_s, workers_s = _waves_s(costs, load, cluster)
    limits_s = {
        "workers": workers_s,
        "driver": load.num_parts * costs.driver_part_s,
        "S3 reads": max(load.num_images / cluster.prefixes, load.num_parts * part.get) / GETS_PER_S,
        "S3 writes": num_puts / PUTS_PER_S,
    }
    limit = max(limits_s, key=limits_s.__getitem__)
    num_pages = 0.0 if cluster.pages_per_s == inf else load.num_images / KEYS_PER_REQUEST
    memory_bytes = max(PLANNING_BYTES, DISTINCT_BYTES * load.num_faces(costs))
    return Prediction(
        steps_s={
            "start": costs.start_s,
            "planning": load.num_images * costs.plan_key_s + num_pages / cluster.pages_per_s,
            "start of workers": worker_start_s,
            limit: limits_s[limit],
            "publishing": _publishing_s(costs, load, cluster),
        },
        gets_per_s=load.num_images / limits_s[limit],
        puts_per_s=num_puts / limits_s[limit],
        usd=_requests_usd(costs, load) + num_pages * PUT_USD,
        driver_mib=costs.driver_mib + memory_bytes / 2**20,
    )


def _waves_s(costs: Costs, load: Load, cluster: Cluster) -> tuple[float, float]:
    """Return the seconds in which workers start and score. Each wave of parts has new workers."""
    image_s = max(sum(costs.stages_s.values()), cluster.latency_s / NUM_DOWNLOADS)
    part_s = load.rows_per_part * image_s + costs.part_s + _latency_s(costs.part_requests, cluster)
    start_s = score_s = 0.0
    for first in range(0, load.num_parts, MAX_BLOCKS):
        num_parts = min(MAX_BLOCKS, load.num_parts - first)
        busy = min(cluster.workers, num_parts)
        start_s += costs.worker_start_s * cluster.slower(cluster.workers, costs.worker_start_cores)
        score_s += ceil(num_parts / busy) * part_s * cluster.slower(busy, costs.scoring_cores)
    return start_s, score_s


def _publishing_s(costs: Costs, load: Load, cluster: Cluster) -> float:
    """Return the seconds from the last part to the end."""
    parts_per_file = min(load.num_parts, PARTS_PER_FILE)
    latency_s = _latency_s(costs.file_requests, cluster) * parts_per_file / PARTS_PER_FILE / NUM_READS
    file_s = min(load.num_images, parts_per_file * load.rows_per_part) * costs.publish_row_s + latency_s
    reads_s = load.num_parts / PARTS_PER_FILE * costs.file_requests.get / GETS_PER_S
    tables_s = max(ceil(load.num_files / cluster.workers) * file_s, reads_s)
    num_faces = load.num_faces(costs)
    distinct_s = DISTINCT_S * num_faces / 1e6 * log2(2 + num_faces) / log2(1e6)
    copies_s = load.num_files * COPIED_TABLES * cluster.latency_s / NUM_COPIES
    deletions_s = load.num_parts / PUTS_PER_S
    return costs.publish_start_s + tables_s + distinct_s + copies_s + deletions_s + costs.finish_s


def _latency_s(requests: Requests, cluster: Cluster) -> float:
    """Return how much longer these requests take, one after the other."""
    return cluster.latency_s * (requests.get + requests.put + requests.list + requests.delete)


def _requests_usd(costs: Costs, load: Load) -> float:
    """Return the price of all requests except those that list the input."""
    part, file = costs.part_requests, costs.file_requests
    num_gets = load.num_images + load.num_parts * (part.get + file.get / PARTS_PER_FILE)
    num_puts = load.num_parts * (part.put + part.list + file.list / PARTS_PER_FILE)
    num_puts += load.num_files * (file.put + COPIED_TABLES)
    return num_gets * GET_USD + num_puts * PUT_USD


# Commands


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--costs", type=Path, required=True, help="JSON file of the costs")
    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint")
    runs.add_argument("--photographs", type=Path, required=True, help="folder of photographs or face chips")
    runs.add_argument("--rows-per-part", type=int, default=64, help="photographs in a part (%(default)s)")
    measure = commands.add_parser("measure", parents=[common, runs], help="write the costs")
    measure.add_argument("--num", type=int, default=1500, help="objects in the bucket (%(default)s)")
    check = commands.add_parser("check", parents=[common, runs], help="compare predictions with runs")
    check.add_argument("--num", type=int, default=3000, help="objects in the bucket (%(default)s)")
    check.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4], help="numbers of nodes (1 2 4)")
    table = commands.add_parser("table", parents=[common], help="print the predictions for large clusters")
    table.add_argument("--node-cpus", type=int, default=16, help="CPUs of a node, each a core (%(default)s)")
    table.add_argument(
        "--usd-per-hour",
        type=float,
        default=0.82112,
        help="price of a node (%(default)s: list price on demand of a c7a.4xlarge, 16 cores of an AMD EPYC, Linux, "
        "us-east-1, as public code quotes it in November 2026; see aws.amazon.com/ec2/pricing/on-demand)",
    )
    table.add_argument("--boot-s", type=float, default=180.0, help="start of a machine, assumed (%(default)s)")
    table.add_argument(
        "--latency-s", type=float, default=0.1, help="time of a small request: AWS says 0.1 to 0.2 (%(default)s)"
    )
    table.add_argument("--prefixes", type=int, default=1, help="prefixes that share the photographs (%(default)s)")
    table.add_argument(
        "--pages-per-s", type=float, default=inf, help="list a prefix at this rate; default: read an S3 Inventory"
    )
    table.add_argument("--figure", type=Path, help="SVG file for a figure of the hours")
    arguments = parser.parse_args()
    {"measure": measure_costs, "check": check_predictions, "table": show_table}[arguments.command](arguments)


def measure_costs(arguments: argparse.Namespace) -> None:
    """Measure, and write the costs."""
    from scale_runs import measure

    costs = measure(arguments.checkpoint.resolve(), arguments.photographs, arguments.num, arguments.rows_per_part)
    arguments.costs.write_text(json.dumps(costs, indent=2) + "\n")
    print(arguments.costs.read_text())


def check_predictions(arguments: argparse.Namespace) -> None:
    """Compare predictions with runs; exit with 1 if one is too far off."""
    from scale_runs import walls_s

    costs, load = Costs.read(arguments.costs), Load(arguments.num, arguments.rows_per_part)
    given = (arguments.checkpoint.resolve(), arguments.photographs, load.num_images, load.rows_per_part)
    cores = len(os.sched_getaffinity(0))
    table = Table("nodes", "predicted, s", "measured, s", "error", title=f"{load.num_images:,} photographs")
    errors = []
    for nodes, measured_s in zip(arguments.nodes, walls_s(*given, arguments.nodes), strict=True):
        prediction = predict(costs, load, Cluster(nodes, cores))
        errors.append(prediction.seconds / measured_s - 1.0)
        print(f"{nodes} nodes: {', '.join(f'{name} {step_s:.1f} s' for name, step_s in prediction.steps_s.items())}")
        table.add_row(f"{nodes}", f"{prediction.seconds:.1f}", f"{measured_s:.1f}", f"{errors[-1]:+.1%}")
    make_console().print(table)
    if max(map(abs, errors)) > MAX_ERROR:
        raise SystemExit(f"a prediction is off by more than {MAX_ERROR:.0%}")


def show_table(arguments: argparse.Namespace) -> None:
    """Print the predictions for large clusters, and draw the figure."""
    costs = Costs.read(arguments.costs)
    # The head's spare CPU is for Ray Data's own tasks.
    clusters = {
        nodes: Cluster(
            nodes * arguments.node_cpus - 1,
            latency_s=arguments.latency_s,
            prefixes=arguments.prefixes,
            pages_per_s=arguments.pages_per_s,
        )
        for nodes in FIGURE_NODES
    }
    boot_s = arguments.boot_s + costs.node_start_s
    table = Table("photographs", "nodes", "busy workers", "hours", "USD", "bottleneck", "GET/s", "PUT/s", "driver, GiB")
    for millions in MILLIONS:
        load = Load(millions * 1_000_000)
        for nodes in TABLE_NODES:
            cluster = clusters[nodes]
            prediction = predict(costs, load, cluster)
            total_s = boot_s + prediction.seconds
            table.add_row(
                f"{millions} million",
                f"{nodes:,}",
                f"{min(cluster.workers, MAX_BLOCKS, load.num_parts):,} of {cluster.workers:,}",
                f"{total_s / 3600:.2f}",
                f"{nodes * total_s / 3600 * arguments.usd_per_hour + prediction.usd:,.1f}",
                f"{prediction.bottleneck}, {prediction.steps_s[prediction.bottleneck] / total_s:.0%}",
                f"{prediction.gets_per_s:,.0f}",
                f"{prediction.puts_per_s:,.0f}",
                f"{prediction.driver_mib / 1024:.1f}",
            )
    console = make_console()
    console.print(table)
    console.print(
        f"Hours and USD include {boot_s:.0f} s until the nodes are up, and all requests. The bottleneck is the longest "
        f"step, with its share of the hours. S3's limits while scoring are {GETS_PER_S:,} GET/s for each of "
        f"{arguments.prefixes:,} prefixes of photographs, and {PUTS_PER_S:,} PUT/s for the parts."
    )
    if arguments.figure:
        figure = hours_figure(costs, clusters, boot_s)
        arguments.figure.write_text(figure_svg(figure, "scale"), encoding="utf-8")


def hours_figure(costs: Costs, clusters: Mapping[int, Cluster], boot_s: float) -> Figure:
    """Draw hours by nodes, a line for each number of photographs; a letter names the bottleneck where it changes."""
    with figure_style():
        figure, axes = new_figure(6.5, 3.6)
        for millions, (colour, marker) in zip(MILLIONS, SERIES, strict=False):
            predictions = [predict(costs, Load(millions * 1_000_000), cluster) for cluster in clusters.values()]
            hours = [(boot_s + each.seconds) / 3600 for each in predictions]
            axes.plot(list(clusters), hours, marker=marker, color=COLOURS[colour], label=f"{millions} million")
            before = ""
            for nodes, value, each in zip(clusters, hours, predictions, strict=True):
                if each.bottleneck != before:
                    axes.annotate(
                        each.bottleneck, (nodes, value), xytext=(3, 5), textcoords="offset points", fontsize=7
                    )
                before = each.bottleneck
        axes.set(xscale="log", yscale="log", xlabel="nodes", ylabel="hours")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.legend(title="photographs")
    return figure


if __name__ == "__main__":
    main()
