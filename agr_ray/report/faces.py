"""`agr-ray predict`: the faces of a few photographs as a table, as JSON lines, and as annotated copies."""

from __future__ import annotations

import io
import itertools
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final

from rich.console import Console

from agr_ray.config import PredictJob
from agr_ray.config.pipeline import Pipeline
from agr_ray.console import make_console, make_table
from agr_ray.data.manifest import IMAGE_SUFFIXES
from agr_ray.errors import ConfigError, JobError
from agr_ray.json_log import print_result, print_to_stderr
from agr_ray.predict.face_model import FaceModel
from agr_ray.predict.photo import Photo
from agr_ray.progress_bar import progress
from agr_ray.schema import Status
from agr_ray.storage import Storage, StorageUnavailable
from agr_ray.vision.decode import ImageError

_BATCH_SIZE: Final = 16


def predict(job: PredictJob) -> list[Photo]:
    """Predict, print, and write the annotated copies.

    Raises:
        ConfigError: the checkpoint can't be used, or a folder has no image.
        JobError: more than half of the photographs could not be read. If it is fewer, each is a result with a status.
    """
    storage = Storage.from_config(job.storage)
    photographs = [each for name in job.photographs for each in _files(name, storage)]
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", UserWarning)
        model = FaceModel.load(
            job.checkpoint,
            overrides=Pipeline(vision=job.vision, predict=job.predict),
            allow_uncalibrated=job.allow_uncalibrated,
            gates=job.gates,
            storage=storage,
        )
    for each in raised:
        if issubclass(each.category, UserWarning):
            print_to_stderr(f"warning: {each.message}")
    console = make_console()
    photos: list[Photo] = []
    names: set[str] = set()
    # JSON lines are for other programs: nothing else may be on the standard output.
    with progress(make_console(quiet=job.json_lines), "photographs", len(photographs)) as update:
        for start in range(0, len(photographs), _BATCH_SIZE):
            batch = model.predict(photographs[start : start + _BATCH_SIZE])
            if job.json_lines:
                for photo in batch:
                    print_result(json.dumps(photo.to_json()))
            if job.out:
                _write_copies(batch, job.out, storage, names)
            photos += batch
            update(len(photos), "")
    if not job.json_lines:
        _print_table(photos, console)
        if names:
            copies = "annotated copy" if len(names) == 1 else "annotated copies"
            console.print(f"{len(names):,} {copies} in {job.out}")
        if not model.predictor.is_calibrated:
            console.print("not calibrated: no age intervals, no abstention; agr-ray evaluate --calibrate adds them")
    failed = [photo for photo in photos if photo.error is not None]
    if 2 * len(failed) > len(photos):
        first = failed[0]
        raise JobError(
            f"{len(failed):,} of {len(photos):,} photographs could not be read: {first.source}: {first.error}"
        )
    return photos


def _files(name: str, storage: Storage) -> list[str]:
    """Return the image files of a folder or prefix; any other name as it is.

    Raises:
        ConfigError: there is none in it.
    """
    if not _is_folder(name, storage):
        return [name]
    found = sorted(info.uri for info in storage.list_readable(storage.absolute(name), IMAGE_SUFFIXES))
    if not found:
        raise ConfigError(f"photographs {name}: there is no image in this folder")
    return found


def _is_folder(name: str, storage: Storage) -> bool:
    if not name.startswith("s3://"):
        return storage.is_folder(name) if "://" in name else os.path.isdir(name)
    if name.lower().endswith(IMAGE_SUFFIXES):
        return False
    try:
        return storage.is_folder(name)
    except StorageUnavailable:  # a user may read objects who may not list the bucket
        return False


def _print_table(photos: Sequence[Photo], console: Console) -> None:
    table = make_table("photograph", "face", "age", "interval", "gender", "race", "remarks")
    for photo in photos:
        if not photo.faces:
            table.add_row(photo.source, "", "", "", "", "", photo.error or "no face was found")
        for index, face in enumerate(photo.faces):
            interval = "" if face.age_interval is None else "{:.0f} to {:.0f}".format(*face.age_interval)
            p_male = face.p_male
            gender = "" if p_male is None else _class(face.gender, max(p_male, 1 - p_male))
            race = "" if face.race_probs is None else _class(face.race, max(face.race_probs.values()))
            age = "" if face.age is None else f"{face.age:.0f}"
            remarks = [*face.flags, *(f"{attribute} is uncertain" for attribute in face.abstain)]
            table.add_row(photo.source, str(index + 1), age, interval, gender, race, ", ".join(remarks))
    console.print(table)


def _class(name: str | None, probability: float) -> str:
    """Return a predicted class and its probability, or `?` if the model abstains."""
    return "?" if name is None else f"{name} ({probability:.0%})"


def _write_copies(photos: Sequence[Photo], out: str, storage: Storage, names: set[str]) -> None:
    """Write an annotated copy of each photograph with faces, under a name that is not in `names`; add it there."""
    for photo in photos:
        if photo.status != Status.OK:
            continue
        stem = PurePosixPath(photo.source).stem or "photograph"
        candidates = (
            f"{stem}{number}-faces.jpg" for number in itertools.chain([""], (f"-{each}" for each in itertools.count(2)))
        )
        name = next(each for each in candidates if each not in names)
        with io.BytesIO() as body:
            try:
                photo.draw().save(body, "JPEG", quality=90)
            except ImageError as error:
                print_to_stderr(f"warning: {photo.source} can't be drawn: {error}")
                continue
            storage.write(storage.join(storage.absolute(out), name), body.getvalue())
        names.add(name)
