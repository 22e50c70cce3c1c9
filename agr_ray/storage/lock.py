"""A lock that keeps two runs out of one output: one object in storage, renewed by whoever holds it.

It is created only if absent, renewed, taken over and deleted only if it is still the object that was read: of many
that try at once, storage lets one through. A holder that died is known by its lock standing still: whoever wants it
watches for `expires_after_s`, by its own clock. So no two clocks are ever compared; the times in the object are for
people to read. Only a holder on this very machine, whose process is gone, need not be watched.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from agr_ray.config import PositiveFloat
from agr_ray.errors import ConfigError
from agr_ray.storage import ChangedObject, MissingObject, Storage, StorageError, StorageUnavailable

_HEARTBEATS_PER_EXPIRY: Final = 4
_EMPTY_EXPIRES_S: Final = 10.0
_LOOKS_PER_HEARTBEAT: Final = 5
"""How often a lock is looked at while it is watched, and how soon a heartbeat that failed is tried again."""


def clock_s() -> float:
    """Return seconds of a clock that, unlike `time.monotonic`, keeps counting while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class LockLost(Exception):
    """The lock is another run's, or gone: this run must not publish. The message is one line."""


class LockRecord(BaseModel):
    """What the lock object holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: str
    """Random, one for each holder."""
    owner: str
    """In the holder's words, such as its run."""
    host: str
    pid: int
    pid_namespace: str = ""
    """Where `pid` means that process and no other, boot included; empty: not known (it is on Linux)."""
    acquired_at: datetime.datetime
    heartbeat_at: datetime.datetime
    expires_after_s: PositiveFloat
    """For so long must the object stand still before another run takes the lock."""

    def to_bytes(self) -> bytes:
        """Return it as JSON with a heartbeat of now, which makes each renewal another object."""
        now = datetime.datetime.now(datetime.UTC)
        return (self.model_copy(update={"heartbeat_at": now}).model_dump_json(indent=2) + "\n").encode()

    @property
    def is_dead(self) -> bool:
        """Whether the holder's process was one of this machine and is gone; false where that can't be told."""
        if not self.pid_namespace or (self.host, self.pid_namespace) != (socket.gethostname(), _pid_namespace()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's
            pass
        return False

    def __str__(self) -> str:
        since, last = (f"{at:%Y-%m-%dT%H:%M:%SZ}" for at in (self.acquired_at, self.heartbeat_at))
        return f"{self.owner} (process {self.pid} on {self.host}) since {since}, last heartbeat {last}"


class RunLock:
    """A lock that this run holds. `run_lock` makes it, renews it and releases it."""

    def __init__(self, storage: Storage, uri: str, record: LockRecord, etag: str, confirmed_s: float) -> None:
        self._storage = storage
        self._uri = uri
        self._record = record
        self._etag = etag
        self._confirmed_s = confirmed_s
        self._mutex = threading.Lock()
        self.lost = False
        """Whether a heartbeat has found that the lock is not ours. Once lost it stays so."""

    @property
    def uri(self) -> str:
        """URI of the lock object."""
        return self._uri

    @property
    def token(self) -> str:
        """Content of the lock object while we hold the lock."""
        return self._record.token

    @property
    def heartbeat_s(self) -> float:
        """Heartbeat interval in seconds."""
        return self._record.expires_after_s / _HEARTBEATS_PER_EXPIRY

    def check(self) -> None:
        """Return only if the lock is ours now and will be for half its expiry at least, else renew it first.

        Call it before each step that others must not see done twice, and do that step within the half expiry.

        Raises:
            LockLost: it is another run's, or gone.
            StorageFailed, StorageUnavailable: it has not been renewed for half its expiry and can't be.
        """
        while not self.lost and clock_s() - self._confirmed_s > self._record.expires_after_s / 2:
            self.renew(self._storage)
        if self.lost:
            raise LockLost(
                f"the lock {self._uri} is no longer ours: it was deleted, or another run took it over after "
                f"{self._record.expires_after_s:g} s without a heartbeat of ours; nothing more is published"
            )

    def confirm(self) -> None:
        """Like `check`, but always ask storage, however recent the last heartbeat is."""
        self.renew(self._storage)
        self.check()

    def renew(self, storage: Storage) -> None:
        """Write a heartbeat, or set `lost`.

        Raises:
            StorageFailed, StorageUnavailable: storage does not answer; the lock may still be ours.
        """
        with self._mutex:
            while not self.lost:
                started_s = clock_s()  # before the write: another process may time the expiry from then on
                with contextlib.suppress(ChangedObject, MissingObject):
                    self._etag = storage.write(self._uri, self._record.to_bytes(), if_match=self._etag)
                    self._confirmed_s = started_s
                    return
                self._find_ours(storage)

    def release(self) -> None:
        """Delete the lock, if it is still ours.

        Raises:
            StorageFailed, StorageUnavailable: it can't be deleted, and will expire.
        """
        while not self.lost:
            with contextlib.suppress(ChangedObject, MissingObject):
                self._storage.delete(self._uri, if_match=self._etag)
                return
            self._find_ours(self._storage)

    def _find_ours(self, storage: Storage) -> None:
        """Learn the ETag of our own last heartbeat, in case its answer was lost; if it is not ours, set `lost`."""
        try:
            found, self._etag = storage.read_with_etag(self._uri)
        except MissingObject:
            self.lost = True
        else:
            self.lost = self._record.token.encode() not in found


@contextlib.contextmanager
def run_lock(storage: Storage, uri: str, owner: str, *, expiry_s: float, console: Console) -> Iterator[RunLock]:
    """Hold the lock `uri` until the block ends; `owner` says in words who does, such as the run's name.

    If there is a lock already it is watched. One that moves is alive and refused, within a heartbeat, which is a
    quarter of the holder's expiry; one that goes away is free; one that stands still for its holder's expiry, or whose
    holder was a process of this machine that is gone, is taken over, with a warning.

    A thread renews the lock, and tries again while storage does not answer. An outage of less than half the expiry
    is not noticed by the holder; after a longer one the lock is still ours unless another run has watched all along.

    Raises:
        ConfigError: another run is alive, or `uri` holds something else than a lock.
        StorageFailed, StorageUnavailable: the lock can't be read or written.
    """
    lock = _acquire(storage, uri, _record(owner, expiry_s), console)
    stop = threading.Event()
    thread = threading.Thread(target=_keep, args=(lock, storage, uri, expiry_s, stop, console), daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        stop.set()
        thread.join()
        try:
            lock.release()
        except (StorageError, StorageUnavailable) as error:
            console.out(f"warning: the lock {uri} is left to expire: {error}", highlight=False)


def _record(owner: str, expiry_s: float) -> LockRecord:
    now = datetime.datetime.now(datetime.UTC)
    return LockRecord(
        token=uuid.uuid4().hex,
        owner=owner,
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_namespace=_pid_namespace(),
        acquired_at=now,
        heartbeat_at=now,
        expires_after_s=expiry_s,
    )


def _pid_namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _acquire(storage: Storage, uri: str, record: LockRecord, console: Console) -> RunLock:
    stale: tuple[LockRecord, str] | None = None
    why_stale = ""
    while True:
        started_s = clock_s()
        try:
            if stale is None:
                etag = storage.write(uri, record.to_bytes(), if_absent=True)
            else:
                etag = storage.write(uri, record.to_bytes(), if_match=stale[1])
                console.out(f"warning: the lock {uri} is taken over from {stale[0]}: {why_stale}", highlight=False)
            return RunLock(storage, uri, record, etag, started_s)
        except (FileExistsError, ChangedObject, MissingObject):
            stale = None
        with contextlib.suppress(MissingObject):
            found, etag = _read(storage, uri)
            if found.token == record.token:  # we wrote it, and the answer was lost
                return RunLock(storage, uri, record, etag, started_s)
            if found.is_dead:
                why_stale = "that process is gone"
            else:
                expiry = f"{found.expires_after_s:g} s"
                console.out(f"the lock {uri} is held by {found}; watching it for up to {expiry}", highlight=False)
                _wait_until_stale(storage, uri, found, etag)
                why_stale = f"it has stood still for {expiry}"
            stale = found, etag


def _wait_until_stale(storage: Storage, uri: str, found: LockRecord, etag: str) -> None:
    """Return once the lock has stood still for its expiry since it was read.

    Raises:
        ConfigError: it moved.
        MissingObject: it went away.
    """
    # This clock stops while the machine sleeps, so that a holder on the same machine has time to wake up.
    read_s = time.monotonic()
    look_every_s = found.expires_after_s / _HEARTBEATS_PER_EXPIRY / _LOOKS_PER_HEARTBEAT
    while time.monotonic() - read_s <= found.expires_after_s:
        time.sleep(look_every_s)
        now, etag_now = _read(storage, uri)
        if etag_now != etag:
            raise ConfigError(
                f"the lock {uri} is held by {now}: that run is alive; wait until it ends, or stop it: what it leaves "
                f"is taken over {now.expires_after_s:g} s after its last heartbeat"
            )


def _read(storage: Storage, uri: str) -> tuple[LockRecord, str]:
    data, etag = storage.read_with_etag(uri)
    if not data:
        # Without hard links and no-replace renames, a lock file is empty while it is being created.
        beginner = _record("a run that is just starting, or died while starting", _EMPTY_EXPIRES_S)
        return beginner.model_copy(update={"host": "an unknown host", "pid": 0}), etag
    try:
        return LockRecord.model_validate_json(data), etag
    except ValidationError as error:
        raise ConfigError(f"{uri} is not a run lock of this version; delete it if no run is at work there") from error


def _keep(lock: RunLock, storage: Storage, uri: str, expiry_s: float, stop: threading.Event, console: Console) -> None:
    """Renew the lock until `stop` is set or the lock is lost."""
    heartbeat_s = expiry_s / _HEARTBEATS_PER_EXPIRY
    # Patience is here, not in the client, whose own retries could last longer than the lock.
    once = Storage(storage.connection.limited(heartbeat_s, 1))
    wait_s = heartbeat_s
    while not lock.lost and not stop.wait(wait_s):
        try:
            lock.renew(once)
            wait_s = heartbeat_s
        except (StorageError, StorageUnavailable) as error:
            if wait_s == heartbeat_s:
                console.out(f"warning: no heartbeat of the lock {uri}, trying again: {error}", highlight=False)
            wait_s = heartbeat_s / _LOOKS_PER_HEARTBEAT
