"""Hand-made heads, targets and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from agr_ray.labels import UTKFACE
from agr_ray.learn.losses import Heads
from agr_ray.models.heads.base import Targets
from agr_ray.models.heads.year_bins import AgeDistribution
from agr_ray.models.network import Outputs
from agr_ray.registry import HEADS


def heads(age: str = "linear", tasks: tuple[str, ...] = ("age", "gender", "race")) -> Heads:
    kinds = {"age": age, "gender": "binary", "race": "softmax"}
    return {task: HEADS[task][kinds[task]](4, task, UTKFACE) for task in tasks}


LINEAR = heads()


def targets(age: list[float], gender: list[int], race: list[int]) -> Targets:
    return {"age": torch.tensor(age), "gender": torch.tensor(gender), "race": torch.tensor(race)}


def linear(age: Tensor | AgeDistribution, gender: Tensor, race: Tensor) -> Outputs:
    return {"age": age, "gender": gender, "race": race}
