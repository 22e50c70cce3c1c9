"""Create a RayJob from a template, wait for it, and fail if it fails: the pod of the nightly CronJob.

    python nightly.py TEMPLATE

TEMPLATE is a RayCronJob whose `jobTemplate` becomes the RayJob. Its name follows from that of the pod's own Job. So a
pod that replaces another (its node was drained) waits for the same RayJob instead of creating a second one. The Job
owns the RayJob: Kubernetes deletes both together.

Exit status: 0, the RayJob succeeded; 1, it failed or cannot be created; anything else: try again. Needs only Python.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes mounts the token of the pod's ServiceAccount."""
ENDED: Final = ("Complete", "Failed", "ValidationFailed")
HOPELESS: Final = (400, 403, 404, 422)
"""HTTP codes that another attempt would get, too: bad request, no right, no such object, invalid object."""
CONFLICT: Final = 409
TRANSIENT: Final = (OSError, HTTPException, ValueError)
"""Errors of a request that another attempt may not get: no connection, an answer that is cut short."""


class Api:
    """The RayJobs and RayCronJobs of the pod's namespace, by Kubernetes' REST API."""

    def __init__(self, environ: Mapping[str, str], account: Path) -> None:
        namespace = (account / "namespace").read_text().strip()
        server = f"https://{environ['KUBERNETES_SERVICE_HOST']}:{environ['KUBERNETES_SERVICE_PORT']}"
        self._url = f"{server}/apis/ray.io/v1/namespaces/{namespace}"
        self._token = account / "token"
        self._tls = ssl.create_default_context(cafile=str(account / "ca.crt"))

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """GET an object, or POST a new one; return the answer.

        Raises:
            HTTPError: the server rejects the request.
            OSError: the server cannot be reached.
        """
        # Kubernetes replaces the token every hour.
        headers = {"Authorization": f"Bearer {self._token.read_text().strip()}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(f"{self._url}/{path}", data, headers), timeout=30, context=self._tls) as answer:
            content: dict[str, Any] = json.load(answer)
            return content


def rayjob_name(job: str) -> str:
    """Return the name of a Job's RayJob. Not the Job's own: KubeRay submits a RayJob by a Job of the RayJob's name."""
    return f"{job}-ray"


def rayjob(template: Mapping[str, Any], job: str, uid: str) -> dict[str, Any]:
    """Return the RayJob of a Job, made from the `jobTemplate` and the labels of a RayCronJob."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": rayjob_name(job),
            "labels": template["metadata"].get("labels", {}),
            "ownerReferences": [owner],
        },
        "spec": template["spec"]["jobTemplate"],
    }


def start(api: Api, template: str, job: str, uid: str) -> None:
    """Create the RayJob, unless an earlier pod of the same Job has created it.

    Raises:
        HTTPError: the template does not exist, or the RayJob is rejected.
        OSError, HTTPException, ValueError: the server cannot be reached, or its answer is cut short.
    """
    name = rayjob_name(job)
    try:
        api.request("rayjobs", rayjob(api.request(f"raycronjobs/{template}"), job, uid))
        print(f"created RayJob {name}", flush=True)
    except HTTPError as error:
        if error.code != CONFLICT:
            raise
        print(f"RayJob {name} exists already", flush=True)


def wait(api: Api, name: str, poll_s: float) -> dict[str, Any]:
    """Return the status of the RayJob once it has ended; print each change until then.

    Raises:
        HTTPError: the RayJob was deleted, or may not be read.
    """
    shown = ""
    while True:
        try:
            status: dict[str, Any] = api.request(f"rayjobs/{name}").get("status") or {}
        except TRANSIENT as error:
            if isinstance(error, HTTPError) and error.code in HOPELESS:
                raise
            print(f"Kubernetes does not answer, trying again: {error}", flush=True)
        else:
            state = f"{status.get('jobDeploymentStatus', 'New')}, job {status.get('jobStatus') or 'not submitted yet'}"
            if state != shown:
                print(f"RayJob {name}: {state}", flush=True)
            if status.get("jobDeploymentStatus") in ENDED:
                return status
            shown = state
        time.sleep(poll_s)


def main(template: str, environ: Mapping[str, str], account: Path = ACCOUNT, poll_s: float = 10.0) -> int:
    """Run the RayJob and return the exit status."""
    job = environ["JOB_NAME"]
    try:
        api = Api(environ, account)
        start(api, template, job, environ["JOB_UID"])
        name = rayjob_name(job)
        status = wait(api, name, poll_s)
    except HTTPError as error:
        print(f"error: {error.url}: {error.code} {error.read().decode(errors='replace')}", file=sys.stderr)
        return 1 if error.code in HOPELESS else 2
    except TRANSIENT as error:
        print(f"error: Kubernetes does not answer: {getattr(error, 'reason', error)}", file=sys.stderr)
        return 2
    if status["jobDeploymentStatus"] == "Complete" and status.get("jobStatus") == "SUCCEEDED":
        return 0
    print(f"error: RayJob {name} failed: {status.get('reason', '')} {status.get('message', '')}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], os.environ))
