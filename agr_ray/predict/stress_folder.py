"""The predictions of a stress test in storage, so that a killed one resumes.

FOLDER/
  plan.json                      what the other files were predicted from
  CORRUPTION-SEVERITY.parquet    schema.STRESS_PREDICTIONS, written when the condition is complete
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from agr_ray.evaluation.robustness import Condition
from agr_ray.storage import MissingObject, Storage

PLAN: Final = "plan.json"


@dataclass(frozen=True)
class StressFolder:
    """The folder of one stress test. Its lock holder is its only writer."""

    storage: Storage
    uri: str

    def begin(self, plan: Mapping[str, Any]) -> bool:
        """Start or resume a stress test; return whether files of another one were deleted.

        Args:
            plan: plain values that name everything on which the predictions depend.
        """
        uri = self.storage.join(self.uri, PLAN)
        try:
            if json.loads(self.storage.read(uri)) == plan:
                return False
            is_stale = True
        except MissingObject:
            is_stale = self.storage.exists(self.uri)
        if is_stale:
            self.storage.delete_tree(self.uri)
        self.storage.write(uri, json.dumps(plan, indent=2).encode())
        return is_stale

    def complete(self, conditions: Sequence[Condition]) -> list[Condition]:
        """Return those of the conditions that are complete."""
        names = {info.key for info in self.storage.list(self.uri, (".parquet",))}
        return [condition for condition in conditions if _file_name(condition) in names]

    def write(self, condition: Condition, tables: Sequence[pa.Table]) -> None:
        """Write the predictions of a condition, sorted by image_id."""
        table = pa.concat_tables(tables).sort_by("image_id")
        self.storage.write_table(table, self.storage.join(self.uri, _file_name(condition)))

    def read(self, condition: Condition) -> pa.Table:
        """Return the predictions of a complete condition."""
        return self.storage.read_table(self.storage.join(self.uri, _file_name(condition)))


def _file_name(condition: Condition) -> str:
    return f"{condition.corruption}-{condition.severity}.parquet"
