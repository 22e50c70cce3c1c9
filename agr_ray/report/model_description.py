"""A network, its training and its data, from a checkpoint's meta.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agr_ray.models.card import UNKNOWN_TERMS
from agr_ray.report.figure import COLOURS, new_figure
from agr_ray.report.page import Block, Drawing, Fold, Paragraph, Table, Values, flat

_BOX_INCHES: Final = (1.55, 0.62)
_GAP_INCHES: Final = 0.35
_HEADS: Final = {"age": "age, years", "gender": "gender, p(male)", "race": "race, probabilities"}
_SETTINGS: Final = ("model", "vision", "predict", "transform")


def architecture(meta: Mapping[str, Any]) -> list[Block]:
    """Return the network as a diagram."""
    model, transform = meta["model"], meta["transform"]
    side = transform["image_size"]
    trunk = [model["backbone"], _attention(model), model.get("neck", "")]
    columns = [
        ["photograph"],
        [f"face, aligned\n{transform['template']}"],
        [f"{side} x {side} x 3\nnormalised"],
        ["\n".join(part for part in trunk if part)],
        [_head(meta, task) for task in model["tasks"]],
    ]
    caption = "The network: one backbone, and a head for each task."
    return [Drawing("architecture", caption, lambda: flow_figure(columns), _parts(meta))]


def _attention(model: Mapping[str, Any]) -> str:
    attention = model.get("attention")
    return "" if not attention or attention == "none" else f"+ {attention}"


def _head(meta: Mapping[str, Any], task: str) -> str:
    head = f"\n({meta['model']['age_head']})" if task == "age" else ""
    return _HEADS.get(task, task) + head


def _parts(meta: Mapping[str, Any]) -> Table:
    """Return the network's configuration."""
    rows = [(key, _text(value)) for key, value in meta["model"].items() if value not in ("", [], None)]
    return Table(("setting", "value"), rows, num_text_columns=2)


def training_flow() -> Figure:
    """Draw one step of training."""
    return flow_figure(
        [
            ["crops and\nlabels"],
            ["augmentation"],
            ["network"],
            ["age loss", "gender loss", "race loss"],
            ["weighted sum"],
            ["gradient step"],
        ]
    )


def flow_figure(columns: Sequence[Sequence[str]]) -> Figure:
    """Draw columns of boxes from left to right, with arrows from each column to the next.

    Args:
        columns: the texts of the boxes.
    """
    width, height = _BOX_INCHES
    tallest = max(map(len, columns))
    size = (len(columns) * (width + _GAP_INCHES), tallest * (height + 0.15) + 0.1)
    figure, axes = new_figure(*size)
    axes.grid(visible=False)
    axes.set(xlim=(0, size[0]), ylim=(0, size[1]))
    axes.axis("off")
    places: list[list[tuple[float, float]]] = []
    for number, texts in enumerate(columns):
        step = size[1] / len(texts)
        centres = [
            (width / 2 + number * (width + _GAP_INCHES), size[1] - step * (row + 0.5)) for row in range(len(texts))
        ]
        for text, (x, y) in zip(texts, centres, strict=True):
            _box(axes, text, x, y)
        places.append(centres)
    for left, right in pairwise(places):
        for start in left:
            for end in right:
                axes.annotate(
                    "",
                    (end[0] - width / 2, end[1]),
                    (start[0] + width / 2, start[1]),
                    arrowprops={"arrowstyle": "->", "color": COLOURS["quiet"], "linewidth": 1},
                )
    return figure


def _box(axes: Axes, text: str, x: float, y: float) -> None:
    axes.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        fontsize=8,
        bbox={"boxstyle": "round,pad=0.5", "facecolor": "none", "edgecolor": COLOURS["blue"]},
    )


def settings_of(meta: Mapping[str, Any]) -> list[Block]:
    """Return the settings of the training, the most important first."""
    config = meta.get("config") or {}
    if not config:
        return [
            Paragraph(
                "This checkpoint has no training record: it is untrained, or was not trained with agr_ray.", "note"
            )
        ]
    train, loss = config.get("train") or {}, config.get("loss") or {}
    rows = [
        ("batch size, over all workers", train.get("batch_size")),
        ("workers", train.get("num_workers")),
        ("maximum epochs", train.get("epochs")),
        ("input", f"{meta['transform']['image_size']} x {meta['transform']['image_size']} px"),
        ("loss weights", ", ".join(f"{task} {_text(loss.get(f'{task}_weight'))}" for task in meta["model"]["tasks"])),
        ("age loss", loss.get("age_loss")),
        ("optimiser", train.get("optimizer")),
        ("learning rate", train.get("lr")),
        ("schedule", train.get("schedule")),
        ("initial weights of the backbone", meta["model"]["pretrained"]),
    ]
    table = Table(
        ("training", "setting"),
        [(name, _text(value)) for name, value in rows if value not in (None, "")],
        num_text_columns=2,
    )
    flow = Drawing("training", "One step of training.", training_flow)
    sections = {**config, **{name: meta[name] for name in _SETTINGS if name in meta}}
    return [table, flow, Fold("All settings", [Values(flat(sections, _text))])]


def split_of_data(meta: Mapping[str, Any] | None) -> list[Block]:
    """Return the images on which the model was trained."""
    data = (meta or {}).get("data") or {}
    names = {
        "source": "trained on",
        "uri": "prepared set",
        "num_train_rows": "training images",
        "num_val_rows": "validation images",
        "detector": "faces found by",
        "licence": "terms of the training images",
    }
    values = {title: _text(data[key]) for key, title in names.items() if data.get(key)}
    if values and not data.get("licence"):
        values["terms of the training images"] = UNKNOWN_TERMS
    return [Values(values)] if values else []


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
