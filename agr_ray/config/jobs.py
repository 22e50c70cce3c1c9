"""The jobs that train nothing: the sections that each uses. `training_jobs` has the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, PrivateAttr
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    CliPositionalArg,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from agr_ray.config.architecture import ModelConfig, PredictConfig
from agr_ray.config.comparing import CompareConfig
from agr_ray.config.cross_validation import CrossValidateConfig
from agr_ray.config.evaluation import EvaluateConfig
from agr_ray.config.infrastructure import ClusterConfig, StorageConfig
from agr_ray.config.label_space import LabelsConfig
from agr_ray.config.rendering import RenderConfig
from agr_ray.config.scoring import GatesConfig, ScoreConfig
from agr_ray.config.section import Section
from agr_ray.config.source import SourceConfig, SplitConfig
from agr_ray.config.training import AugmentConfig, LossConfig, TrainConfig
from agr_ray.config.tuning import TuneConfig
from agr_ray.config.vision import PrepareConfig, VisionConfig
from agr_ray.registry import check_name

SECTIONS: Mapping[str, type[Section]] = {
    "storage": StorageConfig,
    "cluster": ClusterConfig,
    "render": RenderConfig,
    "source": SourceConfig,
    "labels": LabelsConfig,
    "split": SplitConfig,
    "vision": VisionConfig,
    "prepare": PrepareConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "augment": AugmentConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "cross_validate": CrossValidateConfig,
    "gates": GatesConfig,
    "score": ScoreConfig,
}
"""Every table that a recipe may hold."""


class Job(BaseSettings):
    """The sections that a job uses. `load` builds it from the command line; code and tests build it directly."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        env_prefix="AGR_RAY_",
        env_nested_delimiter="__",
    )
    own: ClassVar[str] = ""
    """The section whose options need no prefix on the command line."""
    also: ClassVar[Mapping[str, str]] = {}
    """Dotted keys of other sections that need none either, by option."""
    required: ClassVar[Sequence[str]] = ()
    """Dotted keys that must be set."""
    positional: ClassVar[Sequence[str]] = ()
    """Fields that are positional arguments."""
    essentials: ClassVar[Sequence[str]] = ()
    """Dotted keys that `--help` shows, in this order."""
    example: ClassVar[str] = ""
    """An example command."""

    storage: StorageConfig = StorageConfig()
    log_format: Literal["text", "json"] = "text"
    """`json`: print everything that people would read as JSON, an object for each line, on stderr: time, level, job,
    run, message, counts. Standard output then has only results for other programs, such as `--json-lines`."""
    _recipe: str = PrivateAttr("")

    @property
    def recipe(self) -> str:
        """Return the recipe as the command line named it; empty: none was given. It is no setting."""
        return self._recipe

    @classmethod
    def summary(cls) -> str:
        """Return the first paragraph of the job's documentation."""
        return (cls.__doc__ or "").partition("\n\n")[0]

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """Return the sections by name."""
        return {name: section for name, section in SECTIONS.items() if name in cls.model_fields}

    @classmethod
    def shortcuts(cls) -> dict[str, str]:
        """Return the dotted keys of the options that need no prefix, by option."""
        own = SECTIONS[cls.own].model_fields if cls.own else {}
        return {name: f"{cls.own}.{name}" for name in own} | dict(cls.also)

    def needed(self) -> Sequence[str]:
        """Return the dotted keys that must be set, given the values of the others."""
        return self.required

    @classmethod
    def option(cls, key: str) -> str:
        """Return the command-line option of a dotted key."""
        return "--" + next((name for name, target in cls.shortcuts().items() if target == key), key)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  # the library's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use only what the caller passes: `parse` adds the environment, which the command line overrides."""
        return (init_settings,)


class PredictJob(Job):
    """Find the faces of photographs and estimate their age, gender and race, with no cluster and no tables.

    Prints a row for each face and writes an annotated copy of each photograph.
    """

    required = ("photographs", "checkpoint")
    positional = ("photographs",)
    example = "agr-ray predict party.jpg --checkpoint runs/lite/best"
    essentials = (
        *("photographs", "checkpoint", "out", "json_lines", "vision.min_face_px", "vision.small_faces"),
        *("vision.try_rotations", "gates.min_sharpness", "allow_uncalibrated"),
    )
    photographs: CliPositionalArg[list[str]] = []
    """Files, folders, or URIs such as s3://bucket/photo.jpg or s3://bucket/prefix."""
    checkpoint: str = ""
    """Folder or prefix of the checkpoint."""
    out: str = "faces"
    """Folder of the annotated photographs; empty: none are written."""
    json_lines: CliImplicitFlag[bool] = False
    """Print a JSON object for each photograph instead of the table."""
    allow_uncalibrated: CliImplicitFlag[bool] = False
    """Allow [vision] and [predict] settings that differ from those of the checkpoint's calibration. Ages then have no
    intervals and are not corrected."""
    vision: VisionConfig = VisionConfig()
    predict: PredictConfig = PredictConfig()
    gates: GatesConfig = GatesConfig()


class ReportJob(Job):
    """Make a report of a job's results: a self-contained report.html, the same as report.md, and the figures.

    Evaluations of the same model on several data sets are shown side by side, in the report of the first.
    """

    required = ("folders",)
    positional = ("folders",)
    example = "agr-ray report runs/lite/best-eval-test-1a2b3c4d-5e6f"
    essentials = ("folders", "out", "faces", "run")
    folders: CliPositionalArg[list[str]] = []
    """Output of evaluate, compare, cross-validate or score, or OUT/NAME of train or tune; more: evaluations of the
    model on other data."""
    out: str = ""
    """Folder or prefix of the report; default: the first of FOLDERS."""
    faces: CliImplicitFlag[bool] = False
    """Show the sheets of faces that `agr-ray evaluate --explain` drew. Do not publish such a page without the consent
    of these people."""
    run: str = ""
    """Scoring results only: id of the run to show in detail; default: the latest run that scored an image."""


class StatusJob(Job):
    """Say what is published, running and stuck in the output of a command. Nothing is written.

    The command may be score, prepare, train, tune, compare or cross-validate.
    The exit status is 0 if nothing is stuck, 3 if something is, and 2 if FOLDER can't be read or is none of these. A
    lock counts as expired if its last heartbeat is older, by this machine's clock, than its holder allows.
    """

    required = ("folder",)
    positional = ("folder",)
    also: ClassVar[Mapping[str, str]] = {"json": "as_json"}
    example = "agr-ray status s3://results/uploads"
    essentials = ("folder", "as_json")
    folder: CliPositionalArg[str] = ""
    """OUT of score, prepare, compare or cross-validate, or OUT/NAME of train or tune."""
    as_json: CliImplicitFlag[bool] = False
    """Print one JSON object on standard output."""


def _check_kind(kind: str) -> str:
    return check_name("kind of weights", kind, ("fairface",))


class ImportJob(Job):
    """Turn published weights of another project into a checkpoint that can be used like any other.

    `fairface`: res34_fair_align_multi_7_20190809.pt (seven races, two genders, nine age groups) or
    res34_fair_align_multi_4_20190809.pt (four races), which you download from github.com/joojs/fairface.
    """

    required = ("kind", "weights", "out")
    positional = ("kind", "weights")
    example = "agr-ray import fairface res34_fair_align_multi_7_20190809.pt --out fairface"
    essentials = ("kind", "weights", "out", "races")
    kind: CliPositionalArg[Annotated[str, AfterValidator(_check_kind)]] = ""
    """Project that published the weights; only fairface."""
    weights: CliPositionalArg[str] = ""
    """Path or URI of the file."""
    out: str = ""
    """Folder or prefix of the checkpoint."""
    races: Literal["auto", "4", "7"] = "auto"
    """Number of races that the network predicts; auto: taken from the file name, multi_7 or multi_4."""


class ClusterJob(Job):
    """A job that runs on a Ray cluster."""

    cluster: ClusterConfig = ClusterConfig()

    @classmethod
    def shortcuts(cls) -> dict[str, str]:
        """Return the options of the job's own section, and `--verbose`."""
        return super().shortcuts() | {"verbose": "cluster.verbose"}


class QuantizeJob(Job):
    """Make a checkpoint whose network computes in int8 on CPUs, two to five times as fast, with OpenVINO.

    The ranges of int8 are measured on crops of a prepared set. Prints how far its predictions are from those of the
    original, on the set's validation images. Intervals and abstention must be calibrated again.
    """

    required = ("checkpoint", "data")
    example = "agr-ray quantize --checkpoint runs/lite/best --data data/utkface"
    essentials = ("checkpoint", "data", "out", "images")
    checkpoint: str = ""
    """Folder or prefix of the checkpoint."""
    data: str = ""
    """Folder or prefix of a prepared set with faces like those to predict: the training set's or another."""
    out: str = ""
    """Folder or prefix of the new checkpoint; empty: CHECKPOINT-int8."""
    images: Annotated[int, Field(ge=16, le=100_000)] = 512
    """Maximum number of training images to measure the ranges on; at least the network's batch, which has up to 16."""


class RenderJob(ClusterJob):
    """Render synthetic faces with known labels: chips to train on, and whole photographs to score."""

    own = "render"
    required = ("render.out",)
    example = "agr-ray render --out faces"
    essentials = tuple(f"render.{name}" for name in ("out", "num_chips", "num_photographs", "seed"))
    render: RenderConfig = RenderConfig()


class PrepareJob(ClusterJob):
    """Labelled photographs -> aligned face crops in Parquet, one row for every input, with its split."""

    own = "prepare"
    required = ("source.uri", "prepare.out")
    example = "agr-ray prepare --config utkface_lite --source.uri UTKFACE --out data/utkface"
    essentials = (
        *("source.kind", "source.uri", "source.labels", "source.columns", "source.gender_codes", "source.race_codes"),
        *("source.missing_values", "labels.space", "split.val", "split.test", "split.sample", "split.near_duplicates"),
        *("vision.detector", "prepare.out", "prepare.crop_side_px", "prepare.num_workers"),
    )
    source: SourceConfig = SourceConfig()
    labels: LabelsConfig = LabelsConfig()
    split: SplitConfig = SplitConfig()
    vision: VisionConfig = VisionConfig()
    prepare: PrepareConfig = PrepareConfig()


class EvaluateJob(ClusterJob):
    """Measure a checkpoint on a split of any prepared set, beside majority and median baselines.

    Settings of [predict] that are not given come from the checkpoint. --compare A B measures two checkpoints, or takes
    two earlier evaluations, and compares them on the same images, overall and by group.
    """

    own = "evaluate"
    required = ("evaluate.checkpoint", "evaluate.data")
    example = "agr-ray evaluate --checkpoint runs/lite/best --data data/utkface --split val --calibrate"
    essentials = tuple(
        f"evaluate.{name}"
        for name in (
            *("checkpoint", "data", "split", "out", "calibrate", "coverage", "abstain_risk", "correct_age"),
            *("compare", "stress", "explain", "allow_overlap", "num_workers", "use_gpu"),
        )
    )
    predict: PredictConfig = PredictConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def needed(self) -> Sequence[str]:
        """Return the dotted keys that must be set: none if two models are compared, which may have been evaluated."""
        return () if self.evaluate.compare else self.required


class ScoreJob(ClusterJob):
    """Score every face of every photograph below a folder or bucket prefix: tables of images, faces and demographics.

    Settings of [vision] and [predict] that are not given come from the checkpoint.
    """

    own = "score"
    required = ("score.checkpoint", "score.input", "score.out")
    example = "agr-ray score --checkpoint runs/lite/best --input s3://photographs/uploads --out s3://results/uploads"
    essentials = (
        *("score.checkpoint", "score.input", "score.out", "score.include", "score.key_pattern", "score.group_by"),
        *("score.min_cell", "score.num_workers", "score.use_gpu", "score.limit", "score.allow_uncalibrated"),
        *("vision.min_face_px", "vision.small_faces", "vision.try_rotations"),
    )
    vision: VisionConfig = VisionConfig()
    predict: PredictConfig = PredictConfig()
    gates: GatesConfig = GatesConfig()
    score: ScoreConfig = ScoreConfig()
