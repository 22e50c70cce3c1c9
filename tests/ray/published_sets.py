"""Rendered faces in the files that FairFace and Adience publish."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agr_ray.data.rendered import render_chip
from agr_ray.labels import ADIENCE, FAIRFACE
from agr_ray.vision.decode import encode_jpeg

FAIRFACE_RACES = {
    "white": ("White",),
    "black": ("Black",),
    "indian": ("Indian",),
    "asian": ("East Asian", "Southeast Asian"),
    "others": ("Latino_Hispanic", "Middle Eastern"),
}
"""FairFace's words for each race that is rendered; where there are two, images take turns."""
ADIENCE_HEADER = "user_id original_image face_id age gender x y dx dy tilt_ang fiducial_yaw_angle fiducial_score"


def write_fairface(folder: Path, num_train: int, num_val: int) -> None:
    """Write train/, val/ and a label file for each."""
    index = 0
    for split, num in (("train", num_train), ("val", num_val)):
        (folder / split).mkdir(parents=True)
        lines = ["file,age,gender,race,service_test"]
        for number in range(1, num + 1):
            chip = render_chip(0, index)
            (folder / split / f"{number}.jpg").write_bytes(encode_jpeg(chip.image_rgb))
            group = FAIRFACE.age_groups[FAIRFACE.age_group(np.array([chip.age_years]))[0]]
            age = "more than 70" if group == "70+" else group
            words = FAIRFACE_RACES[chip.race]
            race = words[index % len(words)]
            lines.append(f"{split}/{number}.jpg,{age},{chip.gender.capitalize()},{race},{index % 2 == 0}")
            index += 1
        (folder / f"fairface_label_{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_adience(folder: Path, num_users: int, num_each: int) -> None:
    """Write faces/ and five folds of users; every tenth age is exact, and every twelfth gender unknown."""
    folds: list[list[str]] = [[] for _ in range(5)]
    for index in range(num_users * num_each):
        user, chip = index // num_each, render_chip(0, index)
        name, face = f"{1000 + index}_o.jpg", index % 7
        path = folder / "faces" / f"{user}@N01" / f"coarse_tilt_aligned_face.{face}.{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_jpeg(chip.image_rgb))
        low, high = ADIENCE.age_ranges_years[ADIENCE.age_group(np.array([chip.age_years]))[0]]
        age = f"{chip.age_years:.0f}" if index % 10 == 0 else f"({low}, {high})"
        gender = "u" if index % 12 == 11 else chip.gender[0]
        folds[user % 5].append("\t".join([f"{user}@N01", name, str(face), age, gender, *["0"] * 7]))
    for fold, lines in enumerate(folds):
        text = "\n".join(["\t".join(ADIENCE_HEADER.split()), *lines]) + "\n"
        (folder / f"fold_{fold}_data.txt").write_text(text, encoding="utf-8")
