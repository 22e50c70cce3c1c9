"""The parsing of URIs."""

from __future__ import annotations

from pathlib import Path

import pytest

from agr_ray.storage import (
    Storage,
)
from agr_ray.storage.uri import ancestors, is_bucket


@pytest.fixture
def storage() -> Storage:
    return Storage()


def test_absolute_gives_one_form_to_all_spellings_of_a_local_path(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = str(tmp_path / "a b%20")

    for uri in ("a b%20", "./a b%20/", str(tmp_path / "a b%20"), f"file://{tmp_path}/a%20b%2520"):
        assert storage.absolute(uri) == expected
    assert storage.absolute("s3://bucket/a//b%20/") == "s3://bucket/a//b%20/"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gs://bucket/key", "'gs'"),
        ("https://host/key", "'https'"),
        ("s3:/bucket/key", "lacks a slash"),
        ("file://host/path", "on this machine"),
        ("", "empty"),
    ],
)
def test_other_schemes_are_rejected_with_what_is_allowed(storage: Storage, uri: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        storage.absolute(uri)

    assert "file:///path" in str(caught.value)


def test_an_s3_uri_without_bucket_or_key_is_rejected(storage: Storage) -> None:
    with pytest.raises(ValueError, match="names no bucket"):
        storage.read("s3:///key")
    with pytest.raises(ValueError, match="names no key"):
        storage.read("s3://bucket/")


def test_join_keeps_what_is_in_an_s3_key(storage: Storage) -> None:
    assert storage.join("s3://bucket/a", "b c", "/d#.jpg") == "s3://bucket/a/b c//d#.jpg"
    assert storage.join("s3://bucket", "a") == "s3://bucket/a"
    assert storage.join("folder", "a") == "folder/a"


def test_ancestors_are_given_from_the_root_down() -> None:
    assert ancestors("s3://bucket/a//b.json") == ["s3://bucket", "s3://bucket/a", "s3://bucket/a/"]
    assert ancestors("file:///a/b.json") == ["/", "/a"]


@pytest.mark.parametrize(
    ("uri", "expected"), [("s3://bucket", True), ("s3://bucket/", True), ("s3://bucket/a", False), ("/bucket", False)]
)
def test_a_whole_bucket_is_distinguished_from_a_prefix(uri: str, expected: bool) -> None:
    assert is_bucket(uri) == expected
