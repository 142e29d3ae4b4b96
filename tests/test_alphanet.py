from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import alphanet


def logits(seed, rows=8, classes=7, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    pair = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return pair[0].requires_grad_(), pair[1]


def exact(student, teacher, alpha):
    """The divergence as it is defined, for autograd to differentiate."""
    q, p = student.softmax(1), teacher.softmax(1)
    if alpha == 1:
        return (p * (p / q).log()).sum(1)
    return ((q * (p / q) ** alpha).sum(1) - 1) / (alpha * (alpha - 1))


@settings(deadline=None)  # the first call warms torch up
@given(st.integers(0, 50), st.sampled_from([-1.0, -0.5, 0.5, 1.0, 2.0]), st.floats(0.1, 2.0))
def test_value_and_gradient_are_those_of_the_exact_divergence(seed, alpha, scale):
    student, teacher = logits(seed, scale=scale)
    found = alphanet.divergence(student, teacher, alpha, clip=math.inf)
    wanted = exact(student, teacher, alpha)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    (ours,) = torch.autograd.grad(found.sum(), student)
    (theirs,) = torch.autograd.grad(wanted.sum(), student)
    size = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours / size, theirs / size, rtol=0, atol=1e-12)


def test_alpha_of_one_has_the_gradient_of_soft_cross_entropy():
    student, teacher = logits(0)
    (ours,) = torch.autograd.grad(alphanet.divergence(student, teacher, 1).mean(), student)
    (theirs,) = torch.autograd.grad(F.cross_entropy(student, teacher.softmax(1)), student)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_each_image_is_taught_by_the_larger_of_the_two():
    student, teacher = logits(3, rows=200)
    both = torch.stack([alphanet.divergence(student, teacher, a) for a in (-1.0, 1.0)])
    larger = both.argmax(0)
    assert 0 < int(larger.sum()) < 200, "both branches occur"
    assert alphanet.adaptive(student, teacher) == both.max(0).values.mean()
    (ours,) = torch.autograd.grad(alphanet.adaptive(student, teacher), student)
    for row in range(0, 200, 17):
        alpha = (-1.0, 1.0)[int(larger[row])]
        one = alphanet.divergence(student[row : row + 1], teacher[row : row + 1], alpha).sum()
        (theirs,) = torch.autograd.grad(one / 200, student)
        torch.testing.assert_close(ours[row], theirs[row])


def test_a_sharp_teacher_is_clipped():
    student, teacher = logits(1, scale=8.0)
    free, clipped = (
        torch.autograd.grad(alphanet.divergence(student, teacher, -1.0, c).sum(), student)[0]
        for c in (math.inf, 5.0)
    )
    assert clipped.abs().max() <= 5.0 < 100 < free.abs().max()


def test_no_divergence_between_equals():
    _, teacher = logits(2)
    assert alphanet.adaptive(teacher, teacher) == pytest.approx(0.0, abs=1e-12)
