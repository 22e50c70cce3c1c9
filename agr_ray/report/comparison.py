"""The result of a comparison: comparison.parquet and comparison.html."""

from __future__ import annotations

import io
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from agr_ray.config import ModelConfig, PredictConfig
from agr_ray.config.presets import PRESETS
from agr_ray.console import make_table
from agr_ray.data.crops import read_labels
from agr_ray.data.prepared import PreparedSet
from agr_ray.device import cpu_name
from agr_ray.errors import JobError
from agr_ray.evaluation.comparison import Estimate, compare
from agr_ray.labels import UTKFACE, Labels, LabelSpace
from agr_ray.models.checkpoint import META, Checkpoint
from agr_ray.models.checkpoint_files import local_checkpoint
from agr_ray.models.network import MultiTaskNet, preset_config
from agr_ray.predict.attributes import AttributePredictor
from agr_ray.predict.prediction_rows import read_predictions
from agr_ray.report.model_list import network_size
from agr_ray.report.page import page_environment
from agr_ray.schema import COMPARED_METRICS, COMPARISON
from agr_ray.storage import Storage
from agr_ray.vision.align import stored_side_px

_REFERENCE: Final = "paper"
"""The preset to which differences are relative; if it was not measured, the first one that was."""
_NUM_TIMED: Final = 32
_LABELS: Final = {
    "age_mae_years": "age MAE, years",
    "age_within_5": "within 5 years",
    "age_one_off": "one-off",
    "gender_accuracy": "gender",
    "race_accuracy": "race",
}
_CITED: Final = {
    "age_mae_years": "mae_years",
    "age_one_off": "one_off",
    "gender_accuracy": "gender",
    "race_accuracy": "race",
}


@dataclass(frozen=True)
class Ended:
    """What is known of a preset."""

    preset: str
    seeds: Sequence[int]
    failures: Sequence[str]
    side_px: int
    num_parameters: int
    num_multiply_adds: int
    train_samples_per_s: float | None
    score_images_per_s: float | None
    estimates: Mapping[str, Estimate]
    curves: Sequence[Sequence[tuple[int, float]]]
    """(epoch, validation age MAE in years) of each run."""

    def row(self) -> dict[str, Any]:
        """Return the row of schema.COMPARISON."""
        row: dict[str, Any] = {
            "preset": self.preset,
            "seeds": list(self.seeds),
            "failures": list(self.failures),
            "side_px": self.side_px,
            "parameters": self.num_parameters,
            "multiply_adds": self.num_multiply_adds,
            "train_samples_per_s": self.train_samples_per_s,
            "score_images_per_s": self.score_images_per_s,
        }
        for metric in COMPARED_METRICS:
            estimate = self.estimates.get(metric)
            if estimate is not None:
                row[metric] = estimate.value
                row[f"{metric}_low"], row[f"{metric}_high"] = estimate.interval
                row[f"{metric}_difference"] = estimate.difference
                if estimate.difference_interval is not None:
                    row[f"{metric}_difference_low"], row[f"{metric}_difference_high"] = estimate.difference_interval
            row[f"{metric}_cited"] = cited(self.preset, metric)
        return row


def cited(preset: str, metric: str) -> float | None:
    """Return what the paper cites; None: nothing."""
    figures = PRESETS[preset].cited
    return getattr(figures, _CITED[metric]) if figures is not None and metric in _CITED else None


def write_comparison(
    storage: Storage,
    out: str,
    prepared: PreparedSet,
    split: str,
    failures: Mapping[str, str],
    settings: Mapping[str, Any],
    console: Console,
) -> str:
    """Write comparison.parquet and comparison.html from all evaluations in the folder; return the page's URI.

    Args:
        storage: of the folder.
        out: the comparison's folder.
        prepared: the data.
        split: that was compared.
        failures: why runs failed, by name.
        settings: that all runs share.
        console: gets the table.
    """
    names = _finished(storage, out)
    by_preset: dict[str, list[str]] = defaultdict(list)
    for name in [*names, *failures]:
        if name not in by_preset[_preset_of(name)]:
            by_preset[_preset_of(name)].append(name)
    presets = [preset for preset in PRESETS if preset in by_preset]
    measured = [preset for preset in presets if any(_preset_of(name) == preset for name in names)]
    reference = _REFERENCE if _REFERENCE in measured or not measured else measured[0]
    estimates, num_images = _estimates(storage, out, names, reference, prepared)
    ended = []
    for preset in presets:
        runs = [name for name in by_preset[preset] if name in names]
        config = preset_config(preset, settings["image_size"])
        ended.append(_ended(storage, out, config, runs, failures, estimates.get(preset, {})))
    table = pa.Table.from_pylist([each.row() for each in ended], COMPARISON)
    storage.write_table(table, storage.join(out, "comparison.parquet"))
    page = storage.join(out, "comparison.html")
    storage.write(page, comparison_page(ended, reference, prepared, split, num_images, settings).encode())
    _print(ended, console)
    console.print(page)
    return page


def _finished(storage: Storage, out: str) -> list[str]:
    """Return the names of all runs that have been evaluated, in order."""
    folder = storage.join(out, "evaluations")
    if not storage.exists(folder):
        return []
    uris = (info.uri for info in storage.list(folder, (".json",)))
    return sorted(uri.split("/")[-2] for uri in uris if uri.endswith("/metrics.json"))


def _preset_of(name: str) -> str:
    return name.rpartition("-")[0]


def _estimates(
    storage: Storage, out: str, names: Sequence[str], reference: str, prepared: PreparedSet
) -> tuple[dict[str, dict[str, Estimate]], int]:
    """Return the estimates of each preset, from the runs' predictions for the same images, and the number of these."""
    if not names:
        return {}, 0
    runs = defaultdict(list)
    labels: Labels | None = None
    first: pa.Table | None = None
    for name in names:
        meta = json.loads(storage.read(storage.join(out, "runs", name, "best", META)))
        tasks, space = meta["model"]["tasks"], LabelSpace.from_json(meta["label_space"])
        uri = storage.join(out, "evaluations", name, "predictions.parquet")
        table = storage.read_table(uri).sort_by("image_id")
        if first is not None and not table["image_id"].equals(first["image_id"]):
            raise JobError(f"{uri}: its images are not those of the other evaluations; choose another compare.out")
        if first is None or "race" in tasks:  # an evaluation maps races onto the network's only if it predicts them
            labels = read_labels(table, replace(space, age_groups=prepared.label_space.age_groups))
        first = table
        runs[_preset_of(name)].append(read_predictions(table, tasks, space))
    assert labels is not None
    assert first is not None
    return compare(runs, labels, first["group_id"].to_numpy(), reference), first.num_rows


def _ended(
    storage: Storage,
    out: str,
    config: ModelConfig,
    runs: Sequence[str],
    failures: Mapping[str, str],
    estimates: Mapping[str, Estimate],
) -> Ended:
    histories = [storage.read_table(storage.join(out, "runs", name, "history.parquet")) for name in runs]
    rates = [rate for history in histories for rate in history["samples_per_s"].to_pylist()]
    preset, images_per_s = config.preset, None
    if runs:
        with local_checkpoint(storage, storage.join(out, "runs", runs[0], "best"), "compare.out") as loaded:
            network = loaded.model
            images_per_s = _images_per_s(loaded)
    else:
        network = MultiTaskNet(config, UTKFACE).eval()
    num_parameters, num_multiply_adds = network_size(network)
    curves = [
        [
            (epoch, mae)
            for epoch, mae in zip(*(history[name].to_pylist() for name in ("epoch", "val_age_mae_years")), strict=True)
            if mae is not None
        ]
        for history in histories
    ]
    return Ended(
        preset=preset,
        seeds=[int(name.rpartition("-")[2]) for name in runs],
        failures=[f"{name}: {problem}" for name, problem in failures.items() if _preset_of(name) == preset],
        side_px=network.config.image_size,
        num_parameters=num_parameters,
        num_multiply_adds=num_multiply_adds,
        train_samples_per_s=float(np.median(rates)) if rates else None,
        score_images_per_s=images_per_s,
        estimates=estimates,
        curves=curves,
    )


def _images_per_s(loaded: Checkpoint) -> float:
    """Return how many crops a second the network scores on this machine's CPU: the best of three tries."""
    predictor = AttributePredictor(loaded.model, loaded.transform, PredictConfig(precision="auto"))
    side = stored_side_px(loaded.transform.crop_side_px, loaded.transform.margin)
    crops = np.random.default_rng(0).integers(0, 256, (_NUM_TIMED, side, side, 3), dtype=np.uint8)
    predictor.predict(crops[:1])
    times = []
    for _ in range(3):
        started = time.perf_counter()
        predictor.predict(crops)
        times.append(time.perf_counter() - started)
    return _NUM_TIMED / min(times)


def _print(ended: Sequence[Ended], console: Console) -> None:
    table = make_table("preset", "runs", *_LABELS.values(), "parameters", "images/s, CPU")
    for each in ended:
        table.add_row(
            each.preset,
            str(len(each.seeds)),
            *(text(metric, each.estimates.get(metric)) for metric in COMPARED_METRICS),
            f"{each.num_parameters / 1e6:.1f} M",
            f"{each.score_images_per_s:.0f}" if each.score_images_per_s else "",
        )
    console.print(table)


def text(metric: str, estimate: Estimate | None) -> str:
    """Return an estimate with its interval: `7.31 (7.05-7.58)`, or in percent."""
    if estimate is None:
        return ""
    factor, digits = (1.0, 2) if metric == "age_mae_years" else (100.0, 1)
    low, high = (end * factor for end in estimate.interval)
    return f"{estimate.value * factor:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def difference_text(metric: str, estimate: Estimate | None) -> str:
    """Return the difference from the reference with its interval: `+0.31 (0.05 to 0.58)`; percentage points."""
    if estimate is None or estimate.difference is None or estimate.difference_interval is None:
        return ""
    factor, digits = (1.0, 2) if metric == "age_mae_years" else (100.0, 1)
    low, high = (end * factor for end in estimate.difference_interval)
    return f"{estimate.difference * factor:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def comparison_page(
    ended: Sequence[Ended],
    reference: str,
    prepared: PreparedSet,
    split: str,
    num_images: int,
    settings: Mapping[str, Any],
) -> str:
    """Return the page as HTML that loads no other file."""
    environment = page_environment({"text": text, "difference": difference_text})
    measured = [each for each in ended if each.estimates]
    ranked = sorted(measured, key=lambda each: _rank(each.estimates.get("age_mae_years")))
    return environment.get_template("comparison.html.jinja").render(
        ended=ended,
        metrics=COMPARED_METRICS,
        labels=_LABELS,
        presets=PRESETS,
        cited=cited,
        reference=reference,
        prepared=prepared,
        split=split,
        num_images=num_images,
        with_seeds=_metrics_of(measured, includes_seeds=True),
        without_seeds=_metrics_of(measured, includes_seeds=False),
        settings=settings,
        machine=cpu_name(),
        differences=Markup(_svg(_differences_figure(ranked, reference))) if ranked else None,
        sizes=Markup(_svg(_sizes_figure(ranked, reference))) if ranked else None,
        curves=Markup(_svg(_curves_figure(measured))) if measured else None,
    )


def _metrics_of(measured: Sequence[Ended], *, includes_seeds: bool) -> list[str]:
    """Return the labels of the metrics whose intervals hold the variance between seeds, or of the others."""
    found = {
        metric
        for each in measured
        for metric, estimate in each.estimates.items()
        if estimate.includes_seeds == includes_seeds
    }
    return [_LABELS[metric].removesuffix(", years") for metric in COMPARED_METRICS if metric in found]


def _rank(estimate: Estimate | None) -> float:
    return estimate.value if estimate is not None else float("inf")


def _differences_figure(ranked: Sequence[Ended], reference: str) -> Figure:
    """Draw each preset's age MAE with its interval, best above."""
    shown = [each for each in ranked if "age_mae_years" in each.estimates]
    figure = Figure(figsize=(6, 1.0 + 0.24 * max(len(shown), 1)), layout="constrained")
    axes = figure.subplots()
    for row, each in enumerate(reversed(shown)):
        estimate = each.estimates["age_mae_years"]
        low, high = estimate.interval
        colour = "#0072b2" if estimate.differs else "#888888"
        if each.preset == reference:
            colour = "#d55e00"
        elif estimate.difference is None:
            colour = "#000000"
        axes.plot([low, high], [row, row], color=colour, linewidth=2)
        axes.plot([estimate.value], [row], "o", color=colour)
    axes.set_yticks(range(len(shown)), [each.preset for each in reversed(shown)])
    axes.set_xlabel("age MAE, years, with 95 % intervals")
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    return figure


def _sizes_figure(ranked: Sequence[Ended], reference: str) -> Figure:
    """Draw the age MAE against the work for one image."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for each in ranked:
        if "age_mae_years" in each.estimates:
            x, y = each.num_multiply_adds / 1e6, each.estimates["age_mae_years"].value
            axes.plot([x], [y], "o", color="#d55e00" if each.preset == reference else "#0072b2")
            axes.annotate(each.preset, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.1)
    axes.set_xlabel("multiply-adds for one image, millions")
    axes.set_ylabel("age MAE, years")
    axes.grid(alpha=0.3)
    return figure


def _curves_figure(measured: Sequence[Ended]) -> Figure:
    """Draw the age MAE on validation after each epoch."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, each in enumerate(measured):
        for run, curve in enumerate(each.curves):
            if curve:
                style = ("-", "--", "-.", ":")[number // 10 % 4]
                label = each.preset if run == 0 else None
                axes.plot(
                    *zip(*curve, strict=True), style, marker=".", color=f"C{number % 10}", label=label, linewidth=1
                )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("age MAE on validation, years")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)
    return figure


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    drawn = file.getvalue()
    return drawn[drawn.index("<svg") :]
