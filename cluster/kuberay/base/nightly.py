"""Create a RayJob from a template, wait for it, and fail if it fails: the pod of the nightly CronJob.

    python nightly.py TEMPLATE

TEMPLATE is a RayCronJob whose `jobTemplate` becomes the RayJob. The RayJob has the name of the pod's own Job. So a pod
that replaces another (its node was drained) waits for the same RayJob instead of creating a second one. The Job owns
the RayJob: Kubernetes deletes both together.

Exit status: 0, the RayJob succeeded; 1, it failed or cannot be created; anything else: try again. Needs only Python.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes mounts the token of the pod's ServiceAccount."""
ENDED: Final = ("Complete", "Failed", "ValidationFailed")
HOPELESS: Final = (400, 403, 404, 422)
"""HTTP codes that another attempt would get, too: bad request, no right, no such object, invalid object."""
CONFLICT: Final = 409


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


def rayjob(template: Mapping[str, Any], name: str, uid: str) -> dict[str, Any]:
    """Return the RayJob of a Job, made from the `jobTemplate` and the labels of a RayCronJob."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": template["metadata"].get("labels", {}), "ownerReferences": [owner]},
        "spec": template["spec"]["jobTemplate"],
    }


def start(api: Api, template: str, name: str, uid: str) -> None:
    """Create the RayJob, unless an earlier pod of the same Job has created it.

    Raises:
        HTTPError: the template does not exist, or the RayJob is rejected.
        OSError: the server cannot be reached.
    """
    try:
        api.request("rayjobs", rayjob(api.request(f"raycronjobs/{template}"), name, uid))
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
        except OSError as error:
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
    name = environ["JOB_NAME"]
    try:
        api = Api(environ, account)
        start(api, template, name, environ["JOB_UID"])
        status = wait(api, name, poll_s)
    except HTTPError as error:
        print(f"error: {error.url}: {error.code} {error.read().decode(errors='replace')}", file=sys.stderr)
        return 1 if error.code in HOPELESS else 2
    except URLError as error:
        print(f"error: Kubernetes does not answer: {error.reason}", file=sys.stderr)
        return 2
    if status["jobDeploymentStatus"] == "Complete" and status.get("jobStatus") == "SUCCEEDED":
        return 0
    print(f"error: RayJob {name} failed: {status.get('reason', '')} {status.get('message', '')}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], os.environ))
