"""Random folds of equal size, stratified by age, gender and race; a person's images are in one fold."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from agr_ray.data.protocols.fold import Partition, ProtocolError
from agr_ray.data.splits import deal_groups


def random_folds(images: pa.Table, num_folds: int, seed: int) -> list[Partition]:
    """Return folds named fold-0, fold-1, ...; each image is tested in one of them and trains the others.

    Args:
        images: rows of schema.MANIFEST with a group.
        num_folds: at least 2.
        seed: of the deal.

    Raises:
        ProtocolError: there are fewer groups than folds.
    """
    names = [f"fold-{number}" for number in range(num_folds)]
    fold_of = deal_groups(images, dict.fromkeys(names, 1.0 / num_folds), seed)
    if len(fold_of) < num_folds:
        raise ProtocolError(f"{num_folds} folds need as many people, and the set has {len(fold_of):,}")
    folds = np.array([fold_of[group] for group in images["group_id"].to_pylist()])
    return [Partition(name, folds != name, folds == name) for name in names]
