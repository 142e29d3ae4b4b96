from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_profiles.op import INPUT, KINDS, Op, Tape, macs, params, peak_activation_bytes


def test_convolution_by_hand():
    op = Op("conv", 3, 16, 32, 32, kernel=3, norm=True)
    assert op.macs == 32 * 32 * 16 * 3 * 9 == 442368
    assert op.params == 16 * 3 * 9 + 2 * 16
    assert op.bytes(4) == 4 * (3 * 32 * 32 + 16 * 32 * 32 + 16 * 3 * 9 + 16)


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "out"),
    [(3, 1, 7, 7), (3, 2, 7, 4), (5, 2, 32, 16), (1, 2, 9, 5), (2, 2, 9, 4), (7, 1, 4, 4)],
)
def test_output_sizes(kernel, stride, size, out):
    assert Op("conv", 8, 8, size, size, kernel, stride).h_out == out


@pytest.mark.parametrize(
    ("groups", "weights"), [(1, 8 * 8 * 9), (2, 8 * 4 * 9), (4, 8 * 2 * 9), (8, 8 * 9)]
)
def test_groups_divide_the_weights(groups, weights):
    tape = Tape(8, 5)
    tape.conv(tape.input, 8, kernel=3, groups=groups)
    assert tape.ops[0].weights == weights
    assert tape.ops[0].kind == ("dwconv" if groups == 8 else "conv")


def test_linear_and_elementwise():
    assert Op("linear", 64, 10, 1, 1, bias=True).params == 650
    assert Op("linear", 64, 10, 1, 1).macs == 640
    for kind in ("add", "mul", "concat", "act", "avgpool", "maxpool", "gap", "upsample"):
        op = Op(kind, 8, 8, 4, 4)
        assert op.macs == op.params == 0
        assert op.bytes() > 0  # nothing is free
    assert Op("add", 8, 8, 4, 4).elements_in == 2 * 8 * 16
    assert Op("mul", 8, 8, 4, 4).elements_in == 8 * 17
    assert Op("gap", 8, 8, 4, 4).elements_out == 8


def test_equality_is_of_dimensions_only():
    one = Op("conv", 3, 8, 4, 4, reads=(INPUT,), slot="stem")
    other = Op("conv", 3, 8, 4, 4, reads=(7,), slot="head")
    assert one == other and hash(one) == hash(other)
    assert one != Op("conv", 3, 8, 4, 5)


def test_peak_memory_by_hand():
    tape = Tape(1, 10)  # the input is 100 elements
    x = tape.conv(tape.input, 2)  # input 100 and output 200
    y = tape.conv(x, 4)  # 200 and 400; the input is dead
    tape.add(y, tape.conv(x, 4))  # x 200, y 400, branch 400; then y, branch and sum
    assert peak_activation_bytes(tape.ops, itemsize=1) == 1200


def test_tape_writes_who_reads_whom():
    tape = Tape(3, 8)
    tape.slot = "stem"
    x = tape.conv(tape.input, 8, kernel=3)
    tape.slot = ""
    tape.concat(x, tape.maxpool(x, kernel=3, stride=1))
    assert [op.reads for op in tape.ops] == [(INPUT,), (0,), (0, 1)]
    assert tape.ops[0].slot == "stem" and tape.ops[1].slot == ""
    assert tape.ops[2].c_in == 16
    assert {op.kind for op in tape.ops} <= set(KINDS)
    with pytest.raises(ValueError, match="linear reads a vector"):
        tape.linear(x, 10)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 64),
    more=st.integers(1, 64),
    size=st.integers(1, 40),
    kernel=st.sampled_from([1, 3, 5, 7]),
    stride=st.sampled_from([1, 2]),
)
def test_more_channels_never_cost_less(channels, more, size, kernel, stride):
    def network(width):
        tape = Tape(3, size)
        x = tape.conv(tape.input, width, kernel=kernel, stride=stride, norm=True)
        x = tape.conv(x, width, kernel=kernel, groups=width, norm=True)
        tape.linear(tape.gap(tape.add(x, x)), 10)
        return tape.ops

    small, large = network(channels), network(channels + more)
    assert macs(small) < macs(large) and params(small) < params(large)
    assert peak_activation_bytes(small) <= peak_activation_bytes(large)
    assert sum(op.bytes() for op in small) < sum(op.bytes() for op in large)
