"""Losses and read-outs of the age heads, against cases computed by hand and against numerical gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agr_ray.config import LossConfig
from agr_ray.labels import UTKFACE
from agr_ray.learn.losses import multi_task_loss
from agr_ray.models.heads.base import Head
from agr_ray.models.heads.routed_age import RoutedAge, RoutedOutputs
from agr_ray.models.heads.year_bins import AgeDistribution
from agr_ray.registry import HEADS

NUM_YEARS = 117
NUM_THRESHOLDS = 116
NAN = math.nan
WITH_DISTRIBUTION = ("expectation", "distribution", "mean_variance", "coral", "corn", "soft_ordinal")


def head_of(name: str, num_features: int = 4) -> Head:
    torch.manual_seed(0)
    if name in ("soft routing", "hard routing"):
        return RoutedAge(lambda: head_of("distribution", num_features), is_hard=name == "hard routing")
    head: Head = HEADS["age"][name](num_features, "age", UTKFACE)
    return head


ALL = [*HEADS["age"].names, "soft routing", "hard routing"]


def forward(head: Head, features: Tensor) -> Any:
    if isinstance(head, RoutedAge):
        return head(features, torch.linspace(0.1, 0.9, len(features), dtype=features.dtype))
    return head(features)


def targets(ages: list[float], low: list[float] | None = None, high: list[float] | None = None) -> dict[str, Tensor]:
    none = [NAN] * len(ages)
    return {
        "age": torch.tensor(ages),
        "age_low": torch.tensor(none if low is None else low),
        "age_high": torch.tensor(none if high is None else high),
    }


def loss_of(name: str, outputs: Any, age: float) -> float:
    return float(head_of(name).losses(outputs, targets([age]), LossConfig())[0])


def as_leaves(outputs: Any, leaves: list[Tensor]) -> Any:
    """Return outputs of a head as tensors of which each gets its own gradient, and list them."""
    if isinstance(outputs, Tensor):
        leaves.append(outputs.detach().requires_grad_())
        return leaves[-1]
    parts = [as_leaves(each, leaves) for each in outputs]
    return type(outputs)(*parts) if hasattr(outputs, "_fields") else tuple(parts)


def uniform(name: str) -> Any:
    """Return the outputs of one face for features and biases of 0."""
    head = head_of(name)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        return head(torch.zeros(1, 4))


def test_the_cross_entropy_of_a_uniform_guess_is_the_logarithm_of_its_classes() -> None:
    assert loss_of("expectation", uniform("expectation"), 40.0) == pytest.approx(math.log(NUM_YEARS))
    assert loss_of("groups", uniform("groups"), 40.0) == pytest.approx(math.log(9))


def test_an_age_between_two_years_is_shared_between_them() -> None:
    logits = torch.full((1, NUM_YEARS), -30.0)
    logits[0, 40], logits[0, 41] = math.log(0.75), math.log(0.25)
    outputs = type(uniform("expectation"))(logits, torch.tensor([40.25]))

    assert loss_of("expectation", outputs, 40.25) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_the_mean_variance_loss_adds_half_the_squared_error_and_the_variance() -> None:
    variance = (NUM_YEARS**2 - 1) / 12
    error = 58.0 - 40.0

    expected = math.log(NUM_YEARS) + 0.2 * 0.5 * error**2 + 0.05 * variance
    assert loss_of("mean_variance", uniform("mean_variance"), 40.0) == pytest.approx(expected, rel=1e-5)


def test_soft_labels_that_are_predicted_exactly_have_no_loss() -> None:
    logits = -(torch.arange(NUM_YEARS).float() - 33.0).abs()[None]
    outputs = type(uniform("soft_ordinal"))(logits, torch.tensor([33.0]))

    assert loss_of("soft_ordinal", outputs, 33.0) == pytest.approx(0.0, abs=1e-6)
    assert loss_of("soft_ordinal", outputs, 34.0) > 0.1


def test_a_coral_loss_has_a_term_for_each_threshold() -> None:
    assert loss_of("coral", torch.zeros(1, NUM_THRESHOLDS), 40.0) == pytest.approx(NUM_THRESHOLDS * math.log(2))


def test_a_range_counts_at_the_coral_thresholds_outside_it() -> None:
    losses = head_of("coral").losses(torch.zeros(1, NUM_THRESHOLDS), targets([NAN], [30.0], [39.0]), LossConfig())

    assert float(losses[0]) == pytest.approx((30 + NUM_THRESHOLDS - 39) * math.log(2))


@pytest.mark.parametrize(("age", "num_terms"), [(0.0, 1), (40.0, 41), (115.0, 116), (116.0, 116)])
def test_a_corn_loss_has_a_term_for_each_threshold_that_is_reached(age: float, num_terms: int) -> None:
    assert loss_of("corn", torch.zeros(1, NUM_THRESHOLDS), age) == pytest.approx(num_terms * math.log(2))


def test_a_corn_loss_of_a_range_is_the_probability_of_being_in_it() -> None:
    losses = head_of("corn").losses(torch.zeros(1, NUM_THRESHOLDS), targets([NAN], [30.0], [39.0]), LossConfig())

    # Above 0 to 29 years: 30 halves. Not above all of 30 to 39 years: ten halves less than 1.
    assert float(losses[0]) == pytest.approx(30 * math.log(2) - math.log(1 - 0.5**10), rel=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "first", "last"),
    [(3.0, 9.0, 3, 9), (110.0, 116.0, 110, 116), (30.2, 30.4, 30, 31), (8.0, 8.0, 8, 8), (115.2, 115.5, 115, 116)],
)
def test_corn_learns_a_range_by_the_probability_inside(low: float, high: float, first: int, last: int) -> None:
    head, logits = head_of("corn"), torch.randn(1, NUM_THRESHOLDS, requires_grad=True)
    losses = head.losses(logits, targets([NAN], [low], [high]), LossConfig())
    losses.sum().backward()

    distribution = head.distribution(logits)
    assert distribution is not None
    assert losses.item() == pytest.approx(-math.log(distribution[0, first : last + 1].sum().item()), rel=1e-4)
    assert logits.grad is not None
    assert logits.grad[0].isfinite().all()
    assert [int(k) for k in logits.grad[0].nonzero()] == list(range(first if last == NUM_THRESHOLDS else last + 1))


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("groups", "linear")])
def test_an_age_far_above_a_range_costs_more_than_one_inside(name: str) -> None:
    head = head_of(name)
    head.initialise({"age": np.full(9, 25.0)})
    inside = head.losses(forward(head, torch.zeros(1, 4)), targets([NAN], [20.0], [29.0]), LossConfig())
    head.initialise({"age": np.full(9, 95.0)})
    above = head.losses(forward(head, torch.zeros(1, 4)), targets([NAN], [20.0], [29.0]), LossConfig())

    assert above[0].item() > inside[0].item() + 1.0


@pytest.mark.parametrize("name", ["coral", "corn"])
def test_an_ordinal_prediction_is_the_number_of_passed_thresholds(name: str) -> None:
    logits = torch.full((1, NUM_THRESHOLDS), -20.0)
    logits[0, :42] = 20.0

    assert head_of(name).read_out(logits).tolist() == [42.0]
    distribution = head_of(name).distribution(logits)
    assert distribution is not None
    assert int(distribution.argmax()) == 42


def test_a_group_is_predicted_by_its_mean_training_age() -> None:
    head = head_of("groups")
    head.initialise({"age": np.asarray([22.0, 24.0, 90.0, NAN])})
    logits = torch.eye(9)[[2, 8, 0]]

    assert head.read_out(logits).tolist() == [23.0, 90.0, 5.0]


def test_groups_learn_their_frequency_from_ranges_and_an_open_group_is_not_its_middle() -> None:
    head = head_of("groups")
    nothing = np.full(4, NAN)
    head.initialise(
        {"age": nothing, "age_low": np.array([81.0, 85, 21, 25]), "age_high": np.array([116.0, 90, 30, 32])}
    )

    counts = torch.tensor([1.0, 1, 2, 1, 1, 1, 1, 1, 3])  # and one more each; the last range spans two groups
    torch.testing.assert_close(head.layer.bias.detach(), (counts / counts.sum()).log())
    assert head.read_out(torch.eye(9)[[2, 8]]).tolist() == [25.5, 91.0]


@pytest.mark.parametrize("name", ["groups", "hard routing of groups", "soft routing of groups"])
def test_a_mean_of_groups_is_one_of_them(name: str) -> None:
    """A crop says 21 to 30 with 60 %, its mirror image 41 to 50 with 90 %, and neither 31 to 40."""
    single = HEADS["age"]["groups"](4, "age", UTKFACE)
    views = [torch.full((1, 9), 1e-6).log() for _ in range(2)]
    views[0][0, [2, 4]] = torch.tensor([0.6, 0.4]).log()
    views[1][0, [2, 4]] = torch.tensor([0.1, 0.9]).log()
    half = torch.full((2, 1), 0.5)
    if name == "groups":
        years = single.mixed(views, half)
    else:
        head = RoutedAge(lambda: HEADS["age"]["groups"](4, "age", UTKFACE), is_hard=name.startswith("hard"))
        shares = torch.tensor([[0.5, 0.5]])
        routed = RoutedOutputs(tuple(views), shares)
        assert head.read_out(routed).tolist() == [45.5]
        years = head.mixed([routed, routed], half)
    assert years.tolist() == [45.5]


def test_a_range_within_a_group_counts_and_one_over_several_does_not() -> None:
    truth = targets([NAN, NAN, 25.0], [21.0, 25.0, NAN], [30.0, 32.0, NAN])

    assert head_of("groups").labelled(truth).tolist() == [True, False, True]


def test_soft_routing_weights_both_heads_by_the_predicted_gender() -> None:
    head = head_of("soft routing")
    features = torch.randn(3, 4)
    p = torch.tensor([0.0, 0.25, 1.0])
    outputs = head(features, p)
    first, second = (each.read_out(each(features)) for each in head.heads)  # type: ignore[attr-defined]

    expected = (1 - p) * first + p * second
    assert torch.allclose(head.read_out(outputs), expected)
    one, two = (each.losses(each(features), targets([30.0, 40.0, 50.0]), LossConfig()) for each in head.heads)  # type: ignore[attr-defined]
    assert torch.allclose(head.losses(outputs, targets([30.0, 40.0, 50.0]), LossConfig()), (1 - p) * one + p * two)


def test_hard_routing_takes_the_head_of_the_more_probable_gender() -> None:
    head = head_of("hard routing")
    features = torch.randn(2, 4)
    first, second = (each.read_out(each(features)) for each in head.heads)  # type: ignore[attr-defined]

    years = head.read_out(head(features, torch.tensor([0.49, 0.51])))
    assert torch.equal(years, torch.stack([first[0], second[1]]))


def test_no_gradient_of_the_age_reaches_the_predicted_gender() -> None:
    p = torch.tensor([0.3, 0.6], requires_grad=True)
    head = head_of("soft routing")
    head.losses(head(torch.randn(2, 4), p), targets([30.0, 40.0]), LossConfig()).sum().backward()

    assert p.grad is None


@pytest.mark.parametrize("name", ALL)
def test_gradients_agree_with_numerical_ones(name: str) -> None:
    head = head_of(name).double()
    features = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    truth = {
        key: values.double()
        for key, values in targets([30.2, 41.0, NAN, NAN], [NAN, NAN, 3, NAN], [NAN, NAN, 9, NAN]).items()
    }

    assert torch.autograd.gradcheck(lambda x: head.losses(forward(head, x), truth, LossConfig()), (features,))


@pytest.mark.parametrize("name", ALL)
def test_a_row_without_a_label_adds_nothing_whatever_its_outputs(name: str) -> None:
    head = head_of(name)
    features = torch.randn(2, 4)
    features[1] = NAN
    leaves: list[Tensor] = []
    outputs = as_leaves(forward(head, features), leaves)
    losses = head.losses(outputs, targets([30.0, NAN]), LossConfig())
    losses.sum().backward()

    assert losses[1] == 0.0
    assert losses[0] > 0.0
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert gradients
    assert all(not gradient[1].any() for gradient in gradients)


@pytest.mark.parametrize("name", ALL)
def test_initial_predictions_are_typical(name: str) -> None:
    head = head_of(name, num_features=512)
    head.initialise({"age": np.random.default_rng(0).normal(35, 12, 500).clip(0, 116)})

    years = head.read_out(forward(head, torch.zeros(2, 512)))
    assert all(20.0 <= year <= 50.0 for year in years.tolist())


@pytest.mark.parametrize("name", WITH_DISTRIBUTION)
@pytest.mark.parametrize("mean_years", [30.0, 50.0, 65.0, 80.0])
def test_the_initial_distribution_is_that_of_the_training_ages(name: str, mean_years: float) -> None:
    head = head_of(name, num_features=512)
    head.initialise({"age": np.asarray([mean_years - 8.0, mean_years + 8.0])})

    probabilities = head.distribution(forward(head, torch.zeros(1, 512)))
    assert probabilities is not None
    p, years = probabilities[0].detach().double().numpy(), np.arange(NUM_YEARS)
    mean = p @ years
    assert mean == pytest.approx(mean_years, abs=0.3)
    assert math.sqrt(p @ (years - mean) ** 2) == pytest.approx(8.0, abs=0.3)


@pytest.mark.parametrize("name", WITH_DISTRIBUTION)
def test_a_distribution_sums_to_one(name: str) -> None:
    head = head_of(name)
    probabilities = head.distribution(head(torch.randn(5, 4)))

    assert probabilities is not None
    assert probabilities.shape == (5, NUM_YEARS)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(5), atol=1e-5)
    assert probabilities.min() >= 0.0


def test_heads_without_a_distribution_say_so() -> None:
    assert [name for name in HEADS["age"].names if name not in WITH_DISTRIBUTION] == ["linear", "groups"]
    assert head_of("linear").distribution(torch.zeros(3)) is None
    assert head_of("linear").spread([torch.zeros(3)], torch.ones(1, 1)) is None


def test_the_spread_is_the_standard_deviation_of_the_averaged_distribution() -> None:
    head = head_of("distribution")
    logits = torch.full((2, 3, NUM_YEARS), -1e3)
    for view, face, year in ((0, 0, 20), (1, 0, 30), (0, 1, 50), (1, 1, 50), (0, 2, 0), (1, 2, 116)):
        logits[view, face, year] = 0.0
    outputs = [AgeDistribution(each, each.softmax(dim=1) @ torch.arange(float(NUM_YEARS))) for each in logits]

    assert head.spread(outputs[:1], torch.ones(1, 1)).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-3)
    assert head.spread(outputs, torch.full((2, 1), 0.5)).tolist() == pytest.approx([5.0, 0.0, 58.0], abs=1e-3)
    assert head.spread(outputs, torch.tensor([[0.9] * 3, [0.1] * 3])).tolist() == pytest.approx([3.0, 0.0, 34.8], 1e-4)


@pytest.mark.parametrize("name", WITH_DISTRIBUTION)
def test_every_distribution_has_a_spread(name: str) -> None:
    head = head_of(name)
    outputs = head(torch.randn(5, 4))
    probabilities = head.distribution(outputs)
    assert probabilities is not None
    p = probabilities.detach().double().numpy()
    years = np.arange(NUM_YEARS)
    expected = np.sqrt(p @ years**2 - (p @ years) ** 2)

    assert head.spread([outputs], torch.ones(1, 1)).tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-2)


def test_the_domain_head_reverses_its_gradient() -> None:
    torch.manual_seed(0)
    head: Head = HEADS["domain"]["reversal"](4, "domain", UTKFACE)
    features = torch.randn(6, 4, requires_grad=True)
    truth = {"set_index": torch.tensor([0, 1, 2, 0, -1, 1])}
    losses = head.losses(head(features), truth, LossConfig())
    losses.sum().backward()
    assert features.grad is not None
    step = features.detach() - 0.5 * features.grad

    assert losses[4] == 0.0
    assert head.losses(head(step), truth, LossConfig()).sum() > losses.sum()
    assert float(head.score(torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0, -1.0]), truth).total) == 3.0


def test_the_factor_of_the_reversal_scales_only_the_gradient_of_the_features() -> None:
    """Ganin and Lempitsky, equation 4."""
    truth = {"set_index": torch.tensor([0, 1, 1, 0])}
    features = torch.randn(4, 4, requires_grad=True)
    config = LossConfig(domain_weight=0.25)
    torch.manual_seed(0)
    head: Head = HEADS["domain"]["reversal"](4, "domain", UTKFACE)
    head.configure(config)
    assert head.weight(config, "domain") == 1.0
    loss, _ = multi_task_loss({"domain": head}, {"domain": head(features)}, truth, config, torch.tensor([4.0]))
    loss.backward()
    reversed_gradient, own = features.grad, [parameter.grad for parameter in head.parameters()]

    features.grad = None
    head.zero_grad()
    logits = head.layers(features).squeeze(1)  # type: ignore[operator]
    torch.nn.functional.binary_cross_entropy_with_logits(logits, truth["set_index"].float()).backward()
    assert features.grad is not None
    torch.testing.assert_close(reversed_gradient, -0.25 * features.grad)
    for gradient, parameter in zip(own, head.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
