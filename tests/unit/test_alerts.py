"""Prometheus's own tool reads the alert rules, and each fires when it should."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

RULE = Path(__file__).parents[2] / "cluster" / "observability" / "prometheusrule.yaml"
CASES = Path(__file__).parent / "alert_cases.yaml"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, a part of Prometheus, is not installed")
def test_each_alert_fires_when_it_should(tmp_path: Path) -> None:
    rules = yaml.safe_load(RULE.read_text())["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    shutil.copy(CASES, tmp_path)

    for command in (["check", "rules", "rules.yaml"], ["test", "rules", CASES.name]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_a_case_for_each_alert() -> None:
    rules = yaml.safe_load(RULE.read_text())["spec"]["groups"][0]["rules"]
    tests = yaml.safe_load(CASES.read_text())["tests"]
    tested = [case["alertname"] for test in tests for case in test["alert_rule_test"]]
    assert list(dict.fromkeys(tested)) == [rule["alert"] for rule in rules]
