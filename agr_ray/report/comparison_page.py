"""The page of a comparison: presets that were trained on the same images, side by side."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from matplotlib.figure import Figure

from agr_ray.config.presets import PRESETS
from agr_ray.errors import ConfigError
from agr_ray.evaluation.comparison import Estimate
from agr_ray.report.charts import (
    INTERVAL,
    Dot,
    Line,
    Scale,
    dot_drawing,
    label_heights,
    line_drawing,
    scale_logarithmically,
    shortened,
)
from agr_ray.report.comparison_rows import LABELS, cited, difference_text, estimates_of, text
from agr_ray.report.figure import COLOURS, SERIES, new_figure
from agr_ray.report.page import Block, Cell, Drawing, Drawings, Fold, Page, Paragraph, Section, Table, Values, flat
from agr_ray.report.terms import MEASURED as TERMS
from agr_ray.schema import COMPARED_METRICS
from agr_ray.storage import MissingObject, Storage

TABLE: Final = "comparison.parquet"
RECORD: Final = "comparison.json"
"""The settings that all runs share, by section, those of each preset, and the names of the runs."""
MEASURED: Final = "measured.json"
"""The images on which runs were measured, the reference, and the machine on which scoring was timed."""

_AGE: Final = "age_mae_years"
_ONE_OFF: Final = "age_one_off"
_SCALES: Final = {
    _AGE: Scale("age MAE, years", interval_title=INTERVAL),
    _ONE_OFF: Scale("one-off accuracy, %", 100.0, 1, interval_title=INTERVAL),
}
_TITLES: Final = {_AGE: "Age MAE", _ONE_OFF: "One-off accuracy"}


@dataclass(frozen=True)
class Measurement:
    """Content of `MEASURED`."""

    data: str
    """URI of the prepared set."""
    split_manifest_sha256: str
    num_images: int
    """On which all runs were measured."""
    reference: str
    """The preset to which differences are relative."""
    machine: str
    """On which scoring was timed."""
    commits: Mapping[str, str]
    """Git commit of each run's code, by its name PRESET-SEED; empty: unknown."""


@dataclass(frozen=True)
class ComparedPresets:
    """What a comparison's folder holds."""

    rows: Sequence[Mapping[str, Any]]
    """Of schema.COMPARISON."""
    settings: Mapping[str, Any]
    """Content of `RECORD`."""
    split: str
    measured: Measurement
    curves: Mapping[str, Sequence[tuple[int, float]]]
    """(epoch, validation age MAE in years) of each run, by its name PRESET-SEED."""

    @property
    def reference(self) -> str:
        """The preset to which differences are relative."""
        return self.measured.reference

    @property
    def num_differences(self) -> int:
        """For which the adjusted intervals make up: that of each other measured preset from the reference."""
        return sum(bool(row["seeds"]) for row in self.rows) - 1

    @property
    def ranking(self) -> str:
        """The metric that ranks presets: the age MAE or, if no image has an exact age, one-off."""
        return _AGE if any(row[_AGE] is not None for row in self.rows) else _ONE_OFF

    @property
    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """The estimates of each measured preset, by metric, the best by `ranking` first."""
        several = [row for row in self.rows if len(row["seeds"]) > 1]
        # One preset with several runs tells the variance between seeds for all.
        with_seeds = frozenset(m for m in COMPARED_METRICS if any(row[m] is not None for row in several))
        every = {row["preset"]: estimates_of(row, with_seeds) for row in self.rows}
        measured = [(preset, estimates) for preset, estimates in every.items() if estimates]
        rank, sign = self.ranking, 1.0 if self.ranking == _AGE else -1.0
        return dict(sorted(measured, key=lambda item: sign * item[1][rank].value if rank in item[1] else float("inf")))


def comparison_report(storage: Storage, uri: str) -> Page:
    """Return the page of the comparison in a folder.

    Raises:
        ConfigError: the folder holds no comparison, or a file of it is damaged.
    """
    try:
        rows = storage.read_table(storage.join(uri, TABLE)).to_pylist()
        settings, measured = (json.loads(storage.read(storage.join(uri, name))) for name in (RECORD, MEASURED))
        runs = [f"{row['preset']}-{seed}" for row in rows for seed in row["seeds"]]
        curves = {name: _curve(storage, uri, name) for name in runs}
        compared = ComparedPresets(rows, settings, settings["split"], Measurement(**measured), curves)
    except MissingObject:
        raise ConfigError(f"{uri}: no finished comparison; there are no {TABLE}, {RECORD} and {MEASURED}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{uri}: not written by agr-ray compare, or damaged ({error}); compare again") from None
    return comparison_page(compared)


def history_columns(storage: Storage, folder: str, run: str, *names: str) -> list[list[Any]]:
    """Return columns of the history of a comparison's run; they are empty if it has none, which no result needs."""
    try:
        history = storage.read_table(storage.join(folder, "runs", run, "history.parquet"), columns=list(names))
    except MissingObject:
        return [[] for _ in names]
    return [history[name].to_pylist() for name in names]


def _curve(storage: Storage, folder: str, run: str) -> list[tuple[int, float]]:
    epochs, errors = history_columns(storage, folder, run, "epoch", "val_age_mae_years")
    return [(epoch, mae) for epoch, mae in zip(epochs, errors, strict=True) if mae is not None]


def comparison_page(compared: ComparedPresets) -> Page:
    """Return the page."""
    estimates = compared.estimates
    sections = [
        Section("table", "Results", _results(compared, estimates)),
        Section("differences", f"Differences from {compared.reference}", _differences(compared, estimates)),
        Section("training", "Course of training", _training(compared, estimates)),
        Section("cited", "As the paper cites", _cited(compared)),
        Section("settings", "Settings of all runs", _settings(compared)),
    ]
    terms = {name: TERMS[name] for name in ("MAE", "within 5 years", "95 % interval")}
    return Page(
        f"Comparison of {len(compared.rows)} networks",
        _lead(compared, estimates),
        [section for section in sections if section.blocks],
        terms | {"one-off": TERMS["age group or the next"]},
    )


def _lead(compared: ComparedPresets, estimates: Mapping[str, Mapping[str, Estimate]]) -> list[Block]:
    measured, split = compared.measured, compared.split
    unseen = "which training never saw" if split == "test" else "which were not used to update the weights"
    blocks: list[Block] = [Paragraph(_verdict(compared, estimates), "verdict")]
    if split == "val":
        blocks.append(
            Paragraph(
                "Training chose each network's best epoch on this split, so these results are optimistic.", "warning"
            )
        )
    failures = [failure for row in compared.rows for failure in row["failures"]]
    if failures:
        runs = "1 run" if len(failures) == 1 else f"{len(failures)} runs"
        blocks.append(Paragraph(f"{runs} failed; the reasons are below the results.", "warning"))
    by_commit = defaultdict(list)
    for name, commit in measured.commits.items():
        by_commit[commit].append(name)
    if len(by_commit) > 1:
        listed = "; ".join(f"{commit or 'unknown'} ({', '.join(names)})" for commit, names in by_commit.items())
        warning = f"The runs were trained by different versions of the code, which may explain a difference: {listed}."
        blocks.append(Paragraph(warning, "warning"))
    with_seeds = _metrics_of(estimates, includes_seeds=True)
    without_seeds = _metrics_of(estimates, includes_seeds=False)
    over_seeds = (
        f" and, of {', '.join(with_seeds)}, over seeds: the variance between seeds comes from the networks with "
        "several runs, and is assumed to be the same for the others"
        if with_seeds
        else ""
    )
    blocks += [
        Paragraph(
            f"All were trained on the same images of {measured.data}, from random weights, and measured on the same "
            f"{measured.num_images:,} images of the split {split}, {unseen} (split manifest "
            f"{measured.split_manifest_sha256[:8]}). Settings are the same except those that belong to a preset."
        ),
        Paragraph(
            f"Intervals are 95 % intervals over persons (over images if persons are unknown){over_seeds}. A difference "
            f"is significant if its interval excludes 0. {_correction(compared.num_differences)}".rstrip()
        ),
    ]
    if without_seeds:
        blocks.append(
            Paragraph(
                f"The intervals of {', '.join(without_seeds)} do not include the variance between seeds, because each "
                "network was trained once. Another seed may reverse a small difference. A second seed for some of "
                "these presets (agr-ray compare with --seeds 2) includes it for all."
            )
        )
    remark = (
        "A run's checkpoint is runs/PRESET-SEED/best. Results are for the training budget in the settings below; a "
        "longer training may change the order."
    )
    return [*blocks, Paragraph(remark)]


def _correction(num_differences: int) -> str:
    """Return how intervals of differences are corrected; empty: they are not, because there is one at most."""
    if num_differences < 2:
        return ""
    return (
        f"Intervals of differences are corrected for {num_differences} differences (Bonferroni): with a probability of "
        "95 %, all of those in one metric hold the truth."
    )


def _verdict(compared: ComparedPresets, estimates: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Return the result in one or two sentences."""
    rank = compared.ranking
    ranked = [preset for preset in estimates if rank in estimates[preset]]
    if not estimates:
        return "No network was measured."
    if not ranked:
        return (
            "Age was not measured, because no network predicts it or no image is labelled with it; the tables have the "
            "other tasks."
        )
    best, reference = ranked[0], compared.reference
    first, scale = estimates[best][rank], _SCALES[rank]
    shown = f"{scale.text(first.value)} {'years' if rank == _AGE else '%'}"
    why = "" if rank == _AGE else "No image has an exact age, so one-off accuracy ranks the networks. "
    if len(ranked) == 1:
        return f"{why}{best} has {'an age MAE' if rank == _AGE else 'a one-off accuracy'} of {shown}."
    verdict = f"{why}{best} has the {'lowest age MAE' if rank == _AGE else 'highest one-off accuracy'}, {shown}"
    if best == reference:
        return f"{verdict}; differences from it are below."
    if reference not in ranked:
        return f"{verdict}."
    share = "which is a significant difference" if first.differs else "but the difference is not significant"
    return f"{verdict}. {reference} has {scale.text(estimates[reference][rank].value)}, {share}."


def _metrics_of(estimates: Mapping[str, Mapping[str, Estimate]], *, includes_seeds: bool) -> list[str]:
    """Return the labels of the metrics whose intervals hold the variance between seeds, or of the others."""
    found = {
        metric
        for of_preset in estimates.values()
        for metric, estimate in of_preset.items()
        if estimate.includes_seeds == includes_seeds
    }
    return [LABELS[metric].removesuffix(", years") for metric in COMPARED_METRICS if metric in found]


def _results(compared: ComparedPresets, estimates: Mapping[str, Mapping[str, Estimate]]) -> list[Block]:
    columns = ["preset", "runs", *LABELS.values(), "input, px", "parameters", "multiply-adds"]
    columns += ["training, samples/s", "scoring, images/s, CPU"]
    rows = []
    for row in compared.rows:
        own, preset = estimates.get(row["preset"], {}), row["preset"]
        rows.append(
            [
                f"{preset} (reference)" if preset == compared.reference else preset,
                Cell(str(len(row["seeds"])), key=len(row["seeds"])),
                *(_figure_cell(metric, own.get(metric)) for metric in COMPARED_METRICS),
                Cell(str(row["side_px"]), key=row["side_px"]),
                Cell(f"{row['parameters'] / 1e6:.1f} M", key=row["parameters"]),
                Cell(f"{row['multiply_adds'] / 1e6:,.0f} M", key=row["multiply_adds"]),
                _rate_cell(row["train_samples_per_s"]),
                _rate_cell(row["score_images_per_s"]),
            ]
        )
    note = (
        "Accuracies are in percent. One-off: the predicted age group is the true one or next to it. Training: speed of "
        "the median epoch, without validation; several runs may have shared the machine."
    )
    if any(row["preset"] == "faceage" for row in compared.rows):
        note += " faceage is measured without the calibration of ages that belongs to its method."
    blocks: list[Block] = [Table(columns, rows, note=note, is_sortable=True)]
    failures = [failure.partition(": ") for row in compared.rows for failure in row["failures"]]
    if failures:
        blocks.append(
            Table(
                ("run", "why it failed"),
                [(name, why) for name, _, why in failures],
                num_text_columns=2,
                caption="Runs that failed",
                last_is_text=True,
            )
        )
    ranked = {preset: each[compared.ranking] for preset, each in estimates.items() if compared.ranking in each}
    if ranked:
        blocks.append(Drawings([_ages(compared, ranked), _sizes(compared, ranked)]))
    return blocks


def _rate_cell(rate: float | None) -> Cell:
    return Cell("" if rate is None else f"{rate:,.0f}", key="" if rate is None else rate)


def _figure_cell(metric: str, estimate: Estimate | None) -> Cell:
    return Cell(text(metric, estimate), key="" if estimate is None else estimate.value)


def _differences(compared: ComparedPresets, estimates: Mapping[str, Mapping[str, Estimate]]) -> list[Block]:
    rows = []
    for row in compared.rows:
        own = estimates.get(row["preset"], {})
        if own and row["preset"] != compared.reference:
            each = [(metric, own.get(metric)) for metric in COMPARED_METRICS]
            cells = [Cell(difference_text(name, one), is_strong=one is not None and one.differs) for name, one in each]
            rows.append([row["preset"], *cells])
    if not rows:
        return []
    note = "On the same images. Bold: the interval excludes 0. Accuracies are in percentage points."
    return [Table(["preset", *LABELS.values()], rows, note=f"{note} {_correction(compared.num_differences)}".rstrip())]


def _ages(compared: ComparedPresets, ranked: Mapping[str, Estimate]) -> Drawing:
    """Return each preset's estimate of `ranking` with its interval, best above."""
    reference = compared.reference

    def note(preset: str) -> str:
        return "(reference)" if preset == reference else "(differs)" if ranked[preset].differs else ""

    dots = [Dot(preset, each.value, each.interval, note(preset)) for preset, each in ranked.items()]
    middle = ranked[reference].value if reference in ranked else None
    caption = (
        f"{_TITLES[compared.ranking]} with 95 % intervals. Dotted: {reference}. “differs”: the interval of the "
        "difference from it on the same images excludes 0, even if the bars overlap."
    )
    return dot_drawing("ages", caption, dots, _SCALES[compared.ranking], reference=middle)


def _sizes(compared: ComparedPresets, ranked: Mapping[str, Estimate]) -> Drawing:
    """Return `ranking` against the work for one image."""
    scale = _SCALES[compared.ranking]
    points = [
        (row["preset"], row["multiply_adds"] / 1e6, ranked[row["preset"]].value * scale.factor)
        for row in compared.rows
        if row["preset"] in ranked
    ]

    def draw() -> Figure:
        figure, axes = new_figure(4.4, 3.4)
        heights = label_heights([(x, y) for _, x, y in points])
        for (preset, x, y), height in zip(points, heights, strict=True):
            is_reference = preset == compared.reference
            axes.plot([x], [y], "s" if is_reference else "o", color=COLOURS["red" if is_reference else "blue"])
            axes.annotate(
                shortened(preset),
                (x, y),
                xytext=(12, height),
                textcoords=("offset points", "data"),
                fontsize=8,
                verticalalignment="center",
                arrowprops={"arrowstyle": "-", "color": COLOURS["faint"], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2},
            )
        axes.margins(x=0.2, y=0.1)
        axes.set(xlabel="multiply-adds for one image, millions", ylabel=scale.label)
        scale_logarithmically(axes, is_x=True)
        return figure

    rows = [(preset, f"{x:,.0f}", f"{y:.{scale.digits}f}") for preset, x, y in points]
    numbers = Table(("preset", "multiply-adds, millions", scale.label), rows)
    title = _TITLES[compared.ranking]
    caption = f"{title} against multiply-adds for one image. The square is {compared.reference}."
    return Drawing("sizes", caption, draw, numbers)


def _training(compared: ComparedPresets, estimates: Mapping[str, Mapping[str, Estimate]]) -> list[Block]:
    """Return validation after each epoch: charts of a few runs, in the order of `ranking`."""
    num_runs = {row["preset"]: len(row["seeds"]) for row in compared.rows}
    lines = {}
    for preset in estimates:
        for name in (name for name in compared.curves if name.rpartition("-")[0] == preset and compared.curves[name]):
            epochs, values = zip(*compared.curves[name], strict=True)
            lines[name] = Line(name if num_runs[preset] > 1 else preset, epochs, values)
    dotted = next((name for name in lines if name.rpartition("-")[0] == compared.reference), None)
    drawings = []
    for place in range(0, len(lines), len(SERIES)):
        names = list(lines)[place : place + len(SERIES)]
        shown, caption = [lines[name] for name in names], "Age MAE on validation after each epoch."
        if dotted is not None and dotted not in names:
            shown.append(replace(lines[dotted], is_reference=True))
            caption += f" Dotted: {compared.reference}."
        epoch = Scale("epoch", digits=0, is_integer=True)
        drawings.append(line_drawing(f"training-{place}", caption, shown, epoch, Scale("age MAE on validation, years")))
    return [Drawings(drawings)] if drawings else []


def _cited(compared: ComparedPresets) -> list[Block]:
    rows = []
    for preset in (row["preset"] for row in compared.rows):
        if PRESETS[preset].cited is None:
            continue
        mae = cited(preset, _AGE)
        shares = [cited(preset, metric) for metric in ("age_one_off", "gender_accuracy", "race_accuracy")]
        figures = [
            "" if mae is None else f"{mae:.2f}",
            *("" if each is None else f"{100 * each:.1f}" for each in shares),
        ]
        rows.append([preset, PRESETS[preset].row, *figures])
    if not rows:
        return []
    remark = (
        "Tables 10 and 11 of Bosco and Chi (2025), from which these networks come, cite these figures. They come from "
        "other data sets, splits and protocols: do not use them as targets, and do not rank them against each other or "
        "against the figures above."
    )
    columns = ("preset", "method", LABELS[_AGE], "one-off, %", "gender, %", "race, %")
    return [Paragraph(remark), Table(columns, rows, num_text_columns=2)]


def _settings(compared: ComparedPresets) -> list[Block]:
    shared = {name: content for name, content in compared.settings.items() if name not in ("data", "presets", "runs")}
    remark = (
        "A preset's own settings replace these: the optimiser, learning rate, weight decay, schedule and warm-up of "
        "vit and swin, and the sampler of faceage. Of the loss, age_loss and age_scale_years matter only to the age "
        "heads linear and distribution. Scoring was timed on the machine that wrote comparison.parquet "
        f"({compared.measured.machine}), with the network alone, without detection."
    )
    return [Fold("All settings", [Values(flat(shared))]), Paragraph(remark, "note")]
