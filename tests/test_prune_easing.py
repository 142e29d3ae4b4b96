"""The order in which pruned channels come back (compress.easing), on figures made up."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from compress.easing import bargains, worst_first
from compress.units import Unit


def _unit(name: str, width: int) -> Unit:
    return Unit(name, width, 1, ())


@st.composite
def visited(draw):
    """Units with the growth and the savings of each width."""
    found = []
    for n in range(draw(st.integers(1, 3))):
        width = 8 * draw(st.integers(2, 4))
        narrower = range(width - 8, 0, -8)
        growth = {w: draw(st.floats(0, 1)) for w in narrower}
        each = draw(st.floats(0.1, 10))
        found.append((_unit(f"unit {n}", width), growth, {w: each * (width - w) for w in narrower}))
    return found


@given(visited())
def test_a_units_way_is_whole_and_its_prices_rise(units):
    for unit, grown, saved in units:
        way = bargains(unit, grown, saved)
        assert way[0].wide == unit.width and way[-1].narrow == min(grown)
        for one, other in itertools.pairwise(way):
            assert one.narrow == other.wide
            assert one.price < other.price


@given(visited())
def test_no_choice_of_widths_saves_as_much_at_a_smaller_growth(units):
    """After any number of undone bargains: the growth is the least for what is saved (widths are
    few enough to try all), with growth of a width that of any wider one at least."""
    monotone = [
        (u, dict(zip(g, itertools.accumulate(g.values(), max), strict=True)), s)
        for u, g, s in units
    ]
    tables = [{u.width: (0.0, 0.0)} | {w: (g[w], s[w]) for w in g} for u, g, s in monotone]
    undone = worst_first(b for u, g, s in monotone for b in bargains(u, g, s))
    every = [
        (sum(growth for growth, _ in chosen), sum(saved for _, saved in chosen))
        for chosen in itertools.product(*(table.values() for table in tables))
    ]
    at = {u: min(g) for u, g, _ in units}
    for bargain in (None, *undone):
        if bargain is not None:
            at[bargain.unit] = bargain.wide
        here = [table[at[u]] for (u, _, _), table in zip(units, tables, strict=True)]
        growth, saved = (sum(column) for column in zip(*here, strict=True))
        best = min(g for g, s in every if s >= saved - 1e-9)
        assert growth <= best + 1e-9


def test_layers_that_hardly_cost_anything_come_back_first():
    dear, cheap = _unit("dear", 16), _unit("cheap", 16)
    first = worst_first(
        [*bargains(dear, {8: 0.2}, {8: 100.0}), *bargains(cheap, {8: 0.01}, {8: 0.1})]
    )
    assert [one.unit for one in first] == [cheap, dear]
