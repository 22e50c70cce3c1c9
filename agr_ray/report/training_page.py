"""The page of a training run: learning curves, the best epoch, and the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from agr_ray.errors import ConfigError
from agr_ray.learn.history import best_row
from agr_ray.learn.run import OBJECTIVE
from agr_ray.models.card_tables import group_rows, headline_rows
from agr_ray.models.checkpoint import META
from agr_ray.report.charts import Line, Scale, line_drawing
from agr_ray.report.evaluation_tables import rows_table
from agr_ray.report.model_description import architecture, settings_of, split_of_data
from agr_ray.report.page import Block, Cell, Drawing, Drawings, Page, Paragraph, Section, Table, Values, flat
from agr_ray.report.terms import TRAINED
from agr_ray.storage import MissingObject, Storage

RUN_FILE: Final = "run.json"
HISTORY_FILE: Final = "history.parquet"
_PANELS: Final = (
    ("loss", "Loss: the weighted sum of the task losses.", Scale("loss", digits=4), ("train_loss", "val_loss")),
    (
        "age",
        "Mean distance to the true age or age range on validation.",
        Scale("years", from_zero=True),
        ("val_age_distance_years",),
    ),
    (
        "accuracy",
        "Accuracy on validation.",
        Scale("accuracy, %", 100.0, 2),
        ("val_gender_accuracy", "val_race_accuracy"),
    ),
    (
        "objective",
        "Objective: the epoch with the lowest value is the best.",
        Scale("objective", digits=4),
        (OBJECTIVE,),
    ),
    ("rate", "Learning rate at the end of the epoch.", Scale("learning rate", digits=8, from_zero=True), ("lr",)),
    ("speed", "Training throughput of all workers.", Scale("samples/s", digits=1, from_zero=True), ("samples_per_s",)),
    (
        "waiting",
        "Share of the training time spent waiting for data.",
        Scale("waiting, %", 100.0, 1, from_zero=True),
        ("data_wait_share",),
    ),
)
_NAMES: Final = {
    "train_loss": "training",
    "val_loss": "validation",
    "val_age_distance_years": "age",
    "val_gender_accuracy": "gender",
    "val_race_accuracy": "race",
}
_ENDS: Final = {"epochs": "The run finished all epochs.", "early_stopping": "The run stopped early."}
_COLUMNS: Final = (
    ("epoch", "epoch", "d"),
    ("train_loss", "training loss", ".4f"),
    ("val_loss", "validation loss", ".4f"),
    ("val_age_mae_years", "age MAE, years", ".3f"),
    ("val_gender_accuracy", "gender", ".4f"),
    ("val_race_accuracy", "race", ".4f"),
    (OBJECTIVE, "objective", ".4f"),
    ("lr", "learning rate", ".2e"),
    ("samples_per_s", "samples/s", ".1f"),
    ("epoch_s", "seconds", ".1f"),
)


def training_report(storage: Storage, uri: str) -> Page:
    """Return the page of a training run, which may still be going on.

    Raises:
        ConfigError: its record can't be read, or no epoch has been finished.
    """
    try:
        record = json.loads(storage.read(storage.join(uri, RUN_FILE)))
        finished, config = record["finished"], record["config"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{storage.join(uri, RUN_FILE)}: not written by agr-ray train, or damaged") from None
    history = storage.read_table(storage.join(uri, HISTORY_FILE)).to_pylist()
    if not history:
        raise ConfigError(f"{uri}: no epoch has been finished yet")
    try:
        meta = json.loads(storage.read(storage.join(uri, "best", META)))
    except MissingObject:
        meta = None
    best = best_row(history) or history[-1]
    verdict = (
        f"{len(history)} epoch{'s' if len(history) != 1 else ''}; the best is epoch {best['epoch']}{_measured(best)}."
        + (f" {_ENDS.get(finished, finished)}" if finished else " The run has not ended.")
    )
    model: list[Block]
    if meta is None:
        model = [Paragraph("There is no checkpoint of the best epoch yet.", "note"), Values(flat(config))]
    else:
        model = [*architecture(meta), *settings_of(meta)]
    return Page(
        f"Training run {uri.rstrip('/').rpartition('/')[2]}",
        [
            Paragraph(verdict, "verdict"),
            Paragraph(
                "The best epoch was chosen on the validation images, so its metrics are slightly optimistic. To "
                f"measure the model on the test split: agr-ray evaluate --checkpoint {uri}/best --data "
                f"{record['data'].get('uri', 'DATA')}"
            ),
        ],
        [
            Section("curves", "Learning curves", [Drawings(_curves(history, best["epoch"]))]),
            Section("validation", "Best epoch on validation", _validation(meta)),
            Section("epochs", "All epochs", [_epochs(history, best["epoch"])]),
            Section("data", "Images", split_of_data(meta)),
            Section("model", "Model and training", model),
            Section(
                "about",
                "About this page",
                [
                    Values(
                        {
                            "run": uri,
                            "data": str(record["data"].get("uri", "")),
                            "split manifest, SHA-256": str(record["data"].get("split_manifest_sha256", "")),
                            "digest of the settings": str(record.get("settings_digest", "")),
                            "commit": str(record.get("git_commit") or "unknown"),
                        }
                    )
                ],
            ),
        ],
        TRAINED,
    )


def _measured(row: Mapping[str, Any]) -> str:
    parts = [
        f"{title} {row[name] * factor:.{digits}f}{unit}"
        for name, title, factor, digits, unit in (
            ("val_age_mae_years", "age MAE", 1.0, 2, " years"),
            ("val_gender_accuracy", "gender", 100.0, 1, " %"),
            ("val_race_accuracy", "race", 100.0, 1, " %"),
        )
        if row[name] is not None
    ]
    return f", with {', '.join(parts)} on validation" if parts else ""


def _curves(history: Sequence[Mapping[str, Any]], best_epoch: int) -> list[Drawing]:
    epochs = [row["epoch"] for row in history]
    drawings = []
    for name, caption, scale, columns in _PANELS:
        lines = [
            Line(_NAMES.get(column, scale.label), epochs, [row[column] for row in history])
            for column in columns
            if any(row[column] is not None for row in history)
        ]
        if lines:
            x = Scale("epoch", digits=0, is_integer=True)
            text = f"{caption} The vertical line marks the best epoch."
            drawings.append(line_drawing(f"curve-{name}", text, lines, x, scale, marks=(best_epoch,)))
    return drawings


def _validation(meta: Mapping[str, Any] | None) -> list[Block]:
    val = ((meta or {}).get("metrics") or {}).get("val") or {}
    if not val.get("n"):
        return [Paragraph("Not validated.", "note")]
    blocks: list[Block] = [rows_table(headline_rows(val), is_headline=True)]
    groups = group_rows(val.get("groups") or {})
    if groups.rows:
        blocks.append(rows_table(groups, num_text_columns=2, caption="By true group"))
    return blocks


def _epochs(history: Sequence[Mapping[str, Any]], best_epoch: int) -> Table:
    rows = [
        [
            Cell(
                "" if row[name] is None else f"{row[name]:{form}}",
                key="" if row[name] is None else row[name],
                is_strong=row["epoch"] == best_epoch,
            )
            for name, _, form in _COLUMNS
        ]
        for row in history
    ]
    return Table([title for _, title, _ in _COLUMNS], rows, is_sortable=True, note="Bold: the best epoch.")
