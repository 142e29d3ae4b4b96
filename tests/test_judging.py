"""cli.judging: how much of its bound a change has used up."""

from __future__ import annotations

import math

import pytest

from cli import judging


@pytest.mark.parametrize(
    ("after", "spent"),
    [
        ({"class": 0.7, "box": 0.5}, 0.125 / 0.2),
        ({"class": 0.8, "box": 0.6}, 0),
        ({"class": 0.8, "box": math.nan}, math.inf),
        ({"class": math.nan, "box": 0.5}, math.inf),
    ],
)
def test_the_task_that_lost_most_of_its_bound_counts(after, spent):
    before, bound = {"class": 0.8, "box": 0.5}, {"class": 0.2, "box": 0.1}
    assert judging.spent(before, after, bound) == pytest.approx(spent)
