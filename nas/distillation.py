"""What each network of a step learns from: labels, the largest of the step, or a frozen teacher.

In place (universally slimmable networks, arXiv 1903.05134; BigNAS, 2003.11142): the first network
of a step learns from labels, the others only from its prediction (`kl`). With a frozen teacher
(Once-for-All, 1908.09791, section 3.3) every network learns from labels and from the teacher in
equal parts. `mixed`, the default, takes this second lesson from the first network of the step: in
trainings of minutes that network has little to teach for long (docs/methods/supernet.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from nas import alphanet
from nas.recipe import Recipe
from nas.tasks import Task


@dataclass(frozen=True)
class Lesson:
    """The labels [N] of a step's images, and a frozen teacher's logits [N, C] for them."""

    task: Task
    recipe: Recipe
    labels: Tensor
    taught: Tensor | None = None

    def loss(self, logits: Tensor, largest: Tensor | None) -> Tensor:
        """Of one network; `largest`: the detached logits of the first, None if this is the first.

        With a teacher's logits as target the soft cross-entropy differs from KL by the teacher's
        entropy, a constant: the gradients are the same.
        """
        if self.taught is not None:
            return (self._hard(logits) + self._soft(logits, self.taught)) / 2
        if largest is None or self.recipe.loss == "labels":
            return self._hard(logits)
        if self.recipe.loss == "mixed":
            return (self._hard(logits) + self._soft(logits, largest)) / 2
        return self._soft(logits, largest)

    def _hard(self, logits: Tensor) -> Tensor:
        if self.task.loss is F.cross_entropy:  # smoothing is defined for it alone
            smoothing = self.recipe.label_smoothing
            return F.cross_entropy(logits, self.labels, label_smoothing=smoothing)
        return self.task.loss(logits, self.labels)

    def _soft(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.recipe.loss == "alpha":
            return alphanet.adaptive(logits, target)
        return F.cross_entropy(logits, target.softmax(1))
