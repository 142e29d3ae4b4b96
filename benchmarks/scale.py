"""A sandwich step in several processes: one sum of all gradients against torch's own wrapper.

Three ways to the same step of the same images, in turn in one run: one process that accumulates all
shards; N processes that sum once (`nas.parallel`); N processes with DistributedDataParallel, whose
synchronisation is held back (`no_sync`) in all backwards but the last, where it has to look for
unused parameters because sub-networks use different ones. The gradients must agree. On a machine
with fewer cores than processes the times say what synchronising costs, not what scaling gains.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import contract
from nas import parallel, space, supernet
from nas.elastic import Network, channels_last
from nas.parallel import Workers
from nas.supernet import Recipe
from nas.tasks import Split, Task

SIZE, CLASSES, BATCH = 32, 10, 128
WARM_UP = 2  # steps that are not counted


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--space", default="resnet")
    parser.add_argument("--worker", action="store_true", help="for the launcher alone")
    arguments = parser.parse_args(argv)
    repeats = 5 if arguments.quick else 25
    if arguments.worker:
        return worker(arguments.space, repeats)
    outcome = contract.Outcome("scale")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(arguments.processes), "-m", "benchmarks.scale", "--worker"]
    words = ["--space", arguments.space, *(["--quick"] if arguments.quick else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *words], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    header = ["way", "median ms per step", "spread (p90 / p10)"]
    rows = [[way, figures[f"{way}_ms"], figures[f"{way}_spread"]] for way in ("one", "sum", "ddp")]
    print(contract.table(header, rows))
    alone = figures["sum_alone_ms"], figures["word_alone_ms"]
    print(f"the sum alone {alone[0]:.2f} ms, one word {alone[1]:.2f} ms")
    outcome.figures.update(figures, processes=arguments.processes)
    same = figures["gradient_difference"]
    outcome.aim("gradient difference, sum against one process", "<= 1e-5", same, same <= 1e-5)
    ratio = figures["sum_ms"] / figures["ddp_ms"]
    outcome.aim("step time, sum over torch's wrapper", "<= 1", ratio, ratio <= 1)
    return outcome.finish(arguments.save)


def worker(name: str, repeats: int) -> int:
    """One of the processes; the first prints the figures as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    workers = parallel.workers()
    figures = measured(name, workers, repeats)
    if workers.first:
        print(json.dumps(figures))
    dist.destroy_process_group()
    return 0


def measured(name: str, workers: Workers, repeats: int) -> dict[str, float]:
    """Medians over `repeats` rounds in which each way runs once, after the others have ended."""
    task = noise()
    made = space.load(name, channels=3, classes=CLASSES, size=SIZE)
    torch.manual_seed(0)
    net = channels_last(made.build(made.decode(made.largest)))
    wrapped = DistributedDataParallel(net, find_unused_parameters=True, broadcast_buffers=False)
    recipe = Recipe(steps=WARM_UP + repeats, batch=BATCH)
    archs = supernet.sandwich(made, recipe)
    seconds: dict[str, list[float]] = {"one": [], "sum": [], "ddp": []}
    differences = []
    for step in range(recipe.steps):
        found = {}
        for way, took in seconds.items():
            net.zero_grad(set_to_none=True)
            workers.wait()
            began = time.perf_counter()
            if way != "one" or workers.first:
                shards = Workers(0, 1) if way == "one" else workers
                whole = replace(recipe, accumulate=workers.size) if way == "one" else recipe
                model = wrapped if way == "ddp" else net
                backward(model, archs(step), task, whole, step, shards)
            workers.wait()
            took.append(time.perf_counter() - began)
            found[way] = gradients(net)
        if workers.first:
            differences.append(difference(found["sum"], found["one"]))
            differences.append(difference(found["ddp"], found["one"]))
    figures = {"gradient_difference": max(differences, default=0.0)}
    figures["sum_alone_ms"] = median_ms(lambda: workers.sum_(list(gradients(net).values())))
    figures["word_alone_ms"] = median_ms(workers.wait)
    for way, took in seconds.items():
        ms = 1e3 * np.array(took[WARM_UP:])
        figures[f"{way}_ms"] = float(np.median(ms))
        figures[f"{way}_spread"] = float(np.quantile(ms, 0.9) / np.quantile(ms, 0.1))
    return figures


def median_ms(work: Callable[[], None]) -> float:
    took = []
    for _ in range(50):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return 1e3 * float(np.median(took))


def backward(
    model: nn.Module, archs: list[object], task: Task, recipe: Recipe, step: int, workers: Workers
) -> None:
    """The gradients of a sandwich step, synchronised, left on the parameters."""
    rows = supernet.batch_indices(len(task.train), recipe.batch, step, recipe.seed)
    shards = workers.shards(len(rows), recipe.accumulate)
    ddp = isinstance(model, DistributedDataParallel)
    left = len(shards) * len(archs)
    for _, part in shards:
        at, target = rows[part], None
        x = task.normalise(task.train.images[at])
        for arch in archs:
            left -= 1
            with held_back(model, ddp and left > 0):
                logits = model(x, arch)
                wanted: Tensor = task.train.labels[at] if target is None else target
                loss = F.cross_entropy(logits, wanted) * len(at) / len(rows) / len(archs)
                (loss * workers.size if ddp else loss).backward()  # the wrapper divides
            target = logits.detach().softmax(1) if target is None else target
    if not ddp:
        workers.sum_([p.grad for p in model.parameters() if p.grad is not None])


@contextlib.contextmanager
def held_back(model: nn.Module, hold: bool) -> Iterator[None]:
    if not hold:
        yield
        return
    assert isinstance(model, DistributedDataParallel)
    with model.no_sync():
        yield


def gradients(net: Network) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest over all tensors, each as a share of its tensor's largest value."""
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-6)) for n in b)


def noise() -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1024, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(1024) % CLASSES)
    return Task("noise", tuple(map(str, range(CLASSES))), split, split, split)


if __name__ == "__main__":
    sys.exit(main())
