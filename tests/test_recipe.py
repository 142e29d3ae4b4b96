from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.errors import UsageError
from nas.recipe import FLOOR_AT, Recipe


def rates(recipe):
    return np.array([recipe.lr_at(step) for step in range(recipe.steps)])


@given(st.integers(20, 400), st.floats(0.01, 0.5), st.floats(0.0, 0.3))
def test_with_a_floor_the_rate_decays_exponentially_and_then_stays(steps, floor, warmup):
    recipe = Recipe(steps=steps, lr=0.5, floor=floor, warmup=warmup)
    found = rates(recipe)
    warm = max(1, round(warmup * steps))
    reached = math.ceil(FLOOR_AT * steps)
    assert (np.diff(found[warm:]) <= 0).all()
    np.testing.assert_allclose(found[reached:], 0.5 * floor)
    assert (found[warm : reached - 1] > 0.5 * floor).all()
    falling = found[warm:reached]
    np.testing.assert_allclose(falling[1:] / falling[:-1], falling[1] / falling[0])


def test_without_a_floor_the_rate_ends_near_zero():
    assert rates(Recipe(steps=200))[-1] < 0.01 * 0.2 < rates(Recipe(steps=200, floor=0.05))[-1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch": 1}, "--batch: a batch of 1; allowed: 2 or more, because batch norms"),
        ({"policy": "bestdown"}, "--policy: unknown policy.*uniform.*Did you mean bestup?"),
        ({"loss": "l2"}, "--loss: unknown loss 'l2'; allowed: alpha, kl, labels"),
        ({"dropout": 1.0}, "--dropout: 1.0; allowed: 0 to below 1"),
        ({"drop_connect": -0.1}, "--drop-connect: -0.1"),
        ({"floor": 0.0}, "--floor: 0.0; allowed: above 0"),
        ({"candidates": 0}, "--candidates: 0; allowed: 1 or more"),
        ({"magnitude": math.nan}, "--magnitude: nan; allowed: 0 to 1"),
    ],
)
def test_what_cannot_be_is_one_line_naming_the_flag(fields, said):
    with pytest.raises(UsageError, match=said):
        Recipe(steps=10, **fields)
