"""Settings of the label space."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from agr_ray.config.section import Section

if TYPE_CHECKING:
    from agr_ray.labels import LabelSpace


class LabelsConfig(Section):
    """Races and age groups. By default, those of the source or of the prepared sets."""

    space: Literal["", "utkface", "fairface", "adience", "morph2", "fgnet"] = ""
    """Built-in label space. `prepare` needs it for the source `folder` only (empty: utkface). `train` needs it for
    prepared sets of different label spaces, whose races are mapped onto it by a fixed table."""
    races: tuple[str, ...] | None = None
    """Custom races in place of those of `space`, at least two; an empty list: the data has no races."""
    age_groups: tuple[str, ...] | None = None
    """Custom age groups in place of those of `space`, ascending, such as 0-17, 18-64 and 65+."""

    @property
    def label_space(self) -> LabelSpace | None:
        """Return the configured label space; None if none is."""
        if not self.space and self.races is None and self.age_groups is None:
            return None
        from agr_ray.labels import SPACES  # here, so that importing the configuration does not import numpy

        if self.races is None and self.age_groups is None:
            return SPACES[self.space]
        base = SPACES[self.space or "utkface"]
        return replace(
            base,
            name="custom",
            races=base.races if self.races is None else self.races,
            age_groups=base.age_groups if self.age_groups is None else self.age_groups,
        )

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        _ = self.label_space  # raises ValueError if it is invalid
        return self
