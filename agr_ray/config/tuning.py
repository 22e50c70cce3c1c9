"""Settings of a sweep: its search space, its budget and how it chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agr_ray.config.section import MAX_INT, AnyInt, Name, PositiveFloat, PositiveInt, Section, Seed, shown

Scalar = bool | int | float | str
"""A value as TOML writes it; bool first, because it is an int as well."""

TrialError = Literal["age_mae_years", "gender_error", "race_error", "worst_group_age_mae_years"]
"""What a sweep's constraints may limit, all on validation: the mean absolute error of age; 1 - balanced accuracy; the
mean absolute error of age in the worst group by gender, race or both of ten rows and more."""

PAPER_POINT: Mapping[str, Scalar] = {
    "loss.age_weight": 1.0,
    "loss.gender_weight": 0.5,
    "loss.race_weight": 0.5,
    "train.lr": 1e-4,
}
"""What the paper trains with (its eqs 11 and 19)."""


class ParameterConfig(Section):
    """What a sweep tries for one key. Exactly one of uniform, log_uniform, integer and choice."""

    uniform: tuple[float, float] | None = None
    """Any number from the first to the second, both included."""
    log_uniform: tuple[PositiveFloat, PositiveFloat] | None = None
    """The same, each factor as likely as any other: for learning rates and weights over several powers of ten."""
    integer: tuple[AnyInt, AnyInt] | None = None
    """Any whole number from the first to the second, both included."""
    choice: tuple[Scalar | tuple[Scalar, ...], ...] | None = None
    """One of these, in no order."""
    step: PositiveFloat | None = None
    """`uniform` and `integer` only: distance between the values that are tried, counted from the first; none: any."""
    when: dict[str, Scalar | tuple[Scalar, ...]] = {}
    """Other searched keys, and the value or values of each for which this one is searched: {"train.optimizer" = "sgd"}.
    Where one has another value, this key stays what the recipe says."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        kinds = ("uniform", "log_uniform", "integer", "choice")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(kinds)} is needed, not {' and '.join(given) or 'none'}")
        if self.choice is not None:
            if len(set(self.choice)) < 2 or len(set(self.choice)) < len(self.choice):
                raise ValueError(f"choice {list(self.choice)} needs two values or more, each once")
        elif self.low >= self.high:
            raise ValueError(f"{given[0]} [{self.low:g}, {self.high:g}]: the first must be less than the second")
        if self.step is not None:
            if self.uniform is None and self.integer is None:
                raise ValueError(f"step {self.step:g} goes with uniform and integer only, not with {given[0]}")
            if self.integer is not None and self.step != int(self.step):
                raise ValueError(f"step {self.step:g} of an integer must be whole")
            if self.step > self.high - self.low:
                raise ValueError(f"step {self.step:g} is more than {given[0]} [{self.low:g}, {self.high:g}] is wide")
        return self

    @property
    def range(self) -> tuple[float, float] | None:
        """The bounds; None: it is a choice."""
        return self.uniform or self.log_uniform or self.integer

    @property
    def low(self) -> float:
        """The first bound, of what is no choice."""
        assert self.range is not None
        return self.range[0]

    @property
    def high(self) -> float:
        """The second bound, of what is no choice."""
        assert self.range is not None
        return self.range[1]


class TuneConfig(Section):
    """A sweep: trainings under different settings, of which the best is kept."""

    space: dict[str, ParameterConfig] = {}
    """What is searched: a table [tune.space] with a line for each dotted key of [model], [loss], [augment], [train] or
    [predict], such as "train.lr" = {log_uniform = [1e-4, 1e-2]}, "train.batch_size" = {integer = [32, 128], step = 32}
    or "train.optimizer" = {choice = ["adam", "sgd"]}. All other keys are the recipe's."""
    out: str = "sweeps"
    """Folder or prefix of all sweeps; this one goes into OUT/NAME. Shared storage where there are several nodes."""
    name: Name = ""
    """Name of the sweep; empty: `sweep-` and the digest of the configuration. The same name resumes the sweep."""
    trials: PositiveInt = 20
    """Trials, pruned and failed ones included. A sweep that has made fewer goes on when this is raised; so does
    one that has finished, with --add."""
    max_epochs: PositiveInt | None = None
    """Epochs of all trials together after which the sweep stops; none: no limit."""
    max_hours: PositiveFloat | None = None
    """Hours after which the sweep stops, as if it were interrupted: the same command goes on, for as long again; none:
    no limit."""
    mode: Literal["scalar", "pareto"] = "scalar"
    """`scalar` minimises the mean, over the model's tasks, of the error on validation over the error of guessing the
    median age or the most frequent class: years for age, 1 - balanced accuracy for gender and race. 1 is no better than
    guessing, 0 is perfect. `pareto` minimises the three errors at once, stops no trial early, and reports the front:
    the trials that no other beats in all errors."""
    constraints: dict[TrialError, float] = {}
    """Highest values allowed of age_mae_years, gender_error, race_error (1 - balanced accuracy) and
    worst_group_age_mae_years (the largest age MAE of a group by gender, race or both of ten validation rows and more).
    A trial beyond one is best only if all are, and Optuna is told by how much; ASHA goes by the objective alone."""
    asha: bool = True
    """`scalar` only: stop a trial that after grace_epochs, and after reduction times as many, and so on, is not among
    the best 1 / reduction of those that got so far (asynchronous successive halving). train.epochs can't be searched
    then: schedules of other lengths can't be compared epoch by epoch."""
    grace_epochs: PositiveInt = 2
    """`asha` only: epochs that each trial may make."""
    reduction: Annotated[int, Field(ge=2, le=MAX_INT)] = 3
    """`asha` only: 1 in so many goes on."""
    paper_first: bool = True
    """Whether the first trial has the paper's values (loss weights 1, 0.5, 0.5; train.lr 1e-4) of what is searched."""
    points_to_evaluate: tuple[dict[str, Scalar | tuple[Scalar, ...]], ...] = ()
    """Values of searched keys that the next trials have: [[tune.points_to_evaluate]] tables of "train.lr" = 3e-3 and
    the like. Keys that one leaves out are drawn."""
    random_trials: Annotated[int, Field(ge=0, le=MAX_INT)] = 10
    """Trials whose values are drawn at random before Optuna's sampler (TPE) makes something of those before."""
    seed: Seed = 0
    """Seed of what is drawn. Trials at the same time end in another order each time, so only one after the other
    are the same again."""
    max_concurrent: PositiveInt | None = None
    """Trials at the same time; none: as many as the cluster has room for, on one machine as it has cores."""
    max_failures: Annotated[int, Field(ge=0, le=MAX_INT)] = 1
    """Times that a trial which raises, or a process of which dies, goes on from its last checkpoint. A loss that is no
    number is not tried again. In a sweep this stands for train.max_failures."""
    study: str = ""
    """Where Optuna keeps the study: a file of the local disk that ends in .journal, or sqlite:///FILE or
    postgresql://USER:PASSWORD@HOST/DB; empty: study.journal in the sweep's folder. Sweeps with the same study and
    study_name learn from each other's trials."""
    study_name: str = ""
    """Name of the study; empty: the sweep's."""

    @model_validator(mode="after")
    def _keeps_its_study_where_it_can_be_locked(self) -> Self:
        allowed = "a local file whose name ends in .journal, or a database URL"
        scheme, is_url, _ = self.study.partition("://")
        if self.study and not is_url and not self.study.endswith(".journal"):
            raise ValueError(f"study {shown(self.study)} must be {allowed}")
        if scheme in ("s3", "file") and is_url:
            raise ValueError(
                f"study {scheme}://... must be {allowed}; the default is stored beside the sweep, in any storage"
            )
        return self
