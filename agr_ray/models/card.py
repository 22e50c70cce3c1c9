"""A checkpoint's model card: what meta.json and evaluations say, in words for the model's users.

Everything here is text made from plain values. `save_checkpoint` writes the card; `agr-ray evaluate` adds to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS

HEADLINES: Final = (
    ("age", "mae_years", "age MAE", 1.0, " years"),
    ("age", "within_5", "age within 5 years", 100.0, " %"),
    ("age", "exact_group", "age group", 100.0, " %"),
    ("age", "one_off", "age group or the next", 100.0, " %"),
    ("age", "bias_years", "age bias", 1.0, " years"),
    ("gender", "accuracy", "gender accuracy", 100.0, " %"),
    ("gender", "balanced_accuracy", "gender balanced accuracy", 100.0, " %"),
    ("race", "accuracy", "race accuracy", 100.0, " %"),
    ("race", "balanced_accuracy", "race balanced accuracy", 100.0, " %"),
)
"""Metrics worth a row: task, key, what it is called, factor and unit to show it in."""

_GROUPS: Final = ("gender", "race", "age_group")
_SCARCE: Final = 0.5
"""A class is under-represented below this share of what it would have if all classes had as many images."""
_FEW: Final = 100
"""Or with fewer training images than this."""

_INTENDED: Final = """\
- Statistics over many photographs: how a collection is composed by perceived age, gender and race, with the error rates
  in this card stated beside the figures.
- Auditing collections and other models for uneven representation or uneven error.
- Research on estimating perceived attributes, and on its errors."""

_EXCLUDED: Final = """\
- Deciding anything about one person: admission, employment, credit, insurance, policing, border control, medical care.
- Proving an age, such as for the sale of restricted goods: the error for one face is often many years.
- Identifying anyone, or following anyone. It does not recognise people, and must not be used as if it did.
- Inferring ancestry, ethnicity, nationality, sex or gender identity. None of these can be seen in a photograph.
- Faces of people who have not been told, or have not agreed, where the law asks for that."""

_LIMITS: Final = """\
- Attributes are *perceived*: the labels are what an annotator, or another algorithm, thought of a picture. The model
  repeats their judgement and their mistakes, and accuracy is measured against them.
- It knows the categories of its training labels only, and puts every face into one of them. They are coarse, and
  many people are in none of them or in several."""


def model_card(meta: Mapping[str, Any]) -> str:
    """Return the card, in Markdown, of a checkpoint with this `meta.json`.

    What meta does not say is left out or said to be unknown, so the card of a network that was never trained is short.
    """
    data, config = meta.get("data") or {}, meta.get("config") or {}
    tasks = list(meta["model"]["tasks"])
    metrics = meta.get("metrics") or {}
    sections = [
        ("", _head(meta, tasks)),
        ("Input and output", _interface(meta, tasks)),
        ("Training data", _data(data, tasks)),
        ("Training", _training(meta, config)),
        ("Validation", _validation(metrics)),
        ("Intended uses", _INTENDED),
        ("Excluded uses", _EXCLUDED),
        ("Limits", "\n".join([_LIMITS, *_under_represented(data), *_detector_limit(data)])),
    ]
    return "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections) + "\n"


def with_measured(card: str, metrics: Mapping[str, Any]) -> str:
    """Return the card with a section of what `agr-ray evaluate` measured, in place of an earlier one of the same data.

    Args:
        card: of the checkpoint that was measured.
        metrics: what its `metrics.json` holds.
    """
    said = metrics["evaluation"]
    heading = f"## Measured on {said['source']}, split {said['split']}, {said['split_manifest_sha256'][:8]}"
    seen = said["num_seen_in_training"]
    overlap = f"**{seen:,} of them were trained on, which flatters the model.**" if seen else "None was trained on."
    if seen is None:
        overlap = "**It is not known which of them were trained on.**"
    lines = [
        heading,
        "",
        f"{metrics['n']:,} labelled images of {said['data']}, {metrics['n_fallback']:,} without a detected face. "
        + overlap
        + _ages(metrics["age"])
        + _mapping(said),
        "",
        *_calibration_warning(metrics),
        *_headline_table(metrics),
        "",
        *_group_table(metrics.get("groups") or {}),
    ]
    section = "\n".join(lines).rstrip() + "\n"
    earlier = re.compile(rf"^{re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if earlier.search(card):
        return earlier.sub(lambda found: section + ("\n" if found.end() < len(card) else ""), card)
    return card.rstrip() + "\n\n" + section


def _ages(age: Mapping[str, Any]) -> str:
    """Say how many ages are known as a range, if any are."""
    if not age["n_range"]:
        return ""
    spanning = f"; {age['n_spanning']:,} of them span several groups and are in none" if age["n_spanning"] else ""
    ranges = f"{age['n_range']:,} an age range, which counts for age groups only{spanning}"
    return f" {age['n']:,} have an exact age, and {ranges}."


def _mapping(said: Mapping[str, Any]) -> str:
    """Say how the labels of another label space were mapped, if they were."""
    mapping = said.get("label_mapping")
    if not mapping:
        return ""
    races = ", ".join(f"{data} as {own}" for data, own in mapping["races"].items() if data != own)
    return f" Their label space is {mapping['from']}: age groups are its own" + (
        f", races count {races}." if races else "."
    )


def _calibration_warning(metrics: Mapping[str, Any]) -> list[str]:
    warning = (metrics.get("calibration") or {}).get("warning")
    return [f"**Calibration: {warning}.**", ""] if warning else []


def _head(meta: Mapping[str, Any], tasks: Sequence[str]) -> str:
    versions, model = meta.get("versions") or {}, meta["model"]
    made = [f"agr_ray {versions['agr_ray']}"] if "agr_ray" in versions else []
    made += [f"commit {meta['git_commit']}"] if meta.get("git_commit") else []
    made += [str(meta["created"])] if meta.get("created") else []
    return "\n".join(
        [
            f"# Model card: perceived {_listed(tasks)} from a face",
            "",
            f"A {model['backbone']} with {'a head' if len(tasks) == 1 else 'heads'} for {_listed(tasks)}."
            + (f" Made by {', '.join(made)}." if made else ""),
        ]
    )


def _interface(meta: Mapping[str, Any], tasks: Sequence[str]) -> str:
    transform, space = meta["transform"], meta["label_space"]
    outputs = {
        "age": f"age: years, {AGE_MIN_YEARS:g} to {AGE_MAX_YEARS:g}"
        + (", the expectation of a distribution over years" if meta["model"]["age_head"] == "distribution" else ""),
        "gender": f"gender: the probability of *{space['genders'][1]}*; above 0.5 it is predicted, else "
        f"*{space['genders'][0]}*",
        "race": f"race: a probability each of *{'*, *'.join(space['races'])}*; the largest is predicted",
    }
    side = transform["image_size"]
    return "\n".join(
        [
            f"- In: an upright face, aligned to the template {transform['template']}, {side} x {side} pixels, RGB.",
            *(f"- Out: {outputs.get(task, task)}." for task in tasks),
            "- Settings, transform and label space are in meta.json; calibration.json, where there is one, holds age "
            "intervals,\n  calibrated probabilities and when to abstain.",
        ]
    )


def _data(data: Mapping[str, Any], tasks: Sequence[str]) -> str:
    if not data:
        return "Not known."
    rows = [
        ("source", data.get("source")),
        ("prepared set", data.get("uri")),
        ("split manifest, SHA-256", data.get("split_manifest_sha256")),
        ("images by split", _splits(data.get("splits") or {})),
        ("trained on", _count(data.get("num_train_rows"))),
        ("validated on", _count(data.get("num_val_rows"))),
        ("of them without a detected face", _count(data.get("num_train_fallback"))),
        ("faces found by", data.get("detector")),
    ]
    lines = _table(("", ""), [(name, value) for name, value in rows if value])
    sets = data.get("sets")
    if sets:
        lines += ["", "It learnt from several prepared sets; share is that of the images drawn in training:", ""]
        keys = ("source", "uri", "split_manifest_sha256", "detector")
        header = (
            "source",
            "prepared set",
            "split manifest, SHA-256",
            "faces found by",
            "images by split",
            "trained on",
            "share",
        )
        rows_of_sets = [
            (
                *(of[key] for key in keys),
                _splits(of["splits"]),
                _count(of["num_train_rows"]),
                _share(of["share"], 1),
            )
            for of in sets
        ]
        lines += _table(header, rows_of_sets)
    counts = data.get("train_labels")
    if counts:
        total = data["num_train_rows"]
        classes = []
        for attribute in _GROUPS:
            of = counts[attribute]
            if sum(of.values()) or attribute in (*tasks, "age_group"):
                classes += [(_attribute(attribute), name, f"{n:,}", _share(n, total)) for name, n in of.items()]
                rest = "no label, or a range of several groups" if attribute == "age_group" else "no label"
                classes.append((_attribute(attribute), rest, f"{total - sum(of.values()):,}", ""))
        lines += ["", "Labels that it learnt from:", ""]
        lines += _table(("attribute", "class", "images", "share"), classes)
    return "\n".join(lines)


def _splits(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in splits.items())


def _training(meta: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if not config:
        return "Not trained, or not known how."
    model = meta["model"]
    rows = [
        ("initial weights of the backbone", model["pretrained"]),
        ("age head", model["age_head"] if "age" in model["tasks"] else None),
        *((name, _said(config.get(name) or {}, leave)) for name, leave in (("loss", ()), ("augment", ()))),
        ("train", _said(config.get("train") or {}, _MOOT)),
        ("predict", _said(config.get("predict") or {}, ())),
    ]
    return "\n".join(_table(("", ""), [(name, value) for name, value in rows if value]))


_MOOT: Final = ("data", "out", "name", "max_failures", "cache_mib", "threads_per_worker", "cpus_per_worker")
"""Knobs of training that change nothing of what is learnt."""


def _said(settings: Mapping[str, Any], leave: Sequence[str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items() if key not in leave and value not in ("", []))


def _validation(metrics: Mapping[str, Any]) -> str:
    val = metrics.get("val") or {}
    if not val.get("n"):
        return "Not validated."
    return "\n".join(
        [
            f"After epoch {metrics['epoch']}, on {val['n']:,} images of the validation split. Which epoch is kept was "
            "chosen on them,\nso these figures flatter the model a little: measure it on others with agr-ray evaluate. "
            "The constant baseline\npredicts the training labels' median age and most frequent classes for every face.",
            "",
            *_headline_table(val),
            "",
            *_group_table(val.get("groups") or {}),
        ]
    ).rstrip()


def _headline_table(metrics: Mapping[str, Any]) -> list[str]:
    intervals = metrics.get("intervals") or {}
    rows = []
    for task, key, label, scale, unit in HEADLINES:
        value = metrics[task][key]
        if value is not None:
            between = (intervals.get(task) or {}).get(key)
            interval = "" if between is None else f"{between[0] * scale:.2f} to {between[1] * scale:.2f}"
            guess = (metrics.get("baseline") or {}).get(task, {}).get(key)
            rows.append((label, f"{value * scale:.2f}{unit}", interval, _number(guess, scale, unit)))
    if not any(interval for _, _, interval, _ in rows):
        return _table(("metric", "model", "baseline"), [(label, value, guess) for label, value, _, guess in rows])
    return _table(("metric", "model", "95 % interval", "baseline"), rows)


def _group_table(groups: Mapping[str, Any]) -> list[str]:
    """Return rows by true label; a group without an image has none."""
    rows = [
        (
            _attribute(attribute),
            name,
            f"{of['n']:,}",
            _number(of["age"]["mae_years"], 1.0, ""),
            _number(of["age"]["bias_years"], 1.0, "", "+.2f"),
            _number(of["age"]["exact_group"], 100.0, ""),
            _number(of["gender"]["accuracy"], 100.0, ""),
            _number(of["race"]["accuracy"], 100.0, ""),
        )
        for attribute in _GROUPS
        for name, of in (groups.get(attribute) or {}).items()
        if of["n"]
    ]
    header = ("by true", "", "images", "age MAE, years", "age bias, years", "age group, %", "gender, %", "race, %")
    return ["Where a group has few images, its figures say little.", "", *_table(header, rows)] if rows else []


def _under_represented(data: Mapping[str, Any]) -> list[str]:
    """Say which classes training had few images of."""
    counts = data.get("train_labels")
    if not counts:
        return ["- How its training images are distributed over classes is not known."]
    scarce = []
    for attribute in _GROUPS:
        of = counts[attribute]
        total = sum(of.values())
        if total:
            equal = total / len(of)
            scarce += [
                f"{_attribute(attribute)} {name} ({n:,}, {_share(n, total)})"
                for name, n in of.items()
                if n < max(_SCARCE * equal, _FEW)
            ]
    rule = f"fewer than half of an equal share, or than {_FEW}, of the labelled training images"
    if not scarce:
        return [f"- No class has {rule}."]
    return [f"- Under-represented, with {rule}: {', '.join(scarce)}. Expect larger errors there."]


def _detector_limit(data: Mapping[str, Any]) -> list[str]:
    detector = data.get("detector")
    return (
        [f"- It was trained on crops made with the detector {detector}; with another, errors differ."]
        if detector
        else []
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _number(value: float | None, scale: float, unit: str, form: str = ".2f") -> str:
    return "" if value is None else f"{value * scale:{form}}{unit}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _attribute(name: str) -> str:
    return name.replace("_", " ")


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
