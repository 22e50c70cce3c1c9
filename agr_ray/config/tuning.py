"""Settings of a sweep: its search space, budget and objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agr_ray.config.section import MAX_INT, AnyInt, Name, PositiveFloat, PositiveInt, Private, Section, Seed
from agr_ray.redact import shown

Scalar = bool | int | float | str
"""A TOML scalar; bool first, because it is a subclass of int."""

TrialError = Literal["age_mae_years", "gender_error", "race_error", "worst_group_age_mae_years"]
"""Errors that a sweep can constrain, all on validation: the mean absolute error of age; 1 - balanced accuracy; the mean
absolute error of age in the worst group by gender, race or both of at least ten rows."""

PAPER_POINT: Mapping[str, Scalar] = {
    "loss.age_weight": 1.0,
    "loss.gender_weight": 0.5,
    "loss.race_weight": 0.5,
    "train.lr": 1e-4,
}
"""The paper's own values (its eqs 11 and 19)."""


class ParameterConfig(Section):
    """Search range of one key: exactly one of uniform, log_uniform, integer and choice."""

    uniform: tuple[float, float] | None = None
    """Any number between the two, both included."""
    log_uniform: tuple[PositiveFloat, PositiveFloat] | None = None
    """The same, uniform in the logarithm: for learning rates and weights over several powers of ten."""
    integer: tuple[AnyInt, AnyInt] | None = None
    """Any integer between the two, both included."""
    choice: tuple[Scalar | tuple[Scalar, ...], ...] | None = None
    """One of these values, which have no order."""
    step: PositiveFloat | None = None
    """`uniform` and `integer` only: step between values, from the lower bound; none: any value."""
    when: dict[str, Scalar | tuple[Scalar, ...]] = {}
    """Condition on other searched keys, with the allowed value or values of each: {"train.optimizer" = "sgd"}. If it
    does not hold, this key keeps the recipe's value."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        kinds = ("uniform", "log_uniform", "integer", "choice")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(kinds)} is needed, not {' and '.join(given) or 'none'}")
        if self.choice is not None:
            if len(set(self.choice)) < 2 or len(set(self.choice)) < len(self.choice):
                raise ValueError(f"choice {list(self.choice)} needs at least two distinct values")
        elif self.low >= self.high:
            raise ValueError(f"{given[0]} [{self.low:g}, {self.high:g}]: the first must be less than the second")
        if self.step is not None:
            if self.uniform is None and self.integer is None:
                raise ValueError(f"step {self.step:g} is for uniform and integer only, not for {given[0]}")
            if self.integer is not None and self.step != int(self.step):
                raise ValueError(f"step {self.step:g} of an integer must be whole")
            if self.step > self.high - self.low:
                raise ValueError(f"step {self.step:g} is more than {given[0]} [{self.low:g}, {self.high:g}] is wide")
        return self

    @property
    def range(self) -> tuple[float, float] | None:
        """Return the bounds, or None for a choice."""
        return self.uniform or self.log_uniform or self.integer

    @property
    def low(self) -> float:
        """Return the lower bound; not for a choice."""
        assert self.range is not None
        return self.range[0]

    @property
    def high(self) -> float:
        """Return the upper bound; not for a choice."""
        assert self.range is not None
        return self.range[1]


class TuneConfig(Section):
    """A sweep: trainings with different settings, of which the best is kept."""

    space: dict[str, ParameterConfig] = {}
    """Search space: a table [tune.space] with a line for each dotted key of [model], [loss], [augment], [train] or
    [predict], such as "train.lr" = {log_uniform = [1e-4, 1e-2]}, "train.batch_size" = {integer = [32, 128], step = 32}
    or "train.optimizer" = {choice = ["adam", "sgd"]}. Other keys keep the recipe's values."""
    out: str = "sweeps"
    """Folder or prefix of all sweeps; this one is written to OUT/NAME. Must be shared storage if there are several
    nodes."""
    name: Name = ""
    """Name of the sweep; empty: `sweep-` and a hash of the settings. The same name resumes the sweep."""
    trials: PositiveInt = 20
    """Number of trials, including pruned and failed ones. Raise it to continue an unfinished sweep, or give --add for a
    finished one."""
    max_epochs: PositiveInt | None = None
    """Maximum total epochs of all trials; none: no limit."""
    max_hours: PositiveFloat | None = None
    """Hours after which the sweep is interrupted; the same command resumes it for as long again. None: no limit."""
    mode: Literal["scalar", "pareto"] = "scalar"
    """`scalar` minimises one objective: the mean, over the model's tasks, of the error on validation divided by the
    error of the constant baseline (median age, most frequent class): MAE in years for age, 1 - balanced accuracy for
    gender and race. 1 is no better than the baseline, 0 is perfect. `pareto` minimises the three errors at once, stops
    no trial early, and reports the Pareto front."""
    constraints: dict[TrialError, float] = {}
    """Upper limits of age_mae_years, gender_error, race_error (1 - balanced accuracy) and worst_group_age_mae_years
    (the largest age MAE of a group by gender, race or both of at least ten validation rows). A trial that violates one
    can be the best only if all trials do. Optuna takes violations into account; ASHA uses the objective alone."""
    asha: bool = True
    """`scalar` only: asynchronous successive halving. After grace_epochs, grace_epochs * reduction and so on, a trial
    stops unless it is among the best 1 / reduction of those that got as far. Excludes a search over train.epochs,
    because schedules of different lengths can't be compared epoch by epoch."""
    grace_epochs: PositiveInt = 2
    """`asha` only: epochs that every trial runs."""
    reduction: Annotated[int, Field(ge=2, le=MAX_INT)] = 3
    """`asha` only: 1 in this many trials continues."""
    paper_first: bool = True
    """Give the searched keys the values of Bosco and Chi (2025) in the first trial (loss weights 1, 0.5, 0.5; train.lr
    1e-4)."""
    points_to_evaluate: tuple[dict[str, Scalar | tuple[Scalar, ...]], ...] = ()
    """Values of searched keys for the next trials: [[tune.points_to_evaluate]] tables such as "train.lr" = 3e-3. Keys
    that are left out are sampled."""
    random_trials: Annotated[int, Field(ge=0, le=MAX_INT)] = 10
    """Number of random trials before Optuna's TPE sampler takes over."""
    seed: Seed = 0
    """Seed of the sampler. Concurrent trials end in varying order, so only a sequential sweep is reproducible."""
    max_concurrent: PositiveInt | None = None
    """Maximum concurrent trials; none: as many as fit the cluster, and on one machine its cores."""
    max_failures: Annotated[int, Field(ge=0, le=MAX_INT)] = 1
    """Retries of a trial that raises or loses a process, from its last checkpoint. A non-finite loss is not retried. In
    a sweep, this replaces train.max_failures."""
    study: Private = ""
    """Storage of the Optuna study: a local file that ends in .journal, or sqlite:///FILE or
    postgresql://USER:PASSWORD@HOST/DB; empty: study.journal in the sweep's folder. Sweeps with the same study and
    study_name learn from each other's trials."""
    study_name: str = ""
    """Name of the study; empty: the sweep's."""

    @model_validator(mode="after")
    def _has_a_study_that_can_be_locked(self) -> Self:
        allowed = "a local file whose name ends in .journal, or a database URL"
        scheme, is_url, _ = self.study.partition("://")
        if self.study and not is_url and not self.study.endswith(".journal"):
            raise ValueError(f"study {shown(self.study)} must be {allowed}")
        if scheme in ("s3", "file") and is_url:
            raise ValueError(
                f"study {scheme}://... must be {allowed}; the default is stored beside the sweep, in any storage"
            )
        return self
