"""The shift alarm compares scored faces with the labelled faces that the model was calibrated on.

A `Reference` holds, for each quantity, how many calibration faces lie in each of about ten bins of equal size. Scoring
counts its own faces in the same bins. The counts of files add up, so they need no memory and no second pass.

**Statistic**: the population stability index, the sum over the bins of (q - p) ln(q / p), where p and q are the shares
of the calibration faces and of the scored faces. Half a face in each bin smooths both. It is 0 for equal shares; the
usual rule of thumb calls 0.1 a moderate and 0.25 a large shift.

**Threshold**: two samples of n and m faces of the same population have an index of about (1/n + 1/m) times a
chi-squared variable with (bins - 1) degrees of freedom. A quantity is shifted if the index is above the
1 - `FALSE_ALARM` quantile of this distribution and above `MIN_SHIFT`. So few faces need a large difference, and with
many faces a difference that does not matter stays silent.

Faces of one burst of photographs are not independent, which the threshold does not know: a bucket that shows few people
has a mix of ages of its own, and the alarm says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Final, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import chdtri

from agr_ray.evaluation.terms import FloatArray
from agr_ray.labels import IntArray

Verdict = Literal["similar", "photographs_differ", "predictions_differ", "not_compared"]
QuantityVerdict = Literal["similar", "shifted", "not_compared"]
Values = Mapping[str, FloatArray]
"""Quantity -> (n,) value of each face; NaN: the face has none."""

NUM_BINS: Final = 10
MIN_FACES: Final = 100
"""Fewer faces, on either side, are not compared."""
MIN_SHIFT: Final = 0.1
"""Population stability index up to which a shift is accepted."""
TOO_FEW: Final = (
    f"fewer than {MIN_FACES} faces: it is not known whether these photographs are like those that the model was "
    "calibrated on"
)
FALSE_ALARM: Final = 1e-4
"""Probability of a false alarm for one quantity with few faces; with many, `MIN_SHIFT` makes it far smaller."""
MAX_CHIP_SPREAD: Final = 2.0
"""If the sides of 90 % of the calibration faces are within this factor, they are chips: cut to one size around a face.
In photographs, faces differ in size by more."""


@dataclass(frozen=True)
class Quantity:
    """One property of faces."""

    name: str
    words: str
    """For sentences: `{words} below 35: 55 % of the faces`."""
    resolution: float
    """Values are rounded to this before they are compared. Edges of bins lie between rounded values, so that many equal
    values, such as probabilities of 1, never fall on both sides of an edge."""
    is_predicted: bool = False
    needs_photographs: bool = False
    """Whether chips say nothing about it: they are cut to one size around one face."""


QUANTITIES: Final = (
    Quantity("detector_score", "detector score", 1e-4, needs_photographs=True),
    Quantity("face_px", "face size in pixels", 1.0, needs_photographs=True),
    Quantity("sharpness", "sharpness", 1e-2),
    Quantity("yaw", "yaw in degrees", 0.1),
    Quantity("pitch", "pitch in degrees", 0.1),
    Quantity("age", "predicted age", 0.1, is_predicted=True),
    Quantity("p_male", "probability of male", 1e-2, is_predicted=True),
    Quantity("race", "predicted race", 1.0, is_predicted=True),
)
"""All quantities. Roll is not among them: alignment removes it, so the network never sees it."""


def quality_values(faces: pa.Table) -> dict[str, FloatArray]:
    """Return the quantities that are not predicted, from the columns box, detector_score, sharpness, yaw and pitch.

    `face_px` is the shorter side of the box. A null becomes NaN.
    """
    boxes = faces["box"].combine_chunks()
    sides = np.full((len(boxes), 4), np.nan)
    sides[np.asarray(boxes.is_valid())] = np.asarray(boxes.flatten(), np.float64).reshape(-1, 4)
    columns = {
        name: np.asarray(faces[name].cast(pa.float64()), np.float64)
        for name in ("detector_score", "sharpness", "yaw", "pitch")
    }
    return columns | {"face_px": np.minimum(sides[:, 2] - sides[:, 0], sides[:, 3] - sides[:, 1])}


@dataclass(frozen=True)
class Histogram:
    """The calibration faces in the bins of one quantity."""

    edges: tuple[float, ...]
    """Ascending, between the bins: a value equal to an edge lies above it."""
    counts: tuple[int, ...]
    """Faces in each bin: one more than edges."""

    @classmethod
    def fit(cls, quantity: Quantity, values: FloatArray, num_classes: int) -> Self:
        """Count values; NaNs are left out. The bins hold about equally many, but equal values share one.

        Args:
            quantity: what the values are.
            values: (n,).
            num_classes: number of classes if the values are indices of classes, which then are the bins; else 0.
        """
        known = _rounded(values[np.isfinite(values)], quantity)
        if num_classes:
            edges = np.arange(1, num_classes, dtype=np.float64) - 0.5
        elif len(known):
            inner = np.quantile(known, np.arange(1, NUM_BINS) / NUM_BINS, method="inverted_cdf")
            edges = np.unique(inner[inner < known.max()]) + quantity.resolution / 2
        else:
            edges = np.zeros(0)
        counts = _counts(edges, known)
        return cls(tuple(edges.round(6).tolist()), tuple(counts.tolist()))

    @property
    def num_faces(self) -> int:
        """Return the number of calibration faces that have a value."""
        return sum(self.counts)


@dataclass(frozen=True)
class Reference:
    """What the calibration faces are like."""

    histograms: Mapping[str, Histogram]
    """By quantity; one that no calibration face has is absent."""
    races: tuple[str, ...]
    """Names of the bins of `race`."""
    are_chips: bool
    """Whether the calibration images are chips, see `MAX_CHIP_SPREAD`."""

    @classmethod
    def fit(cls, values: Values, races: Sequence[str]) -> Self:
        """Count the calibration faces.

        Args:
            values: of the calibration images in which a face was detected; `race` holds indices into `races`.
            races: classes of the label space.
        """
        present = [quantity for quantity in QUANTITIES if np.isfinite(values.get(quantity.name, np.zeros(0))).any()]
        sides = values.get("face_px", np.zeros(0))
        sides = sides[np.isfinite(sides)]
        low, high = np.quantile(sides, [0.05, 0.95]) if len(sides) else (1.0, 1.0)
        return cls(
            {each.name: Histogram.fit(each, values[each.name], _num_classes(each, races)) for each in present},
            tuple(races),
            bool(high <= MAX_CHIP_SPREAD * low),
        )

    def count(self, values: Values) -> dict[str, IntArray]:
        """Return the number of scored faces in each bin, by quantity of `histograms`. Counts of several files add up.

        Args:
            values: as for `fit`; a quantity that is missing counts as NaN.
        """
        counts = {}
        for quantity in QUANTITIES:
            if quantity.name in self.histograms:
                found = values.get(quantity.name, np.zeros(0))
                edges = np.asarray(self.histograms[quantity.name].edges)
                counts[quantity.name] = _counts(edges, _rounded(found[np.isfinite(found)], quantity))
        return counts

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json`'s result.

        Raises:
            KeyError, TypeError, ValueError: a part is missing or has another shape.
        """
        histograms = {
            name: Histogram(tuple(map(float, each["edges"])), tuple(map(int, each["counts"])))
            for name, each in values["histograms"].items()
        }
        for name, each in histograms.items():
            if len(each.counts) != len(each.edges) + 1:
                raise ValueError(f"reference: {name} has {len(each.edges)} edges and {len(each.counts)} counts")
        return cls(histograms, tuple(values["races"]), bool(values["are_chips"]))


@dataclass(frozen=True)
class QuantityShift:
    """The comparison of one quantity."""

    quantity: str
    verdict: QuantityVerdict
    sentence: str
    """Where the shares differ most; why it was not compared, if so."""
    statistic: float | None = None
    """Population stability index; None, like the others, if the quantity was not compared."""
    threshold: float | None = None
    """Index above which it is shifted."""
    num_faces: int | None = None
    """Scored faces that have a value."""
    num_reference: int | None = None
    """Calibration faces that have a value."""
    bins: tuple[str, ...] = ()
    """What lies in each bin, such as `35.2 to 41.7`, or the names of classes."""
    shares: tuple[float, ...] = ()
    """Of the scored faces, by bin."""
    reference_shares: tuple[float, ...] = ()
    """Of the calibration faces, by bin."""


@dataclass(frozen=True)
class Shift:
    """The comparison of a run with its calibration."""

    verdict: Verdict
    sentence: str
    quantities: tuple[QuantityShift, ...]

    def to_json(self, *, hides_counts: bool = False) -> dict[str, Any]:
        """Return plain values, with the same keys in every case.

        Args:
            hides_counts: leave out everything from which a count of faces of a class could be computed: all numbers,
                and the predicted quantities.
        """
        if hides_counts and self.quantities:
            verdicts = [
                QuantityShift(each.quantity, each.verdict, each.sentence if each.verdict == "not_compared" else "")
                for each in self.quantities
                if not _QUANTITY[each.quantity].is_predicted
            ]
            return _conclusion(verdicts).to_json()
        quantities = [
            {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(each).items()}
            for each in self.quantities
        ]
        return {"verdict": self.verdict, "sentence": self.sentence, "quantities": quantities}


def not_compared_lines(quantities: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each reason why quantities were not compared, from `Shift.to_json`."""
    by_reason: dict[str, list[str]] = {}
    for each in quantities:
        if each["verdict"] == "not_compared":
            by_reason.setdefault(each["sentence"], []).append(_QUANTITY[each["quantity"]].words)
    return [f"not compared: {', '.join(names)}, because {reason}" for reason, names in by_reason.items()]


_QUANTITY: Final = {quantity.name: quantity for quantity in QUANTITIES}


def compare(reference: Reference | None, counts: Mapping[str, IntArray], because: str = "") -> Shift:
    """Compare a run's faces with those of the calibration.

    Args:
        reference: of the calibration; None: there is none.
        counts: `Reference.count` of all faces of the run.
        because: why there is no reference.
    """
    if reference is None:
        return Shift("not_compared", f"not compared with the calibration images: {because}", ())
    if max((int(found.sum()) for found in counts.values()), default=0) < MIN_FACES:
        return Shift("not_compared", TOO_FEW, ())
    return _conclusion([_compare(quantity, reference, counts) for quantity in QUANTITIES])


def _compare(quantity: Quantity, reference: Reference, counts: Mapping[str, IntArray]) -> QuantityShift:
    def not_compared(why: str) -> QuantityShift:
        return QuantityShift(quantity.name, "not_compared", why)

    histogram = reference.histograms.get(quantity.name)
    if histogram is None:
        return not_compared("the calibration images have no such values")
    expected, found = np.asarray(histogram.counts), counts[quantity.name]
    num_expected, num_found = int(expected.sum()), int(found.sum())
    if quantity.needs_photographs and reference.are_chips:
        return not_compared("the calibration images are chips, cut to one size around a face")
    if num_expected < MIN_FACES:
        return not_compared(f"only {num_expected:,} calibration faces have a value; {MIN_FACES} are needed")
    if not num_found:
        return not_compared("no scored face has a value")
    if num_found < MIN_FACES:
        return not_compared(f"fewer than {MIN_FACES} scored faces have a value")
    if len(expected) == 1:
        return not_compared("all calibration faces have the same value")
    statistic = stability_index(expected, found)
    threshold = alarm_threshold(len(expected), num_expected, num_found)
    shares, reference_shares = found / num_found, expected / num_expected
    bins = reference.races if quantity.name == "race" else _bin_names(histogram.edges)
    verdict: QuantityVerdict = "shifted" if statistic > threshold else "similar"
    where, share, reference_share = _largest_difference(quantity, bins, histogram.edges, shares, reference_shares)
    return QuantityShift(
        quantity.name,
        verdict,
        f"{quantity.words} {where}: {_per_cent(share)} of the faces, {_per_cent(reference_share)} of the calibration "
        "faces",
        round(statistic, 4),
        round(threshold, 4),
        num_found,
        num_expected,
        bins,
        tuple(shares.round(6).tolist()),
        tuple(reference_shares.round(6).tolist()),
    )


def stability_index(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Return the population stability index of two arrays of counts in the same bins, smoothed."""
    p, q = ((counts + 0.5) / (counts.sum() + 0.5 * len(counts)) for counts in (expected, found))
    return float(((q - p) * np.log(q / p)).sum())


def alarm_threshold(num_bins: int, num_expected: int, num_found: int) -> float:
    """Return the index above which samples of these sizes differ by more than chance, and by more than `MIN_SHIFT`."""
    chance = (1.0 / num_expected + 1.0 / num_found) * chdtri(num_bins - 1, FALSE_ALARM)
    return float(max(MIN_SHIFT, chance))


def _conclusion(quantities: Sequence[QuantityShift]) -> Shift:
    """Sum up the verdicts in one sentence."""

    def words(verdict: QuantityVerdict, *, is_predicted: bool | None = None) -> str:
        chosen = [_QUANTITY[each.quantity] for each in quantities if each.verdict == verdict]
        return ", ".join(each.words for each in chosen if is_predicted in (None, each.is_predicted))

    verdict: Verdict
    inputs, predicted = (words("shifted", is_predicted=each) for each in (False, True))
    if inputs:
        verdict = "photographs_differ"
        sentence = (
            f"the faces differ from the calibration images in {inputs}: age intervals, probabilities, abstention and "
            "corrected shares may not hold; label a few hundred of these photographs and evaluate on them"
        )
    elif predicted:
        verdict = "predictions_differ"
        sentence = (
            f"the faces differ from the calibration images in {predicted}: either the people differ, which corrected "
            "shares account for, or the model behaves differently on these photographs, which they do not account "
            "for; the coverage of age intervals is an average over the calibration images' mix of ages"
        )
    elif words("similar"):
        verdict = "similar"
        sentence = f"the faces are similar to the calibration images in {words('similar')}"
    else:
        verdict, sentence = "not_compared", "nothing could be compared with the calibration images"
    return Shift(verdict, sentence, tuple(quantities))


def _num_classes(quantity: Quantity, races: Sequence[str]) -> int:
    return len(races) if quantity.name == "race" else 0


def _rounded(values: FloatArray, quantity: Quantity) -> FloatArray:
    return np.asarray(np.round(values / quantity.resolution) * quantity.resolution, np.float64)


def _counts(edges: FloatArray, values: FloatArray) -> IntArray:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1).astype(np.int64)


def _bin_names(edges: Sequence[float]) -> tuple[str, ...]:
    between = [f"{low:.4g} to {high:.4g}" for low, high in pairwise(edges)]
    return (f"below {edges[0]:.4g}", *between, f"above {edges[-1]:.4g}")


def _largest_difference(
    quantity: Quantity, bins: Sequence[str], edges: Sequence[float], shares: FloatArray, reference_shares: FloatArray
) -> tuple[str, float, float]:
    """Return where the shares differ most: of a class, or below or above an edge, whichever has more scored faces."""
    if quantity.name == "race":
        most = int(np.abs(shares - reference_shares).argmax())
        return bins[most], float(shares[most]), float(reference_shares[most])
    below, reference_below = shares.cumsum()[:-1], reference_shares.cumsum()[:-1]
    most = int(np.abs(below - reference_below).argmax())
    share, reference_share = float(below[most]), float(reference_below[most])
    if share < reference_share:
        return f"above {edges[most]:.4g}", 1.0 - share, 1.0 - reference_share
    return f"below {edges[most]:.4g}", share, reference_share


def _per_cent(share: float) -> str:
    return f"{100 * share:.0f} %"
