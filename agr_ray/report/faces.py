"""`agr-ray predict`: the faces of a few photographs as a table, as JSON lines, and as annotated copies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from agr_ray.config import PredictJob
from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_console, make_table
from agr_ray.errors import JobError
from agr_ray.predict.face_model import FaceModel
from agr_ray.predict.photo import Photo
from agr_ray.schema import Status
from agr_ray.storage import Storage


def predict(job: PredictJob) -> list[Photo]:
    """Predict, print, and write the annotated copies.

    Raises:
        ConfigError: the checkpoint can't be used.
        JobError: not one photograph could be read; the others are rows with a status.
    """
    storage = Storage.from_config(job.storage)
    model = FaceModel.load(
        job.checkpoint,
        overrides=Pipeline(vision=job.vision, predict=job.predict),
        allow_uncalibrated=job.allow_uncalibrated,
        gates=job.gates,
        storage=storage,
    )
    photos = model.predict(job.photographs)
    console = make_console()
    if job.json_lines:
        for photo in photos:
            console.print(json.dumps(photo.to_json()))
    else:
        _print_table(photos, console)
    written = _write_copies(photos, job.out)
    if written and not job.json_lines:
        console.print(f"{len(written):,} annotated photographs: {job.out}")
    if not any(photo.error is None for photo in photos):
        raise JobError(f"not one of {len(photos):,} photographs could be read: {photos[0].source}: {photos[0].error}")
    return photos


def _print_table(photos: Sequence[Photo], console: Console) -> None:
    table = make_table("photograph", "face", "age", "interval", "gender", "race", "remarks")
    for photo in photos:
        if not photo.faces:
            table.add_row(photo.source, "", "", "", "", "", photo.error or "no face was found")
        for index, face in enumerate(photo.faces):
            interval = "" if face.age_interval is None else "{:.0f} to {:.0f}".format(*face.age_interval)
            male = face.p_male
            shown = "" if male is None else f"{face.gender or '?'} ({max(male, 1 - male):.0%})"
            race = "" if face.race_probs is None else f"{face.race or '?'} ({max(face.race_probs.values()):.0%})"
            age = "" if face.age is None else f"{face.age:.0f}"
            remarks = [*face.flags, *(f"{attribute} is uncertain" for attribute in face.abstain)]
            table.add_row(photo.source, str(index + 1), age, interval, shown, race, ", ".join(remarks))
    console.print(table)


def _write_copies(photos: Sequence[Photo], out: str) -> list[Path]:
    """Write an annotated copy of each photograph that has faces; equal names get a number."""
    if not out:
        return []
    written: list[Path] = []
    names: dict[str, int] = {}
    for photo in photos:
        if photo.status != Status.OK:
            continue
        stem = Path(photo.source).stem or "photograph"
        names[stem] = names.get(stem, 0) + 1
        number = f"-{names[stem]}" if names[stem] > 1 else ""
        Path(out).mkdir(parents=True, exist_ok=True)
        path = Path(out, f"{stem}{number}-faces.jpg")
        photo.draw().save(path, quality=90)
        written.append(path)
    return written
