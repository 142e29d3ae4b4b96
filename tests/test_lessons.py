"""Every lesson against its formula in plain numpy loops, and what must hold of each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nets import conv

from compress.lessons import Weighted, mi_alpha
from compress.lessons.attention import Attention
from compress.lessons.energy import Energy
from compress.lessons.features import Features
from compress.lessons.logits import Logits
from compress.lessons.mi_alpha import MiAlpha
from compress.lessons.relations import KINDS, Relations
from compress.watching import watching
from nas.errors import UsageError
from nas.seen import Heads, Seen

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)


def seen(width, heads, seed, *, mask=MASK):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    layer = Heads(*(draw(2, 5, width) for _ in "qkv"))
    return Seen((draw(2, 5, width),), (layer,), (heads,), mask, draw(2, 3))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def directly(student, teacher, heads, kind):
    """The sums of the papers, one row of one relation head at a time."""
    total = 0.0
    for mine, wanted in zip(student.attention[0], teacher.attention[0], strict=True):
        terms = []
        for n in range(2):
            real = np.flatnonzero(MASK[n].numpy())
            for r in range(heads):
                for i in real:
                    rows = []
                    for x in (mine, wanted):
                        size = x.shape[2] // heads
                        part = x[n, :, r * size : (r + 1) * size].double().numpy()
                        rows.append(part[real] @ part[i] / math.sqrt(size))
                    a, b = rows
                    if kind == "scores":
                        terms += list((a - b) ** 2)
                    elif kind == "mse":
                        terms += list((softmax(a) - softmax(b)) ** 2)
                    else:
                        p, q = softmax(b), softmax(a)
                        terms.append((p * np.log(p / q)).sum())
        total += np.mean(terms)
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "heads", "relations"), [(12, 3, 4), (14, 2, 4), (8, 2, 1)])
def test_relations_are_the_formula(kind, width, heads, relations):
    """Also where the relation heads do not divide the width: what is left over is dropped."""
    student, teacher = seen(width, heads, 0), seen(16, 4, 1)
    found = Relations(relations, kind)(student, teacher)
    expected = directly(student, teacher, relations, kind)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_network_has_no_loss(kind):
    same = seen(16, 4, 0)
    assert float(Relations(4, kind)(same, same)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_relation_heads_matters_only_if_one_side_changes_it(kind):
    def permuted(found):
        parts = (x.unflatten(2, (4, 4))[:, :, [2, 0, 3, 1]].flatten(2) for x in found.attention[0])
        return Seen(found.features, (Heads(*parts),), found.heads, found.mask)

    a, b = seen(16, 4, 0), seen(16, 4, 1)
    loss = Relations(4, kind)
    assert float(loss(permuted(a), permuted(b))) == pytest.approx(float(loss(a, b)), rel=1e-6)
    assert float(loss(permuted(a), b)) != pytest.approx(float(loss(a, b)), rel=1e-3)


@pytest.mark.parametrize(
    "lesson",
    [*(Relations(4, kind) for kind in KINDS), Attention(), Energy(), Features(16, 16)],
    ids=[*KINDS, "attention", "energy", "features"],
)
def test_padding_counts_for_nothing(lesson):
    student, teacher = seen(16, 4, 0), seen(16, 4, 1)
    before = float(lesson(student, teacher).detach())
    for part in (*student.attention[0], *teacher.attention[0], *student.features):
        part[~MASK] = 100.0
    assert float(lesson(student, teacher).detach()) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_relations_of_any_width_have_finite_gradients(kind):
    for heads in range(1, 8):
        student, teacher = seen(heads * 4, heads, 0), seen(32, 8, 1)
        for part in student.attention[0]:
            part.requires_grad_()
        Relations(3, kind)(student, teacher).backward()
        for part in student.attention[0]:
            assert part.grad.isfinite().all() and part.grad.any()
            assert not part.grad[~MASK].any()


def test_more_relation_heads_than_channels_are_refused():
    with pytest.raises(UsageError, match="20 relation heads of 16 channels"):
        Relations(20)(seen(16, 4, 0), seen(64, 4, 1))
    with pytest.raises(UsageError, match="allowed: kl, mse, scores"):
        Relations(2, "l2")


def test_logits_are_the_formula_with_gradients_of_one_size():
    student, teacher = seen(8, 2, 0), seen(8, 2, 1)
    for t in (1.0, 4.0):
        rows = [[softmax(x[n].double().numpy() / t) for n in range(2)]
                for x in (teacher.logits, student.logits)]  # fmt: skip
        kl = np.mean([(p * np.log(p / q)).sum() for p, q in zip(*rows, strict=True)])
        assert float(Logits(t)(student, teacher)) == pytest.approx(t * t * kl, rel=1e-5)
    norms = []
    for t in (50.0, 500.0):
        logits = student.logits.clone().requires_grad_()
        Logits(t)(Seen(logits=logits), teacher).backward()
        norms.append(float(logits.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    assert float(Logits()(student, student)) == pytest.approx(0, abs=1e-7)


def test_features_are_the_formula_and_slice_their_adapter():
    lesson, student, teacher = Features(16, 6), seen(12, 3, 0), seen(6, 2, 1)
    weight, bias = lesson.adapter.weight.detach()[:, :12], lesson.adapter.bias.detach()
    total, n = 0.0, 0
    for example, place in MASK.nonzero().tolist():
        mine = weight @ student.features[0][example, place] + bias
        total += float((mine - teacher.features[0][example, place]).square().sum())
        n += 6
    assert float(lesson(student, teacher).detach()) == pytest.approx(total / n, rel=1e-5)


def test_attention_is_the_formula():
    student, teacher = seen(12, 3, 0), seen(16, 4, 1)
    shares = []
    for found, heads in ((student, 3), (teacher, 4)):
        size = found.attention[0].q.shape[2] // heads
        rows = {}
        for n in range(2):
            real = np.flatnonzero(MASK[n].numpy())
            for i in real:
                each = []
                for h in range(heads):
                    q, k = (x[n, :, h * size : (h + 1) * size].double().numpy()
                            for x in found.attention[0][:2])  # fmt: skip
                    each.append(softmax(k[real] @ q[i] / math.sqrt(size)))
                rows[n, i] = np.mean(each, 0)
        shares.append(rows)
    terms = [(p * np.log(p / shares[0][at])).sum() for at, p in shares[1].items()]
    assert float(Attention()(student, teacher)) == pytest.approx(np.mean(terms), rel=1e-4)


def test_energy_is_the_formula_on_maps():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, c, 3, 3, generator=generator) for c in (4, 7))
    maps = []
    for x in (a, b):
        flat = x.double().square().mean(1).flatten(1)
        maps.append(flat / flat.norm(dim=1, keepdim=True))
    expected = float((maps[0] - maps[1]).square().sum(1).mean())
    assert float(Energy()(Seen((a,)), Seen((b,)))) == pytest.approx(expected, rel=1e-5)


# ---- mutual information --------------------------------------------------------------------------


def info_nce(f):
    return math.log(len(f)) + float(np.mean(np.diag(f) - np.log(np.exp(f).sum(0))))


def test_alpha_one_is_info_nce_and_alpha_zero_is_nwj():
    f = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = f.numpy()
    assert float(mi_alpha.bound(f, 1.0)) == pytest.approx(info_nce(values), abs=1e-12)
    nwj = np.mean(np.diag(values)) - np.exp(values - 1).mean()
    assert float(mi_alpha.bound(f, 0.0)) == pytest.approx(nwj, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.99])
def test_in_between_it_is_the_formula(alpha):
    f = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    e = np.exp(f.numpy())
    d = alpha * e.mean(0) + (1 - alpha) * math.e
    expected = 1 + np.mean(np.log(np.diag(e) / d)) - (e / d).mean()
    assert float(mi_alpha.bound(f, alpha)) == pytest.approx(expected, abs=1e-12)


def test_info_nce_is_at_most_the_logarithm_of_the_batch():
    f = 50 * torch.eye(8, dtype=torch.float64)
    assert float(mi_alpha.bound(f, 1.0)) == pytest.approx(math.log(8), abs=1e-6)
    with pytest.raises(UsageError, match="0 to 1"):
        MiAlpha(8, 8, 1.5)


def test_mutual_information_is_learned_from_features_that_share_something():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(64, 4, generator=generator)
    teacher = Seen((shared @ torch.randn(4, 12, generator=generator),))
    torch.manual_seed(0)
    found = {}
    for name, source in (("same", shared), ("other", torch.randn(64, 4, generator=generator))):
        student = Seen((source @ torch.randn(4, 8, generator=generator),))
        lesson = MiAlpha(8, 12, size=8)
        optimiser = torch.optim.Adam(lesson.parameters(), lr=0.02)
        for _ in range(60):
            optimiser.zero_grad()
            lesson(student, teacher).backward()
            optimiser.step()
        found[name] = -float(lesson(student, teacher).detach())
    assert found["same"] > found["other"] + 1.0 and found["same"] < math.log(64) + 0.1


# ---- all of them ---------------------------------------------------------------------------------


def test_convolutional_networks_are_taught_through_the_same_interface():
    """Features of modules by name, a wider teacher, no line of either network changed."""
    torch.manual_seed(0)
    student, teacher = conv(), conv().eval()
    x = torch.randn(4, 3, 8, 8)
    lessons = [Features(8, 8), Energy(), Logits(), MiAlpha(8, 8)]
    with watching(student, ["1", "4"]) as ours, watching(teacher, ["1", "4"]) as theirs:
        with torch.no_grad():
            wanted = theirs(x)
        assert torch.equal(wanted.logits, teacher(x)) and len(wanted.features) == 2
        for lesson in lessons:
            student.zero_grad()
            lesson(ours(x), wanted).backward()
            assert student[0].weight.grad.isfinite().all() and student[0].weight.grad.any()
        whole = Weighted(lessons, (0.1, 1.0, 2.0, 0.5))(ours(x), wanted)
    with pytest.raises(UsageError, match="no submodule 'none'"):
        watching(student, ["none"]).__enter__()
    assert whole.isfinite() and not any(m._forward_hooks for m in student.modules())


def test_a_sum_is_the_weighted_sum():
    student, teacher = seen(16, 4, 0), seen(16, 4, 1)
    parts = [Relations(4), Attention()]
    expected = 0.3 * parts[0](student, teacher) + 2.0 * parts[1](student, teacher)
    torch.testing.assert_close(Weighted(parts, (0.3, 2.0))(student, teacher), expected)


@pytest.mark.parametrize(
    "lesson",
    [Relations(4), Attention(), Energy(), Features(16, 16), Logits(), MiAlpha(16, 16)],
    ids=lambda lesson: type(lesson).__name__,
)
def test_teachers_receive_no_gradient(lesson):
    student, teacher = seen(16, 4, 0), seen(16, 4, 1)
    tensors = [*teacher.attention[0], *teacher.features, teacher.logits]
    for tensor in (*tensors, *student.attention[0], *student.features, student.logits):
        tensor.requires_grad_()
    lesson(student, teacher).backward()
    assert all(tensor.grad is None for tensor in tensors)
    assert any(
        x.grad is not None for x in (*student.attention[0], *student.features, student.logits)
    )
