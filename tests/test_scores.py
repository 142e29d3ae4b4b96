"""Scores of many networks: order, processes, kills and failures change nothing."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nets
import numpy as np
import psutil
import pytest
import torch

from nas import proxies, scores
from nas import space as spaces
from nas.errors import NasctlError, UsageError
from nas.passes import Score

FEW = ("params", "snip", "jacob_cov")


def job(names=FEW, seed=0, n=8):
    space = spaces.load("resnet", channels=1, classes=4, size=8, width=0.25)
    return scores.Job(space, nets.batch(n, channels=1, seed=seed), names)


def rows_of(space, n=4, seed=0):
    return space.sample(np.random.default_rng(seed), n)


def values(rows):
    return {row.genes: {name: score.value for name, score in row.scores.items()} for row in rows}


def test_scores_depend_on_seed_and_genes_alone():
    one = job()
    genes = rows_of(one.space)
    forwards = values(scores.scored(one, genes))
    torch.manual_seed(99)
    assert values(scores.scored(one, genes[::-1])) == forwards
    assert values(scores.scored(one, genes[2:3])).items() <= forwards.items()
    other = values(scores.scored(replace(one, batch=replace(one.batch, seed=1)), genes))
    for key, found in forwards.items():
        assert found["params"] == other[key]["params"] and found["snip"] != other[key]["snip"]


def test_a_network_is_a_function_of_seed_and_genes_and_every_block_speaks():
    space = job().space
    state = torch.get_rng_state()
    nets_ = [scores.fresh(space, space.largest, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    a, b, other = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets_)
    assert torch.equal(a, b) and not torch.equal(a, other)
    nets_[0](torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad.any() for p in nets_[0].parameters())


def test_a_matrix_in_the_order_asked_for():
    one = job()
    genes = rows_of(one.space)
    rows = list(scores.scored(one, np.concatenate([genes, genes])))
    assert len(rows) == len(np.unique(genes, axis=0))  # each is scored once
    found = scores.matrix(rows, genes[::-1], ("params", "snip"))
    assert found.shape == (len(genes), 2) and np.isfinite(found).all()
    assert found[:, 0].tolist() == one.space.costs(genes[::-1])[:, 1].tolist()


def test_a_batch_is_drawn_by_the_seed_and_normalised(tiny):
    one, again, other = (scores.batch_of(tiny, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(one.inputs, again.inputs) and not torch.equal(one.inputs, other.inputs)
    assert one.inputs.shape == (32, 1, 8, 8) and abs(one.inputs.mean()) < 0.2
    assert len(scores.batch_of(tiny, 10_000, 0).inputs) == len(tiny.train)


# ---- the file ------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Scoring takes no time here, and every network is a letter in `calls`."""
    calls = []

    def measured(job, key, names, device):
        calls.append(key)
        missing = Score(math.nan, "dead: as it happens", 0.1)
        return {n: missing if n == "snip" else Score(sum(key) / 3, "", 0.2) for n in names}

    monkeypatch.setattr(scores, "_measure", measured)
    return calls


def as_read(rows):
    return json.dumps([[row.genes, {n: vars(s) for n, s in row.scores.items()}] for row in rows])


def test_it_goes_on_from_a_cut_at_every_byte(counted, tmp_path):
    one, path = job(("snip",)), tmp_path / "scores.jsonl"
    genes = rows_of(one.space, 2)
    whole = as_read(scores.scored(one, genes, path=path))
    content = path.read_bytes()
    assert len(counted) == 2
    rows_begin = content.index(b"\n")
    for cut in (*range(0, rows_begin, 40), *range(rows_begin - 1, len(content))):
        path.write_bytes(content[:cut])
        counted.clear()
        assert sorted(as_read(scores.scored(one, genes, path=path))) == sorted(whole), cut
        assert len(counted) == 2 - max(0, content[:cut].count(b"\n") - 1)
        assert path.read_bytes() == content
    counted.clear()
    assert as_read(scores.scored(one, genes, path=path)) == whole and not counted


def test_more_proxies_and_networks_compute_only_what_is_new(counted, tmp_path):
    path = tmp_path / "scores.jsonl"
    genes = rows_of(job().space, 5)
    list(scores.scored(job(("params",)), genes[:3], path=path))
    counted.clear()
    found = list(scores.scored(job(), genes, path=path))
    assert len(counted) == 5 and all(set(row.scores) == set(FEW) for row in found)
    counted.clear()
    list(scores.scored(job(("jacob_cov",)), genes, path=path))
    assert not counted


@pytest.mark.parametrize("other", [job(seed=1), job(n=9)])
def test_scores_of_other_inputs_are_refused(other, counted, tmp_path):
    path = tmp_path / "scores.jsonl"
    list(scores.scored(job(), rows_of(job().space), path=path))
    with pytest.raises(NasctlError, match="these scores are of something else: (images|seed) "):
        list(scores.scored(other, rows_of(job().space), path=path))


def test_a_file_that_is_none_of_ours_is_one_line(counted, tmp_path):
    path = tmp_path / "scores.jsonl"
    for content in ("name,accuracy\n", '{"key": 1}\n', "[]\n"):
        path.write_text(content)
        with pytest.raises(NasctlError, match="scores"):
            list(scores.scored(job(), rows_of(job().space), path=path))
        assert path.read_text() == content


# ---- failures ------------------------------------------------------------------------------------


def test_one_network_that_cannot_be_built_is_missing_and_the_others_are_scored(monkeypatch):
    one = job()
    genes = rows_of(one.space)
    build, bad = one.space.build, one.space.decode(genes[1])

    def fails(arch):
        if arch == bad:
            raise RuntimeError("no such width\nsecond line")
        return build(arch)

    monkeypatch.setattr(one.space, "build", fails)
    found = {row.genes: row.scores for row in scores.scored(one, genes)}
    for key, row in found.items():
        failed = key == tuple(genes[1].tolist())
        assert all(failed == math.isnan(score.value) for score in row.values())
        assert not failed or row["snip"].reason == "not built: RuntimeError: no such width"


def test_an_unknown_proxy_is_told_before_any_work(counted):
    with pytest.raises(UsageError, match="unknown proxy 'snp'"):
        list(scores.scored(job(("snp",)), rows_of(job().space)))
    assert not counted


def test_a_space_travels_to_other_processes_after_its_tables_were_compiled():
    space = job().space
    before = space.costs(space.largest[None]).tolist()
    copied = multiprocessing.reduction.ForkingPickler.loads(
        multiprocessing.reduction.ForkingPickler.dumps(space)
    )
    assert copied.costs(space.largest[None]).tolist() == before


# ---- processes -----------------------------------------------------------------------------------


@pytest.mark.slow  # two processes import torch
def test_several_processes_find_what_one_finds(tmp_path):
    one = job(tuple(name for name in proxies.names() if name != "ntk"))
    genes = rows_of(one.space, 6)
    alone = values(scores.scored(one, genes))
    found = values(scores.scored(one, genes, path=tmp_path / "s.jsonl", workers=2))
    assert found.keys() == alone.keys()
    for key, row in alone.items():
        np.testing.assert_array_equal(list(found[key].values()), list(row.values()))


KILLED = """
import sys
sys.path[:0] = {path!r}
import test_scores as t
from pathlib import Path
from nas import scores
if __name__ == "__main__":
    one = t.job(t.FEW, n=64)
    list(scores.scored(one, t.rows_of(one.space, 400), path=Path("s.jsonl"), workers=2))
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_goes_on(tmp_path):
    program = tmp_path / "killed.py"
    program.write_text(KILLED.format(path=sys.path))
    run = subprocess.Popen([sys.executable, program], cwd=tmp_path)
    path, until = tmp_path / "s.jsonl", time.monotonic() + 240
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    children = psutil.Process(run.pid).children(recursive=True)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert len(children) >= 2 and not psutil.wait_procs(children, timeout=60)[1]
    done = path.read_bytes().count(b"\n") - 1
    one = job(FEW, n=64)
    genes = rows_of(one.space, 400)[: done + 2]
    found = values(scores.scored(one, genes, path=path))
    assert found == values(scores.scored(one, genes))
