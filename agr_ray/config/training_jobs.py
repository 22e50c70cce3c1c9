"""The jobs that train networks, and the checks across their sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from pydantic_settings import CliImplicitFlag

from agr_ray.config.architecture import ModelConfig, PredictConfig
from agr_ray.config.comparing import CompareConfig
from agr_ray.config.cross_validation import CrossValidateConfig
from agr_ray.config.jobs import ClusterJob
from agr_ray.config.label_space import LabelsConfig
from agr_ray.config.presets import with_preset
from agr_ray.config.section import MAX_INT
from agr_ray.config.training import AugmentConfig, LossConfig, TrainConfig
from agr_ray.config.tuning import TuneConfig


class TrainingJob(ClusterJob):
    """A job that trains networks."""

    labels: LabelsConfig = LabelsConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()

    @model_validator(mode="after")
    def _can_train(self) -> Self:
        # Not in TrainConfig, because a recipe may hold some of these values, and the command line the others.
        train = self.train
        if train.batch_size < 2 * train.max_workers * train.grad_accum_steps:
            parts = f" and train.grad_accum_steps {train.grad_accum_steps}" if train.grad_accum_steps > 1 else ""
            raise ValueError(
                f"train.batch_size {train.batch_size} is too small for train.num_workers {train.max_workers}{parts}: "
                "each needs two images per step, for batch normalisation"
            )
        shares, uris = list(train.data_shares), train.data_uris
        if shares and len(uris) == 1:
            raise ValueError(f"train.data_shares {shares} needs several sets in train.data, which is {train.data!r}")
        if shares and len(shares) != len(uris):
            raise ValueError(
                f"train.data_shares {shares} must have a number for each of the {len(uris)} sets in train.data"
            )
        if self.predict.precision == "int8":
            raise ValueError(
                "predict.precision int8: agr-ray quantize makes an int8 network, after training; allowed here: auto, "
                "float32, bfloat16"
            )
        return self


class NetworkJob(TrainingJob):
    """A job that trains one network, several times or once."""

    model: ModelConfig = ModelConfig()

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        return with_preset(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _fits_its_parts(self) -> Self:
        if self.loss.weighting == "uncertainty" and "domain" in self.model.tasks:
            raise ValueError(
                "loss.weighting uncertainty learns the weights of all tasks, and that of the task domain must stay 1; "
                "allowed with it: fixed"
            )
        if self.model.head_pose and (self.augment.mixup_alpha or self.augment.cutmix_alpha):
            raise ValueError(
                "model.head_pose: images mixed by augment.mixup_alpha or augment.cutmix_alpha have no head pose; set "
                "both to 0"
            )
        sides = self.train.image_sizes
        if sides and sides[-1] != self.model.image_size:
            raise ValueError(f"train.image_sizes {list(sides)} must end with model.image_size {self.model.image_size}")
        return self


class TrainJob(NetworkJob):
    """Train a multi-task network on a prepared set. Run the same command again to resume a run that was killed."""

    own = "train"
    also: ClassVar[Mapping[str, str]] = {"preset": "model.preset"}
    required: ClassVar[Sequence[str]] = ("train.data",)
    example: ClassVar[str] = "agr-ray train --config utkface_lite --data data/utkface --name lite"
    essentials: ClassVar[Sequence[str]] = (
        *("train.data", "train.out", "train.name", "model.preset", "model.image_size", "train.epochs"),
        *("train.batch_size", "train.lr", "train.num_workers", "train.use_gpu", "train.precision"),
        *("new_run", "dry_run"),
    )
    new_run: CliImplicitFlag[bool] = False
    """If the run of this name has finished, start another, with a number added to its name."""
    dry_run: CliImplicitFlag[bool] = False
    """Write nothing, but print the plan: rows, steps, memory, and the time, estimated from up to 20 real steps."""


class TuneJob(TrainJob):
    """Search for better settings: train with different ones, stop bad trials early, keep the best.

    The recipe's [tune.space] says what is searched; the built-in recipe tune_lite is an example. Each trial is a
    training run in OUT/NAME/trials. In OUT/NAME the sweep ends with best.toml, a recipe for agr-ray train; best/, the
    checkpoint; trials.parquet, a row for each trial; and report.html, its page. Run the same command again to
    resume a sweep that was killed; --add 20 adds 20 trials to a finished sweep.
    """

    own = "tune"
    also: ClassVar[Mapping[str, str]] = {**TrainJob.also, "data": "train.data"}
    required = ("train.data", "tune.space")
    example = "agr-ray tune --config tune_lite --data data/utkface --name lite"
    essentials = (
        *("train.data", "tune.out", "tune.name", "tune.trials", "tune.max_hours", "tune.max_concurrent", "tune.mode"),
        *("tune.constraints", "train.epochs", "train.use_gpu", "train.gpus_per_worker", "add", "new_run", "dry_run"),
    )
    tune: TuneConfig = TuneConfig()
    add: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    """Number of trials to add to a finished sweep."""


class CompareJob(TrainingJob):
    """Train presets on the same data with the same settings, and compare them on images that training never saw.

    Settings that belong to a preset, such as the optimiser of `vit`, replace those of [train]. Run the same command
    again to resume a comparison that was killed.
    """

    own = "compare"
    also: ClassVar[Mapping[str, str]] = {"data": "train.data"}
    required = ("train.data",)
    example = "agr-ray compare --config compare_lite --data data/utkface --out comparison"
    essentials = (
        *("train.data", "compare.out", "compare.presets", "compare.seeds", "compare.image_size", "compare.split"),
        *("compare.max_concurrent", "train.epochs", "train.batch_size", "train.lr", "train.use_gpu"),
    )
    compare: CompareConfig = CompareConfig()

    @model_validator(mode="after")
    def _has_one_side(self) -> Self:
        if self.train.image_sizes:
            raise ValueError(
                f"train.image_sizes {list(self.train.image_sizes)}: a comparison has no progressive resizing, because "
                "its networks have different input sizes"
            )
        return self

    @model_validator(mode="after")
    def _has_a_fixed_number_of_workers(self) -> Self:
        if self.train.min_workers != self.train.max_workers:
            asked = [self.train.min_workers, self.train.max_workers]
            raise ValueError(f"train.num_workers {asked}: the runs of a comparison need a fixed number")
        return self


class CrossValidateJob(NetworkJob):
    """Train a network for each fold of a prepared set, and test it on the fold: mean and deviation over the folds.

    predictions.parquet holds each image's prediction by the network that did not see it. Run the same command again to
    resume a cross-validation that was killed.
    """

    own = "cross_validate"
    also: ClassVar[Mapping[str, str]] = {"data": "train.data", "preset": "model.preset"}
    required = ("train.data",)
    example = "agr-ray cross-validate --data data/adience --protocol published_folds --out cv-adience"
    essentials = (
        *("train.data", "cross_validate.out", "cross_validate.protocol", "cross_validate.folds", "cross_validate.val"),
        *("cross_validate.near_duplicates", "cross_validate.max_concurrent", "model.preset", "model.image_size"),
        *("train.epochs", "train.batch_size", "train.lr", "train.use_gpu"),
    )
    cross_validate: CrossValidateConfig = CrossValidateConfig()

    @property
    def training(self) -> TrainJob:
        """Return the training of a fold, whose data, folder and name are not set yet."""
        sections = ("storage", "cluster", "labels", "model", "loss", "augment", "train", "predict")
        return TrainJob(**{name: getattr(self, name) for name in sections})
