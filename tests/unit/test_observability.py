"""The dashboard and the alerts use metrics and labels that the code defines, and the metrics follow the events."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql import Query, parse
from ray.dashboard.modules.reporter import reporter_agent
from ray.util.metrics import Counter, Gauge, Histogram

from agr_ray.learn.progress import Progress
from agr_ray.runtime import metrics
from agr_ray.runtime.metrics import COMMON_LABELS, DEFINITIONS, EXPORTED, Metrics
from agr_ray.schema import CROP_STATUSES, HISTORY, SCORED_STATUSES, Status

FOLDER = Path(__file__).parents[2] / "cluster" / "observability"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULE, MONITOR, KUSTOMIZATION = (
    yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("prometheusrule", "podmonitor", "kustomization")
)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = RULE["spec"]["groups"][0]["rules"]
OF_RAY = {
    "ray_node_mem_used": (),
    "ray_node_mem_total": (),
    "ray_node_cpu_utilization": (),
    "ray_node_gpus_utilization": ("GpuIndex",),
    "ray_node_gram_used": ("GpuIndex",),
    "ray_node_gram_available": ("GpuIndex",),
}
"""Metrics of Ray itself, with their labels besides `ip` and `RayNodeType`."""


def exported() -> dict[str, tuple[str, ...]]:
    """Return the labels of all metrics that Prometheus sees, by name."""
    names = {name: ("ip", "RayNodeType", *labels) for name, labels in OF_RAY.items()}
    for name, definition in DEFINITIONS.items():
        labels = (*COMMON_LABELS, *definition.labels)
        if definition.kind is Histogram:
            names |= {f"{EXPORTED}{name}_{part}": labels for part in ("sum", "count")}
            names[f"{EXPORTED}{name}_bucket"] = (*labels, "le")
        else:
            names[f"{EXPORTED}{name}"] = labels
    return names


def check(query: Query) -> None:
    known = exported()
    assert query.selectors
    allowed: set[str] = set()
    for name, labels, has_duration in query.selectors:
        assert name in known, name
        assert set(labels) <= set(known[name]), (name, labels)
        counts = name.endswith(("_total", "_sum", "_count", "_bucket")) and name not in OF_RAY
        assert has_duration or not counts, f"{name} is a counter: use rate or increase"
        allowed |= set(known[name])
    assert set(query.by) <= allowed, query.by


def queries(panel: dict[str, Any]) -> list[str]:
    return [
        target["expr"].replace("$__rate_interval", "1m").replace("$output", "s3://results/uploads")
        for target in panel["targets"]
    ]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_each_panel_says_what_it_shows_and_uses_defined_metrics(panel: dict[str, Any]) -> None:
    assert panel["type"] in ("timeseries", "stat")
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert re.fullmatch(r"\w+|(count|suffix):\S.*", panel["fieldConfig"]["defaults"]["unit"])  # Grafana adds a space
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [target["refId"] for target in panel["targets"]] == ["A", "B"][: len(panel["targets"])]
    for target, expression in zip(panel["targets"], queries(panel), strict=True):
        query = parse(expression)
        check(query)
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= set(query.by)


def test_the_dashboard_has_what_grafana_needs() -> None:
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= set(DASHBOARD)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert sorted(ids) == list(range(1, len(ids) + 1))
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)
    places = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in DASHBOARD["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places), "panels overlap"
    assert max(x for x, _ in places) < 24
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(DASHBOARD["panels"])))
    assert used == variables


def test_panels_are_wide_enough_for_a_window_of_800_pixels() -> None:
    assert {panel["gridPos"]["w"] for panel in DASHBOARD["panels"]} == {12, 24}


def test_the_dashboard_lists_each_output_even_if_its_images_are_not_counted() -> None:
    (output,) = (variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "output")
    match = re.fullmatch(r"label_values\(\{__name__=~\"(.*)\"\}, output\)", output["query"]["query"])
    assert match
    names = [name for name in exported() if re.fullmatch(match[1], name)]
    assert names == ["ray_agr_ray_parts", "ray_agr_ray_train_progress_timestamp_seconds"]


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = {name for panel in PANELS for query in queries(panel) for name, _, _ in parse(query).selectors}
    ours = {re.sub(r"_(sum|count|bucket)$", "", name.removeprefix(EXPORTED)) for name in shown - set(OF_RAY)}
    assert ours == set(DEFINITIONS) - {"agr_ray_train_loss_finite"}  # an alert shows that one


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_alert_uses_defined_metrics_and_says_what_to_do(rule: dict[str, Any]) -> None:
    query = parse(rule["expr"])

    check(query)
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
    assert set(rule["annotations"]) == {"summary", "description"}
    text = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= set(query.by)


def test_there_is_an_alert_for_each_thing_to_watch() -> None:
    assert [rule["alert"].removeprefix("AgrRay") for rule in RULES] == [
        *("ScoringOverdue", "TooManyRejects", "TrainingStalled", "LossNotFinite", "NodeMemory")
    ]


def test_a_night_without_new_photographs_is_not_overdue() -> None:
    assert [name for name, *_ in parse(RULES[0]["expr"]).selectors] == [
        f"{EXPORTED}agr_ray_last_finished_timestamp_seconds"
    ]


def test_the_queries_about_rejects_leave_out_what_is_not_rejected() -> None:
    matcher = f'status!~"{"|".join(SCORED_STATUSES)}"'
    (rejects,) = (panel for panel in PANELS if panel["title"] == "Share of rejected images")
    assert matcher in queries(rejects)[0]
    assert matcher in RULES[1]["expr"]


def test_only_images_that_are_not_rejected_are_grey() -> None:
    (panel,) = (panel for panel in PANELS if panel["title"] == "Images by status")
    greys = [override["matcher"]["options"].strip("/") for override in panel["fieldConfig"]["overrides"]]
    names = [f"{command} {status}" for command in ("score", "prepare") for status in Status]
    accepted = [f"score {status}" for status in SCORED_STATUSES] + [f"prepare {status}" for status in CROP_STATUSES]
    assert sorted(name for name in names if any(re.search(grey, name) for grey in greys)) == sorted(accepted)


def test_the_manifests_name_each_other() -> None:
    assert (RULE["kind"], MONITOR["kind"]) == ("PrometheusRule", "PodMonitor")
    assert {RULE["apiVersion"], MONITOR["apiVersion"]} == {"monitoring.coreos.com/v1"}
    assert MONITOR["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"
    (generated,) = KUSTOMIZATION["configMapGenerator"]
    for name in (*KUSTOMIZATION["resources"], *generated["files"]):
        assert (FOLDER / name).is_file()


def test_ray_has_its_metrics_of_nodes() -> None:
    defined = {f"{EXPORTED}{name}" for name in reporter_agent.METRICS_GAUGES}
    assert set(OF_RAY) <= defined


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "sum by (output ray_agr_ray_parts",
        "rate(ray_agr_ray_images_total)",
        "ray_agr_ray_parts{state=waiting}",
        'ray_agr_ray_parts{state=~"("}',
        "sum(ray_agr_ray_parts) >",
        "summ(ray_agr_ray_parts)",
        "histogram_quantile(ray_agr_ray_parts)",
        "ray_agr_ray_parts)",
        "ray_agr_ray_parts[5 minutes]",
    ],
)
def test_malformed_queries_are_rejected(expression: str) -> None:
    with pytest.raises((ValueError, re.error)):
        parse(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "max(ray_agr_ray_partz)",
        'max(ray_agr_ray_parts{stat="waiting"})',
        "sum by (outputs) (ray_agr_ray_parts)",
        "ray_agr_ray_images_total",
        "ray_agr_ray_parts_total",
    ],
)
def test_queries_with_other_names_are_found(expression: str) -> None:
    with pytest.raises(AssertionError):
        check(parse(expression))


def test_names_follow_the_conventions_of_prometheus() -> None:
    for name, definition in DEFINITIONS.items():
        assert re.fullmatch(r"agr_ray(_[a-z]+)+", name), name
        assert name.endswith("_total") == (definition.kind is Counter)
        assert not re.search(r"_(ms|s|mib|percent|pct)$", name)
        assert definition.description
        assert not {"job", "instance"} & set(definition.labels), "Prometheus' own labels"


# Events


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """Record values in place of Ray's metrics; check their labels."""
    values: list[tuple[str, float, dict[str, str]]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def inc(self, value: float, labels: dict[str, str]) -> None:
            assert DEFINITIONS[self.name].kind is Counter
            assert value > 0
            self.add(value, labels)

        def set(self, value: float, labels: dict[str, str]) -> None:
            assert DEFINITIONS[self.name].kind is Gauge
            self.add(value, labels)

        def observe(self, value: float, labels: dict[str, str]) -> None:
            assert DEFINITIONS[self.name].kind is Histogram
            self.add(value, labels)

        def add(self, value: float, labels: dict[str, str]) -> None:
            assert sorted(labels) == sorted((*COMMON_LABELS, *DEFINITIONS[self.name].labels))
            values.append((self.name.removeprefix("agr_ray_"), value, labels))

    monkeypatch.setattr(metrics, "_metric", Recorder)
    return values


def plain(values: list[tuple[str, float, dict[str, str]]]) -> list[tuple[Any, ...]]:
    """Return each value with its own labels."""
    return [
        (name, value, *(text for key, text in labels.items() if key not in COMMON_LABELS))
        for name, value, labels in values
    ]


SUMMARY = {"statuses": {"ok": 3, "unreadable": 1}, "num_faces": 5, "worker_s": {"decode": 0.4, "detect": 2.0}}


def test_a_scored_part_counts_its_images_faces_and_stages(recorded: Any) -> None:
    Metrics("score", "s3://results/uploads").scored(SUMMARY, hides_totals=False)

    assert plain(recorded) == [
        ("image_stage_seconds", 0.1, "decode"),
        ("image_stage_seconds", 0.5, "detect"),
        ("images_total", 3, "ok"),
        ("images_total", 1, "unreadable"),
        ("faces_total", 5),
    ]
    assert recorded[0][2] == {"command": "score", "output": "s3://results/uploads", "stage": "decode"}


def test_totals_that_score_min_cell_withholds_are_not_counted(recorded: Any) -> None:
    Metrics("score", "out").scored(SUMMARY, hides_totals=True)

    assert [name for name, *_ in plain(recorded)] == ["image_stage_seconds", "image_stage_seconds"]


def test_parts_are_in_flight_or_waiting(recorded: Any) -> None:
    job = Metrics("score", "out")
    for number in (5, 1, 0):
        job.parts_left(number, 2)

    assert [value for _, value, _ in recorded] == [2, 3, 1, 0, 0, 0]
    assert [state for *_, state in plain(recorded)] == ["in_flight", "waiting"] * 3


def test_secrets_of_the_output_are_redacted(recorded: Any) -> None:
    Metrics("score", "https://user:hunter2hunter2@host/x").parts_left(1, 1)

    assert "hunter2" not in str(recorded)


def test_a_job_that_is_done_has_its_time_and_that_of_the_last_publication(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "time", lambda: 1772409600.0)
    Metrics("score", "out").finished({"published_at": "2026-03-01T00:00:00.500+00:00"})

    assert plain(recorded) == [
        ("last_finished_timestamp_seconds", 1772409600.0),
        ("last_published_timestamp_seconds", 1772323200.5),
    ]


def test_training_shows_its_progress_and_validation(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "time", lambda: 7.0)
    job = Metrics("train", "run")
    job.training(
        Progress(
            epoch=2,
            num_epochs=3,
            num_samples=10,
            num_samples_total=20,
            loss=float("inf"),  # Ray passes on finite values only
            running={},
            samples_per_s=5.0,
            data_wait_share=0.25,
            num_later_samples=0.0,
            steady_samples_per_s=None,
        )
    )
    row = dict.fromkeys(HISTORY.names) | {"val_loss": 1.5, "val_objective": 0.5, "val_gender_accuracy": 0.75}
    job.epoch(row)
    job.not_finite()

    assert plain(recorded) == [
        ("train_epoch", 2),
        ("train_loss_finite", 1.0),
        ("train_samples_per_second", 5.0),
        ("train_data_wait_ratio", 0.25),
        ("train_progress_timestamp_seconds", 7.0),
        ("validation_loss", 1.5),
        ("validation_objective_ratio", 0.5),
        ("validation_gender_accuracy_ratio", 0.75),
        ("train_progress_timestamp_seconds", 7.0),
        ("train_loss_finite", 0.0),
    ]


def test_gauges_are_set_again_until_the_job_ends(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "REFRESH_S", 0.01)
    monkeypatch.setattr(metrics.ray, "is_initialized", lambda: True)
    job = Metrics("score", "out")
    with job.kept():
        job.parts_left(3, 1)
        while len(recorded) < 6:
            pass
    number = len(recorded)

    assert [(value, *more) for _, value, *more in plain(recorded)[:4]] == [(1, "in_flight"), (2, "waiting")] * 2
    assert len(recorded) == number
