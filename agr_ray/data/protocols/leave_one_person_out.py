"""Leave one person out: each person is tested by a model trained on all others. The protocol of FG-NET."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa

from agr_ray.data.manifest import CONFLICT_PREFIX
from agr_ray.data.protocols.fold import Partition, ProtocolError

MAX_PEOPLE: Final = 200
"""Each person is a training run."""
_SUBJECT: Final = "subject:"


def leave_one_person_out(images: pa.Table) -> list[Partition]:
    """Return a fold for each person, named person-0, person-1, ... in the order of the people's names.

    G. Panis, A. Lanitis, N. Tsapatsoulis, T. F. Cootes, "Overview of Research on Facial Ageing Using the FG-NET Ageing
    Database", IET Biometrics 5(2), 2016.

    Args:
        images: rows of schema.MANIFEST with a group.

    Raises:
        ProtocolError: an image has no subject, or there are fewer than three people or more than `MAX_PEOPLE`.
    """
    groups = np.array([group.removeprefix(CONFLICT_PREFIX) for group in images["group_id"].to_pylist()], object)
    nameless = [
        key for key, group in zip(images["key"].to_pylist(), groups, strict=True) if not group.startswith(_SUBJECT)
    ]
    if nameless:
        raise ProtocolError(f"{len(nameless):,} images have no subject, such as {nameless[0]}")
    people = sorted(set(groups))
    if not 3 <= len(people) <= MAX_PEOPLE:
        raise ProtocolError(
            f"the set has {len(people):,} people; allowed: 3 to {MAX_PEOPLE}, one training run for each"
        )
    return [Partition(f"person-{number}", groups != person, groups == person) for number, person in enumerate(people)]
