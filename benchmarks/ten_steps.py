"""Losses and predictions of ten fixed-seed training steps, to show that a change of structure changes no result.

    python benchmarks/ten_steps.py --out before.json          # before the change
    python benchmarks/ten_steps.py --against before.json      # after it, on the same machine

Rendered faces of 64 pixels, some without labels; each configuration exercises other parts of the network and the loss.
Exits with status 1 if any number differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from agr_ray.config import AugmentConfig, LossConfig, ModelConfig, PredictConfig, TrainConfig, TrainJob
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import UTKFACE, Labels
from agr_ray.learn.context import LocalContext
from agr_ray.learn.loop import train
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.transform import Transform
from agr_ray.predict.forward import predict

NUM, SIDE, STEPS = 24, 64, 10
CONFIGURATIONS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "resnet18, linear": {"model": {"backbone": "resnet18"}},
    "resnet50, linear, Huber, accumulation": {
        "model": {"backbone": "resnet50"},
        "loss": {"age_loss": "huber"},
        "train": {"grad_accum_steps": 3},
    },
    "resnet34, distribution, learnt weights": {
        "model": {"backbone": "resnet34", "age_head": "distribution"},
        "loss": {"weighting": "uncertainty"},
    },
    "mobilenet_v3_small, distribution, mixup, moving average": {
        "model": {"backbone": "mobilenet_v3_small", "age_head": "distribution", "dropout": 0.2, "bn_momentum": 0.1},
        "augment": {"mixup_alpha": 0.4},
        "train": {"ema_decay": 0.9},
    },
    "mobilenet_v3_large, age and gender": {
        "model": {"backbone": "mobilenet_v3_large", "tasks": ("age", "gender")},
        "loss": {"label_smoothing": 0.1},
    },
    "resnet18, race alone, frozen, clipped": {
        "model": {"backbone": "resnet18", "tasks": ("race",)},
        "train": {"freeze_epochs": 3, "grad_clip_norm": 1.0},
    },
}


def main() -> None:
    """Train each configuration and print or compare its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers here")
    parser.add_argument("--against", type=Path, help="compare with the numbers of an earlier run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    results = {name: ten_steps(sections) for name, sections in CONFIGURATIONS.items()}
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    before = json.loads(options.against.read_text()) if options.against else {}
    for name, numbers in results.items():
        same = "" if name not in before else ("  same" if before[name] == numbers else "  DIFFERS")
        print(f"{name:58} loss {numbers['losses'][0]:.6f} -> {numbers['losses'][-1]:.6f}{same}")
    if options.against:
        differing = [name for name in before if before[name] != results.get(name)]
        print(f"{len(before) - len(differing)} of {len(before)} configurations agree in every number")
        sys.exit(bool(differing))


def ten_steps(sections: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Return the training losses, the objectives and the final predictions of ten steps of one batch each."""
    values = {"epochs": STEPS, "batch_size": NUM, "lr": 1e-3, "early_stopping_patience": 0, "precision": "float32"}
    job = TrainJob(
        model=ModelConfig(**{"image_size": SIDE, **sections["model"]}),
        loss=LossConfig(**sections.get("loss", {})),
        augment=AugmentConfig(**sections.get("augment", {})),
        train=TrainConfig(**{**values, **sections.get("train", {})}),
        predict=PredictConfig(precision="float32"),
    )
    data = faces()
    torch.manual_seed(0)
    model = MultiTaskNet(job.model, UTKFACE)
    model.initialise({"age": np.array([20.0, 60.0])})  # mean 40, standard deviation 20
    baseline = Baseline.fit(Labels.from_arrays(UTKFACE, data))
    transform = Transform(image_size=SIDE, crop_side_px=SIDE)
    rows = train(LocalContext(data, data, NUM), model, transform, job, baseline, NUM)
    predictions = predict(model.eval(), data["crop"], transform, job.predict)
    parts = [values.ravel() for values in predictions.values()]
    return {
        "losses": [row["train_loss"] for row in rows],
        "objectives": [row["val_objective"] for row in rows],
        "predictions": np.concatenate(parts).tolist(),
    }


def faces() -> dict[str, Any]:
    """Return crops of noise tinted by their labels; every fifth row lacks one label."""
    rng = np.random.default_rng(0)
    gender, race, age = rng.integers(0, 2, NUM), rng.integers(0, 5, NUM), rng.integers(0, 100, NUM).astype(np.float32)
    stored = SIDE + 2 * round(0.1 * SIDE)
    crop = rng.integers(0, 30, (NUM, stored, stored, 3))
    crop += np.stack([gender * 200, race * 50, age.astype(np.int64) * 2], axis=1)[:, None, None, :]
    age[::5], gender[1::5], race[2::5] = np.nan, -1, -1
    return {"crop": crop.astype(np.uint8), "age": age, "gender": gender, "race": race}


if __name__ == "__main__":
    main()
