"""The pod of the nightly CronJob, against a real HTTPS server that speaks Kubernetes' API for RayJobs."""

from __future__ import annotations

import importlib.util
import json
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "cluster"))
from servers import self_signed_certificate

SCRIPT = Path(__file__).parents[2] / "cluster" / "kuberay" / "base" / "nightly.py"
TEMPLATE = {"metadata": {"labels": {"agr-ray": "nightly"}}, "spec": {"jobTemplate": {"entrypoint": "agr-ray score"}}}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nightly", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


main = load().main


class Kubernetes(ThreadingHTTPServer):
    """An API server with one namespace, one template, and RayJobs that go through the given states."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = "first"
        self.rayjobs: dict[str, dict[str, Any]] = {}
        self.states: list[Any] = []
        """What each GET of a RayJob answers: a status, an HTTP code, or a function that returns one. The last one is
        repeated."""
        self.requests: list[str] = []
        self.is_cut = False
        """Whether a POST gets no answer."""
        certificate, key = self_signed_certificate("kubernetes", "127.0.0.1")
        self.account = folder / "account"
        self.account.mkdir()
        (self.account / "ca.crt").write_text(certificate)
        (self.account / "namespace").write_text("agr-ray")
        (self.account / "token").write_text(self.token)
        (folder / "key.pem").write_text(key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.account / "ca.crt", folder / "key.pem")
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def run(self, name: str = "score-nightly-1", template: str = "score-nightly") -> int:
        """Run the script against the server and return its exit status."""
        environ = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self.server_address[1]),
            "JOB_NAME": name,
            "JOB_UID": "uid-1",
        }
        status: int = main(template, environ, self.account, poll_s=0.01)
        return status


class Handler(BaseHTTPRequestHandler):
    server: Kubernetes

    def do_GET(self) -> None:
        kind, _, name = self._path().partition("/")
        if kind == "raycronjobs":
            self._answer(*((200, TEMPLATE) if name == "score-nightly" else (404, {"message": f"{name} not found"})))
        elif name not in self.server.rayjobs:
            self._answer(404, {"message": f"{name} not found"})
        else:
            states = self.server.states
            state = states.pop(0) if len(states) > 1 else states[0]
            state = state() if callable(state) else state
            if isinstance(state, int):
                self._answer(state, {})
            else:
                self._answer(200, self.server.rayjobs[name] | {"status": state})

    def do_POST(self) -> None:
        if self.server.is_cut:
            self.close_connection = True  # no answer
            return
        rayjob = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = rayjob["metadata"]["name"]
        if self._path() != "rayjobs" or name in self.server.rayjobs:
            self._answer(409, {})
        else:
            self.server.rayjobs[name] = rayjob
            self._answer(201, rayjob)

    def _path(self) -> str:
        path = self.path.removeprefix("/apis/ray.io/v1/namespaces/agr-ray/")
        self.server.requests.append(f"{self.command} {path}")
        return path

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        if self.headers["Authorization"] != f"Bearer {self.server.token}":
            code, body = 401, {"message": "Unauthorized"}
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def state(deployment: str, job: str = "", message: str = "") -> dict[str, str]:
    return {"jobDeploymentStatus": deployment, "jobStatus": job, "message": message}


RUNNING, DONE = state("Running", "RUNNING"), state("Complete", "SUCCEEDED")


@pytest.fixture
def kubernetes(tmp_path: Path) -> Iterator[Kubernetes]:
    server = Kubernetes(tmp_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_rayjob_is_created_from_the_template_and_waited_for(
    kubernetes: Kubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes.states = [{}, state("Initializing"), RUNNING, RUNNING, DONE]

    assert kubernetes.run() == 0
    assert kubernetes.rayjobs == {
        "score-nightly-1-ray": {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {
                "name": "score-nightly-1-ray",  # KubeRay makes a Job of this name
                "labels": {"agr-ray": "nightly"},
                "ownerReferences": [
                    {"apiVersion": "batch/v1", "kind": "Job", "name": "score-nightly-1", "uid": "uid-1"}
                ],
            },
            "spec": {"entrypoint": "agr-ray score"},
        }
    }
    assert kubernetes.requests == [
        "GET raycronjobs/score-nightly",
        "POST rayjobs",
        *["GET rayjobs/score-nightly-1-ray"] * 5,
    ]
    assert capsys.readouterr().out.splitlines() == [
        "created RayJob score-nightly-1-ray",
        "RayJob score-nightly-1-ray: New, job not submitted yet",
        "RayJob score-nightly-1-ray: Initializing, job not submitted yet",
        "RayJob score-nightly-1-ray: Running, job RUNNING",
        "RayJob score-nightly-1-ray: Complete, job SUCCEEDED",
    ]


@pytest.mark.parametrize(
    "end",
    [state("Failed", "FAILED", "no space"), state("ValidationFailed", "", "no space"), state("Complete", "STOPPED")],
)
def test_the_pod_fails_with_the_rayjob(
    kubernetes: Kubernetes, end: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes.states = [RUNNING, state("Retrying", "FAILED"), RUNNING, end]

    assert kubernetes.run() == 1
    assert f"error: RayJob score-nightly-1-ray failed:  {end['message']}" in capsys.readouterr().err


def test_a_second_pod_of_the_same_job_waits_for_the_same_rayjob(kubernetes: Kubernetes) -> None:
    kubernetes.states = [DONE]

    assert [kubernetes.run(), kubernetes.run()] == [0, 0]
    assert list(kubernetes.rayjobs) == ["score-nightly-1-ray"]
    assert kubernetes.requests.count("POST rayjobs") == 2


def test_outages_of_the_server_are_waited_out(kubernetes: Kubernetes) -> None:
    kubernetes.states = [RUNNING, 500, 503, 429, RUNNING, DONE]

    assert kubernetes.run() == 0


def test_a_request_without_an_answer_is_left_to_the_next_pod(
    kubernetes: Kubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes.is_cut = True

    assert kubernetes.run() == 2
    assert capsys.readouterr().err.startswith("error: Kubernetes does not answer: ")


def test_a_renewed_token_is_read(kubernetes: Kubernetes) -> None:
    def renew() -> dict[str, str]:
        kubernetes.token = "second"
        (kubernetes.account / "token").write_text("second\n")
        return RUNNING

    kubernetes.states = [RUNNING, renew, RUNNING, DONE]

    assert kubernetes.run() == 0
    assert len(kubernetes.requests) == 6


def test_a_deleted_rayjob_is_a_failure(kubernetes: Kubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    kubernetes.states = [RUNNING, 404]

    assert kubernetes.run() == 1
    assert "404" in capsys.readouterr().err


def test_a_missing_template_is_a_failure(kubernetes: Kubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    assert kubernetes.run(template="score-nightli") == 1
    assert "raycronjobs/score-nightli: 404" in capsys.readouterr().err
    assert kubernetes.rayjobs == {}


def test_a_wrong_token_is_left_to_the_next_pod(kubernetes: Kubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    kubernetes.token = "second"

    assert kubernetes.run() == 2
    shown = capsys.readouterr()
    assert "401" in shown.err
    assert "first" not in shown.out + shown.err


def test_a_server_with_another_certificate_is_not_trusted(
    kubernetes: Kubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    other = Kubernetes(tmp_path / "other")
    other.server_close()
    (kubernetes.account / "ca.crt").write_bytes((other.account / "ca.crt").read_bytes())

    assert kubernetes.run() == 2
    assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().err
    assert kubernetes.requests == []
