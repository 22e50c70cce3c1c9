"""The parts of Ray that `ray_compat` depends on are unchanged. A new Ray that changes one fails here first."""

from __future__ import annotations

import inspect
import logging
import os
import pkgutil
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data._internal.execution.streaming_executor as streaming_executor
from ray._private import worker as ray_worker
from ray.data import DataContext
from ray.train import ControllerError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal import constants, exceptions
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.tune import tune as tune_module
from ray.tune.integration.ray_train import TuneReportCallback

from agr_ray.runtime import ray_compat
from agr_ray.runtime.training import interruptible


def test_ray_has_the_tested_version() -> None:
    assert ray.__version__ == ray_compat.SEEN_WITH  # after an update: check the module's reasons, then change it


def test_the_raylet_supports_the_variable_that_disables_prestarted_workers() -> None:
    library = next(Path(ray.__file__).parent.glob("_raylet*.so"))

    assert ray_compat.NO_PRESTART.removeprefix("RAY_").encode() in library.read_bytes()


def test_machine_cpus_are_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= ray_compat.machine_cpus() <= (os.cpu_count() or 1)
    monkeypatch.setattr(ray_compat, "get_num_cpus", lambda override_docker_cpu_warning: 0.5)
    assert ray_compat.machine_cpus() == 1


@pytest.mark.parametrize(("types", "expected"), [(["node_ab"], False), (["node_ab", "worker"], True), ([], False)])
def test_a_cluster_with_configured_node_types_has_an_autoscaler(
    types: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions 1 and 2 of the autoscaler are run by tests/system/test_autoscaling.py."""
    report = {"autoscaler_report": {"active_nodes": dict.fromkeys(types, 1)}}
    monkeypatch.setattr(ray_compat, "is_autoscaler_v2", lambda fetch_from_server: False)
    monkeypatch.setattr(ray_compat, "_internal_kv_get", lambda key: ray_compat.json.dumps(report))
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "ab"}])

    assert ray_compat.has_autoscaler() is expected


def test_ray_data_calls_back_between_steps() -> None:
    assert "callback.on_execution_step(self)" in inspect.getsource(streaming_executor)
    context = DataContext.get_current().copy()
    assert context.custom_execution_callback_classes is not None

    ray_compat.pace_ray_data(context)

    assert context.custom_execution_callback_classes == [ray_compat.PacedExecution]


@pytest.mark.parametrize("name", ray_compat.DATA_LOGGERS)
def test_ray_data_logs_errors_under_these_names(name: str) -> None:
    names = [info.name for info in pkgutil.walk_packages(ray.data.__path__, "ray.data.")]
    assert name in names
    assert logging.getLogger(name).name == name


def test_ray_train_names_its_checkpoints_in_a_file() -> None:
    assert ray_compat.SNAPSHOT == "checkpoint_manager_snapshot.json"  # of a run that an earlier version began


def test_the_time_to_start_workers_is_limited_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    monkeypatch.setenv(name, "7")
    ray_compat.limit_worker_start(60.0)
    assert os.environ[name] == "7"
    monkeypatch.delenv(name)

    ray_compat.limit_worker_start(60.0)

    assert os.environ.pop(name) == "60"
    assert name in constants.ENV_VARS_TO_PROPAGATE


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (exceptions.WorkerGroupStartupTimeoutError(num_workers=2), True),
        (exceptions.WorkerGroupStartupFailedError("no"), True),
        (ValueError("no"), False),
    ],
)
def test_workers_that_could_not_start_are_reported(failure: Exception, expected: bool) -> None:
    assert ray_compat.could_not_start(ControllerError(failure)) is expected


def test_ray_train_gets_the_clusters_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENV_VARS_TO_PROPAGATE", {"A"})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: type("Context", (), {"gcs_address": "1.2.3.4:5"}))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    with ray_compat.named_cluster():
        assert constants.get_env_vars_to_propagate()["RAY_ADDRESS"] == "1.2.3.4:5"

    assert "RAY_ADDRESS" not in os.environ


class _Flags(dict[str, bool]):
    """The cluster's flags, and which flag the workers answer with."""

    def __init__(self, *answers: str) -> None:
        self._answers = answers

    def set(self, name: str) -> None:
        self[name] = True
        self.update((f"run/{answer}", True) for answer in self._answers)


@pytest.mark.parametrize("num_interrupts", [1, 2])
def test_an_interrupted_fit_lets_the_workers_save_and_aborts_the_controller(
    monkeypatch: pytest.MonkeyPatch, num_interrupts: int
) -> None:
    aborted: list[Any] = []
    flags = _Flags("saving", "saved") if num_interrupts == 1 else _Flags()
    monkeypatch.setattr(interruptible, "abort_training", aborted.append)
    monkeypatch.setattr(interruptible, "set_flag", flags.set)
    seen: list[str] = []

    def has_flag(name: str) -> bool:
        seen.append(name)
        if not flags.keys() & {"run/saving"}:
            signal.raise_signal(signal.SIGINT)  # the second one, while the driver waits
        return name in flags

    monkeypatch.setattr(interruptible, "has_flag", has_flag)
    trainer = interruptible.InterruptibleTrainer(print, stop_request=interruptible.StopRequest("run"))
    before = signal.getsignal(signal.SIGINT)

    def fit(self: Any) -> None:
        self._register_sigint_handler("controller")
        assert signal.getsignal(signal.SIGINT) is before
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TorchTrainer, "fit", fit)

    with pytest.raises(KeyboardInterrupt):
        trainer.fit()

    assert "run/stop" in flags
    assert seen == ["run/saving", "run/saved"][: 3 - num_interrupts]
    assert aborted == ["controller"]
    assert "_register_sigint_handler" in inspect.getsource(TorchTrainer._initialize_and_run_controller)


def test_a_request_to_stop_that_nobody_answers_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    flags: set[str] = set()
    monkeypatch.setattr(interruptible, "set_flag", flags.add)
    monkeypatch.setattr(interruptible, "has_flag", flags.__contains__)
    monkeypatch.setattr(interruptible, "ANSWER_TIMEOUT_S", 0.5)
    request = interruptible.StopRequest("run")
    assert not request.is_made()

    request.make()

    assert flags == {"run/stop"}
    assert request.is_made()
    request.is_met()
    assert flags == {"run/stop", "run/saving", "run/saved"}


def test_tune_ends_its_trials_after_one_interrupt_and_at_once_after_two(capfd: pytest.CaptureFixture[str]) -> None:
    assert "SIGUSR1, signal_interrupt_tune_run" in inspect.getsource(tune_module._setup_signal_catching)
    assert "TUNE_DISABLE_SIGINT_HANDLER" in inspect.getsource(tune_module._setup_signal_catching)
    ended: list[int] = []
    before = signal.getsignal(signal.SIGUSR1)
    with ray_compat.graceful_interrupts() as is_stopped:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGUSR1)  # Tune has no handler yet
        signal.signal(signal.SIGUSR1, lambda signum, _: ended.append(signum))  # as Tune does
        assert not is_stopped()
        signal.raise_signal(signal.SIGINT)
        assert is_stopped()
        assert ended == [signal.SIGUSR1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGUSR1) is before
    assert capfd.readouterr().err == "stopping the trials; press Ctrl-C again to end at once\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (ControllerCallback.after_controller_start, ["self", "train_run_context"]),
        (TuneReportCallback.after_report, ["self", "run_context", "metrics", "checkpoint"]),
        (TrainController.abort, ["self"]),
    ],
)
def test_the_signatures_of_rays_callbacks_and_controller_are_unchanged(function: Any, names: list[str]) -> None:
    # Not `inspect.signature`: Ray adds a parameter for traces to it once the class is an actor of this process.
    code = inspect.unwrap(function).__code__
    assert list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) == names


def test_ray_prints_all_forwarded_lines_with_the_replaced_function() -> None:
    for name in ("listen_error_messages", "connect"):
        assert "print_to_stdstream" in inspect.getsource(getattr(ray_worker, name))


def test_ray_init_connects_with_the_replaced_function() -> None:
    assert "\n    connect(\n" in inspect.getsource(ray_worker.init)


def test_the_raylet_reports_full_memory_and_disk_in_the_matched_words() -> None:
    raylet = (Path(ray.__file__).parent / "core/src/ray/raylet/raylet").read_bytes()
    for words in (b"killed due to memory pressure (OOM)", b"% full, available space"):
        assert words in raylet
        assert ray_compat._RESOURCE_RAN_OUT.search(words.decode())


def test_only_lines_for_the_user_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def data(pid: str, *lines: str) -> dict[str, Any]:
        return {
            "pid": pid,
            "lines": [*lines],
            "is_err": False,
            "actor_name": "RayTrainWorker",
            "ip": "",
            "localhost": "",
        }

    ray_prints = ray_worker.print_to_stdstream
    with ray_compat.quiet_console():
        print_lines = ray_worker.print_to_stdstream
        lines = [
            "agr_ray 1.12: epoch 1",
            "a word agr_ray 2.12: inside",
            "agr_ray 3.12: epoch 2",
            "agr_ray 4.12: epoch 2",
        ]
        print_lines(data("12", "noise", *lines), False)
        print_lines(data("12", *lines), False)  # by another node of the same machine
        print_lines(data("raylet", "8 PYTHON worker processes have been started", "a worker died"), False)
        assert capsys.readouterr().out.splitlines() == ["epoch 1", "epoch 2", "epoch 2"]
        died, killed = "A worker died, maybe by the OOM killer", "2 Workers killed due to memory pressure (OOM)"
        print_lines(data("raylet", died, killed), False)
        shown = capsys.readouterr().out
        assert "memory pressure" in shown
        assert "died" not in shown
    assert ray_worker.print_to_stdstream is ray_prints


def test_lines_for_the_user_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    ray_compat.print_for_user("epoch 1")
    ray_compat.print_for_user("epoch 1")

    matches = [ray_compat.FOR_USER.fullmatch(line) for line in capsys.readouterr().out.splitlines()]
    assert [match and match[2] for match in matches] == ["epoch 1", "epoch 1"]
    assert len({match and match[1] for match in matches}) == 2
