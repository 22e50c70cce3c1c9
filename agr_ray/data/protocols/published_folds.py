"""The folds that a source publishes, such as Adience's five, or that a label table numbers in its column `fold`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from agr_ray.data.protocols.fold import Partition, ProtocolError


def published_folds(images: pa.Table) -> list[Partition]:
    """Return folds named by their numbers, fold-0, fold-1, ...; images without a number are in none.

    E. Eidinger, R. Enbar, T. Hassner, "Age and Gender Estimation of Unfiltered Faces", IEEE TIFS 9(12), 2014, report
    the mean over Adience's five folds, of which each is tested by a model trained on the other four.

    Args:
        images: rows of schema.MANIFEST.

    Raises:
        ProtocolError: there are fewer than two numbers.
    """
    folds = np.array([-1 if fold is None else fold for fold in images["fold"].to_pylist()], np.int64)
    numbers = sorted({*folds.tolist()} - {-1})
    if len(numbers) < 2:
        raise ProtocolError(
            f"the set has {len(numbers)} published folds and needs two; source.kind adience has five, and a label "
            "table may have a column fold"
        )
    return [Partition(f"fold-{number}", (folds >= 0) & (folds != number), folds == number) for number in numbers]
