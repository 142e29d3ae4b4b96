from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nas import pareto

SIDE = 6
pairs = st.lists(st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)), min_size=1, max_size=12)


def dominated(p, q):
    """q is at least as good in both and better in one."""
    return (q <= p).all() and (q < p).any()


@given(pairs)
def test_front_is_what_nobody_dominates(values):
    points = np.array(values, float)
    best = {tuple(p) for p in points if not any(dominated(p, q) for q in points)}
    at = pareto.front(points)
    assert {tuple(points[i]) for i in at} == best
    assert len(at) == len(best)  # of equal points one is kept
    assert all(points[i].tolist() not in points[:i].tolist() for i in at)  # the first of them
    assert (np.diff(points[at, 0]) > 0).all() and (np.diff(points[at, 1]) < 0).all()


@given(pairs)
def test_hypervolume_counts_the_unit_cells_behind_the_points(values):
    points = np.array(values, float)
    cells = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1).reshape(-1, 1, 2)
    covered = (points[None] <= cells).all(2).any(1).sum()
    assert pareto.hypervolume(points, (SIDE, SIDE)) == covered


@given(pairs)
def test_ranks_peel_one_front_after_the_other(values):
    points = np.array(values, float)
    left, level = list(range(len(points))), 0
    rank = pareto.ranks(points)
    while left:
        best = [i for i in left if not any(dominated(points[i], points[j]) for j in left)]
        assert [i for i in left if rank[i] == level] == best
        left = [i for i in left if i not in best]
        level += 1


def test_crowding_is_the_gap_between_neighbours_as_a_share_of_the_range():
    points = np.array([[4.0, 0.0], [0.0, 8.0], [1.0, 6.0], [2.0, 1.0]])
    np.testing.assert_allclose(
        pareto.crowding(points), [np.inf, np.inf, 2 / 4 + 7 / 8, 3 / 4 + 6 / 8]
    )
    assert pareto.crowding(points[:1]).tolist() == [np.inf]
    assert np.isinf(pareto.crowding(np.ones((2, 2)))).all()


@given(pairs)
def test_crowded_order_goes_by_rank_and_then_by_room(values):
    points = np.array(values, float)
    order, rank = pareto.crowded_order(points), pareto.ranks(points)
    assert sorted(order) == list(range(len(points)))
    assert (np.diff(rank[order]) >= 0).all()
    for level in set(rank.tolist()):
        same = [i for i in order if rank[i] == level]
        room = dict(zip(sorted(same), pareto.crowding(points[sorted(same)]), strict=True))
        assert [room[i] for i in same] == sorted(room.values(), reverse=True)


def test_hypervolume_of_one_point_and_of_none():
    assert pareto.hypervolume(np.array([[1.0, 2.0]]), (3.0, 7.0)) == 10.0
    assert pareto.hypervolume(np.array([[4.0, 2.0]]), (3.0, 7.0)) == 0.0
    assert pareto.hypervolume(np.zeros((0, 2)), (3.0, 7.0)) == 0.0
    assert pareto.front(np.zeros((0, 2))).tolist() == []


@given(pairs, st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)))
def test_another_point_never_shrinks_the_hypervolume(values, extra):
    points = np.array(values, float)
    more = np.concatenate([points, [extra]])
    reference = (SIDE + 1.0, SIDE + 1.0)
    assert pareto.hypervolume(more, reference) >= pareto.hypervolume(points, reference)


@given(pairs, st.floats(0.1, 50))
def test_knee_is_on_the_front_whatever_the_units(values, scale):
    points = np.array(values, float) + 1.0
    at = pareto.knee(points)
    assert at in pareto.front(points)
    grid = points * (1.0, 2.0**-8)  # exact in binary, so that no tie is broken by rounding
    assert pareto.knee(grid) == at
    assert np.isfinite(points[pareto.knee(points * (scale, 1.0))]).all()


def test_knee_is_the_corner_of_an_l_and_the_best_of_two():
    corner = np.array([[1.0, 9.0], [2.0, 1.5], [64.0, 1.0], [70.0, 20.0]])
    assert pareto.knee(corner) == 1
    assert pareto.knee(np.array([[2.0, 1.0], [1.0, 3.0]])) == 0  # the lower second objective
    assert pareto.knee(np.array([[2.0, 1.0]])) == 0
