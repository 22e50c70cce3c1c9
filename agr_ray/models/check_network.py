"""Check that a checkpoint's weights fit its network, in another process. This module does not import torch.

Another process, because the driver of a scoring run stays small without torch, and lives for as long as the run.

    python -m agr_ray.models.check_network FOLDER     the other process; prints what is wrong as a JSON string
"""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
from pathlib import Path

from agr_ray.child_process import child_process
from agr_ray.errors import ConfigError, JobError
from agr_ray.models.checkpoint import Checkpoint, CheckpointError, read_checkpoint


def check_network(checkpoint: Checkpoint, uri: str, key: str) -> None:
    """Build the network of the checkpoint that a setting names on the CPU of another process, as workers do.

    Raises:
        ConfigError: as `checkpoint_network.given_network`, with the same message.
        JobError: the process failed for another reason.
    """
    command = child_process(__name__, str(checkpoint.directory))
    ended = subprocess.run(**command, capture_output=True, text=True, errors="replace")
    if ended.returncode:
        raise JobError(f"{key} {uri}: the network can't be built: {_reason(ended)}")
    problem = json.loads(ended.stdout.splitlines()[-1])  # libraries may print, too
    if problem:
        raise ConfigError(f"{key} {uri}: {problem}")


def _reason(ended: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that a failed process printed: the message of its error, if it was not killed."""
    if ended.returncode < 0:
        return f"its process was killed by {signal.Signals(-ended.returncode).name}; is this machine out of memory?"
    lines = ended.stderr.strip().splitlines()
    return lines[-1].strip() if lines else f"its process ended with status {ended.returncode}"


def main(directory: Path) -> None:
    """Build the network; print why it can't be built, or an empty string."""
    from agr_ray.models.checkpoint_network import load_network  # imports torch

    problem = ""
    try:
        load_network(read_checkpoint(directory))
    except CheckpointError as error:
        problem = str(error)
    print(json.dumps(problem))
    gc.freeze()  # else Python traverses all of torch when the process ends, for half a second


if __name__ == "__main__":
    main(Path(sys.argv[1]))
