"""Who judges the networks of a search: the supernet that they are cut from, or each one's own short
training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from torch import nn

from cli import console, training
from cli.stages import Job
from nas import run as runs
from nas import supernet
from nas.elastic import Network
from nas.space import Genes
from nas.supernet import Score
from nas.tasks import Split

JUDGED_ON = 2_000  # validation images that rank networks; all of them if there are fewer


class Judge(ABC):
    """Validation score of a network: `judge(genes) -> (cross-entropy, metric)`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.calibration = supernet.calibration_images(job.task)
        val = job.task.val
        self.val = Split(val.images[:JUDGED_ON], val.labels[:JUDGED_ON])

    @abstractmethod
    def child(self, genes: Genes) -> Network:
        """The stand-alone network of `genes` with the weights it is judged by, in eval mode."""

    def score(self, net: nn.Module, resolution: int) -> Score:
        return supernet.evaluate(net, self.job.task, self.val, resolution)

    def __call__(self, genes: Genes) -> tuple[float, float]:
        resolution = self.job.space.decode(genes).resolution
        score = self.score(self.child(genes), resolution)
        return score.cross_entropy, score.accuracy


class Inherited(Judge):
    """By the weights it has in a supernet."""

    def __init__(self, job: Job, net: nn.Module) -> None:
        super().__init__(job)
        self.net = net

    def child(self, genes: Genes) -> Network:
        return supernet.child(self.net, self.job.space, genes, self.calibration)


class Alone(Judge):
    """By a short training of its own, `--epochs` long; the weights stay in the run."""

    def child(self, genes: Genes) -> Network:
        """Trains it, unless the run has it; goes on where that was interrupted."""
        recipe, net = self.job.recipe, training.fresh(self.job, genes)
        archs, state = supernet.alone(net), self._state(genes)
        steps = supernet.train(net, archs, self.job.task, recipe, resume=state)
        with console.deferred_interrupt() as interrupted:
            for _ in steps:
                if interrupted():
                    steps.close()  # saves
                    raise KeyboardInterrupt
        return supernet.calibrate(net, self.calibration, net.arch.resolution)

    def _state(self, genes: Genes) -> Path:
        name = runs.digest([genes.tolist(), self.job.train_key])[:16]
        return self.job.run.path(runs.TRAINED) / f"{name}.safetensors"


def made(job: Job) -> Judge:
    """The judge that the spec asks for; trains its supernet if there is none yet."""
    from cli import stages

    return Alone(job) if job.spec.alone else Inherited(job, stages.trained_supernet(job))
