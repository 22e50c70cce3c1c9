"""Every knob: frozen pydantic models, filled from a TOML recipe, the environment and the command line.

One recipe serves every job: a job uses its own sections, and only validates the others.
"""

from agr_ray.config.architecture import ModelConfig, PredictConfig
from agr_ray.config.command_line import did_you_mean, fail, one_line
from agr_ray.config.comparing import CompareConfig
from agr_ray.config.cross_validation import CrossValidateConfig
from agr_ray.config.evaluation import EvaluateConfig, Split
from agr_ray.config.infrastructure import ClusterConfig, StorageConfig
from agr_ray.config.jobs import (
    SECTIONS,
    ClusterJob,
    EvaluateJob,
    ImportJob,
    Job,
    PredictJob,
    PrepareJob,
    QuantizeJob,
    RenderJob,
    ReportJob,
    ScoreJob,
    StatusJob,
)
from agr_ray.config.label_space import LabelsConfig
from agr_ray.config.parsing import built_in_recipes, load, parse, read_local, wants_json
from agr_ray.config.rendering import RenderConfig
from agr_ray.config.scoring import GatesConfig, ScoreConfig
from agr_ray.config.section import PositiveFloat, Section, digest, other_settings
from agr_ray.config.source import MISSING_VALUES, SourceConfig, SplitConfig
from agr_ray.config.training import AugmentConfig, LossConfig, TrainConfig
from agr_ray.config.training_jobs import CompareJob, CrossValidateJob, TrainJob, TuneJob
from agr_ray.config.tuning import PAPER_POINT, ParameterConfig, Scalar, TrialError, TuneConfig
from agr_ray.config.vision import PrepareConfig, VisionConfig

__all__ = [
    "MISSING_VALUES",
    "PAPER_POINT",
    "SECTIONS",
    "AugmentConfig",
    "ClusterConfig",
    "ClusterJob",
    "CompareConfig",
    "CompareJob",
    "CrossValidateConfig",
    "CrossValidateJob",
    "EvaluateConfig",
    "EvaluateJob",
    "GatesConfig",
    "ImportJob",
    "Job",
    "LabelsConfig",
    "LossConfig",
    "ModelConfig",
    "ParameterConfig",
    "PositiveFloat",
    "PredictConfig",
    "PredictJob",
    "PrepareConfig",
    "PrepareJob",
    "QuantizeJob",
    "RenderConfig",
    "RenderJob",
    "ReportJob",
    "Scalar",
    "ScoreConfig",
    "ScoreJob",
    "Section",
    "SourceConfig",
    "Split",
    "SplitConfig",
    "StatusJob",
    "StorageConfig",
    "TrainConfig",
    "TrainJob",
    "TrialError",
    "TuneConfig",
    "TuneJob",
    "VisionConfig",
    "built_in_recipes",
    "did_you_mean",
    "digest",
    "fail",
    "load",
    "one_line",
    "other_settings",
    "parse",
    "read_local",
    "wants_json",
]
