"""Losses, evidence and metrics of goals against values worked out by hand or by another library."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score, jaccard_score

from nas import goals
from nas.goals import (
    VOID,
    boundaries,
    boundary,
    box,
    classes,
    corners,
    presence,
    present,
    segmentation,
)

NAN = float("nan")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape, high, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def answer_for(boxes):
    """The logits of which `corners` makes these boxes."""
    left, top, right, bottom = torch.tensor(boxes).unbind(1)
    parts = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    return torch.stack(parts, 1).logit()


def test_top_1():
    goal = classes("c", target="y")
    outputs = {"c": torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])}
    targets = {"y": torch.tensor([0, 1, 1])}
    assert goal.evidence(outputs, targets).tolist() == [1, 1, 0]
    assert goal.metric(outputs, targets) == pytest.approx(2 / 3)


def test_boxes_by_hand():
    goal = box("b", target="t")
    # the same box; half of it; a box that is elsewhere; none at all
    answers = [
        [0.2, 0.2, 0.6, 0.6],
        [0.2, 0.2, 0.6, 0.4],
        [0.0, 0.0, 0.1, 0.1],
        [0.1, 0.1, 0.9, 0.9],
    ]
    truth = torch.tensor([answers[0]] * 3 + [[NAN] * 4])
    outputs, targets = {"b": answer_for(answers)}, {"t": truth}
    found = goal.evidence(outputs, targets)
    assert found[:3].tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-5)
    assert found[3].isnan()
    assert goal.score(found) == pytest.approx(0.5, abs=1e-5)
    # generalised IoU of the third: no overlap, 0.36 enclosing, 0.17 covered
    generalised = [1.0, 0.5, 0.0 - (0.36 - 0.17) / 0.36]
    distances = [0.0, 0.05, (0.2 + 0.2 + 0.5 + 0.5) / 4]
    loss = sum(1 - g + d for g, d in zip(generalised, distances, strict=True)) / 3
    assert goal.loss(outputs, targets).item() == pytest.approx(loss, abs=1e-5)


GOALS = {
    "class": classes("x", target="class"),
    "box": box("x", target="box"),
    "segmentation": segmentation("x", target="map", n_classes=2),
    "boundary": boundary("x", target="map"),
    "presence": presence("x", target="map", n_classes=2),
}


@pytest.mark.parametrize("bad", [3, 4])
@pytest.mark.parametrize("kind", GOALS)
def test_answers_that_are_not_numbers_are_wrong_ones(kind, bad):
    """Right on four images, then NaN on most or all of them; the fifth is labelled by nobody."""
    goal, boxes = GOALS[kind], torch.tensor([[0.1, 0.1, 0.5, 0.5]] * 5)
    truth = torch.zeros(5, 8, 8, dtype=torch.uint8)
    truth[1:4, :, 4:] = 1
    each = {
        "class": torch.tensor([[9.0, 0.0]] * 5),
        "box": answer_for(boxes.tolist()),
        "segmentation": torch.stack([truth == 0, truth == 1], 1) * 20.0 - 10,
        "boundary": boundaries(truth)[:, None] * 20.0 - 10,
        "presence": present(truth, 2) * 20.0 - 10,
    }
    truth[4], boxes[4] = VOID, NAN
    targets = {"class": torch.tensor([0, 0, 0, 0, -1]), "box": boxes, "map": truth}
    answers = each[kind]
    assert goal.metric({"x": answers}, targets) == pytest.approx(1, abs=1e-5)
    answers[:bad] = NAN
    found = goal.evidence({"x": answers}, targets)
    assert not found[:4].isnan().any()
    # class 1 is in three of four pictures, of which the worst ranking has one that lacks it first
    worst = (1 / 2 + 2 / 3 + 3 / 4) / 3 if kind == "presence" else 0
    assert goal.score(found) <= max(worst + 1e-6, {3: 0.5, 4: 0}[bad])


def test_a_batch_without_any_box_gives_no_gradient():
    answer = random(3, 4).requires_grad_()
    loss = box("b", target="t").loss({"b": answer}, {"t": torch.full((3, 4), NAN)})
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(answer.grad, torch.zeros(3, 4))


def test_one_missing_box_does_not_spoil_the_gradient():
    answer = random(2, 4).requires_grad_()
    truth = torch.tensor([[0.1, 0.1, 0.5, 0.5], [NAN] * 4])
    box("b", target="t").loss({"b": answer}, {"t": truth}).backward()
    assert answer.grad.isfinite().all()
    assert answer.grad[0].abs().sum() > 0
    assert answer.grad[1].abs().sum() == 0


def test_corners_are_ordered():
    made = corners(random(100, 4))
    assert (made[:, 2:] > made[:, :2]).all()


def test_mean_iou_agrees_with_another_library_and_leaves_void_out():
    goal = segmentation("s", target="m", n_classes=4)
    logits, truth = random(5, 4, 8, 8), labels(5, 8, 8, high=4)
    truth[:, 0] = VOID
    known = truth != VOID
    wanted = jaccard_score(truth[known], logits.argmax(1)[known], average="macro")
    assert goal.metric({"s": logits}, {"m": truth}) == pytest.approx(wanted)
    other = logits.clone()
    other[:, :, 0] = random(5, 4, 8, seed=1)
    same = [goal.loss({"s": x}, {"m": truth}).item() for x in (logits, other)]
    assert same[0] == pytest.approx(same[1])
    assert goal.metric({"s": other}, {"m": truth}) == pytest.approx(wanted)


def test_a_class_that_never_occurs_does_not_count():
    goal = segmentation("s", target="m", n_classes=5)
    truth = labels(2, 4, 4, high=3)
    logits = torch.nn.functional.one_hot(truth.long(), 5).permute(0, 3, 1, 2).float()
    assert goal.metric({"s": logits}, {"m": truth}) == 1


def test_boundaries_by_hand():
    found = boundaries(torch.tensor([[[0, 0, 1], [0, 0, 1], [VOID, 2, 2]]], dtype=torch.uint8))
    assert found[0].int().tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 0]]


def _drawn(truth, probability=0.9):
    return torch.where(truth, probability, 1 - probability).logit()[:, None]


def test_a_perfect_boundary_scores_one_also_when_it_is_one_pixel_off():
    labels_ = torch.zeros(1, 9, 9, dtype=torch.uint8)
    labels_[:, :, 4:] = 1
    truth = boundaries(labels_)
    goal = boundary("e", target="m")
    # two pixels off, nothing beats calling every pixel a boundary: precision 3/9, recall 1
    for off, wanted in ((0, 1.0), (1, 1.0), (2, 0.5)):
        logits = _drawn(truth.roll(off, 2))
        assert goal.metric({"e": logits}, {"m": labels_}) == pytest.approx(wanted)


def test_boundary_counts_both_kinds_of_errors():
    labels_ = torch.zeros(1, 12, 12, dtype=torch.uint8)
    labels_[:, :, 6:] = 1
    truth = boundaries(labels_)
    half = truth.clone()
    half[:, 6:] = False  # and one row more is within the tolerance
    goal = boundary("e", target="m")
    recall = 7 / 12
    wanted = 2 * recall / (1 + recall)
    assert goal.metric({"e": _drawn(half)}, {"m": labels_}) == pytest.approx(wanted)
    everywhere = torch.ones_like(truth)
    precision = 3 / 12
    wanted = 2 * precision / (1 + precision)
    assert goal.metric({"e": _drawn(everywhere)}, {"m": labels_}) == pytest.approx(wanted)


def test_the_threshold_is_the_best_of_the_whole_set():
    labels_ = torch.zeros(1, 9, 9, dtype=torch.uint8)
    labels_[:, :, 4:] = 1
    faint = _drawn(boundaries(labels_), 0.6) - 2.5  # 0.11 on the boundary, 0.05 elsewhere
    assert boundary("e", target="m").metric({"e": faint}, {"m": labels_}) == pytest.approx(1.0)


def test_mean_average_precision_agrees_with_another_library():
    goal = presence("p", target="m", n_classes=3)
    maps, logits = labels(40, 6, 6, high=2), random(40, 3)
    maps[::3] = 2  # only the third class: so the first two are missing in some
    there = present(maps, 3)
    wanted = [average_precision_score(there[:, c], logits[:, c]) for c in range(3)]
    assert goal.metric({"p": logits}, {"m": maps}) == pytest.approx(sum(wanted) / 3)


def test_presence_leaves_out_what_is_always_there():
    goal = presence("p", target="m", n_classes=2)
    maps = torch.zeros(4, 4, 4, dtype=torch.uint8)
    maps[:2, 0, 0] = 1  # 1/16 of the pixels; class 0 is in every image
    logits = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [0.0, -2.0]])
    # class 1: right at ranks 1 and 3
    assert goal.metric({"p": logits}, {"m": maps}) == pytest.approx((1 + 2 / 3) / 2)


def test_imitation_is_least_where_the_answers_agree():
    for goal, shape in (
        (classes("g", target="y"), (6, 5)),
        (box("g", target="y"), (6, 4)),
        (segmentation("g", target="y", n_classes=5), (2, 5, 4, 4)),
        (boundary("g", target="y"), (2, 1, 4, 4)),
        (presence("g", target="y", n_classes=3), (6, 3)),
    ):
        taught = random(*shape)
        own = taught.clone().requires_grad_()
        at_teacher = goal.imitate(own, taught)
        at_teacher.backward()
        assert own.grad.abs().max() < 1e-3 or goal.name == "box"
        assert goal.imitate(random(*shape, seed=1), taught) > at_teacher


# ---- images that nobody labelled -----------------------------------------------------------------


def unlabelled(target):
    """The targets of two images with the second one's label taken away."""
    taken = {name: t.clone() for name, t in target.items()}
    for t in taken.values():
        t[1] = {torch.int64: goals.UNLABELLED, torch.uint8: goals.VOID}.get(t.dtype, torch.nan)
    return taken


@pytest.mark.parametrize(
    ("goal", "answer", "target"),
    [
        (goals.classes("x", target="t"), (2, 3), torch.tensor([1, 2])),
        (goals.box("x", target="t"), (2, 4), torch.tensor([[0.1, 0.2, 0.5, 0.9]] * 2)),
        (
            goals.segmentation("x", target="t", n_classes=3),
            (2, 3, 4, 4),
            (torch.arange(32) % 3).view(2, 4, 4).to(torch.uint8),
        ),
        (
            goals.boundary("x", target="t"),
            (2, 1, 4, 4),
            (torch.arange(32) % 3).view(2, 4, 4).to(torch.uint8),
        ),
        (
            goals.presence("x", target="t", n_classes=3),
            (2, 3),
            (torch.arange(32) % 2).view(2, 4, 4).to(torch.uint8),
        ),
    ],
    ids=["class", "box", "segmentation", "boundary", "presence"],
)
def test_an_image_without_label_counts_for_nothing(goal, answer, target):
    outputs = {"x": torch.randn(answer, generator=torch.Generator().manual_seed(0))}
    outputs["x"].requires_grad_()
    both = unlabelled({"t": target})
    first = {"x": outputs["x"][:1]}, {"t": target[:1]}
    assert goal.labelled(both).tolist() == [True, False]
    torch.testing.assert_close(goal.loss(outputs, both), goal.loss(*first))
    score = goal.score(goal.evidence(outputs, both))
    assert score == pytest.approx(goal.score(goal.evidence(*first)), nan_ok=True)
    none = {"t": both["t"][1:]}
    loss = goal.loss({"x": outputs["x"][1:]}, none)
    loss.backward()
    assert loss == 0 and not outputs["x"].grad.any()
