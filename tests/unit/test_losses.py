"""The multi-task loss, against arithmetic by hand and across ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from heads import LINEAR, heads, linear, targets
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.labels import UTKFACE
from agr_ray.learn.losses import first_log_variances, label_counts, multi_task_loss, rows_of
from agr_ray.models.heads.base import Targets
from agr_ray.models.heads.year_bins import AGE_BINS_YEARS, AgeDistribution

NAN = math.nan
ONE_EACH = LossConfig(age_weight=1.0, gender_weight=1.0, race_weight=1.0)


def test_loss_is_the_weighted_sum_of_the_papers_three() -> None:
    outputs = linear(torch.tensor([30.0, 40.0]), torch.tensor([0.0, 2.0]), torch.zeros(2, len(UTKFACE.races)))
    truth = targets([33.0, 39.0], [1, 0], [0, 4])
    loss, tasks = multi_task_loss(LINEAR, outputs, truth, LossConfig(), label_counts(LINEAR, truth))
    gender = (math.log(2.0) + math.log(1.0 + math.exp(2.0))) / 2
    assert loss.item() == pytest.approx(1.0 * 2.0 + 0.5 * gender + 0.5 * math.log(5.0))
    assert tasks.sums.tolist() == pytest.approx([4.0, 2 * gender, 2 * math.log(5.0)])
    assert tasks.counts.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("values", "by_hand"),
    [
        ({"age_loss": "l1"}, [1.0, 6.0]),
        ({"age_loss": "mse"}, [1.0, 36.0]),
        ({"age_loss": "huber"}, [0.5, 5.5]),
        ({"age_loss": "huber", "huber_delta_years": 4.0}, [0.5, 4.0 * (6.0 - 2.0)]),
        ({"age_loss": "l1", "age_scale_years": 10.0}, [0.1, 0.6]),
        ({"age_loss": "mse", "age_scale_years": 10.0}, [0.01, 0.36]),
        ({"age_loss": "huber", "huber_delta_years": 4.0, "age_scale_years": 10.0}, [0.005, 0.16]),
    ],
    ids=str,
)
@pytest.mark.parametrize("head", ["linear", "distribution"])
def test_age_losses(head: str, values: dict[str, Any], by_hand: list[float]) -> None:
    truth = targets([31.0, NAN, 46.0], [-1] * 3, [-1] * 3)
    bins = torch.tensor(AGE_BINS_YEARS, dtype=torch.float32)
    # Targets as they should be, so that the divergence is nothing.
    logits = -0.5 * ((bins - torch.tensor([[31.0], [0.0], [46.0]])) / 2.0) ** 2 if head == "distribution" else None
    years = torch.tensor([30.0, 20.0, 40.0])
    outputs = {"age": years if logits is None else AgeDistribution(logits, years)}
    age = heads(head, ("age",))
    config = LossConfig(age_expectation_weight=3.0, **values)
    loss, tasks = multi_task_loss(age, outputs, truth, config, label_counts(age, truth))
    expected = sum(by_hand) * (3.0 if head == "distribution" else 1.0)
    assert tasks.sums.tolist() == pytest.approx([expected], abs=1e-5)
    assert loss.item() == pytest.approx(expected / 2, abs=1e-5)


def test_missing_labels_affect_only_their_task() -> None:
    outputs = linear(torch.tensor([30.0, 40.0]), torch.zeros(2), torch.zeros(2, len(UTKFACE.races)))
    truth = targets([NAN, 39.0], [-1, -1], [2, -1])
    loss, tasks = multi_task_loss(LINEAR, outputs, truth, ONE_EACH, label_counts(LINEAR, truth))
    assert loss.item() == pytest.approx(1.0 + 0.0 + math.log(5.0))
    assert tasks.counts.tolist() == [1, 0, 1]


@pytest.mark.parametrize("age_loss", ["l1", "mse", "huber"])
@pytest.mark.parametrize("head", ["linear", "distribution"])
def test_non_finite_values_in_unlabelled_rows_poison_nothing(head: str, age_loss: str) -> None:
    age = torch.tensor([NAN, 40.0], requires_grad=True)
    logits = torch.full((2, len(AGE_BINS_YEARS)), 0.0)
    logits[0] = math.inf
    logits.requires_grad_()
    gender = torch.tensor([math.inf, 0.0], requires_grad=True)
    race = torch.tensor([[NAN] * 5, [0.0] * 5], requires_grad=True)
    truth = targets([NAN, 39.0], [-1, 1], [-1, 1])
    outputs = linear(AgeDistribution(logits, age) if head == "distribution" else age, gender, race)
    parts = heads(head)
    config = ONE_EACH.model_copy(update={"age_loss": age_loss})
    loss, _ = multi_task_loss(parts, outputs, truth, config, label_counts(parts, truth))
    loss.backward()
    assert math.isfinite(loss.item())
    for leaf in (age, gender, race, *([logits] if head == "distribution" else [])):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        assert not leaf.grad[0].any()


def test_batch_without_any_label_gives_zero_gradients_not_none() -> None:
    leaves = [
        torch.ones(2, requires_grad=True),
        torch.ones(2, requires_grad=True),
        torch.ones(2, 5, requires_grad=True),
    ]
    truth = targets([NAN, NAN], [-1, -1], [-1, -1])
    loss, _ = multi_task_loss(LINEAR, linear(*leaves), truth, LossConfig(), label_counts(LINEAR, truth))
    loss.backward()
    assert loss.item() == 0.0
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_tasks_without_head_cost_nothing() -> None:
    truth = targets([20.0, 30.0], [0, 1], [1, 1])
    gender = heads(tasks=("gender",))
    loss, tasks = multi_task_loss(gender, {"gender": torch.zeros(2)}, truth, ONE_EACH, label_counts(gender, truth))
    assert loss.item() == pytest.approx(math.log(2.0))
    assert tasks.counts.tolist() == [2]


def test_distribution_loss_is_divergence_plus_error_of_the_expectation() -> None:
    bins = torch.tensor(AGE_BINS_YEARS, dtype=torch.float64)
    truth_p = torch.exp(-((bins - 40.0) ** 2) / (2 * 3.0**2))
    truth_p /= truth_p.sum()
    guess_p = torch.exp(-((bins - 45.0) ** 2) / (2 * 3.0**2))
    guess_p /= guess_p.sum()
    # Between Gaussians of one width the divergence is (difference / sigma)^2 / 2.
    divergence = (5.0 / 3.0) ** 2 / 2
    outputs = {"age": AgeDistribution(guess_p.log()[None].float(), torch.tensor([45.0]))}
    age = heads("distribution", ("age",))
    truth = targets([40.0], [-1], [-1])
    config = LossConfig(age_sigma_years=3.0, age_expectation_weight=0.5)
    loss, _ = multi_task_loss(age, outputs, truth, config, label_counts(age, truth))
    assert float((truth_p * (truth_p / guess_p).log()).sum()) == pytest.approx(divergence, rel=1e-4)
    assert loss.item() == pytest.approx(divergence + 0.5 * 5.0, rel=1e-4)


def test_perfect_distribution_costs_nothing() -> None:
    bins = torch.tensor(AGE_BINS_YEARS, dtype=torch.float32)
    outputs = {"age": AgeDistribution((-0.5 * ((bins - 40.0) / 2.0) ** 2)[None], torch.tensor([40.0]))}
    age = heads("distribution", ("age",))
    truth = targets([40.0], [-1], [-1])
    loss, _ = multi_task_loss(age, outputs, truth, LossConfig(), label_counts(age, truth))
    assert loss.item() == pytest.approx(0.0, abs=1e-5)


def test_smoothed_labels_are_spread_over_all_classes() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1]]))
    outputs = linear(torch.zeros(1), torch.tensor([math.log(3.0)]), logits)  # p_male = 3/4
    truth = targets([NAN], [1], [0])
    config = LossConfig(gender_weight=1.0, race_weight=1.0, label_smoothing=0.2)
    _, tasks = multi_task_loss(LINEAR, outputs, truth, config, label_counts(LINEAR, truth))
    gender = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))
    race = -(0.84 * math.log(0.6) + 4 * 0.04 * math.log(0.1))
    assert tasks.sums.tolist() == pytest.approx([0.0, gender, race])


@pytest.mark.parametrize(
    ("head", "age_loss", "age_by_hand"),
    [
        ("linear", "l1", lambda mean, s: math.exp(-s) * mean + s),
        ("linear", "mse", lambda mean, s: 0.5 * math.exp(-s) * mean + 0.5 * s),
        ("linear", "huber", lambda mean, s: math.exp(-s) * mean + 0.5 * s),
        ("distribution", "l1", lambda mean, s: math.exp(-s) * mean + 0.5 * s),
    ],
)
def test_uncertainty_weighting_is_kendalls(
    head: str, age_loss: str, age_by_hand: Callable[[float, float], float]
) -> None:
    years = torch.tensor([30.0, 40.0])
    said = AgeDistribution(torch.zeros(2, len(AGE_BINS_YEARS)), years) if head == "distribution" else years
    outputs = linear(said, torch.tensor([0.0, 2.0]), torch.zeros(2, len(UTKFACE.races)))
    parts = heads(head)
    truth = targets([33.0, 39.0], [1, 0], [0, 4])
    config = LossConfig(weighting="uncertainty", age_loss=age_loss)  # type: ignore[arg-type]  # one of them
    s = torch.tensor([1.5, -0.5, 0.25], requires_grad=True)
    loss, tasks = multi_task_loss(parts, outputs, truth, config, label_counts(parts, truth), log_variances=s)
    age, gender, race = (tasks.sums / tasks.counts).tolist()
    by_hand = age_by_hand(age, 1.5) + math.exp(0.5) * gender - 0.25 + math.exp(-0.25) * race + 0.125
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("age_loss", ["l1", "mse", "huber"])
def test_uncertainty_weighting_begins_with_the_fixed_weights(age_loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(size, generator=generator).requires_grad_() for size in ((6,), (6,), (6, 5))]
    truth = targets([1.0, -2.0, 0.5, NAN, 3.0, 0.0], [0, 1, -1, 1, 0, 1], [0, 1, 2, 3, 4, -1])
    config = LossConfig(weighting="uncertainty", age_weight=0.1, race_weight=2.0, age_loss=age_loss)  # type: ignore[arg-type]  # one of them
    gradients = []
    for s in (None, first_log_variances(LINEAR, config)):
        loss, _ = multi_task_loss(LINEAR, linear(*leaves), truth, config, label_counts(LINEAR, truth), log_variances=s)
        gradients.append(torch.autograd.grad(loss, leaves))
    for fixed, learnt in zip(*gradients, strict=True):
        torch.testing.assert_close(fixed, learnt)


def test_the_best_scale_is_the_mean_error() -> None:
    truth = targets([33.0, 39.0], [-1, -1], [-1, -1])
    s = torch.tensor([math.log(2.0), 7.0, 7.0], requires_grad=True)  # a mean error of 2 years
    outputs = linear(torch.tensor([30.0, 40.0]), torch.zeros(2), torch.zeros(2, 5))
    loss, _ = multi_task_loss(LINEAR, outputs, truth, LossConfig(), label_counts(LINEAR, truth), log_variances=s)
    loss.backward()
    assert s.grad is not None
    assert s.grad.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)  # tasks without labels stay where they are


def test_a_task_without_a_label_keeps_its_learnt_weight() -> None:
    truth = targets([NAN, NAN], [0, 1], [-1, -1])
    s = torch.zeros(3, requires_grad=True)
    outputs = linear(torch.zeros(2), torch.zeros(2), torch.zeros(2, len(UTKFACE.races)))
    loss, _ = multi_task_loss(LINEAR, outputs, truth, LossConfig(), label_counts(LINEAR, truth), log_variances=s)
    loss.backward()
    assert s.grad is not None
    assert s.grad.tolist() == pytest.approx([0.0, 0.5 - math.log(2.0), 0.0])


def test_gradients_averaged_over_ranks_equal_those_of_one_process() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 4, generator=generator)
    # Rank 1's share (the last two rows) has no gender, and an age only once.
    truth = targets([20.0, NAN, 35.0, 50.0, 61.0, NAN, 70.0], [0, 1, -1, 1, 0, -1, -1], [0, 1, 2, -1, 4, 3, -1])
    config = LossConfig(age_expectation_weight=0.3)
    parts = heads("distribution")

    def gradients(rows: slice, counts: Tensor, world_size: int) -> Tensor:
        s = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
        weights = torch.linspace(-1, 1, 4 * (len(AGE_BINS_YEARS) + 6)).view(4, -1).requires_grad_()
        age, gender, race = (features[rows] @ weights).split([len(AGE_BINS_YEARS), 1, 5], dim=1)
        expectation = age.softmax(dim=1) @ torch.tensor(AGE_BINS_YEARS, dtype=torch.float32)
        outputs = linear(AgeDistribution(age, expectation), gender.squeeze(1), race)
        share = rows_of(truth, rows)
        for log_variances in (None, s):  # the sum of both is as good a loss
            loss, _ = multi_task_loss(parts, outputs, share, config, counts, world_size, log_variances)
            loss.backward(retain_graph=True)
        assert weights.grad is not None
        assert s.grad is not None
        return torch.cat([weights.grad.flatten(), s.grad])

    counts = label_counts(parts, truth)
    whole = gradients(slice(0, 7), counts, 1)
    averaged = (gradients(slice(0, 5), counts, 2) + gradients(slice(5, 7), counts, 2)) / 2
    torch.testing.assert_close(averaged, whole, rtol=1e-5, atol=1e-5)


def in_a_range(low: float, high: float) -> Targets:
    return {"age": torch.tensor([NAN]), "age_low": torch.tensor([low]), "age_high": torch.tensor([high])}


@pytest.mark.parametrize(("answer", "distance"), [(2.0, 1.0), (3.0, 0.0), (5.5, 0.0), (9.0, 0.0), (13.0, 4.0)])
@pytest.mark.parametrize("age_loss", ["l1", "mse"])
def test_linear_age_learns_a_range_by_the_distance_to_it(answer: float, distance: float, age_loss: Any) -> None:
    age, truth = heads(tasks=("age",)), in_a_range(3.0, 9.0)
    years = torch.tensor([answer], requires_grad=True)
    loss, tasks = multi_task_loss(age, {"age": years}, truth, LossConfig(age_loss=age_loss), label_counts(age, truth))
    loss.backward()
    assert tasks.counts.tolist() == [1]
    assert loss.item() == pytest.approx(distance if age_loss == "l1" else distance**2)
    slope = 0.0 if distance == 0.0 else math.copysign(1.0 if age_loss == "l1" else 2 * distance, answer - 5.0)
    assert years.grad is not None
    assert years.grad.tolist() == pytest.approx([slope])


@pytest.mark.parametrize(("low", "high", "bins"), [(3.0, 9.0, 7), (110.0, 116.0, 7), (20.2, 20.4, 2), (8.0, 8.0, 1)])
def test_distribution_learns_a_range_by_the_probability_inside(low: float, high: float, bins: int) -> None:
    age, truth = heads("distribution", ("age",)), in_a_range(low, high)
    logits = torch.zeros(1, len(AGE_BINS_YEARS), requires_grad=True)
    outputs = {"age": AgeDistribution(logits, torch.tensor([58.0]))}
    loss, _ = multi_task_loss(age, outputs, truth, LossConfig(), label_counts(age, truth))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(bins / len(AGE_BINS_YEARS)), rel=1e-5)
    assert logits.grad is not None
    assert logits.grad[0].isfinite().all()
    assert [int(k) for k in (logits.grad[0] < 0).nonzero()] == list(range(math.floor(low), math.ceil(high) + 1))


@pytest.mark.parametrize("kind", ["linear", "distribution"])
def test_ages_and_ranges_are_learnt_in_one_batch(kind: str) -> None:
    age = heads(kind, ("age",))
    rows = {
        "age": torch.tensor([30.0, NAN, NAN, 30.0]),
        "age_low": torch.tensor([NAN, 3.0, NAN, NAN]),
        "age_high": torch.tensor([NAN, 9.0, NAN, NAN]),
    }
    years, logits = torch.tensor([33.0, 11.0, NAN, 33.0]), torch.randn(4, len(AGE_BINS_YEARS))
    said = years if kind == "linear" else AgeDistribution(logits, years)
    each = age["age"].losses(said, rows, LossConfig())
    one_by_one = [
        age["age"]
        .losses(
            years[k : k + 1] if kind == "linear" else AgeDistribution(logits[k : k + 1], years[k : k + 1]),
            rows_of(rows, slice(k, k + 1)),
            LossConfig(),
        )
        .item()
        for k in range(4)
    ]
    assert each.tolist() == pytest.approx(one_by_one)
    assert each[2] == 0.0
    assert label_counts(age, rows).tolist() == [3.0]
    if kind == "linear":
        assert each.tolist() == [3.0, 2.0, 0.0, 3.0]
