"""Score parts in one other process on this machine, without Ray.

Another process, because a photograph may kill the one that decodes it. It is started again then, and the attempts
record of the part (`storage.parts`) finds the photograph.

    python -m agr_ray.scoring.local_worker DESCRIPTOR     the other process; the descriptor is of its end of a pipe
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

from agr_ray.child_process import child_process
from agr_ray.errors import JobError
from agr_ray.json_log import child_stderr
from agr_ray.scoring.scorer import PartScorer, Scoring

if TYPE_CHECKING:
    from agr_ray.scoring.publish import Counts, Publication  # takes long to import; only the driver publishes

_MAX_DEATHS: Final = 30
"""Deaths of the process without a finished part after which a job is given up. A photograph that kills it is given up
after three, so that the same command can go on."""


class LocalWorker:
    """The only worker of a small scoring run (`driver.Workers`)."""

    num_workers: Final = 1

    def session(self, num_photographs: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """Do nothing: there is no cluster."""
        return nullcontext()

    def score(self, scoring: Scoring, parts: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """Score the parts; yield the `scorer.SUMMARY` row of each part.

        Raises:
            JobError: the process keeps being killed, or ends by itself.
            Exception: that scoring raised in the process.
        """
        left, num_deaths = list(parts), 0
        while left:
            for summary in _summaries(scoring, tuple(left)):
                left.remove(summary["part"])
                num_deaths = 0
                yield summary
            num_deaths += bool(left)
            if num_deaths == _MAX_DEATHS:
                raise JobError(
                    f"the process that scores was killed {num_deaths} times: by photographs, or because this machine "
                    "is out of memory; the same command resumes"
                )

    def stage(self, publication: Publication) -> Iterator[Counts]:
        """Write the files of all parts in this process; yield the counts of each."""
        return map(publication.stage_file, range(publication.num_files))

    def finished(self, record: Mapping[str, Any]) -> None:
        """Do nothing: without a cluster there are no metrics."""


def _summaries(scoring: Scoring, parts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the summaries of parts that a new process scores, until it is done or dies."""
    ours, theirs = Pipe()
    with ours, child_stderr() as stderr:
        with theirs:
            process = subprocess.Popen(
                **child_process(__name__, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stderr=stderr,
                start_new_session=True,  # so that Ctrl-C reaches only this process, which ends the other
            )
        try:
            with suppress(ConnectionError):  # it has died, which `_answer` finds out
                ours.send((scoring, parts))
            while (answer := _answer(ours, process)) is not None:
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            process.kill()
            process.wait()


def _answer(pipe: Connection, process: subprocess.Popen[bytes]) -> Any:
    """Return what the process sends next; None if it is done, or was killed.

    Raises:
        JobError: it ended by itself, so another one would end, too.
    """
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        status = process.wait()
        if status >= 0:
            raise JobError(f"the process that scores ended with status {status}; what it printed says why") from None
        return None


def main(descriptor: int) -> None:
    """Score the parts that the pipe names, and send each part's summary, then None; or the exception that ended it."""
    with Connection(descriptor) as pipe:
        scoring, parts = pipe.recv()
        threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
        try:
            scorer = PartScorer(scoring)
            for part in parts:
                pipe.send(scorer.score(part))
            pipe.send(None)
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))  # of this process; shown if it is a bug
            pipe.send(error)


def _end_with(pipe: Connection) -> None:
    """End this process when the other one ends."""
    pipe.poll(None)  # nothing more is sent, so this returns at the end of the pipe
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
