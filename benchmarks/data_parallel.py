"""Communication cost of data-parallel training: measured on this machine's CPUs, and calculated for 8 to 64 GPUs.

    python benchmarks/data_parallel.py [--backbone resnet50] [--side 224] [--batch 8] [--steps 8]

Measured, without Ray: one process, then --workers processes (DDP, gloo) with one thread each. Each gets --batch random
images per step, so twice the workers see twice the images. The benchmark prints

- samples/s, and the efficiency: the share of the throughput of as many independent processes;
- the same without communication (`no_sync`): the loss from sharing one machine's memory and caches;
- the bytes of gradients that DDP sends per step (a hook adds up its buckets), beside 4 bytes per parameter;
- the time of an all-reduce of as many bytes alone.

Calculated: a ring all-reduce among N GPUs sends 2 (N - 1) / N of the gradient's bytes through each GPU's link, which
takes bytes / speed at --link-gbit-s. A step computes for --batch-per-gpu / --samples-per-s-per-gpu. The table shows the
share of a step that communication would take if nothing overlapped. DDP sends a bucket while backward computes the
next, so this is an upper bound, except for latency and shared links. --samples-per-s-per-gpu is an assumption until it
is measured: `jobs/train.py --dry-run` reports it for an available GPU.
"""

# No annotations from __future__, because DDP needs a hook's annotations as types, not strings.
import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from agr_ray.config import LossConfig, ModelConfig, TrainConfig
from agr_ray.console import make_console
from agr_ray.labels import UTKFACE
from agr_ray.learn.losses import label_counts, multi_task_loss
from agr_ray.learn.optimise import build_optimizer
from agr_ray.models.network import MultiTaskNet

WARM_UP_STEPS: Final = 2
NUM_ALL_REDUCES: Final = 5
NUM_GPUS: Final = (8, 16, 32, 64)


@dataclass(frozen=True)
class Measured:
    """Results of one group of processes."""

    step_s: float
    alone_step_s: float
    """The same without communication."""
    sent_bytes: float
    """Bytes of gradients that one process sends in one step."""
    all_reduce_s: float
    """Time of an all-reduce of as many bytes alone; 0: there is only one process."""


def main() -> None:
    """Measure one process and several, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50", help="torchvision network (%(default)s)")
    parser.add_argument("--side", type=int, default=224, help="side of the images, pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images per process and step (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the larger group (%(default)s)")
    parser.add_argument("--link-gbit-s", type=float, nargs="+", default=[100.0, 400.0], help="calculated (100 400)")
    parser.add_argument("--samples-per-s-per-gpu", type=float, default=1000.0, help="calculated (%(default)s)")
    parser.add_argument("--batch-per-gpu", type=int, default=64, help="calculated (%(default)s)")
    arguments = parser.parse_args()
    console = make_console()
    config = ModelConfig(backbone=arguments.backbone, image_size=arguments.side)
    num_parameters = sum(p.numel() for p in MultiTaskNet(config, UTKFACE).parameters())
    groups = {size: measure(size, config, arguments.batch, arguments.steps) for size in (1, arguments.workers)}
    title = f"{config.backbone}, {arguments.side} px, {arguments.batch} images a step for each process"
    console.print(measured_table(groups, arguments.batch, title))
    several = groups[arguments.workers]
    console.print(
        f"gradients: each process sends {several.sent_bytes:,.0f} bytes per step; {num_parameters:,} "
        f"parameters of 4 bytes are {4 * num_parameters:,}; all-reduce of as many bytes alone: "
        f"{several.all_reduce_s * 1000:.0f} ms",
    )
    compute_s = arguments.batch_per_gpu / arguments.samples_per_s_per_gpu
    console.print(paper_table(4 * num_parameters, compute_s, arguments.link_gbit_s))


def measured_table(groups: dict[int, Measured], batch: int, title: str) -> Table:
    """Return the measurements, a row for each group."""
    table = Table("processes", "samples/s", "efficiency", "no communication", "efficiency", "ms a step", title=title)
    one = batch / groups[1].alone_step_s
    for size, found in groups.items():
        speed, alone = size * batch / found.step_s, size * batch / found.alone_step_s
        shares = f"{speed / (size * one):.1%}", f"{alone / (size * one):.1%}"
        table.add_row(str(size), f"{speed:.2f}", shares[0], f"{alone:.2f}", shares[1], f"{found.step_s * 1000:.0f}")
    return table


def paper_table(gradient_bytes: int, compute_s: float, links_gbit_s: list[float]) -> Table:
    """Return the maximum cost of communication, a row for each number of GPUs."""
    links = [f"at {link:g} Gbit/s" for link in links_gbit_s]
    title = f"calculated: {gradient_bytes / 1e6:.0f} MB of gradients, {compute_s * 1000:.0f} ms of computing a step"
    table = Table("GPUs", "MB sent by each", *(f"{each}: ms, share of a step" for each in links), title=title)
    for num_gpus in NUM_GPUS:
        sent = ring_bytes(gradient_bytes, num_gpus)
        seconds = [sent * 8 / (link * 1e9) for link in links_gbit_s]
        shown = (f"{each * 1000:.1f}, {each / (compute_s + each):.1%}" for each in seconds)
        table.add_row(str(num_gpus), f"{sent / 1e6:.0f}", *shown)
    return table


def ring_bytes(gradient_bytes: int, num_gpus: int) -> float:
    """Return the bytes that each member of a ring sends and receives: N - 1 parts to add, N - 1 parts of the sum."""
    return 2 * (num_gpus - 1) / num_gpus * gradient_bytes


def measure(size: int, config: ModelConfig, batch: int, num_steps: int) -> Measured:
    """Train in this many processes, and return the time of the slowest."""
    with tempfile.TemporaryDirectory(prefix="data-parallel-") as folder:
        torch.multiprocessing.spawn(work, (size, folder, config, batch, num_steps), nprocs=size)
        each_rank = [Measured(**torch.load(Path(folder, f"{rank}.pt"), weights_only=True)) for rank in range(size)]
    return Measured(
        step_s=max(each.step_s for each in each_rank),
        alone_step_s=max(each.alone_step_s for each in each_rank),
        sent_bytes=each_rank[0].sent_bytes,
        all_reduce_s=max(each.all_reduce_s for each in each_rank),
    )


def work(rank: int, size: int, folder: str, config: ModelConfig, batch: int, num_steps: int) -> None:
    """Run one of the processes: time steps and all-reduces, and write a `Measured` into the folder."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    model = MultiTaskNet(config, UTKFACE).to(memory_format=torch.channels_last)
    heads = model.heads_by_task
    optimizer = build_optimizer(model, TrainConfig())
    wrapped = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
    sent = SentBytes()
    wrapped.register_comm_hook(sent, add_up_and_send)
    images = torch.rand(batch, 3, config.image_size, config.image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = {"age": torch.rand(batch) * 90, "gender": torch.randint(2, (batch,)), "race": torch.randint(5, (batch,))}
    counts = label_counts(heads, targets) * size

    def step() -> None:
        loss, _ = multi_task_loss(heads, wrapped(images), targets, LossConfig(), counts, size)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    with wrapped.no_sync():
        alone_s = timed(step, num_steps)
    sent.num_bytes = 0
    step_s = timed(step, num_steps)
    sent_bytes = sent.num_bytes / (WARM_UP_STEPS + num_steps)
    gradients = torch.zeros(int(sent_bytes) // 4)
    all_reduce_s = timed(lambda: dist.all_reduce(gradients), NUM_ALL_REDUCES) if size > 1 else 0.0
    measured = Measured(step_s, alone_s, sent_bytes, all_reduce_s)
    torch.save(vars(measured), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@dataclass
class SentBytes:
    """Bytes counted by the hook."""

    num_bytes: int = 0


def add_up_and_send(sent: SentBytes, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket over processes, as DDP does itself, and count its bytes."""
    buffer = bucket.buffer()
    sent.num_bytes += buffer.numel() * buffer.element_size()
    return allreduce_hook(dist.group.WORLD, bucket)


def timed(act: Callable[[], object], num_times: int) -> float:
    """Return the mean time of an action, started by all processes together, after a warm-up, seconds."""
    for _ in range(WARM_UP_STEPS):
        act()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(num_times):
        act()
    return (time.perf_counter() - start) / num_times


if __name__ == "__main__":
    main()
