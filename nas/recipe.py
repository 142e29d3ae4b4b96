"""How a network or a supernet is trained: every choice of a training in one frozen value.

A state on disk is fingerprinted by all of it. Imports without torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nas.errors import UsageError, unknown

POLICIES = ("uniform", "bestup", "worstup")
LOSSES = ("mixed", "kl", "alpha", "labels")
FLOOR_AT = 2 / 3  # of the steps: where an exponential decay has come down to its floor


@dataclass(frozen=True)
class Recipe:
    """The defaults suit small images and minutes, not days. Raises UsageError naming the flag.

    "The largest" is the first architecture of a step: of a network trained alone, itself.
    """

    steps: int
    batch: int = 128
    lr: float = 0.2  # peak per network: a step takes that times the number of its networks
    momentum: float = 0.9
    weight_decay: float = 5e-4  # not on norms and biases
    label_smoothing: float = 0.1
    warmup: float = 0.1  # share of the steps
    floor: float | None = None  # share of the peak: decay to it and stay; None: linear to zero
    clip_norm: float = 2.0
    n_random: int = 2
    policy: str = "uniform"  # how random networks are chosen: one of POLICIES
    candidates: int = 3  # networks of one cost that bestup and worstup choose among
    loss: str = "mixed"  # what all but the largest learn from: one of LOSSES
    dropout: float = 0.0  # of the largest's features
    drop_connect: float = 0.0  # of the largest's last block, linearly less towards the first
    operations: int = 0  # of random augmentation on each image
    magnitude: float = 0.5  # of these, 0 to 1
    cutout: float = 0.0  # side of the hole, as a share of the image's
    ema: float = 0.0  # decay of the average of the weights that replaces them at the end; 0: none
    bf16: bool = False  # forward passes in bfloat16 where torch's autocast does so
    seed: int = 0
    start: str = ""  # names the initial weights, where they are not the seed's
    #: micro-batches per process and step. As the number of processes, no part of what identifies a
    #: training: a state may be continued with another
    accumulate: int = field(default=1, repr=False)

    def __post_init__(self) -> None:
        for name, known in (("policy", POLICIES), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known, where=f"--{name}")
        if self.batch < 2:
            raise UsageError(
                f"a batch of {self.batch}",
                where="--batch",
                allowed="2 or more, because batch norms need a deviation",
            )
        for name in ("dropout", "drop_connect", "ema"):
            self._check(name, 0 <= getattr(self, name) < 1, "0 to below 1")
        for name in ("magnitude", "cutout"):
            self._check(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        for name, least in (
            ("n_random", 0),
            ("operations", 0),
            ("candidates", 1),
            ("steps", 0),
            ("accumulate", 1),
        ):
            self._check(name, getattr(self, name) >= least, f"{least} or more")
        self._check("floor", self.floor is None or 0 < self.floor <= 1, "above 0, up to 1")

    def _check(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{getattr(self, name)}", where=flag, allowed=allowed)

    def lr_at(self, step: int) -> float:
        """Linear warm-up; then linear to zero, or with `floor` exponential to that share of the
        peak at two thirds of the steps and constant from there (BigNAS, section 3.1)."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.floor is None:  # with few epochs a floor only costs accuracy
            return self.lr * (self.steps - step) / max(1, self.steps - warm)
        reached = max(warm + 1, math.ceil(FLOOR_AT * self.steps))
        return float(self.lr * self.floor ** min(1.0, (step - warm) / (reached - warm)))
