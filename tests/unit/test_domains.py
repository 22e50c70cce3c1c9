"""The benchmark of rendered faces: what it prepares, and that a folder holds one measurement."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import domains

from agr_ray.config import PrepareJob, SplitConfig
from agr_ray.errors import ConfigError


def test_rendered_faces_that_are_mixed_into_training_are_not_in_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: dict[str, SplitConfig] = {}

    def prepare(job: PrepareJob) -> None:
        splits[Path(job.prepare.out).name] = job.split

    monkeypatch.setattr(domains, "render", lambda _: None)
    monkeypatch.setattr(domains, "prepare", prepare)
    monkeypatch.setattr(domains, "copy_without_labels", lambda *_: None)
    monkeypatch.setattr(domains, "open_prepared", lambda *_: SimpleNamespace(splits={"train": 1}))
    domains.prepare_sets(tmp_path / "chips", tmp_path, 400)

    (mixed,) = (variant for variant in domains.VARIANTS if variant.shares)
    first, *others = mixed.sets
    assert splits[first].val > 0.0
    assert [(splits[name].val, splits[name].test, splits[name].sample) for name in others] == [(0.0, 0.0, 100)]


def test_a_folder_that_was_made_with_other_arguments_is_refused(tmp_path: Path) -> None:
    given = {"chips": tmp_path / "chips", "work": tmp_path, "sample": 400, "epochs": 3, "seeds": 1}
    domains.check_arguments(Namespace(**given))
    domains.check_arguments(Namespace(**given | {"seeds": 2}))

    with pytest.raises(ConfigError, match=r"holds measurements with arguments\.sample 400, not 500; choose another"):
        domains.check_arguments(Namespace(**given | {"sample": 500}))
