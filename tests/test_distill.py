from __future__ import annotations

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from texts import prose, save_teacher

from compress import adamw, finetune, inherit, members, teacher
from compress.adamw import Plan
from compress.distill import Course, distill
from compress.lessons.features import Features
from compress.lessons.relations import Relations
from nas import checkpoint
from nas.data import sentences, text
from nas.elastic import extract
from nas.errors import BudgetInfeasible, NasctlError
from nas.recipe import Recipe
from nas.sampling import sandwich
from nas.search_spaces.bert import Arch, Bert, Frame, Grid, Space

LENGTH, STEPS = 10, 6
PLAN = Plan(steps=STEPS, lr=1e-3)
GRID = Grid((2, 3), (32, 64), (2, 4), (4, 8))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder)
    return teacher.load(str(folder))


@pytest.fixture(scope="module")
def rows(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(prose(60))
    text.pack([folder / "a.txt"], LENGTH, found.encode, found.wrapping, folder / "packed")
    return torch.from_numpy(np.array(text.sequences(folder / "packed", LENGTH))).long()


@pytest.fixture
def space(found):
    return Space(size=LENGTH, grid=GRID, frame=found.net.frame)


@pytest.fixture
def course(found, rows):
    chosen = adamw.shuffled(len(rows), 8, seed=0)
    return Course(found.net.look, Relations(4), lambda step: rows[chosen(step)], "test")


def supernet(space, found):
    torch.manual_seed(0)
    return inherit.inherit(space.supernet(), found.net)


def archs_of(space):
    return sandwich(space, Recipe(steps=STEPS, seed=0))


def run(space, found, course, **how):
    net = supernet(space, found)
    steps = list(distill(net, archs_of(space), course, PLAN, **how))
    return net, steps


def test_every_size_learns(space, found, course, rows):
    net = supernet(space, found)
    archs = [space.decode(row) for row in (space.smallest, space.largest)]
    held_out = [rows[-20:]]
    wanted = members.taught(found.net.look, held_out, course.lesson)

    def losses():
        return [members.loss_of(net, arch, course.lesson, held_out, wanted) for arch in archs]

    before = losses()
    plan = Plan(steps=40, lr=3e-3)
    for _ in distill(net, sandwich(space, Recipe(steps=40, seed=0)), course, plan):
        pass
    assert all(after < 0.7 * was for was, after in zip(before, losses(), strict=True))


def test_a_step_runs_the_largest_the_smallest_and_two_others(space, found, course):
    _, steps = run(space, found, course)
    archs = [archs_of(space)(step) for step in range(STEPS)]
    assert [len(step.losses) for step in steps] == [4] * STEPS
    ends = [space.decode(space.largest), space.decode(space.smallest)]
    assert all(list(some[:2]) == ends for some in archs)
    assert len({tuple(some[2:]) for some in archs}) > 1


def test_stopping_anywhere_leads_to_the_same_bytes(tmp_path, space, found, course):
    whole, _ = run(space, found, course)
    path = tmp_path / "state.safetensors"
    for _ in range(STEPS):  # one step a time, each in a network that knows nothing
        net = supernet(space, found)
        going = distill(net, archs_of(space), course, PLAN, resume=path)
        next(going, None)
        going.close()
    assert checkpoint.digest(net) == checkpoint.digest(whole)


def test_a_state_of_another_training_is_refused(tmp_path, space, found, course):
    path = tmp_path / "state.safetensors"
    going = distill(supernet(space, found), archs_of(space), course, PLAN, resume=path)
    next(going)
    going.close()
    for other, plan in (
        (replace(course, fingerprint="else"), PLAN),
        (replace(course, lesson=Relations(4, "mse")), PLAN),
        (course, replace(PLAN, lr=2e-3)),
    ):
        with pytest.raises(NasctlError, match="another recipe or other data"):
            next(distill(supernet(space, found), archs_of(space), other, plan, resume=path))


def test_micro_batches_change_nothing_but_rounding(space, found, course):
    whole, _ = run(space, found, course)
    parts, _ = run(space, found, replace(course, accumulate=4))
    for name, tensor in whole.state_dict().items():
        # Adam divides by what may be nearly nothing: close, not equal
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=0, atol=2e-3)
    pairs = zip(whole.state_dict().values(), parts.state_dict().values(), strict=True)
    mean = [float((a - b).abs().mean()) for a, b in pairs]
    assert max(mean) < 1e-4


def test_adapters_are_trained_saved_and_not_part_of_the_student(tmp_path, space, found, course):
    torch.manual_seed(0)
    lesson = Features(64, 64)
    before = lesson.adapter.weight.detach().clone()
    path = tmp_path / "state.safetensors"
    net, _ = run(space, found, replace(course, lesson=lesson), resume=path)
    assert not torch.equal(lesson.adapter.weight, before)
    tensors, _ = checkpoint.read(path)
    assert torch.equal(tensors["net.lesson.adapter.weight"], lesson.adapter.weight)
    assert not any("adapter" in name for name in net.state_dict())


def test_half_precision_stays_close_and_leaves_weights_in_full(space, found, course):
    whole, steps = run(space, found, course)
    half, rough = run(space, found, replace(course, bf16=True))
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert checkpoint.digest(half) != checkpoint.digest(whole)
    for a, b in zip(steps, rough, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=0.2)


def test_a_loss_that_is_no_number_is_one_line(space, found, course):
    net = supernet(space, found)
    net.words.weight.data[:] = torch.nan
    with pytest.raises(NasctlError, match="not finite at step 1.*Try --lr"):
        list(distill(net, archs_of(space), course, PLAN))


def _worker(rank, port, ends):
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    large = Bert(Arch((0, 1, 2), 64, 4, 256), Frame(vocabulary=24, positions=32, head=16), 2)
    large.requires_grad_(False)
    space = Space(size=LENGTH, grid=GRID, frame=large.frame)
    rows = torch.randint(4, 20, (32, LENGTH), generator=torch.Generator().manual_seed(0))
    course = Course(large.look, Relations(4), lambda step: rows[8 * step : 8 * step + 8], "")
    net = inherit.inherit(space.supernet(), large)
    for _ in distill(net, archs_of(space), course, Plan(steps=2, lr=1e-3)):
        pass
    ends.put((rank, checkpoint.digest(net)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    found = spawn.SimpleQueue()
    workers = [spawn.Process(target=_worker, args=(rank, port, found)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    ends = dict(found.get() for _ in workers)
    assert ends[0] == ends[1]


# ---- members -------------------------------------------------------------------------------------


def test_all_members_are_ranked_as_their_extracted_networks(tmp_path, space, found, course, rows):
    net = supernet(space, found)
    held_out = [rows[:6], rows[6:9]]
    wanted = members.taught(found.net.look, held_out, course.lesson)
    every = members.every(space)
    assert len(every) == space.count() == 16
    kept = tmp_path / "members.jsonl"
    listed = list(members.rank(net, space, every, course.lesson, (held_out, wanted), kept=kept))
    for member, row in zip(listed, every, strict=True):
        small = extract(net, space.build(space.decode(row))).eval()
        alone = members.loss_of(small, small.arch, course.lesson, held_out, wanted)
        assert member.loss == pytest.approx(alone, abs=1e-5)
        assert member.params == sum(p.numel() for p in small.parameters())


def test_batches_of_similar_length_are_every_row_once_an_epoch():
    length = np.random.default_rng(0).integers(3, 50, 1000)
    rows = finetune.batches(length, 32, seed=1)
    epoch = [rows(step) for step in range(31)]
    assert len(set(np.concatenate(epoch).tolist())) == 31 * 32
    padded = np.mean([length[at].max() for at in epoch])
    assert padded < 1.15 * length.mean() < length.max()
    longest = [length[at].max() for at in epoch]
    assert sorted(longest) != longest and longest != sorted(longest, reverse=True)
    np.testing.assert_array_equal(rows(0), finetune.batches(length, 32, seed=1)(0))
    assert (rows(31) != rows(0)).any()  # the next epoch
    with pytest.raises(NasctlError, match="32 examples per step, but 31 in all"):
        finetune.batches(length[:31], 32, seed=1)


def test_predictions_are_of_their_own_rows_whatever_the_lengths(found):
    texts = ["the cat sat on a mat", "the cat", "a dog ran", "the cat sat on a mat and a dog ran"]
    tokens = finetune.encoded(found, texts * 3, 14)
    net = finetune.with_classes(found.net, 5, seed=0)
    alone = torch.cat([finetune.predictions(net, tokens[at : at + 1]) for at in range(12)])
    assert torch.equal(finetune.predictions(net, tokens), alone)


def test_only_what_the_lesson_reads_of_the_teacher_is_kept(found, course, rows):
    whole = found.net.look(rows[:4])
    (kept,) = members.taught(found.net.look, [rows[:4]], course.lesson)
    assert [part.numel() > 0 for part in kept.attention[-1]] == [True] * 3
    assert not kept.features and kept.logits is None
    assert all(part.numel() == 0 for heads in kept.attention[:-1] for part in heads)
    student = found.net.look(rows[:4])
    assert course.lesson(student, kept) == course.lesson(student, whole)


def test_ranking_goes_on_where_it_was_cut(tmp_path, space, found, course, rows):
    net, kept = supernet(space, found), tmp_path / "members.jsonl"
    held_out = [rows[:4]]
    wanted = members.taught(found.net.look, held_out, course.lesson)
    every = members.every(space)
    going = members.rank(net, space, every, course.lesson, (held_out, wanted), kept=kept)
    some = [next(going) for _ in range(5)]
    going.close()
    kept.write_bytes(kept.read_bytes()[:-3])  # torn by a kill
    calls = []

    class Counting(Relations):
        def forward(self, student, teacher):
            calls.append(1)
            return super().forward(student, teacher)

    again = list(members.rank(net, space, every, Counting(4), (held_out, wanted), kept=kept))
    assert again[:5] == some and len(calls) == 16 - 4


def test_a_larger_budget_never_chooses_a_worse_student():
    rng = np.random.default_rng(0)
    listed = [members.Member((at,), float(loss), 0, 0) for at, loss in enumerate(rng.random(30))]
    costs = rng.random(30) * 10
    limits = np.sort([*costs, 20.0])
    chosen = [members.best_within(listed, costs, limit) for limit in limits]
    losses = [listed[at].loss for at in chosen]
    assert losses == sorted(losses, reverse=True)
    assert all(costs[at] <= limit for at, limit in zip(chosen, limits, strict=True))
    front = members.front(listed, costs)
    assert set(chosen) == set(front) and sorted(costs[front]) == list(costs[front])
    with pytest.raises(BudgetInfeasible, match="the cheapest costs"):
        members.best_within(listed, costs, 0.0)


# ---- a task --------------------------------------------------------------------------------------


def labelled(found, n, seed):
    """A sentence is good or bad by one word of it."""
    lines = prose(n, seed).splitlines()
    texts = [f"{line} {'good' if at % 2 else 'bad'} film" for at, line in enumerate(lines)]
    tokens = finetune.encoded(found, texts, 14)
    return finetune.Labelled(tokens, torch.arange(n) % 2)


def test_fine_tuning_learns_and_goes_on_to_the_same_bytes(tmp_path, found):
    train, test = labelled(found, 200, 0), labelled(found, 60, 1)
    how = finetune.Finetuning(Plan(steps=60, lr=1e-3), batch=16, seed=1)

    def fresh():
        return finetune.with_classes(found.net, 2, seed=1)

    net = fresh()
    for _ in finetune.finetune(net, train, how):
        pass
    right = (finetune.predictions(net, test.tokens) == test.labels).float().mean()
    assert right > 0.9
    assert not any(p.requires_grad for p in found.net.parameters())
    short, path = replace(how, plan=Plan(steps=4, lr=1e-3)), tmp_path / "state.safetensors"
    whole = fresh()
    for _ in finetune.finetune(whole, train, short):
        pass
    for _ in range(4):
        net = fresh()
        going = finetune.finetune(net, train, short, resume=path)
        next(going, None)
        going.close()
    assert checkpoint.digest(net) == checkpoint.digest(whole)


def test_long_sentences_are_cut_and_short_ones_padded(found):
    tokens = finetune.encoded(found, ["the cat", "the cat sat on a mat and a dog ran"], 6)
    assert tokens.tolist() == [[2, 4, 5, 3, 0, 0], [2, 4, 5, 6, 7, 3]]
    assert finetune.trimmed(tokens[:1], 0).shape == (1, 4)
    with pytest.raises(NasctlError, match="33 tokens, but positions for 32"):
        finetune.encoded(found, ["the cat"], 33)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "sentence\tlabel\n", "no sentences"),
        ("a.tsv", "text\tlabel\na\t1\n", "no column 'sentence'.*The first line names"),
        ("a.csv", "sentence,label\na,1\nb\n", "line 3 has too few columns"),
        ("a.txt", "sentence\tlabel\na\t1\n", "unknown kind of file"),
        ("a.parquet", "none", "cannot read labelled sentences"),
    ],
)
def test_bad_labelled_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(NasctlError, match=message):
        sentences.load(tmp_path / name)
    with pytest.raises(NasctlError, match="cannot read"):
        sentences.load(tmp_path / "absent.tsv")


def test_labels_that_training_lacks_are_named(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\nsay "no\t0\nyes\t1\n')
    (tmp_path / "b.csv").write_text("sentence,label\nmaybe,2\n")
    train, other = sentences.load(tmp_path / "a.tsv"), sentences.load(tmp_path / "b.csv")
    assert train.texts == ('say "no', "yes") and sentences.classes(train) == ("0", "1")
    assert sentences.numbers(train, ("0", "1"), "a") == [0, 1]
    with pytest.raises(NasctlError, match="row 1 has the label '2'.*allowed: 0, 1"):
        sentences.numbers(other, ("0", "1"), "b.csv")
    with pytest.raises(NasctlError, match="one label only"):
        sentences.classes(other)


def test_a_new_head_leaves_the_encoder_as_it_was(found):
    net = finetune.with_classes(found.net, 5, seed=0)
    assert isinstance(net, Bert) and net.head.out_features == 5
    again = finetune.with_classes(found.net, 5, seed=0)
    assert torch.equal(net.head.weight, again.head.weight)
    assert torch.equal(net.words.weight, found.net.words.weight)
    assert net.words.weight is not found.net.words.weight
