"""With `--log-format json`, everything that a command prints is one JSON object a line on stderr."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from agr_ray import progress_bar
from agr_ray.cli import COMMANDS, main, run
from agr_ray.config import ReportJob, ScoreJob, parse, wants_json
from agr_ray.console import make_console, make_table, print_counts
from agr_ray.errors import ConfigError, JobError
from agr_ray.json_log import child_stderr, json_log, name_run, print_at_once, print_result, print_to_stderr
from agr_ray.progress_bar import progress
from agr_ray.scoring.messages import print_summary

KEYS = ["time", "level", "job", "run", "message"]


def logged(stderr: str) -> list[dict[str, Any]]:
    """Return the objects of stderr, each of which must be one line of the log."""
    found = [json.loads(line) for line in stderr.splitlines()]
    assert [list(each)[: len(KEYS)] for each in found] == [KEYS] * len(found)
    return found


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    shown = capsys.readouterr()
    assert shown.out == ""
    return logged(shown.err)


def messages(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    return [(line["level"], line["message"]) for line in lines(capsys)]


def test_a_line_has_its_time_level_job_run_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    with json_log("score"):
        console = make_console()
        console.print("[bold]40 photographs[/]")
        name_run("20260301T020012.345Z-1a2b3c4d")
        console.print("warning: no calibration:\n  2 faces")

    first, second, third = lines(capsys)
    assert datetime.datetime.fromisoformat(first["time"]).utcoffset() == datetime.timedelta(0)
    assert {**first, "time": ""} == {
        "time": "",
        "level": "info",
        "job": "score",
        "run": None,
        "message": "[bold]40 photographs[/]",
    }
    assert (second["level"], second["message"]) == ("warning", "no calibration:")
    assert second["run"] == third["run"] == "20260301T020012.345Z-1a2b3c4d"
    assert (third["level"], third["message"]) == ("info", "2 faces")


def test_counts_are_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "LOG_EVERY_S", 0.0)
    totals = {"num_images": 3, "num_faces": 2, "num_flagged": 0, "num_abstained": 0, "num_unique": 1}
    with json_log("score"):
        with progress(make_console(), "scoring", 10) as update:
            update(4, "ok 4")
        print_summary(make_console(), totals | {"counts": {"ok": 2, "unreadable": 1}}, "out run=5")
        print_counts(make_console(quiet=True), "hidden", {"x": 1})

    first, second, *_ = lines(capsys)
    assert first["counts"] == {"done": 4, "total": 10}
    assert first["message"].startswith("scoring: 4 of 10, ")
    assert second["counts"] == {"ok": 2, "unreadable": 1, "faces": 2, "images": 3}


def test_without_it_counts_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_counts(make_console(), "scoring: 4 of 10", {"done": 4})
    name_run("no log")
    print_to_stderr("warning: x")

    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("scoring: 4 of 10\n", "warning: x\n")


def test_a_row_of_a_table_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    table = make_table("status", "images", "most frequent reasons")
    table.add_row("ok", "1,234", "")
    table.add_row("unreadable", "2", "1 x a\n1 x b")
    with json_log("prepare"):
        make_console().print(table)

    assert messages(capsys) == [
        ("info", "status ok, images 1,234, most frequent reasons"),
        ("info", "status unreadable, images 2, most frequent reasons 1 x a 1 x b"),
    ]


def test_secrets_are_redacted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    with json_log("score"):
        name_run("https://user:hunter3@host/run")
        make_console().print("refused: hunter2hunter2, https://user:hunter3@host/, password=hunter4")

    (line,) = lines(capsys)
    assert "hunter" not in json.dumps(line)


@pytest.mark.parametrize(("error", "status"), [(ConfigError("no such folder"), 2), (JobError("it failed"), 1)])
def test_an_error_is_the_last_line(error: Exception, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(job: ReportJob) -> None:
        make_console().print("begins")
        raise error

    with pytest.raises(SystemExit) as ended:
        run(ReportJob, fail, ["folder", "--log-format", "json"], prog="agr-ray report")

    assert ended.value.code == status
    logged = lines(capsys)
    assert [(line["job"], line["level"], line["message"]) for line in logged] == [
        ("report", "info", "begins"),
        ("report", "error", str(error)),
    ]
    make_console().print("text again")
    assert capsys.readouterr().out == "text again\n"


def test_lines_of_several_threads_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with json_log("score"):
        threads = [
            threading.Thread(target=lambda: [make_console().print("x" * 500) for _ in range(50)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert messages(capsys) == [("info", "x" * 500)] * 200


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_option_in_its_full_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help-all"])
    assert "--log_format" in capsys.readouterr().out


def test_the_environment_sets_it_and_other_values_are_rejected() -> None:
    argv = ["--checkpoint", "c", "--input", "i", "--out", "o"]
    assert parse(ScoreJob, argv, {"AGR_RAY_LOG_FORMAT": "json"}).log_format == "json"
    assert parse(ScoreJob, argv, {}).log_format == "text"
    with pytest.raises(ConfigError, match=r"^log_format: 'xml' is not allowed: .*'text' or 'json'"):
        parse(ScoreJob, [*argv, "--log-format", "xml"], {})


def test_a_json_log_is_no_terminal_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")

    with json_log("score"):
        assert not make_console().is_terminal  # else bars would print through the log into themselves


# Every command


@pytest.mark.parametrize("name", COMMANDS)
def test_mistakes_on_the_command_line_are_logged(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--log_format=json", "--unknown", "1"])

    shown = capsys.readouterr()
    (line,) = logged(shown.err)
    assert (ended.value.code, shown.out) == (2, "")
    assert (line["level"], line["job"]) == ("error", name)
    assert line["message"].startswith("--unknown: there is no such option")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_a_result(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    plain = capsys.readouterr()
    with pytest.raises(SystemExit):
        main([name, "--help", "--log-format", "json"])
    assert capsys.readouterr() == plain
    assert plain.out.endswith("\n")


def bug() -> None:
    raise ValueError("a bug")


def mistake() -> None:
    raise ConfigError("train.lr 2: must be below 1")


def sigterm() -> None:
    signal.raise_signal(signal.SIGTERM)


ENDINGS: dict[Callable[[], None], tuple[int, str]] = {
    bug: (1, r"Traceback \(most recent call last\):\n(.*\n)*ValueError: a bug"),
    mistake: (2, r"train\.lr 2: must be below 1"),
    sigterm: (143, "stopped by SIGTERM; run the same command again to resume it"),
}
"""Ways in which a command ends: its status, and its last message."""


@pytest.mark.parametrize("end", ENDINGS)
@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_a_command_prints_is_logged_however_it_ends(
    name: str, end: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    def work(job: object) -> None:
        name_run("run-7")
        make_console().print("lines\nof a console")
        print("a library's line")
        print("another's", file=sys.stderr)
        print_result("a result")
        end()

    job = COMMANDS[name].job
    words = shlex.split(job.example)[2:]

    with pytest.raises(SystemExit) as ended:
        run(job, work, [*words, "--log-format", "json"], prog=f"agr-ray {name}")

    shown = capfd.readouterr()
    lines = logged(shown.err)
    status, last = ENDINGS[end]
    assert (ended.value.code, shown.out) == (status, "a result\n")
    assert {(line["job"], line["run"]) for line in lines} == {(name, "run-7")}
    messages = [line["message"] for line in lines]
    assert messages[:4] == ["lines", "of a console", "a library's line", "another's"]
    assert messages[4:-1] == (["stopping"] if end is sigterm else [])
    assert lines[-1]["level"] == "error"
    assert re.fullmatch(last, messages[-1])


@pytest.mark.parametrize("argv", [["--log-format", "json"], ["--log_format=json"], ["--log-format=text"], []])
@pytest.mark.parametrize("environ", [{"AGR_RAY_LOG_FORMAT": "json"}, {"agr_ray_log_format": "json"}, {}])
def test_the_format_is_known_before_the_command_line_is_read(argv: list[str], environ: dict[str, str]) -> None:
    job = parse(ScoreJob, ["--checkpoint", "c", "--input", "i", "--out", "o", *argv], environ)
    assert wants_json(argv, environ) == (job.log_format == "json")


# Pieces


def test_parts_of_lines_are_put_together_and_the_last_needs_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    with json_log("score"):
        for part in ("one ", "line\ntw", "o\n", "three"):
            sys.stdout.write(part)

    assert [line["message"] for line in logged(capsys.readouterr().err)] == ["one line", "two", "three"]


def test_the_lines_of_a_child_are_logged_until_it_ends(capfd: pytest.CaptureFixture[str]) -> None:
    child = [sys.executable, "-c", "import os; os.write(2, b'error: \\xff\\nlast')"]
    with json_log("score"), child_stderr() as stderr:
        subprocess.run(child, stderr=stderr, check=True)
    with child_stderr() as inherited:
        pass

    lines = logged(capfd.readouterr().err)
    assert [(line["level"], line["message"]) for line in lines] == [("error", "\\xff"), ("info", "last")]
    assert inherited is None


def test_without_it_signals_and_results_are_plain(capfd: pytest.CaptureFixture[str]) -> None:
    print_at_once("stopping")
    print_result("a result")
    assert capfd.readouterr() == ("a result\n", "stopping\n")


def test_after_the_block_the_streams_are_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit):
        run(ReportJob, lambda _: sys.exit(3), ["folder", "--log-format", "json"], prog="agr-ray report")
    assert (sys.stdout, sys.stderr) == before
    make_console().print("text")
    assert capsys.readouterr().out == "text\n"
