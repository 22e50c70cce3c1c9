"""Two halves that are balanced by race and gender, and the rest: the protocol of MORPH II, by person.

G. Guo and G. Mu, "Simultaneous Dimensionality Reduction and Human Age Estimation via Kernel Partial Least Squares
Regression", CVPR 2011: in S1 and S2 there are as many white as black faces and three times as many male as female
ones; S3 is the rest. A model trained on S1 is tested on S2 and S3, one trained on S2 on S1 and S3. B. Yip et al.,
"Preliminary Studies on a Large Face Database", 2018 (arXiv:1811.06446), keep each subject in one of the three, as here.
The published lists are not used: subjects are dealt at random.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Final

import numpy as np
import pyarrow as pa

from agr_ray.data.protocols.fold import Partition, ProtocolError
from agr_ray.data.splits import shuffled_order

HALVES: Final = ("S1", "S2")
MALES_PER_FEMALE: Final = 3
RACES: Final = ("white", "black")


def balanced_halves(images: pa.Table, seed: int) -> list[Partition]:
    """Return the folds S1 and S2, named after what they train on. The images of neither half are tested twice.

    People whose images differ in race or gender are in neither half. The balance is exact as far as whole people allow.

    Args:
        images: rows of schema.MANIFEST with a group.
        seed: of the deal.

    Raises:
        ProtocolError: there are too few white or black faces of a gender.
    """
    sizes: Counter[str] = Counter()
    kinds: dict[str, set[tuple[str | None, str | None]]] = defaultdict(set)
    for group, race, gender in zip(*(images[name].to_pylist() for name in ("group_id", "race", "gender")), strict=True):
        sizes[group] += 1
        kinds[group].add((race, gender))
    members: dict[tuple[str, str], list[str]] = {}
    for race in RACES:
        for gender in ("female", "male"):
            members[race, gender] = [group for group, found in kinds.items() if found == {(race, gender)}]
    totals = {kind: sum(sizes[group] for group in groups) for kind, groups in members.items()}
    shares = {kind: MALES_PER_FEMALE if kind[1] == "male" else 1 for kind in members}
    unit = min(totals[kind] // (len(HALVES) * shares[kind]) for kind in members)
    if not unit:
        found = ", ".join(f"{' '.join(kind)} {total:,}" for kind, total in totals.items())
        raise ProtocolError(
            f"each half needs a female face and three male faces that are white, and as many that are black; the set "
            f"has {found}"
        )
    half_of: dict[str, str] = {}
    for kind, groups in members.items():
        room = dict.fromkeys(HALVES, unit * shares[kind])
        for group in shuffled_order(groups, seed, "halves"):
            half = max(HALVES, key=lambda each: room[each])
            if sizes[group] <= room[half]:
                half_of[group] = half
                room[half] -= sizes[group]
    halves = np.array([half_of.get(group, "") for group in images["group_id"].to_pylist()])
    return [Partition(half, halves == half, halves != half) for half in HALVES]
