"""`agr-ray train --dry-run`: the plan of a run, and its memory and time estimated from 20 real steps in this process.

Starts no cluster and writes nothing. Memory is counted in one step on two images: the state of the optimiser, and the
tensors that the forward pass saves for the backward pass, which grow in proportion to the batch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import torch
from rich.console import Console
from torch import Tensor

from agr_ray.config import TrainJob
from agr_ray.data.crops import TRAINING_COLUMNS, select_crops, training_arrays, usable_statuses
from agr_ray.data.prepared import PreparedSet
from agr_ray.errors import JobError
from agr_ray.learn.batches import Batch
from agr_ray.learn.context import LocalContext
from agr_ray.learn.loop import train as train_loop
from agr_ray.learn.monitor import NonFiniteLossError
from agr_ray.learn.optimise import build_optimizer
from agr_ray.learn.resources import MIN_VAL_BATCH, crop_bytes, max_kept_rows, spare_cpus
from agr_ray.learn.run import Run
from agr_ray.learn.schedule import epoch_side_px, steps_per_epoch
from agr_ray.models.network import MultiTaskNet
from agr_ray.models.precision import autocast, compute_dtype
from agr_ray.progress_bar import Update, progress

NUM_STEPS: Final = 20
MIN_STEPS: Final = 2
MAX_S: Final = 30.0
"""After this time no more steps are taken: on a slow CPU, one of a ResNet50 at 224 px takes ten seconds."""
_WARM_UP_STEPS: Final = 3
"""Steps before the timed ones, in which algorithms are chosen and memory is allocated."""
_NUM_VAL_BATCHES: Final = 3
_MIB: Final = 2**20


@dataclass(frozen=True)
class Memory:
    """Memory of one worker's training step, bytes."""

    weights: int
    """Weights and batch-norm statistics."""
    gradients: int
    optimizer: int
    average: int
    """Moving average of weights; 0: there is none."""
    activations: int
    """Tensors saved by the forward pass for the backward pass, for one micro-batch."""

    @property
    def total(self) -> int:
        """The sum. The framework, its workspaces and augmentation need more."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Speed:
    """Measured times at one image size, seconds."""

    step_s: float
    """Time of one optimiser step on one worker's batch, including augmentation."""
    val_row_s: float
    """Time to validate one image."""


def dry_run(run: Run, sets: Sequence[PreparedSet], model: MultiTaskNet, num_cpus: int, console: Console) -> float:
    """Print the plan of a run, and the memory and time that it is likely to need; return the seconds.

    Args:
        run: the run, as its workers would get it.
        sets: its prepared sets, of which only the first crops are read.
        model: with its initial weights; not changed.
        num_cpus: CPUs of this machine that this process may use.
        console: where to print.

    Raises:
        JobError: the loss is not finite in one of the steps.
    """
    job, config = run.job, run.job.train
    for line in plan_lines(run, model):
        console.print(line)
    device = torch.device("cuda" if config.use_gpu and torch.cuda.is_available() else "cpu")
    batch_size = math.ceil(config.batch_size / config.min_workers)
    largest = max(_sides(job))
    crops = _first_crops(run, sets, batch_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads_per_worker or max(1, num_cpus // config.min_workers))
    try:
        micro_batch = math.ceil(batch_size / config.grad_accum_steps)
        memory = count_memory(model, job, largest, micro_batch, device)
        for line in memory_lines(run, memory, micro_batch, largest, device):
            console.print(line)
        speeds = {}
        for side in _sides(job):
            at_most = _WARM_UP_STEPS + NUM_STEPS
            with progress(console, f"timing at most {at_most} steps at {side} px, done", None) as update:
                speeds[side] = time_steps(run, model, crops, side, device, update)
    except NonFiniteLossError as error:
        raise JobError(f"dry run: {error}; train.grad_clip_norm or a lower train.lr may help") from None
    finally:
        torch.set_num_threads(threads)
    for line in time_lines(run, speeds, device):
        console.print(line)
    console.print("dry run: nothing was written")
    return run_s(run, speeds)


def plan_lines(run: Run, model: MultiTaskNet) -> list[str]:
    """Return the part of the plan that needs no measurement: data, classes, steps, parameters, workers."""
    job, config = run.job, run.job.train
    steps = steps_per_epoch(run.num_train_rows, config)
    counts = run.data["train_labels"]
    parameters = sum(p.numel() for p in model.parameters())
    workers = f"{config.min_workers}" if config.min_workers == config.max_workers else f"at least {config.min_workers}"
    resources = f"{config.cpus_per_worker:g} CPU" + (" and 1 GPU" if config.use_gpu else "")
    share = f"{math.ceil(config.batch_size / config.min_workers)} images per step each"
    if config.grad_accum_steps > 1:
        share += f" in {config.grad_accum_steps} micro-batches"
    lines = [
        f"data: {run.data['uri']}: {run.num_train_rows:,} training crops, {run.num_val_rows:,} validation crops",
    ]
    for part in run.data.get("sets", ()):
        lines.append(
            f"of them {part['uri']}: {part['num_train_rows']:,} training crops, "
            f"{100 * part['share']:.1f} % of those drawn; {part['num_val_rows']:,} validation crops"
        )
    for attribute in ("gender", "race", "age_group"):
        of = ", ".join(f"{name} {count:,}" for name, count in counts[attribute].items())
        lines.append(f"training labels, {attribute.replace('_', ' ')}: {of}")
    return [
        *lines,
        f"network: {job.model.backbone}, heads {', '.join(model.tasks)}, {parameters:,} parameters, "
        f"{_shown_sides(job)} px",
        f"steps: {steps:,} per epoch, {config.batch_size} images each; {steps * config.epochs:,} in all "
        f"{config.epochs} epochs",
        f"workers: {workers} x {resources}, {share}; "
        f"including reading, {config.min_workers * config.cpus_per_worker + spare_cpus(config):g} logical CPUs in all",
    ]


def memory_lines(run: Run, memory: Memory, num_images: int, side_px: int, device: torch.device) -> list[str]:
    """Return the memory of a worker's step on a micro-batch of `num_images`, and of its decoded crops."""
    config = run.job.train
    held = f"weights {_mib(memory.weights)}, gradients {_mib(memory.gradients)}, optimiser {_mib(memory.optimizer)}"
    if memory.average:
        held += f", average of weights {_mib(memory.average)}"
    kind = str(compute_dtype(device, config.precision)).removeprefix("torch.")
    share = math.ceil(run.num_train_rows / config.min_workers)
    decoded = share * crop_bytes(run.transform)
    kept = share <= max_kept_rows(run.job.train, run.transform)
    return [
        f"memory of a worker's step: {_mib(memory.total)}: {held}, activations {_mib(memory.activations)} for "
        f"{num_images} images of {side_px} px in {kind} (extrapolated from two images; without the framework's own)",
        f"memory of a worker's crops: {_mib(decoded)} decoded, twice that while they are joined; "
        + (
            "kept after the first epoch"
            if kept
            else f"more than train.cache_mib {config.cache_mib}, so they are streamed in every epoch"
        ),
    ]


def run_s(run: Run, speeds: Mapping[int, Speed]) -> float:
    """Return the estimated time of the run, seconds, from the times at each image size."""
    epochs = _num_epochs(run)
    return sum(epochs[side] * _epoch_s(run, speed) for side, speed in speeds.items())


def _num_epochs(run: Run) -> Counter[int]:
    """Return the number of epochs at each image size."""
    config = run.job.train
    return Counter(epoch_side_px(epoch, config, run.job.model.image_size) for epoch in range(1, config.epochs + 1))


def _epoch_s(run: Run, speed: Speed) -> float:
    config = run.job.train
    steps = steps_per_epoch(run.num_train_rows, config)
    return steps * speed.step_s + run.num_val_rows / config.min_workers * speed.val_row_s


def time_lines(run: Run, speeds: dict[int, Speed], device: torch.device) -> list[str]:
    """Return the estimated times of epochs and of the run, from the times at each image size."""
    config, epochs, lines = run.job.train, _num_epochs(run), []
    for side, speed in speeds.items():
        lines.append(
            f"time at {side} px: {speed.step_s * 1000:.0f} ms per step, "
            f"{config.batch_size / speed.step_s:.0f} samples/s of all workers; {duration_text(_epoch_s(run, speed))} "
            f"per epoch with validation, epochs: {epochs[side]}"
        )
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
    lines.append(
        f"total time: {duration_text(run_s(run, speeds))}, estimated from at most {NUM_STEPS} steps on {on}; without "
        "reading and decoding in the first epoch, exchange of gradients, and checkpoints"
    )
    if config.use_gpu and device.type == "cpu":
        lines.append("warning: train.use_gpu is set, but this machine has no GPU: the times are those of its CPU")
    return lines


def count_memory(model: MultiTaskNet, job: TrainJob, side_px: int, num_images: int, device: torch.device) -> Memory:
    """Count the memory of a training step, by taking one step on two images.

    Args:
        model: not changed.
        job: its optimiser, precision and moving average.
        side_px: of the images.
        num_images: of one worker's micro-batch, for which activations are counted.
        device: on which the step is taken.
    """
    model = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, job.train)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict(keep_vars=True).values()}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    images = torch.rand(2, 3, side_px, side_px, device=device).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        with autocast(device, job.train.precision):
            outputs = model(images)
        # Saved tensors are alive until backward, so no address is reused.
        loss = torch.stack([each.mean() for each in _tensors(tuple(outputs.values()))]).sum()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
    optimizer.step()
    weights = _num_bytes(model.state_dict().values())
    return Memory(
        weights=weights,
        gradients=_num_bytes(p.grad for p in model.parameters() if p.grad is not None),
        optimizer=_num_bytes(
            value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ),
        average=weights if job.train.ema_decay else 0,
        activations=sum(saved.values()) * num_images // 2,
    )


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples."""
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        for each in outputs:
            yield from _tensors(each)


def time_steps(
    run: Run, model: MultiTaskNet, crops: Batch, side_px: int, device: torch.device, update: Update
) -> Speed:
    """Time up to `NUM_STEPS` steps of one worker in the training loop itself, all on the same crops.

    The backbone is trained in all of them; steps with a frozen one (`train.freeze_epochs`) are faster.
    """
    batch_size = len(crops["age"])
    job = run.job.model_copy(
        update={
            "train": run.job.train.model_copy(
                update={
                    "epochs": 1,
                    "num_workers": 1,
                    "image_sizes": (),
                    "freeze_epochs": 0,
                    "batch_size": batch_size,
                }
            )
        }
    )
    context = _Timed(crops, crops, batch_size, device=device)
    context.on_progress = lambda now: update(now.num_samples // batch_size, "")
    transform = dataclasses.replace(run.transform, image_size=side_px)
    num_rows = batch_size * (_WARM_UP_STEPS + NUM_STEPS)
    train_loop(context, copy.deepcopy(model), transform, job, run.baseline, num_rows)
    return Speed(context.train_s / context.num_steps, context.val_s / (_NUM_VAL_BATCHES * context.num_val_rows))


@dataclass
class _Timed(LocalContext):
    """Repeats one batch, and times the steps."""

    train_s: float = field(default=0.0, init=False)
    num_steps: int = field(default=0, init=False)
    """Timed steps: fewer than `NUM_STEPS` if they are slow."""
    val_s: float = field(default=0.0, init=False)

    @property
    def num_val_rows(self) -> int:
        """Rows of a validation batch."""
        return max(len(self.val["age"]), MIN_VAL_BATCH)

    def train_batches(self, epoch: int, steps_done: int = 0) -> Iterator[Batch]:  # noqa: ARG002  # all alike
        """Yield the batch for the warm-up steps and the timed ones."""
        for _ in range(_WARM_UP_STEPS):
            yield self.train
        start = self._now()
        while self.num_steps < NUM_STEPS and (self.num_steps < MIN_STEPS or self.train_s < MAX_S):
            yield self.train
            self.num_steps += 1
            self.train_s = self._now() - start

    def val_batches(self) -> Iterator[Batch]:
        """Yield one batch to warm up, and those that are timed."""
        rows = torch.arange(self.num_val_rows).numpy() % len(self.val["age"])
        batch = {name: values[rows] for name, values in self.val.items()}
        yield batch
        start = self._now()
        for _ in range(_NUM_VAL_BATCHES):
            yield batch
        self.val_s = self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _first_crops(run: Run, sets: Sequence[PreparedSet], batch_size: int) -> Batch:
    """Return one worker's batch of crops; if the sets have fewer, repeat them."""
    storage = run.storage
    statuses = usable_statuses(use_fallback=run.job.train.use_fallback)
    tables: list[pa.Table] = []
    for uri in (uri for prepared in sets for uri in prepared.parts(storage)):
        columns = [*TRAINING_COLUMNS, "split", "status"]
        tables.append(select_crops(storage.read_table(uri, columns=columns), "train", statuses))
        if sum(table.num_rows for table in tables) >= batch_size:
            break
    rows = pa.concat_tables(tables)
    arrays = training_arrays(rows.slice(0, batch_size), sets[0].crop_side_px, run.baseline.space)
    chosen = torch.arange(batch_size).numpy() % len(arrays["age"])
    return {name: values[chosen] for name, values in arrays.items()}


def _sides(job: TrainJob) -> list[int]:
    """Return the distinct image sides of the run, in order, pixels."""
    return list(dict.fromkeys(job.train.image_sizes or (job.model.image_size,)))


def _shown_sides(job: TrainJob) -> str:
    return " then ".join(map(str, _sides(job)))


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.0f} MiB"


def duration_text(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"
