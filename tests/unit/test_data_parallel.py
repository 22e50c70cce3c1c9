"""Several processes whose gradients torch's own DDP averages over gloo, beside one process on the same rows."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from test_loop import STILL, TRANSFORM, faces, job, network, part, still_norms
from torch import Tensor, nn

from agr_ray.config import LossConfig
from agr_ray.evaluation.metrics import Baseline
from agr_ray.labels import UTKFACE, Labels
from agr_ray.learn.batches import Batch
from agr_ray.learn.context import LocalContext
from agr_ray.learn.loop import train

NUM = 11
SHARES = (slice(0, 6), slice(6, 10), slice(10, 11))
"""The second rank has no race, the third only an age."""
# One step of plain gradient descent at this rate moves each weight by its gradient.
CONFIG = job(
    {"epochs": 1, "optimizer": "sgd", "lr": 1.0, "batch_size": NUM, "grad_clip_norm": 0.0},
    loss=LossConfig(age_loss="mse", age_scale_years=20.0),
    augment=STILL,
)


class Gloo(LocalContext):
    """One of several processes."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)


def labelled() -> Batch:
    data = faces(NUM)
    data["race"][SHARES[1].start :] = -1
    data["gender"][SHARES[2]] = -1
    return data


def step(context: LocalContext) -> tuple[float, dict[str, Tensor]]:
    """Take the one step; return its loss and the gradients."""
    data, model = labelled(), still_norms(network(CONFIG))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    baseline = Baseline.fit(Labels.from_arrays(UTKFACE, data))
    (row,) = train(context, model, TRANSFORM, CONFIG, baseline, NUM)
    return row["train_loss"], {name: before[name] - value.detach() for name, value in model.named_parameters()}


def rank(number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=number, world_size=len(SHARES)
    )
    shares = [part(labelled(), rows) for rows in SHARES]
    context = Gloo(shares[number], shares[number], NUM, rank=number, world_size=len(SHARES))
    torch.save(step(context), folder / f"{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, dict[str, Tensor]]]:
    """Return the loss and the gradients of the step in each of three processes."""
    folder = tmp_path_factory.mktemp("ranks")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "agr_ray.learn.loop"])  # once, not in each process
    processes = [server.Process(target=rank, args=(number, folder)) for number in range(len(SHARES))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{number}.pt") for number in range(len(SHARES))]


@pytest.fixture(scope="module")
def of_one() -> tuple[float, dict[str, Tensor]]:
    return step(LocalContext(labelled(), labelled(), NUM))


def test_several_processes_have_the_same_loss_as_one(
    of_ranks: list[tuple[float, dict[str, Tensor]]], of_one: tuple[float, dict[str, Tensor]]
) -> None:
    assert [loss for loss, _ in of_ranks] == pytest.approx([of_one[0]] * len(SHARES), rel=1e-5)


def test_several_processes_have_the_same_gradient_as_one(
    of_ranks: list[tuple[float, dict[str, Tensor]]], of_one: tuple[float, dict[str, Tensor]]
) -> None:
    largest = max(float(gradient.abs().max()) for gradient in of_one[1].values())
    assert largest > 0.1
    for _, gradients in of_ranks:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, of_one[1][name], rtol=1e-5, atol=1e-5 * largest, msg=name)
