"""What a network that answers several questions at once is asked: class, box, label map, its
boundaries, which classes are in the picture. One constructor each.

A goal judges in two steps: `evidence` is what its metric needs to know of each image, `score` makes
the metric of the evidence of any set of images. So every metric, a mean over images or not, can be
resampled over images (`nas.paired`).

An answer that is NaN, as a network gives that overflows in half precision, is a wrong one, in every
metric but a user's own (`own`), which sees it. NaN as evidence means that nobody labelled the
image, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.heads import Answer

Outputs = Mapping[str, Tensor]  # what a network returns: one tensor per goal, by the goal's name
Targets = Mapping[str, Tensor]  # rows belong to the images of a batch

VOID = 255  # in label maps: pixels that nobody labelled
UNLABELLED = -1  # as a class: the image has none
PRESENT = 0.01  # share of an image's pixels from which on a class counts as being in it
THRESHOLDS = torch.arange(1, 20) / 20  # of boundary probability
SLACK = 3  # side of the square in which a boundary pixel may match another: one pixel off


@dataclass(frozen=True, eq=False)
class Goal:
    """One question. `name` is also the key of the network's answer."""

    name: str
    loss: Callable[[Outputs, Targets], Tensor]  # scalar, mean over the batch
    evidence: Callable[[Outputs, Targets], Tensor]  # [N, ...]
    score: Callable[[Tensor], float]  # of evidence; higher is better
    imitate: Callable[[Tensor, Tensor], Tensor] | None = None  # (own, teacher's answer) -> scalar
    weight: float = 1.0  # of the loss among those of the other goals
    answer: Answer | None = None  # what a head for it returns; None: nobody said
    #: which images [N] anybody labelled for it; the others are left out of loss and metric
    labelled: Callable[[Targets], Tensor] | None = None

    def metric(self, outputs: Outputs, targets: Targets) -> float:
        return self.score(self.evidence(outputs, targets))


# ---- class ---------------------------------------------------------------------------------------


def classes(name: str, *, target: str, n_classes: int | None = None) -> Goal:
    """One of C classes: logits [N, C], target int64 [N], UNLABELLED where an image has none; such
    images are left out. Metric: top-1 accuracy."""

    def loss(outputs: Outputs, targets: Targets) -> Tensor:
        if not known(targets).any():
            return _nothing(outputs[name])
        return F.cross_entropy(outputs[name], targets[target], ignore_index=UNLABELLED)

    def evidence(outputs: Outputs, targets: Targets) -> Tensor:
        answers = outputs[name]  # argmax takes NaN for the largest
        right = (answers.argmax(1) == targets[target]) & ~answers.isnan().any(1)
        return right.float().masked_fill(~known(targets), torch.nan)

    def known(targets: Targets) -> Tensor:
        return targets[target] != UNLABELLED

    answer = None if n_classes is None else Answer("vector", n_classes)
    return Goal(name, loss, evidence, _mean, soft, answer=answer, labelled=known)


def _nothing(outputs: Tensor) -> Tensor:
    """A loss of images without labels: zero, with a gradient."""
    return outputs.sum() * 0


def own(
    name: str,
    *,
    target: str,
    loss: Callable[[Tensor, Tensor], Tensor],
    metric: Callable[[Tensor, Tensor], float],
) -> Goal:
    """Logits [N, C] with a loss and a metric of the user's own, both of (logits, labels [N])."""

    def evidence(outputs: Outputs, targets: Targets) -> Tensor:
        labels = targets[target].double()[:, None]
        return torch.cat([outputs[name].double(), labels], 1)

    return Goal(
        name,
        loss=lambda outputs, targets: loss(outputs[name], targets[target]),
        evidence=evidence,
        score=lambda seen: float(metric(seen[:, :-1].float(), seen[:, -1].long())),
        imitate=soft,
    )


def soft(logits: Tensor, taught: Tensor) -> Tensor:
    """Cross-entropy to the teacher's distribution, over classes in dimension 1."""
    return F.cross_entropy(logits, taught.softmax(1))


def _mean(evidence: Tensor) -> float:
    return evidence.double().nanmean().item()


# ---- box -----------------------------------------------------------------------------------------


def box(name: str, *, target: str) -> Goal:
    """One box per image: answer [N, 4], target [N, 4] as left, top, right, bottom in shares of the
    image, NaN where there is none; such images are left out. Metric: mean IoU.

    The answer is the logits of centre x, centre y, width and height. Loss: generalised IoU
    (Rezatofighi et al., CVPR 2019) plus the mean distance of the four sides.
    """

    def evidence(outputs: Outputs, targets: Targets) -> Tensor:
        iou, _ = _iou(corners(outputs[name]), targets[target])
        return iou.masked_fill(iou.isnan() & known(targets), 0)

    def known(targets: Targets) -> Tensor:
        return ~targets[target].isnan().any(1)

    return Goal(
        name,
        loss=lambda outputs, targets: _box_loss(corners(outputs[name]), targets[target]),
        evidence=evidence,
        score=_mean,
        imitate=lambda own, taught: _box_loss(corners(own), corners(taught)),
        answer=Answer("box"),
        labelled=known,
    )


def corners(answer: Tensor) -> Tensor:
    """Logits of centre and size [N, 4] to left, top, right, bottom."""
    centre, size = answer.sigmoid().chunk(2, 1)
    return torch.cat([centre - size / 2, centre + size / 2], 1)


def _box_loss(boxes: Tensor, truth: Tensor) -> Tensor:
    known = ~truth.isnan().any(1)
    if not known.any():
        return _nothing(boxes)
    boxes, truth = boxes[known], truth[known]
    overlap, generalised = _iou(boxes, truth)
    return (1 - generalised).mean() + (boxes - truth).abs().mean()


def _iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU [N] and generalised IoU [N] of boxes [N, 4] row by row; NaN stays NaN."""
    inner = _area(torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:]))
    outer = _area(torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:]))
    union = (_area(a[:, :2], a[:, 2:]) + _area(b[:, :2], b[:, 2:]) - inner).clamp_min(1e-9)
    iou = inner / union
    return iou, iou - (outer - union) / outer.clamp_min(1e-9)


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp_min(0).prod(1)


# ---- label map -----------------------------------------------------------------------------------


def segmentation(name: str, *, target: str, n_classes: int) -> Goal:
    """A class per pixel: logits [N, C, H, W], target uint8 [N, H, W] with VOID pixels left out.
    Metric: IoU of all images' pixels together, mean over the classes that occur."""

    def loss(outputs: Outputs, targets: Targets) -> Tensor:
        truth = targets[target]
        if (truth == VOID).all():
            return _nothing(outputs[name])
        return F.cross_entropy(outputs[name], truth.long(), ignore_index=VOID)

    def evidence(outputs: Outputs, targets: Targets) -> Tensor:
        found = outputs[name].argmax(1).masked_fill(outputs[name].isnan().any(1), VOID)
        return _areas(found, targets[target], n_classes)

    answer = Answer("map", n_classes)
    known = _known_pixels(target)
    return Goal(name, loss, evidence, _mean_iou, soft, answer=answer, labelled=known)


def _known_pixels(target: str) -> Callable[[Targets], Tensor]:
    return lambda targets: (targets[target] != VOID).any(2).any(1)


def _areas(found: Tensor, truth: Tensor, n_classes: int) -> Tensor:
    """Pixels [N, C, 3] of each class: found rightly, found, there; pixels that are VOID in `truth`
    do not count, those that are VOID in `found` are of no class."""
    found = torch.where(truth == VOID, VOID, found)
    rows = []
    for label in range(n_classes):
        here, there = found == label, truth == label
        rows.append(torch.stack([part.sum((1, 2)) for part in (here & there, here, there)], 1))
    return torch.stack(rows, 1)


def _mean_iou(evidence: Tensor) -> float:
    both, found, there = evidence.sum(0).double().unbind(1)
    union = found + there - both
    return (both[union > 0] / union[union > 0]).mean().item()


# ---- boundaries ----------------------------------------------------------------------------------


def boundary(name: str, *, target: str) -> Goal:
    """Where a label map changes: logits [N, 1, H, W], target the map uint8 [N, H, W].

    Metric: F-measure at the best threshold for the whole set (ODS of edge detection). A pixel is
    right if the other side has one at most one pixel away. Ours: pixels are not matched one to one
    and answers are not thinned, which is lenient with thick lines by at most the tolerance.
    """
    return Goal(
        name,
        loss=lambda outputs, targets: _boundary_loss(outputs[name][:, 0], targets[target]),
        evidence=lambda outputs, targets: _matches(outputs[name][:, 0], targets[target]),
        score=_best_f,
        imitate=imitated,
        answer=Answer("map", 1),
        labelled=_known_pixels(target),
    )


def boundaries(labels: Tensor) -> Tensor:
    """True [N, H, W] where a pixel differs from its right or lower neighbour; VOID has none."""
    edge = torch.zeros_like(labels, dtype=torch.bool)
    for dim in (1, 2):
        length = labels.shape[dim] - 1
        one, other = labels.narrow(dim, 0, length), labels.narrow(dim, 1, length)
        edge.narrow(dim, 0, length).logical_or_((one != other) & (one != VOID) & (other != VOID))
    return edge


def imitated(logits: Tensor, taught: Tensor) -> Tensor:
    """Binary cross-entropy to the teacher's probabilities."""
    return F.binary_cross_entropy_with_logits(logits, taught.sigmoid())


def _boundary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    each = F.binary_cross_entropy_with_logits(
        logits, boundaries(labels).to(logits), reduction="none"
    )
    known = labels != VOID
    return (each * known).sum() / known.sum().clamp_min(1)


def _matches(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts [N, thresholds, 4]: answers that are right, answers, boundary found, boundary."""
    truth, known = boundaries(labels), labels != VOID
    near_truth, probability = _widened(truth), logits.sigmoid()
    rows = []
    for threshold in THRESHOLDS.tolist():
        found = (probability > threshold) & known
        parts = (found & near_truth, found, truth & _widened(found), truth)
        rows.append(torch.stack([part.sum((1, 2)) for part in parts], 1))
    return torch.stack(rows, 1)


def _widened(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask.float(), SLACK, 1, SLACK // 2).bool()


def _best_f(evidence: Tensor) -> float:
    right, answers, found, truth = evidence.sum(0).double().unbind(1)
    precision, recall = right / answers.clamp_min(1), found / truth.clamp_min(1)
    f = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return f.max().item()


# ---- presence ------------------------------------------------------------------------------------


def presence(name: str, *, target: str, n_classes: int) -> Goal:
    """Which classes are in the picture: logits [N, C], target the label map uint8 [N, H, W].

    Metric: mean average precision over the classes that some images have and others lack.
    """

    known = _known_pixels(target)

    def loss(outputs: Outputs, targets: Targets) -> Tensor:
        there = known(targets)
        if not there.any():
            return _nothing(outputs[name])
        wanted = present(targets[target], n_classes).to(outputs[name])
        return F.binary_cross_entropy_with_logits(outputs[name][there], wanted[there])

    def evidence(outputs: Outputs, targets: Targets) -> Tensor:
        wanted = present(targets[target], n_classes).to(outputs[name])
        # the worst rank for what is no number: below all others if it is there, else above
        worst = torch.where(wanted > 0, -torch.inf, torch.inf).to(wanted)
        answers = outputs[name].where(~outputs[name].isnan(), worst)
        rows = torch.stack([answers, wanted], 2)
        return rows.masked_fill(~known(targets)[:, None, None], torch.nan)

    answer = Answer("vector", n_classes)
    score = _mean_average_precision
    return Goal(name, loss, evidence, score, imitated, answer=answer, labelled=known)


def present(labels: Tensor, n_classes: int) -> Tensor:
    """Bool [N, C]: does the class fill PRESENT of the image's pixels?"""
    shares = [(labels == label).float().mean((1, 2)) for label in range(n_classes)]
    return torch.stack(shares, 1) >= PRESENT


def _mean_average_precision(evidence: Tensor) -> float:
    known = ~evidence.isnan().flatten(1).any(1)
    scores, wanted = evidence[known].double().unbind(2)
    order = scores.argsort(dim=0, descending=True, stable=True)
    hit = wanted.gather(0, order)
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1, device=hit.device)[:, None]
    positives = hit.sum(0)
    told = (positives > 0) & (positives < len(hit))
    return ((precision * hit).sum(0)[told] / positives[told]).mean().item()
