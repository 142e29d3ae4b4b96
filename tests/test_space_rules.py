"""Rules of every space that the shipped ones do not exercise, on toys."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles import op
from nas import space as spaces
from nas.errors import NasctlError, UsageError
from nas.space import Gene


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    package = tmp_path / "my_pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "my_mod.py").write_text(toy.MODULE)
    (package / "empty.py").touch()
    (package / "broken.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_pkg.my_mod"
    for name in [name for name in sys.modules if name.startswith("my_pkg")]:
        del sys.modules[name]


def test_a_module_of_ones_own_is_a_space(own_module):
    space = spaces.load(own_module, channels=1, size=4)
    assert space.count() == 3 * (1 + 2)
    genes = space.sample(np.random.default_rng(0), 60)
    assert len(np.unique(genes, axis=0)) == space.count()
    fold = space.fold(spaces.scalar(lambda o: o.macs))
    assert fold(genes)[:, 0].tolist() == [op.macs(space.ops(space.decode(g))) for g in genes]


def test_a_module_without_a_space_or_that_fails_to_import_says_so(own_module):
    with pytest.raises(NasctlError, match="--space: module 'my_pkg.empty' has no 'Space'"):
        spaces.load("my_pkg.empty")
    with pytest.raises(NasctlError, match="--space: the module failed with .*no_such_dependency"):
        spaces.load("my_pkg.broken")
    with pytest.raises(NasctlError, match="--space: no module named 'my_pkg.absent'"):
        spaces.load("my_pkg.absent")


def test_an_unknown_space_names_the_nearest():
    with pytest.raises(UsageError, match="--space: unknown space 'resnt'.*Did you mean resnet?"):
        spaces.load("resnt")


@st.composite
def gene_lists(draw):
    """Genes of which some need an earlier one, possibly in chains."""
    genes = []
    for i in range(draw(st.integers(1, 5))):
        options = tuple(range(1, draw(st.integers(2, 4))))
        needs = None
        if genes and draw(st.booleans()):
            other = draw(st.sampled_from(genes))
            # the first option must not satisfy it, or inactive and 0 would be confused
            needs = (other.name, draw(st.integers(2, 4)))
        genes.append(Gene(f"g{i}", options, needs))
    return tuple(genes)


def with_genes(genes):
    space = toy.Space()
    space.genes = genes
    return space


def grid(space):
    return np.array(list(itertools.product(*map(range, space.sizes))))


@given(gene_lists())
def test_canonical_is_idempotent_even_where_needs_are_chained(genes):
    space = with_genes(genes)
    once = space.canonical(grid(space))
    assert (space.canonical(once) == once).all()
    assert (space.active(once) == space.active(grid(space))).all()


@given(gene_lists())
def test_count_is_the_number_of_distinct_canonical_rows(genes):
    space = with_genes(genes)
    assert space.count() == len(np.unique(space.canonical(grid(space)), axis=0))


def test_a_mutant_differs_in_at_least_one_redrawn_gene():
    space = toy.Space(n=4, options=50)
    parents = space.sample(np.random.default_rng(0), 400)
    changed = (space.mutate(parents, np.random.default_rng(1), rate=0.0) != parents).sum(1)
    assert set(changed.tolist()) <= {0, 1}  # 0: the same option was drawn again
    assert changed.mean() > 0.9


def test_a_child_takes_every_gene_from_a_parent():
    space, rng = toy.Space(), np.random.default_rng(0)
    a, b = space.sample(rng, 100), space.sample(rng, 100)
    child = space.crossover(a, b, rng)
    assert ((child == a) | (child == b)).all()
    assert (child != a).any() and (child != b).any()
