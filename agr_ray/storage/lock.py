"""A lock that keeps two runs from writing to one output: an object in storage that its holder renews.

The object is created only if absent, and renewed, replaced and deleted only if it is still the object that was read,
so storage lets only one of several runs through. A holder that died stops renewing its lock: another run watches the
lock for `expires_after_s` by its own clock and then takes it over. No two clocks are ever compared; the times in the
object are for people to read. A holder on this machine whose process is gone is replaced at once.
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

from agr_ray.config.section import PositiveFloat
from agr_ray.errors import ConfigError
from agr_ray.storage import ChangedObject, MissingObject, Storage, StorageError, StorageUnavailable

_HEARTBEATS_PER_EXPIRY: Final = 4
_EMPTY_EXPIRES_S: Final = 10.0
_CHECKS_PER_HEARTBEAT: Final = 5
"""How often a watched lock is read, and a failed heartbeat retried, per heartbeat interval."""


def clock_s() -> float:
    """Return the seconds of a clock that, unlike `time.monotonic`, keeps counting while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class LockLost(Exception):
    """Another run holds the lock, or it was deleted: this run must not publish. The message is one line."""


class LockRecord(BaseModel):
    """The content of the lock object."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: str
    """Random; different for each holder."""
    owner: str
    """Description of the holder, such as the name of its run."""
    host: str
    pid: int
    pid_namespace: str = ""
    """Boot and PID namespace in which `pid` identifies the process; empty: unknown, as on systems other than Linux."""
    acquired_at: datetime.datetime
    heartbeat_at: datetime.datetime
    expires_after_s: PositiveFloat
    """Seconds for which the object must stay unchanged before another run takes over the lock."""

    def to_bytes(self) -> bytes:
        """Return the record as JSON with the current time as its heartbeat, so that each renewal changes the object."""
        now = datetime.datetime.now(datetime.UTC)
        return (self.model_copy(update={"heartbeat_at": now}).model_dump_json(indent=2) + "\n").encode()

    @property
    def is_dead(self) -> bool:
        """Whether the holder was a process of this machine and is gone; false if that can't be determined."""
        if not self.pid_namespace or (self.host, self.pid_namespace) != (socket.gethostname(), _pid_namespace()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it belongs to another user
            pass
        return False

    @property
    def is_expired(self) -> bool:
        """Whether the holder is gone, or has sent no heartbeat for its expiry by this machine's clock: for display."""
        silent_s = (datetime.datetime.now(datetime.UTC) - self.heartbeat_at).total_seconds()
        return self.is_dead or silent_s > self.expires_after_s

    def __str__(self) -> str:
        since, last = (f"{at:%Y-%m-%dT%H:%M:%SZ}" for at in (self.acquired_at, self.heartbeat_at))
        return f"{self.owner} (process {self.pid} on {self.host}) since {since}, last heartbeat {last}"


class RunLock:
    """A lock that this run holds. `run_lock` creates, renews and releases it."""

    def __init__(self, storage: Storage, uri: str, record: LockRecord, etag: str, confirmed_s: float) -> None:
        self._storage = storage
        self._uri = uri
        self._record = record
        self._etag = etag
        self._confirmed_s = confirmed_s
        self._mutex = threading.Lock()
        self.lost = False
        """Whether a heartbeat has found that we no longer hold the lock; never false again."""

    @property
    def uri(self) -> str:
        """URI of the lock object."""
        return self._uri

    @property
    def token(self) -> str:
        """The token that the lock object contains while we hold the lock."""
        return self._record.token

    @property
    def heartbeat_s(self) -> float:
        """Heartbeat interval in seconds."""
        return self._record.expires_after_s / _HEARTBEATS_PER_EXPIRY

    def check(self) -> None:
        """Return only if the lock is ours for at least another half of its expiry; renew it first if necessary.

        Call it before each step that must not be done twice, and finish that step within half the expiry.

        Raises:
            LockLost: another run holds the lock, or it was deleted.
            StorageFailed, StorageUnavailable: it has not been renewed for half its expiry and can't be renewed now.
        """
        while not self.lost and clock_s() - self._confirmed_s > self._record.expires_after_s / 2:
            self.renew(self._storage)
        if self.lost:
            raise LockLost(
                f"the lock {self._uri} is no longer ours: it was deleted, or another run took it over after "
                f"{self._record.expires_after_s:g} s without a heartbeat of ours; nothing more is published"
            )

    def confirm(self) -> None:
        """Like `check`, but always renew the lock, however recent the last heartbeat is."""
        self.renew(self._storage)
        self.check()

    def renew(self, storage: Storage) -> None:
        """Write a heartbeat, or set `lost`.

        Raises:
            StorageFailed, StorageUnavailable: the heartbeat can't be written; the lock may still be ours.
        """
        with self._mutex:
            while not self.lost:
                started_s = clock_s()  # before the write: another process may time the expiry from then on
                with contextlib.suppress(ChangedObject, MissingObject):
                    self._etag = storage.write(self._uri, self._record.to_bytes(), if_match=self._etag)
                    self._confirmed_s = started_s
                    return
                self._read_back(storage)

    def release(self) -> None:
        """Delete the lock if it is still ours.

        Raises:
            StorageFailed, StorageUnavailable: it can't be deleted; it will expire.
        """
        while not self.lost:
            with contextlib.suppress(ChangedObject, MissingObject):
                self._storage.delete(self._uri, if_match=self._etag)
                return
            self._read_back(self._storage)

    def _read_back(self, storage: Storage) -> None:
        """Read the ETag of our own last heartbeat, in case its response was lost; set `lost` if it is not ours."""
        try:
            data, self._etag = storage.read_with_etag(self._uri)
        except MissingObject:
            self.lost = True
        else:
            self.lost = self._record.token.encode() not in data


@contextlib.contextmanager
def run_lock(storage: Storage, uri: str, owner: str, *, expiry_s: float, console: Console) -> Iterator[RunLock]:
    """Hold the lock `uri` until the block ends; `owner` describes the holder, such as its run's name.

    A lock that exists is watched. If it changes, its holder is alive and this run is refused, within a heartbeat, which
    is a quarter of the holder's expiry. If it disappears, it is free. If it stays unchanged for its holder's expiry, or
    its holder was a process of this machine that is gone, it is taken over with a warning.

    A thread renews the lock, and retries while storage is unavailable. The holder does not notice an outage shorter
    than half the expiry. After a longer one the lock is still ours unless another run has watched it all the time.

    Raises:
        ConfigError: another run is alive, or the object is not a lock.
        StorageFailed, StorageUnavailable: the lock can't be read or written.
    """
    lock = _acquire(storage, uri, _record(owner, expiry_s), console)
    stop = threading.Event()
    thread = threading.Thread(target=_send_heartbeats, args=(lock, storage, uri, expiry_s, stop, console), daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        stop.set()
        thread.join()
        try:
            lock.release()
        except (StorageError, StorageUnavailable) as error:
            console.out(f"warning: the lock {uri} was not deleted and will expire: {error}", highlight=False)


def lock_holder(storage: Storage, uri: str) -> LockRecord | None:
    """Return the record of a lock, whether its holder is alive or not; None: there is no lock.

    Raises:
        ConfigError: the object is not a lock.
        StorageFailed, StorageUnavailable: it can't be read.
    """
    try:
        return _read(storage, uri)[0]
    except MissingObject:
        return None


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
            holder, etag = _read(storage, uri)
            if holder.token == record.token:  # our write succeeded, and its response was lost
                return RunLock(storage, uri, record, etag, started_s)
            if holder.is_dead:
                why_stale = "that process is gone"
            else:
                expiry = f"{holder.expires_after_s:g} s"
                console.out(f"the lock {uri} is held by {holder}; watching it for up to {expiry}", highlight=False)
                _wait_until_stale(storage, uri, holder, etag)
                why_stale = f"it has had no heartbeat for {expiry}"
            stale = holder, etag


def _wait_until_stale(storage: Storage, uri: str, holder: LockRecord, etag: str) -> None:
    """Return once the lock has stayed unchanged for its expiry since it was read.

    Raises:
        ConfigError: it changed: its holder is alive.
        MissingObject: it was deleted.
    """
    # This clock stops while the machine sleeps, so that a holder on the same machine has time to wake up.
    read_s = time.monotonic()
    interval_s = holder.expires_after_s / _HEARTBEATS_PER_EXPIRY / _CHECKS_PER_HEARTBEAT
    while time.monotonic() - read_s <= holder.expires_after_s:
        time.sleep(interval_s)
        now, etag_now = _read(storage, uri)
        if etag_now != etag:
            raise ConfigError(
                f"the lock {uri} is held by {now}: that run is alive; wait until it ends, or stop it: its lock "
                f"can be taken over {now.expires_after_s:g} s after its last heartbeat"
            )


def _read(storage: Storage, uri: str) -> tuple[LockRecord, str]:
    data, etag = storage.read_with_etag(uri)
    if not data:
        # Without hard links and no-replace renames, a lock file is empty while it is being created.
        holder = _record("a run that is just starting, or died while starting", _EMPTY_EXPIRES_S)
        return holder.model_copy(update={"host": "an unknown host", "pid": 0}), etag
    try:
        return LockRecord.model_validate_json(data), etag
    except ValidationError as error:
        raise ConfigError(f"{uri} is not a run lock of this version; delete it if no run writes there") from error


def _send_heartbeats(
    lock: RunLock, storage: Storage, uri: str, expiry_s: float, stop: threading.Event, console: Console
) -> None:
    """Renew the lock until `stop` is set or the lock is lost."""
    heartbeat_s = expiry_s / _HEARTBEATS_PER_EXPIRY
    # Retries are made here, not by the client, whose own could outlast the lock.
    once = Storage(storage.connection.limited(heartbeat_s, 1))
    wait_s = heartbeat_s
    while not lock.lost and not stop.wait(wait_s):
        try:
            lock.renew(once)
            wait_s = heartbeat_s
        except (StorageError, StorageUnavailable) as error:
            if wait_s == heartbeat_s:
                console.out(f"warning: no heartbeat of the lock {uri}, retrying: {error}", highlight=False)
            wait_s = heartbeat_s / _CHECKS_PER_HEARTBEAT
