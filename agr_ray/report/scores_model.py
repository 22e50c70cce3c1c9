"""How good the model of a scored bucket is: its errors in validation, and how uncertain it is about the faces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from agr_ray.data.prepared import RENDERED
from agr_ray.models.card_tables import figure
from agr_ray.report.page import Block, Paragraph, Table
from agr_ray.report.scores_shares import attributes, num_counted, total_rows

_OTHERS: Final = "On other photographs, errors can be larger."
_MEASURED: Final = {
    "age_mae_years": ("age MAE", 1.0, " years"),
    "age_exact_group": ("in the right age group", 100.0, " %"),
    "gender_accuracy": ("gender accuracy", 100.0, " %"),
    "race_accuracy": ("race accuracy", 100.0, " %"),
}


def model_warnings(record: Mapping[str, Any]) -> list[str]:
    """Return warnings about what the model was trained on."""
    source = ((record.get("model") or {}).get("trained_on") or {}).get("source") or ""
    if RENDERED not in source.split(" + "):
        return []
    if source != RENDERED:
        return [f"The model was partly trained on drawings ({source})."]
    return ["The model was trained on drawings of faces only. Its predictions for photographs of people mean nothing."]


def model_blocks(record: Mapping[str, Any], demographics: pa.Table, mean_width_years: float | None) -> list[Block]:
    """Return the model's errors on validation images, and how uncertain it is about these faces.

    Args:
        record: of the run.
        demographics: of the run.
        mean_width_years: mean width of the age intervals of the run's faces; None: not known.
    """
    model = record.get("model") or {}
    return [*_errors(model), *_uncertainty(model, demographics, mean_width_years)]


def _errors(model: Mapping[str, Any]) -> list[Block]:
    trained_on = model.get("trained_on")
    source = "It is not known what the model was trained on."
    if trained_on:
        number = "" if trained_on["num_images"] is None else f" ({trained_on['num_images']:,} images)"
        source = f"The model was trained on {trained_on['source']}{number}."
    blocks: list[Block] = [Paragraph(source)]
    for each in model.get("measured") or []:
        header = (f"on {each['data']}", "model", "95 % interval", "baseline", "images")
        blocks.append(Table(header, each["rows"], is_headline=True, note=_OTHERS))
    if len(blocks) > 1:
        return blocks
    validation = model.get("validation")
    if not validation:
        unknown = "Its errors are not known, because no validation is recorded: agr-ray evaluate measures them."
        return [Paragraph(f"{source} {unknown}")]
    rows: list[Sequence[str]] = []
    for key, each in validation.items():
        title, scale, unit = _MEASURED[key]
        values = (figure(each[name], scale, unit) for name in ("value", "baseline"))
        rows.append((title, *values, f"{each['num_images']:,}"))
    note = (
        "Validation images are of the same kind as the training images. The training chose its best epoch on them, so "
        "these figures are slightly optimistic: agr-ray evaluate measures the model on test images."
    )
    columns = ("on validation images", "model", "baseline", "images")
    return [*blocks, Table(columns, rows, is_headline=True, note=f"{note} {_OTHERS}")]


def _uncertainty(model: Mapping[str, Any], demographics: pa.Table, mean_width_years: float | None) -> list[Block]:
    calibration = model.get("calibration") or {}
    rows = []
    if mean_width_years is not None:
        rows.append(("mean width of the age intervals", f"{mean_width_years:.1f} years", "", ""))
    for attribute in attributes(demographics):
        of = calibration.get(attribute)
        row = total_rows(demographics, attribute)[0]
        undecided, faces = row["num_abstained"], num_counted(row)
        if of is None and not undecided:
            continue
        here = f"{100 * undecided / faces:.1f} %" if faces and undecided is not None else ""
        abstained, error = (
            "" if not of or of[key] is None else f"{100 * of[key]:.1f} %" for key in ("abstained", "error")
        )
        rows.append((f"abstains on {attribute}", here, abstained, error))
    if not rows:
        return []
    number = f"{calibration['num_images']:,} " if calibration else ""
    columns = ("uncertainty", "these faces", f"{number}calibration images", "error where it does not abstain")
    return [Table(columns, rows)]
