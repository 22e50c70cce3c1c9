"""False-adult and false-minor rates: what happens if the predicted age decides whether someone is old enough.

The terms follow NIST's evaluation of age verification (Hanaoka, Ngan, Yang, Quinn, Hom and Grother 2024, NIST IR 8525,
"Face Analysis Technology Evaluation: Age Estimation and Verification"). There, "Challenge 25" accepts a person as 18 or
over only if the estimated age is at least 25, and the false positive rate is the share of people below the legal age
who are accepted.

With a legal threshold L and a buffer b, someone passes if the predicted age is at least the challenge age L + b:

- false-adult rate (NIST: false positive rate): the share of people under L who pass;
- false-minor rate (a false negative): the share of people of L or over who do not pass, and would have to show
  a document.

Both depend on the ages of the people measured: a set with many infants has few false adults. So the rates among people
within five years of the threshold are given, too, and the share who pass by single year of age.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from agr_ray.evaluation.cells import Cells
from agr_ray.evaluation.estimates import Estimates, ratios
from agr_ray.evaluation.terms import FloatArray
from agr_ray.evaluation.units import Units, unit_sums
from agr_ray.labels import AGE_MAX_YEARS, IntArray, Labels
from agr_ray.models.predictions import Predictions

DEFAULT_THRESHOLDS: Final = (18, 21, 25)
DEFAULT_BUFFER_YEARS: Final = 7
NEAR_YEARS: Final = 5
"""People this close to the threshold are also measured by themselves: from L - 5 to L - 1, and from L to L + 4."""
_CURVE_YEARS: Final = 15
"""The curve has the challenge ages from L to L + 15."""
_YEARS: Final = int(AGE_MAX_YEARS) + 1
_BREAKDOWNS: Final = ("gender", "race", "gender_race")
_POPULATIONS: Final = ("minor", "adult", "near_minor", "near_adult")


class ThresholdSums:
    """Sums over rows for one legal threshold; parts may be added in any order."""

    def __init__(self, threshold_years: int, buffer_years: int, cells: Cells, num_units: int) -> None:
        self.threshold_years, self.buffer_years, self._cells = threshold_years, buffer_years, cells
        # Age groups are no part of these cells: an age threshold cuts through them.
        self._shape = cells.shape[:2]
        num_cells = self._shape[0] * self._shape[1]
        self._sums = {
            (population, challenge): np.zeros((num_units, num_cells))
            for population in _POPULATIONS
            for challenge in ("all", "legal", "buffered")
        }
        self._by_predicted = {population: np.zeros((num_units, _YEARS)) for population in ("minor", "adult")}
        self._by_true = {name: np.zeros((num_units, _YEARS)) for name in ("all", "legal", "buffered")}

    def update(self, labels: Labels, predictions: Predictions, units: Units) -> None:
        """Count n rows: those of a known age, or of a range of ages on one side of the threshold."""
        predicted = predictions["age"]
        low, high = labels.age_range
        legal = self.threshold_years
        passes = {
            "legal": predicted >= legal,
            "buffered": predicted >= legal + self.buffer_years,
        }
        of = {
            "minor": high < legal,  # of whole years, both included; NaN compares as false
            "adult": low >= legal,
            "near_minor": (high < legal) & (low >= legal - NEAR_YEARS),
            "near_adult": (low >= legal) & (high < legal + NEAR_YEARS),
        }
        cells = (labels.gender + 1) * self._shape[1] + labels.race + 1
        num_cells = self._shape[0] * self._shape[1]

        for population, chosen in of.items():
            own, own_cells = Units(units.codes[chosen], units.num, units.of), cells[chosen]
            self._sums[population, "all"] += unit_sums(own, own_cells, num_cells)
            for challenge, is_passed in passes.items():
                self._sums[population, challenge] += unit_sums(own, own_cells, num_cells, is_passed[chosen])
            if population in self._by_predicted:
                years = np.clip(predicted[chosen], 0, _YEARS - 1).astype(np.int64)
                self._by_predicted[population] += unit_sums(own, years, _YEARS)
        exact = np.isfinite(labels.age)
        own = Units(units.codes[exact], units.num, units.of)
        years = np.clip(labels.age[exact], 0, _YEARS - 1).astype(np.int64)
        self._by_true["all"] += unit_sums(own, years, _YEARS)
        for challenge, is_passed in passes.items():
            self._by_true[challenge] += unit_sums(own, years, _YEARS, is_passed[exact])

    def to_json(self) -> dict[str, Any] | None:
        """Return the rates; None if no row counts.

        Keys: `threshold_years`, `buffer_years`, `challenge_years`; `at_threshold` and `with_buffer`: see `_rates`, each
        also with `groups` by gender, race and both; `curve`: for each challenge age from L to L + 15, both rates with
        intervals; `by_age`: for each year of true age from L - 10 to L + buffer + 5 that has rows, the share who pass.
        """
        if not any(self._sums[population, "all"].any() for population in ("minor", "adult")):
            return None
        return {
            "threshold_years": self.threshold_years,
            "buffer_years": self.buffer_years,
            "challenge_years": self.threshold_years + self.buffer_years,
            "at_threshold": self._with_groups("legal"),
            "with_buffer": self._with_groups("buffered"),
            "curve": self._curve(),
            "by_age": self._by_age(),
        }

    def _with_groups(self, challenge: str) -> dict[str, Any]:
        num_cells = self._shape[0] * self._shape[1]
        (overall,) = self._rates(challenge, np.zeros(num_cells, np.int64), 1)
        groups = {}
        for breakdown in _BREAKDOWNS:
            names = [group.name for group in self._cells.groups[breakdown]]
            # The codes do not depend on the age group: take any of it.
            codes = self._cells.group_codes(breakdown).reshape(*self._shape, -1)[..., 0].ravel()
            groups[breakdown] = dict(zip(names, self._rates(challenge, codes, len(names)), strict=True))
        return overall | {"groups": groups}

    def _rates(self, challenge: str, codes: IntArray, num_groups: int) -> Iterator[dict[str, Any]]:
        """Yield for each group: n_minor, n_adult, false_adult_rate, false_minor_rate; the same of `near_` people."""
        members = (codes[:, None] == np.arange(num_groups)).astype(np.float64)
        columns: dict[str, Sequence[Any]] = {}
        for population in _POPULATIONS:
            total = self._sums[population, "all"] @ members
            rate = _rate(population, self._sums[population, challenge] @ members, total)
            near, _, who = population.rpartition("_")
            prefix = f"{near}_" if near else ""
            columns[f"n_{population}"] = [int(num) for num in total.sum(axis=0)]
            results = rate.to_json()
            name = f"{prefix}false_{'adult' if who == 'minor' else 'minor'}_rate"
            columns[name] = [value for value, _ in results]
            columns[f"{name}_interval"] = [interval for _, interval in results]
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))

    def _curve(self) -> list[dict[str, Any]]:
        ages = np.arange(self.threshold_years, min(self.threshold_years + _CURVE_YEARS, _YEARS - 1) + 1)
        columns = []
        for population, by_years in self._by_predicted.items():
            at_least = by_years[:, ::-1].cumsum(axis=1)[:, ::-1]
            total = np.broadcast_to(at_least[:, :1], (len(at_least), len(ages)))
            columns.append(_rate(population, at_least[:, ages], total).to_json())
        return [
            {
                "challenge_years": int(age),
                "false_adult_rate": adult,
                "false_adult_interval": adult_interval,
                "false_minor_rate": minor,
                "false_minor_interval": minor_interval,
            }
            for age, (adult, adult_interval), (minor, minor_interval) in zip(ages, *columns, strict=True)
        ]

    def _by_age(self) -> list[dict[str, Any]]:
        first = max(self.threshold_years - 10, 0)
        ages = np.arange(first, min(self.threshold_years + self.buffer_years + 5, _YEARS - 1) + 1)
        total = self._by_true["all"][:, ages]
        legal, buffered = (
            ratios(self._by_true[challenge][:, ages], total, "share")[0].to_json()
            for challenge in ("legal", "buffered")
        )
        return [
            {
                "age_years": int(age),
                "n": int(num),
                "passes_threshold": at_threshold,
                "passes_threshold_interval": threshold_interval,
                "passes_with_buffer": at_challenge,
                "passes_with_buffer_interval": challenge_interval,
            }
            for age, num, (at_threshold, threshold_interval), (at_challenge, challenge_interval) in zip(
                ages, total.sum(axis=0), legal, buffered, strict=True
            )
            if num
        ]


def _rate(population: str, passed: FloatArray, total: FloatArray) -> Estimates:
    """Return the false-adult rate of minors, or the false-minor rate of adults."""
    return ratios(passed if population.endswith("minor") else total - passed, total, "share")[0]
