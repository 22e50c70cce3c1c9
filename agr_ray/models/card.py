"""A checkpoint's model card: the content of meta.json and the results of evaluations, in words for users of the model.

Pure functions from plain values to text. `save_checkpoint` writes the card; `agr-ray evaluate` adds to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from agr_ray.labels import AGE_MAX_YEARS, AGE_MIN_YEARS
from agr_ray.models.card_tables import (
    GROUPS,
    disparity_table,
    escaped,
    group_table,
    headline_table,
    listed,
    stress_table,
    table,
    threshold_table,
    unescaped,
    words,
)

_SCARCE: Final = 0.5
"""A class is under-represented below this fraction of an equal share of the images."""
_FEW: Final = 100
"""A class is also under-represented with fewer training images than this."""

_INTENDED: Final = """\
- Statistics over many photographs: the composition of a collection by perceived age, gender and race, published with
  the error rates in this card.
- Auditing collections and other models for uneven representation or uneven error.
- Research on estimating perceived attributes, and on its errors."""

_EXCLUDED: Final = """\
- Deciding anything about one person: admission, employment, credit, insurance, policing, border control, medical care.
- Proving an age, such as for the sale of restricted goods: the error for one face is often many years.
- Identifying or tracking anyone. It does not recognise people, and must not be used as if it did.
- Inferring ancestry, ethnicity, nationality, sex or gender identity. None of these can be seen in a photograph.
- Processing faces of people who were not informed or did not consent, where the law requires it."""

UNKNOWN_TERMS: Final = "not recorded; check that the data set's licence allows training and use of the model"

_LAW: Final = """\
An outline, not legal advice. Ask a lawyer before you use this model on photographs of people.

- **EU AI Act** (Regulation 2024/1689). Article 5(1)(g) prohibits systems that categorise individual people by their
  biometric data to infer their race, among other traits; labelling or filtering lawfully acquired data sets is exempt.
  Biometric categorisation by other sensitive or protected attributes is high-risk (Annex III, 1(b)), and the people
  concerned must be informed (Article 50(3)).
- **GDPR**. A photograph of a person is personal data. Data that reveal racial or ethnic origin are a special category,
  whose processing Article 9 prohibits without explicit consent or another exception. A model that infers them produces
  such data.
- **Illinois BIPA** (740 ILCS 14) requires notice and written consent before a scan of face geometry is collected, and a
  public retention and destruction policy. It gives people a right to sue. Scoring writes landmarks of each face, and no
  embedding that could identify anyone.
- Publishing only aggregated tables (`score.aggregate_only`) lowers these risks. It does not remove them: each face is
  still processed."""

_CALIBRATION: Final = "Calibration"
_NOT_CALIBRATED: Final = (
    "Not calibrated: no age intervals and no abstention. `agr-ray evaluate --split val --calibrate` calibrates it."
)

_LIMITS: Final = """\
- Attributes are *perceived*: the labels are judgements of a picture by an annotator or another algorithm. The model
  repeats their judgements and their mistakes, and its accuracy is measured against them.
- It knows only the categories of its training labels, and puts every face into one of them. They are coarse, and
  many people belong to none of them or to several."""


def model_card(meta: Mapping[str, Any]) -> str:
    """Return the card, in Markdown, of a checkpoint with this `meta.json`.

    Missing information is left out or marked as unknown, so the card of an untrained network is short.
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
        (_CALIBRATION, _NOT_CALIBRATED),
        ("Intended uses", _INTENDED),
        ("Excluded uses", _EXCLUDED),
        ("The law, in outline", _LAW),
        ("Limits", "\n".join([_LIMITS, *_under_represented(data), *_detector_limit(data)])),
    ]
    return "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections) + "\n"


def with_measured(card: str, metrics: Mapping[str, Any]) -> str:
    """Return the card with a section for the results of an evaluation, replacing an earlier one of the same data.

    Args:
        card: of the checkpoint that was measured.
        metrics: content of the evaluation's `metrics.json`.
    """
    record = metrics["evaluation"]
    heading = f"## Measured on {escaped(record['source'])}, split {record['split']}, "
    heading += record["split_manifest_sha256"][:8]
    seen = record["num_seen_in_training"]
    overlap = f"**{seen:,} of them are training images, so the metrics are optimistic.**" if seen else _UNSEEN
    if seen is None:
        overlap = "**It is not known which of them were trained on.**"
    lines = [
        heading,
        "",
        f"{metrics['n']:,} labelled images of {escaped(record['data'])}, "
        f"{metrics['n_fallback']:,} without a detected face. "
        + overlap
        + ranges_note(metrics["age"])
        + (f" {escaped(mapping)}" if (mapping := mapping_note(record)) else ""),
        "",
        *_calibration_lines(metrics),
        *headline_table(metrics),
        "",
        *group_table(metrics["groups"]),
        "",
        *disparity_table(metrics["disparities"]),
        *threshold_table(metrics["age_thresholds"]),
        *stress_table(metrics.get("stress")),
    ]
    section = "\n".join(lines).rstrip() + "\n"
    earlier = re.compile(rf"^{re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    card = _with_calibration(card, metrics.get("calibration"))
    if earlier.search(card):
        return earlier.sub(lambda found: section + ("\n" if found.end() < len(card) else ""), card)
    return card.rstrip() + "\n\n" + section


def measured_in(card: str, titles: Sequence[str]) -> list[dict[str, Any]]:
    """Return what `with_measured` added for images that training certainly never saw: `data` and `rows`.

    Args:
        card: of a checkpoint.
        titles: of the headline metrics to return, such as `age MAE`. A row has the cells that `headline_rows` gave it:
            title, value, interval, baseline, images.
    """
    section = re.compile(
        r"^## Measured on ([^\n]*, split (\w+)), [0-9a-f]{8}\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL
    )
    measured = []
    for data, split, text in section.findall(card):
        table = (re.split(r"(?<!\\) \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| "))
        lines = ([unescaped(cell) for cell in cells] for cells in table)
        rows = [cells for cells in lines if cells[0] in titles and len(cells) == _NUM_HEADLINE_CELLS]
        if rows and split not in ("train", "val") and _UNSEEN in text:
            measured.append({"data": unescaped(data), "rows": rows})
    return measured


_NUM_HEADLINE_CELLS: Final = 5
_UNSEEN: Final = "None is a training image."


def _with_calibration(card: str, calibration: Mapping[str, Any] | None) -> str:
    """Return the card with what the checkpoint is calibrated on; unchanged if it was evaluated uncalibrated."""
    if calibration is None:
        return card
    parts = []
    if calibration["age"] is not None:
        parts.append(f"intervals that should hold {100 * calibration['age']['nominal']:g} % of true ages")
    for task in ("gender", "race"):
        if calibration[task] is not None:
            risk = 100 * calibration[task]["risk"]
            parts.append(f"an abstention from {task} that should leave at most {risk:g} % wrong")
    lines = [
        f"Calibrated on {calibration['num_calibrated_on']:,} images: {listed(parts) or 'nothing could be fitted'}."
    ]
    lines += [f"- {escaped(note)}" for note in calibration["notes"]]
    earlier = re.compile(rf"^## {_CALIBRATION}\n.*?(?=^## )", re.MULTILINE | re.DOTALL)
    return earlier.sub(lambda _: f"## {_CALIBRATION}\n\n" + "\n".join(lines) + "\n\n", card)


def ranges_note(age: Mapping[str, Any]) -> str:
    """Return the number of ages that are known as a range, if any."""
    if not age["n_range"]:
        return ""
    spanning = f"; {age['n_spanning']:,} of them span several groups and are in none" if age["n_spanning"] else ""
    ranges = f"{age['n_range']:,} an age range, which counts for age groups only{spanning}"
    return f" {age['n']:,} have an exact age, and {ranges}."


def mapping_note(record: Mapping[str, Any]) -> str:
    """Return how the labels of another label space were mapped, if they were."""
    mapping = record.get("label_mapping")
    if not mapping:
        return ""
    races = ", ".join(f"{data} as {own}" for data, own in mapping["races"].items() if data != own)
    return f" Their label space is {mapping['from']}, whose age groups are used" + (
        f"; its races are counted as follows: {races}." if races else "."
    )


def _calibration_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return a warning about the calibration, and the errors of corrected ages, if there are any."""
    calibration = metrics.get("calibration") or {}
    warning = calibration.get("warning")
    lines = [f"**Calibration: {escaped(warning)}.**", ""] if warning else []
    note = correction_note(metrics)
    return [*lines, note, ""] if note else lines


def correction_note(metrics: Mapping[str, Any]) -> str:
    """Return the errors of corrected ages, if the calibration corrects them."""
    age = (metrics.get("calibration") or {}).get("age") or {}
    if age.get("mae_years") == age.get("mae_years_before"):
        return ""
    return (
        f"Scoring outputs corrected ages: MAE {age['mae_years']:.2f} years, bias {age['bias_years']:+.2f} years. The "
        "tables below are of uncorrected ages."
    )


def _head(meta: Mapping[str, Any], tasks: Sequence[str]) -> str:
    versions, model = meta.get("versions") or {}, meta["model"]
    origin = [f"agr_ray {versions['agr_ray']}"] if "agr_ray" in versions else []
    origin += [f"commit {meta['git_commit']}"] if meta.get("git_commit") else []
    origin += [str(meta["created"])] if meta.get("created") else []
    return "\n".join(
        [
            f"# Model card: perceived {listed(tasks)} from a face",
            "",
            f"A {model['backbone']} with {'a head' if len(tasks) == 1 else 'heads'} for {listed(tasks)}."
            + (f" Created with {escaped(', '.join(origin))}." if origin else ""),
        ]
    )


def _interface(meta: Mapping[str, Any], tasks: Sequence[str]) -> str:
    transform, space = meta["transform"], meta["label_space"]
    outputs = {
        "age": f"age: years, {AGE_MIN_YEARS:g} to {AGE_MAX_YEARS:g}{_AGE_OUTPUTS.get(meta['model']['age_head'], '')}",
        "gender": f"gender: the probability of *{space['genders'][1]}*, which is predicted above 0.5, else "
        f"*{space['genders'][0]}*",
        "race": f"race: probabilities of *{'*, *'.join(map(escaped, space['races']))}*; the most probable is predicted",
    }
    side = transform["image_size"]
    return "\n".join(
        [
            f"- Input: an upright face, aligned to the template {transform['template']}, {side} x {side} pixels, RGB.",
            *(f"- Output: {outputs.get(task, task)}." for task in tasks),
            "- Settings, transform and label space are in meta.json. calibration.json, if there is one, adds age "
            "intervals,\n  calibrated probabilities and abstention.",
        ]
    )


_AGE_OUTPUTS: Final = {
    "distribution": ", the expectation of a distribution over years",
    "groups": ", a typical age of the most probable age group",
}
"""What the age is, by age head."""


def _data(data: Mapping[str, Any], tasks: Sequence[str]) -> str:
    if not data:
        return "Unknown."
    rows = [
        ("source", data.get("source")),
        ("prepared set", data.get("uri")),
        ("split manifest, SHA-256", data.get("split_manifest_sha256")),
        ("images by split", _splits(data.get("splits") or {})),
        ("trained on", _count(data.get("num_train_rows"))),
        ("of them without a detected face", _count(data.get("num_train_fallback"))),
        ("validated on", _count(data.get("num_val_rows"))),
        ("faces found by", data.get("detector")),
        ("weights", data.get("weights")),
        ("terms of the images", data.get("licence") or UNKNOWN_TERMS),
    ]
    lines = table(("", ""), [(name, value) for name, value in rows if value])
    sets = data.get("sets")
    if sets:
        lines += ["", "It was trained on several prepared sets; share: fraction of the images drawn in training:", ""]
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
        lines += table(header, rows_of_sets)
    counts = data.get("train_labels")
    if counts:
        total = data["num_train_rows"]
        classes = []
        for attribute in GROUPS:
            of = counts[attribute]
            if sum(of.values()) or attribute in (*tasks, "age_group"):
                classes += [(words(attribute), name, f"{n:,}", _share(n, total)) for name, n in of.items()]
                rest = "no label, or a range of several groups" if attribute == "age_group" else "no label"
                classes.append((words(attribute), rest, f"{total - sum(of.values()):,}", ""))
        lines += ["", "Training labels:", ""]
        lines += table(("attribute", "class", "images", "share"), classes)
    return "\n".join(lines)


def _splits(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in splits.items())


def _training(meta: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if not config:
        return (
            "Trained by its publishers, not by agr_ray."
            if "weights" in (meta.get("data") or {})
            else "Not trained, or unknown."
        )
    model = meta["model"]
    rows = [
        ("initial weights of the backbone", model["pretrained"]),
        ("age head", model["age_head"] if "age" in model["tasks"] else None),
        *((name, _listed_settings(config.get(name) or {})) for name in ("loss", "augment")),
        ("train", _listed_settings(config.get("train") or {}, _WITHOUT_EFFECT)),
        ("predict", _listed_settings(config.get("predict") or {})),
    ]
    return "\n".join(table(("", ""), [(name, value) for name, value in rows if value]))


_WITHOUT_EFFECT: Final = ("data", "out", "name", "max_failures", "cache_mib", "threads_per_worker", "cpus_per_worker")
"""Settings of training that do not affect what is learnt."""


def _listed_settings(settings: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    return ", ".join(
        f"{key} {value}" for key, value in settings.items() if key not in without and value not in ("", [])
    )


def _validation(metrics: Mapping[str, Any]) -> str:
    val = metrics.get("val") or {}
    if not val.get("n"):
        return "Not validated."
    return "\n".join(
        [
            f"After epoch {metrics['epoch']}, on {val['n']:,} images of the validation split. The best epoch was "
            "chosen on them,\nso these metrics are slightly optimistic: agr-ray evaluate measures the model on others. "
            "The constant baseline\npredicts the training labels' median age and most frequent classes for every face.",
            "",
            *headline_table(val),
            "",
            *group_table(val.get("groups") or {}),
        ]
    ).rstrip()


def _under_represented(data: Mapping[str, Any]) -> list[str]:
    """Return which classes had few training images."""
    counts = data.get("train_labels")
    if not counts:
        return ["- The distribution of its training images over classes is unknown."]
    scarce = []
    for attribute in GROUPS:
        of = counts[attribute]
        total = sum(of.values())
        if total:
            equal = total / len(of)
            scarce += [
                f"{words(attribute)} {escaped(name)} ({n:,}, {_share(n, total)})"
                for name, n in of.items()
                if n < max(_SCARCE * equal, _FEW)
            ]
    rule = f"fewer than {_FEW} training images, or fewer than half as many as if all classes had equally many"
    if not scarce:
        return [f"- No class has {rule}."]
    return [f"- Under-represented ({rule}): {', '.join(scarce)}. Expect larger errors for them."]


def _detector_limit(data: Mapping[str, Any]) -> list[str]:
    detector = data.get("detector")
    return (
        [f"- It was trained on crops made with the detector {escaped(detector)}; errors differ with another detector."]
        if detector
        else []
    )


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
