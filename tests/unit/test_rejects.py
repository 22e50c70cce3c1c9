"""Equal reasons are counted together, whatever object they name."""

from __future__ import annotations

import pyarrow as pa
import pytest

from agr_ray.data.rejects import reject_reasons

ERRORS = [
    "{uri}: AccessDenied: An error occurred (AccessDenied) when calling the GetObject operation: Access Denied",
    "{uri}: AccessDenied: User: arn:aws:sts::1:assumed-role/r/s is not authorized to perform: s3:GetObject on "
    'resource: "arn:aws:s3:::{path}" because no identity-based policy allows it',
    "{uri}: KMS.NotFoundException: key of {name} (request 4GX{number}ZQ) is gone",
    "{name} has {number} bytes, and 7 are allowed",
    "cut short after {number} bytes of {key}",
]


@pytest.mark.parametrize("error", ERRORS)
def test_equal_errors_of_different_objects_are_one_reason(error: str) -> None:
    rows = []
    for number, key in enumerate(["a.jpg", "up/b c.jpg", "2026/11/x y/27.jpg", "d", "up/ünï.jpg"]):
        uri, name = f"s3://bucket/{key}", key.rpartition("/")[2]
        said = error.format(uri=uri, path=f"bucket/{key}", key=key, name=name, number=number + 10)
        rows.append({"uri": uri, "status": "failed", "error": said})
    rows.append({"uri": "s3://bucket/e.jpg", "status": "ok", "error": None})
    rows.append({"uri": "s3://bucket/f.jpg", "status": "missing", "error": None})

    reasons = reject_reasons(pa.Table.from_pylist(rows), ["ok"])

    assert sorted(reasons.values()) == [1, 5]
    assert reasons["missing"] == 1


def test_different_errors_are_different_reasons() -> None:
    errors = ["AccessDenied: no", "SlowDown: wait", "AccessDenied: no"]
    rows = [{"uri": f"s3://b/{n}.jpg", "status": "failed", "error": error} for n, error in enumerate(errors)]
    assert reject_reasons(pa.Table.from_pylist(rows), []) == {
        "failed: AccessDenied: no": 2,
        "failed: SlowDown: wait": 1,
    }
