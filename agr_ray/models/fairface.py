"""FairFace's published networks as checkpoints: `agr-ray import fairface FILE`.

K. Karkkainen, J. Joo: FairFace: Face Attribute Dataset for Balanced Race, Gender, and Age for Bias Measurement and
Mitigation, WACV 2021. Networks, data and code: github.com/joojs/fairface, CC BY 4.0.

The files res34_fair_align_multi_7_20190809.pt and res34_fair_align_multi_4_20190809.pt are state dicts of torchvision's
ResNet34 with 18 outputs: seven races (in the second file four, and three unused outputs), then male and female, then
nine age groups. The input is a chip of dlib with a padding of 0.25, shrunk to 224 pixels, in ImageNet's normalisation.

The network made of them has the same weights and gives the same probabilities. Only the input is approximated:
FairFace finds and aligns faces with dlib; here our detector does, and the network sees the region that dlib's chip
would show of a frontal face. Beyond the border of a photograph, dlib's chips are black; our crops mirror the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final

import torch
from torch import Tensor

from agr_ray.config import ImportJob, ModelConfig
from agr_ray.console import make_console
from agr_ray.errors import ConfigError
from agr_ray.labels import FAIRFACE, LabelSpace
from agr_ray.models.backbones.base import WeightsError
from agr_ray.models.checkpoint_files import publish_checkpoint
from agr_ray.models.checkpoint_network import save_checkpoint
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.pretrained import load_backbone, mismatch, stored_state
from agr_ray.models.transform import Transform
from agr_ray.storage import MissingObject, Storage
from agr_ray.storage.scratch import scratch_folder
from agr_ray.vision.align import TEMPLATE_POINTS

FOUR_RACES: Final = LabelSpace("fairface_4", ("white", "black", "asian", "indian"), FAIRFACE.age_groups)
SPACES: Final = {"7": FAIRFACE, "4": FOUR_RACES}
"""The label space of a file, by its number of races."""

_NUM_OUTPUTS: Final = 18
_MALE, _FEMALE = slice(7, 8), slice(8, 9)
_AGES: Final = slice(9, _NUM_OUTPUTS)

_IMAGE_SIZE: Final = 224
_CHIP_EYES: Final = ((0.22733, 0.2214), (0.75281, 0.2212))
"""Midpoints (x, y) between the corners of each eye, left and right in the image, in dlib's mean face of five points.
Source: dlib/image_transforms/interpolation.h, get_face_chip_details."""
_CHIP_PADDING: Final = 0.25


def import_fairface(job: ImportJob) -> None:
    """Convert a published file to a checkpoint, and print the next commands.

    Raises:
        ConfigError: the file can't be read or is not one of FairFace's, or `out` holds other files.
    """
    storage = Storage.from_config(job.storage)
    name = PurePosixPath(job.weights).name
    races = next((n for n in SPACES if f"multi_{n}" in name), "") if job.races == "auto" else job.races
    if not races:
        raise ConfigError(
            f"{job.weights}: no multi_7 or multi_4 in its name; give the number of races: --races 7 or --races 4"
        )
    try:
        state = stored_state(storage, job.weights)
        model, transform = fairface_network(state, SPACES[races], job.weights)
    except MissingObject as error:
        raise ConfigError(f"{error}; FairFace's README links to its files: https://github.com/joojs/fairface") from None
    except WeightsError as error:
        raise ConfigError(str(error)) from None
    data = {
        "source": "FairFace, published weights",
        "weights": name,
        "licence": "CC BY 4.0 (of the repository): K. Karkkainen and J. Joo, github.com/joojs/fairface",
    }
    out = storage.absolute(job.out)
    with scratch_folder() as folder:
        save_checkpoint(Path(folder), model, transform, data=data)
        try:
            publish_checkpoint(storage, Path(folder), out, replace=False)
        except FileExistsError as error:
            raise ConfigError(f"--out {job.out}: {error}; give a new folder or prefix") from None
    console = make_console()
    console.print(f"{out}: {', '.join(model.tasks)} in the label space {model.space.name}; no calibration yet")
    console.print(f"score photographs: agr-ray score --checkpoint {job.out} --input PHOTOGRAPHS --out scored")
    console.print(
        f"calibrate it: prepare labelled photographs of your own with {_labels_options(model.space)} --crop_side_px "
        f"{transform.crop_side_px}, then agr-ray evaluate --checkpoint {job.out} --data DATA --split val --calibrate "
        "--allow_overlap true (nobody can check whether FairFace's training images are among them)"
    )


def _labels_options(space: LabelSpace) -> str:
    """Return the options of `agr-ray prepare` for photographs that are labelled in this space."""
    if space == FAIRFACE:
        return f"--labels.space {space.name}"
    return f"--labels.space fairface --labels.races {','.join(space.races)}"


def fairface_network(state: Mapping[str, Tensor], space: LabelSpace, where: str) -> tuple[MultiTaskNet, Transform]:
    """Return the network of a published state dict, in evaluation mode, and the transform of its input.

    Args:
        state: contents of the file.
        space: one of `SPACES`.
        where: name of the file in messages.

    Raises:
        WeightsError: it is not the state dict of a ResNet34 with 18 outputs.
    """
    config = ModelConfig(backbone="resnet34", age_head="groups", image_size=_IMAGE_SIZE)
    model = MultiTaskNet(config, space)
    shapes = {"fc.weight": torch.empty(_NUM_OUTPUTS, model.backbone.num_features), "fc.bias": torch.empty(_NUM_OUTPUTS)}
    problem = mismatch(shapes, {name: state[name] for name in shapes if name in state})
    if problem:
        raise WeightsError(f"{where}: does not fit FairFace's network: {problem}")
    load_backbone(model, state, where)
    heads = model.heads.state_dict()
    for kind in ("weight", "bias"):
        outputs = state[f"fc.{kind}"]
        heads[f"race.layer.{kind}"] = outputs[: len(space.races)]
        # The sigmoid of the difference of two logits is the softmax of both.
        heads[f"gender.layer.{kind}"] = outputs[_MALE] - outputs[_FEMALE]
        heads[f"age.layer.{kind}"] = outputs[_AGES]
    model.heads.load_state_dict(heads)
    return model.eval(), _transform()


def _transform() -> Transform:
    """Return the transform that shows the network what dlib's chip shows: both have the eyes in the same place."""
    (left_x, left_y), (right_x, right_y) = (
        tuple((_CHIP_PADDING + value) / (1 + 2 * _CHIP_PADDING) for value in eye) for eye in _CHIP_EYES
    )
    ours_left, ours_right = TEMPLATE_POINTS[:2]
    side = (ours_right[0] - ours_left[0]) / (right_x - left_x)
    x = (ours_left[0] + ours_right[0]) / 2 - side * (left_x + right_x) / 2
    y = ours_left[1] - side * (left_y + right_y) / 2
    return Transform(_IMAGE_SIZE, round(_IMAGE_SIZE / side), window=(x, y, side))
