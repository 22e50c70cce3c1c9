"""A prepared set follows its source: after any changes and kills it equals the result of a fresh run. No Ray."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from cropping_here import CroppingHere
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from agr_ray.config import PrepareConfig, PrepareJob, SourceConfig, SplitConfig, VisionConfig
from agr_ray.console import make_console
from agr_ray.data import preparation as module
from agr_ray.data.preparation import prepare_set
from agr_ray.data.prepared import PreparedSet, open_prepared
from agr_ray.errors import ConfigError
from agr_ray.predict.crop_maker import CropMaker
from agr_ray.schema import CROPS
from agr_ray.storage import ChangedObject, ServerFailed, Storage, StorageFailed, StorageUnavailable
from agr_ray.storage.lock import LockLost, RunLock, run_lock
from agr_ray.storage.parts import KILLED_ITS_WORKER, MAX_DEATHS, Parts
from agr_ray.vision.decode import encode_jpeg

NUM_SEQUENCES = int(os.environ.get("AGR_TEST_SEQUENCES", "60"))
NAMES = "abcdefgh"
LABELS = ("20,male,white", "30,female,black", "40,,asian", ",male,")


class Killed(BaseException):
    """Stands for SIGKILL: no code runs after it."""


def prepare(job: PrepareJob, pause_s: float = 0.0) -> PreparedSet:
    return prepare_set(job, CroppingHere(job, pause_s), make_console(io.StringIO()))


class Source:
    """A folder of images and labels, and the set that is prepared from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: dict[str, int] = {}
        self.labels: dict[str, str] = {}
        self._puts = itertools.count(1)
        (folder / "in").mkdir(parents=True)
        for number, name in enumerate(NAMES[:6]):
            self.put(name)
            self.label(name, LABELS[number % len(LABELS)])

    def put(self, name: str, content: int | None = None) -> None:
        """Write an image; the same `content` is the same bytes."""
        self.images[name] = content if content is not None else 100 + next(self._puts)
        body = encode_jpeg(np.full((24, 24, 3), self.images[name] % 256, np.uint8)) + bytes([self.images[name] % 256])
        (self.folder / "in" / f"{name}.jpg").write_bytes(body)
        self.labels.setdefault(name, LABELS[0])
        self._write()

    def label(self, name: str, label: str) -> None:
        self.labels[name] = label
        self._write()

    def remove(self, name: str) -> None:
        (self.folder / "in" / f"{name}.jpg").unlink(missing_ok=True)
        self.images.pop(name, None)
        self.labels.pop(name, None)
        self._write()

    def _write(self) -> None:
        lines = [f"{name}.jpg,{label}" for name, label in sorted(self.labels.items())]
        (self.folder / "in" / "labels.csv").write_text("\n".join(["key,age,gender,race", *lines]) + "\n")

    def job(self, out: str = "out") -> PrepareJob:
        return PrepareJob(
            source=SourceConfig(uri=str(self.folder / "in")),
            split=SplitConfig(val=0.25, test=0.25),
            vision=VisionConfig(detector="none"),
            prepare=PrepareConfig(
                out=str(self.folder / out), crop_side_px=16, rows_per_file=2, allow_shrink=True, outage_s=5
            ),
        )

    def rows(self, out: str = "out") -> list[dict[str, Any]]:
        rows = pq.read_table(self.folder / out / "crops").to_pylist()
        return sorted(rows, key=lambda row: str(row["key"]))

    def check(self) -> None:
        """Compare with a fresh run. Only the splits may differ, because images keep theirs."""
        prepared = prepare(self.job())
        shutil.rmtree(self.folder / "fresh", ignore_errors=True)
        prepare(self.job("fresh"))
        rows, fresh = self.rows(), self.rows("fresh")
        assert [without_split(row) for row in rows] == [without_split(row) for row in fresh]
        of_group: dict[str, str | None] = {}
        for row in rows:
            if row["group_id"]:
                assert of_group.setdefault(row["group_id"], row["split"]) == row["split"]
        manifest = pq.read_table(self.folder / "out" / "manifest.parquet").to_pylist()
        assert [(row["key"], row["split"]) for row in manifest] == [(row["key"], row["split"]) for row in rows]
        lines = (self.folder / "out" / "splits.tsv").read_text().splitlines()
        assert sorted(line.split("\t")[1:] for line in lines) == sorted(
            [row["key"], row["split"]] for row in rows if row["split"]
        )
        assert open_prepared(Storage(), str(self.folder / "out"), "train.data") == prepared


def without_split(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "split"}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_the_summary_counts_labels_and_quotes_those_that_are_not_understood(source: Source) -> None:
    source.label(NAMES[0], "20-25,X,white")
    shown = io.StringIO()

    prepare_set(source.job(), CroppingHere(source.job(), 0.0), make_console(shown))

    lines = shown.getvalue().splitlines()
    assert "age labels: 4; age ranges: 1, of which 1 span several age groups and count in none" in lines
    assert "gender labels: 4 (female 2, male 2)" in lines
    assert "race labels: 5 (asian 1, black 2, white 2)" in lines
    assert any("'X'" in line for line in lines)


names = st.sampled_from(NAMES)
steps = st.one_of(
    st.tuples(st.just("label"), names, st.sampled_from(LABELS)),
    st.tuples(st.just("put"), names, st.none()),
    st.tuples(st.just("copy"), names, names),
    st.tuples(st.just("remove"), names, st.none()),
    st.tuples(st.just("killed"), st.integers(1, 30), st.none()),
    st.tuples(st.just("unreadable"), names, st.sampled_from([ChangedObject, StorageFailed])),
)


def take(source: Source, step: tuple[str, Any, Any]) -> None:
    what, which, how = step
    with pytest.MonkeyPatch.context() as patch:
        if what == "label" and which in source.images:
            source.label(which, how)
        elif what == "put":
            source.put(which)
        elif what == "copy" and how in source.images:
            source.put(which, source.images[how])
        elif what == "remove" and len(source.images) > 2:
            source.remove(which)
        elif what == "killed":
            kill_at(patch, which)
            with suppress(Killed):
                prepare(source.job())
        elif what == "unreadable":
            refuse(patch, which, how)
            prepare(source.job())


def kill_at(patch: pytest.MonkeyPatch, change: int) -> None:
    """Die just before the n-th write or delete of an object."""
    num_changes = 0
    for name in ("write", "write_table", "delete", "upload_tree", "delete_tree"):
        real = getattr(Storage, name)

        def counted(storage: Storage, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            nonlocal num_changes
            is_locks = any(str(each).endswith("lock.json") for each in args)
            num_changes += not is_locks
            if num_changes >= change and not is_locks:
                raise Killed
            return real(storage, *args, **kwargs)

        patch.setattr(Storage, name, counted)


def refuse(patch: pytest.MonkeyPatch, name: str, error: type[Exception]) -> None:
    read = Storage.read

    def read_or_refuse(storage: Storage, uri: str, **kwargs: Any) -> bytes:
        if uri.endswith(f"/{name}.jpg"):
            raise error(f"{uri}: still being written")
        return read(storage, uri, **kwargs)

    patch.setattr(Storage, "read", read_or_refuse)


@settings(
    max_examples=NUM_SEQUENCES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
@given(sequence=st.lists(steps, min_size=1, max_size=6))
def test_after_any_changes_and_kills_the_set_equals_a_fresh_one(sequence: list[tuple[str, Any, Any]]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="agr-ray-again-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        source = Source(folder)
        prepare(source.job())
        for step in sequence:
            take(source, step)
        try:
            source.check()
        except ConfigError as error:
            assert "byte for byte" in str(error)  # noqa: PT017  # a copy joins two splits
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("label", ["33,female,asian", "20,male,", ",,"])
def test_a_corrected_label_is_copied_without_a_new_crop(source: Source, label: str) -> None:
    prepare(source.job())
    before = source.rows()

    source.label("b", label)
    prepare(source.job())

    after = source.rows()
    assert [row["crop"] for row in after] == [row["crop"] for row in before]
    assert [row["split"] for row in after] == [row["split"] for row in before]
    age, gender, race = (each or None for each in label.split(","))
    assert (after[1]["age"], after[1]["gender"], after[1]["race"]) == (age and float(age), gender, race)
    source.check()


def test_a_sampled_image_keeps_its_split_when_its_subject_changes_and_images_come(source: Source) -> None:
    def prepare_sample() -> dict[str, str | None]:
        job = source.job()
        prepare(job.model_copy(update={"split": SplitConfig(val=0.3, test=0.3, sample=3)}))
        return {row["key"]: row["split"] for row in source.rows()}

    before = prepare_sample()
    assert sum(split is not None for split in before.values()) == 3
    lines = (source.folder / "in" / "labels.csv").read_text().splitlines()
    lines = [f"{line}," for line in lines[1:]]
    subjects = {key: f"subject {key}" for key, split in before.items() if split}
    for number in range(2):
        source.put(f"new{number}")
    rows = [f"{line}{subjects.get(line.split(',')[0], '')}" for line in lines] + [
        f"new{n}.jpg,20,male,white," for n in (0, 1)
    ]
    (source.folder / "in" / "labels.csv").write_text("\n".join(["key,age,gender,race,subject", *rows]) + "\n")

    after = prepare_sample()

    assert [after[key] for key in before] == list(before.values())
    assert [after[f"new{number}.jpg"] for number in range(2)] == [None, None]


def test_an_image_that_was_absent_for_one_run_gets_its_split_back(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(source.job())
    before = {row["key"]: row["split"] for row in source.rows()}
    for name in NAMES[:6]:
        label, content = source.labels[name], source.images[name]
        source.label(name, "old,neither,none")
        prepare(source.job())
        source.label(name, label)
        prepare(source.job())
        assert {row["key"]: row["split"] for row in source.rows()} == before
        source.remove(name)
        prepare(source.job())
        source.put(name, content)
        source.label(name, label)
        prepare(source.job())
        assert {row["key"]: row["split"] for row in source.rows()} == before


def test_another_source_does_not_empty_a_set_unless_that_is_allowed(source: Source, tmp_path: Path) -> None:
    prepare(source.job())
    before = source.rows()
    other = Source(tmp_path / "other")
    for name in NAMES[:5]:
        other.put(name)
    job = source.job()
    job = job.model_copy(update={"prepare": job.prepare.model_copy(update={"allow_shrink": False})})
    job = job.model_copy(update={"source": job.source.model_copy(update={"uri": str(tmp_path / "other" / "in")})})
    with pytest.raises(ConfigError, match=r"^source\.uri .*: has \d of the 6 images .*--prepare\.allow_shrink true"):
        prepare(job)
    assert source.rows() == before

    prepare(job.model_copy(update={"prepare": job.prepare.model_copy(update={"allow_shrink": True})}))

    assert [row["uri"] for row in source.rows()] == [
        str(tmp_path / "other" / "in" / f"{name}.jpg") for name in NAMES[:6]
    ]


def test_an_image_that_was_being_written_is_cropped_by_the_next_run(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, "c", ChangedObject)
        prepare(source.job())
    assert [row["status"] for row in source.rows()].count("changed") == 1

    source.check()

    assert [row["status"] for row in source.rows()] == ["fallback"] * 6


def test_parts_of_two_jobs_that_overlap_become_one_set(source: Source) -> None:
    prepare(source.job())
    before = source.rows()
    crops = source.folder / "out" / "crops"
    pq.write_table(pa.Table.from_pylist(before[1:4], schema=CROPS), crops / "part-of-another.parquet")
    with pytest.raises(ConfigError, match=r"^train\.data .*: holds 9 crop rows of 6 images"):
        open_prepared(Storage(), str(source.folder / "out"), "train.data")

    prepare(source.job())

    assert source.rows() == before
    source.check()


def test_a_second_job_is_rejected_while_one_is_running(source: Source) -> None:
    prepare(source.job())
    uri = str(source.folder / "out" / "lock.json")
    with (
        run_lock(Storage(), uri, "another job", expiry_s=0.8, console=make_console(io.StringIO())),
        pytest.raises(ConfigError, match=r"is held by another job .*that run is alive"),
    ):
        prepare(source.job())
    assert not Path(uri).exists()


def test_a_job_that_has_lost_its_lock_stops_at_its_next_part(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table = Storage.write_table
    written: list[str] = []

    def write_and_lose(storage: Storage, table: pa.Table, uri: str) -> None:
        write_table(storage, table, uri)
        if "/parts/" in uri:
            written.append(uri)
            (source.folder / "out" / "lock.json").unlink()
            monkeypatch.setattr(module.RunLock, "_confirmed_s", -1e9, raising=False)

    monkeypatch.setattr(Storage, "write_table", write_and_lose)
    job = source.job()
    job = job.model_copy(update={"prepare": job.prepare.model_copy(update={"lock_expiry_s": 0.2})})
    with pytest.raises(LockLost):
        prepare(job, pause_s=0.3)  # the heartbeat has time to see that the lock is lost
    assert len(written) == 1
    assert not module._check_out(Storage(), str(source.folder / "out"), module._settings(job)).finished  # type: ignore[union-attr]


def test_a_source_without_usable_images_is_rejected_with_the_reason(source: Source) -> None:
    for name in NAMES[:6]:
        source.label(name, "old,male?,white?")
    with pytest.raises(ConfigError, match=r"none of its 6 images is usable; most frequent reason \(\d\): bad_label: "):
        prepare(source.job())
    assert not (source.folder / "out" / "prepare.json").exists()


def test_a_source_without_a_readable_image_is_rejected_and_not_finished(source: Source) -> None:
    for name in NAMES[:6]:
        (source.folder / "in" / f"{name}.jpg").write_bytes(b"no image " + name.encode())
    with pytest.raises(ConfigError, match=r"none of its 6 images is usable; most frequent reason \(6\): not_an_image"):
        prepare(source.job())
    with pytest.raises(ConfigError, match=r"preparation has not finished"):
        open_prepared(Storage(), str(source.folder / "out"), "train.data")


def test_a_mostly_refused_source_is_an_error_and_the_same_command_finishes_later(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for name in "abcd":
            refuse(patch, name, StorageFailed)
        with pytest.raises(ConfigError, match=r"storage refuses 4 of its 6 images for the same reason: failed: "):
            prepare(source.job())
    source.check()


def count_reads(patch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the images that are downloaded from now on."""
    read = Storage.read
    names: list[str] = []

    def read_and_count(storage: Storage, uri: str, **kwargs: Any) -> bytes:
        if uri.endswith(".jpg"):
            names.append(Path(uri).stem)
        return read(storage, uri, **kwargs)

    patch.setattr(Storage, "read", read_and_count)
    return names


def test_each_image_is_downloaded_once_and_again_only_where_it_has_changed(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = count_reads(monkeypatch)
    prepare(source.job())
    assert sorted(names) == list(NAMES[:6])
    source.label("b", LABELS[2])
    source.remove("c")
    prepare(source.job())
    assert len(names) == 6

    source.put("d")
    source.put("g")
    prepare(source.job())

    assert sorted(names[6:]) == ["d", "g"]


def test_a_resumed_job_does_not_download_staged_images_again(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    names = count_reads(monkeypatch)
    with monkeypatch.context() as patch:
        write = Parts.write

        def write_two(parts: Parts, number: int, table: pa.Table) -> None:
            if number == 2:
                raise Killed
            write(parts, number, table)

        patch.setattr(Parts, "write", write_two)
        with pytest.raises(Killed):
            prepare(source.job())
    plans = [path.name for path in (source.folder / "out" / "work").iterdir()]
    (source.folder / "out" / "work" / plans[0] / "parts" / ".tmp-0123").write_bytes(b"half a part")
    (source.folder / "out" / "crops").mkdir()
    (source.folder / "out" / "crops" / ".tmp-0123").write_bytes(b"half a part")
    assert len(names) == 6
    source.label("a", "44,male,black")  # needs no other plan

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", lambda *_: pytest.fail("planned again"))
        prepare(source.job())

    assert len(plans) == 1
    assert sorted(names) == sorted([*NAMES[:6], *names[4:6]])
    assert not (source.folder / "out" / "work").exists()
    source.check()


def test_every_request_of_a_running_job_is_retried(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agr_ray.storage.retry._RETRY_S", 0.0)
    prepare(source.job())
    source.put("g")
    source.remove("a")
    source.remove("b")
    source.label("c", "44,male,black")
    failures: list[str] = []

    def fail_once(name: str, real: Any) -> Any:
        def called(storage: Storage, uri: Any, *args: Any, **kwargs: Any) -> Any:
            target = {"write_table": args[0], "upload_tree": "the plan"}.get(name, uri) if args else uri
            key = f"{name} {target}"
            is_running = "/out/work/" in str((uri, args)) or failures
            if is_running and "/in/" not in key and "lock.json" not in key and key not in failures:
                failures.append(key)
                raise StorageUnavailable("away")
            return real(storage, uri, *args, **kwargs)

        return called

    num_checks = 0

    def check(lock: RunLock) -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks % 2:
            raise StorageUnavailable("away")

    names = ("read", "read_table", "write", "write_table", "delete", "upload_tree", "delete_tree")
    with monkeypatch.context() as patch:
        patch.setattr(RunLock, "check", check)
        for name in names:
            patch.setattr(Storage, name, fail_once(name, getattr(Storage, name)))
        prepare(source.job())

    assert sorted({each.split()[0] for each in failures}) == sorted(names)
    assert num_checks > 6
    source.check()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_image_that_kills_its_worker_fails_and_is_retried_once_replaced(
    source: Source, monkeypatch: pytest.MonkeyPatch, *, is_replaced: bool
) -> None:
    crops = CropMaker.crops
    killer = (source.folder / "in" / "c.jpg").read_bytes()

    def die(maker: CropMaker, bodies: list[bytes]) -> Iterator[dict[str, Any]]:
        if killer in bodies:
            raise Killed
        return crops(maker, bodies)

    num_runs = 0
    with monkeypatch.context() as patch:
        patch.setattr(CropMaker, "crops", die)
        while num_runs < 10:
            num_runs += 1
            with suppress(Killed):
                prepare(source.job())
                break
    assert num_runs == 5  # once in its batch, three times alone
    assert [(row["status"], row["error"]) for row in source.rows()] == [
        ("failed", KILLED_ITS_WORKER) if name == "c" else ("fallback", None) for name in NAMES[:6]
    ]
    names = count_reads(monkeypatch)
    if is_replaced:
        source.put("c")
    prepare(source.job())
    assert names == (["c"] if is_replaced else [])
    assert [row["status"] for row in source.rows()].count("fallback") == (6 if is_replaced else 5)


def test_an_outdated_part_is_deleted_before_its_successor_is_written(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(source.job())
    for name in NAMES[:6]:
        source.put(name)  # every id stays, so a new part has the name of an old one
    delete = Storage.delete

    def delete_slowly(storage: Storage, uri: str, **kwargs: Any) -> None:
        if "/crops/" in uri:
            time.sleep(0.5)
        delete(storage, uri, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", delete_slowly)
        prepare(source.job())

    source.check()


def test_an_outage_does_not_count_against_an_image(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", kill)
        with pytest.raises(Killed):
            prepare(source.job())  # so that the next jobs take images one at a time
    config = source.job().prepare.model_copy(update={"outage_s": 0.0})
    impatient = source.job().model_copy(update={"prepare": config})
    for _ in range(MAX_DEATHS + 1):
        with monkeypatch.context() as patch:
            refuse(patch, "c", StorageUnavailable)
            with pytest.raises(StorageUnavailable):
                prepare(impatient)

    source.check()


def test_an_image_is_requested_again_from_a_busy_server(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Storage.read
    refused: list[str] = []

    def refuse_once(storage: Storage, uri: str, **kwargs: Any) -> bytes:
        if uri.endswith(("/b.jpg", "/c.jpg")) and uri not in refused:
            refused.append(uri)
            raise ServerFailed(f"{uri}: SlowDown")
        return read(storage, uri, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "read", refuse_once)
        prepared = prepare(source.job())

    assert len(refused) == 2
    assert prepared.counts == {"fallback": 6}
    source.check()


def kill(*_: Any) -> None:
    raise Killed


def test_a_detector_without_its_package_is_rejected_before_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    job = Source(tmp_path).job().model_copy(update={"vision": VisionConfig(detector="mtcnn_int8")})

    with pytest.raises(ConfigError, match=r"^vision\.detector mtcnn_int8: needs openvino"):
        prepare(job)

    assert not (tmp_path / "out").exists()
