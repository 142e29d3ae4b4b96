"""compress.guard: which nodes stay in float, and which file is fastest inside the bound."""

import numpy as np
import pytest
from onnx import numpy_helper
from test_quantize import batches, network

from compress import quantize
from compress.guard import Guard, Variant, _Judge, fastest, relative_error
from compress.quantize import Scheme
from compress.record import Record
from hw_profiles.protocol import Timing
from hw_profiles.runtimes import onnxruntime
from nas.errors import NasctlError


@pytest.fixture(scope="module")
def fragile():
    """A network that INT8 harms in one place: one input channel of its second 1x1 convolution is
    a thousand times larger than the others, and its weights are as much smaller."""
    model = network()
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [8, 8, 1, 1]:
            values = numpy_helper.to_array(tensor).copy()
            values[:, 0] *= 2000.0
            values[:, 1:] *= 20.0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return quantize.prepared(model)


def run(model, some):
    session = onnxruntime.load(model.SerializeToString())
    return [onnxruntime.run(session, batch) for batch in some]


class Judge:
    """Spends a bound on the relative error of the outputs; counts what it judged."""

    def __init__(self, model, bound):
        self.some, self.bound, self.judged = batches(seed=7), bound, 0
        self.expected = run(model, self.some)

    def __call__(self, model):
        self.judged += 1
        return relative_error(self.expected, run(model, self.some)) / self.bound


def guard(model, bound, record=None, always=()):
    judge = Judge(model, bound)
    made = Guard(model, batches(2), Scheme(), run, judge, record or Record(), always)
    return made, judge


def convolution(model):
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    (node,) = (n for n in model.graph.node if shapes.get((*n.input, "")[1]) == [8, 8, 1, 1])
    return node.name


def test_a_loose_bound_keeps_nothing_in_float(fragile):
    asked, judge = guard(fragile, bound=10.0)
    found = asked.guarded()
    assert found.kept == () and found.spent == found.spent_without <= 1
    assert judge.judged == found.judged == 1


@pytest.fixture(scope="module")
def guarded(fragile):
    asked, judge = guard(fragile, bound=1.0)
    without = asked.guarded().spent_without  # relative error with everything in INT8
    asked, judge = guard(fragile, bound=0.6 * without)
    return asked.guarded(), 0.6 * without


def test_a_tight_bound_keeps_few_and_is_held(fragile, guarded):
    found, bound = guarded
    assert found.spent <= 1 < found.spent_without
    assert 1 <= len(found.kept) < found.nodes / 2
    assert all(kept.error > 0 and kept.kind for kept in found.kept)
    judge = Judge(fragile, bound)
    assert judge(found.model) == pytest.approx(found.spent)


def test_none_that_is_kept_could_be_given_back(fragile, guarded):
    found, bound = guarded
    judge, scheme = Judge(fragile, bound), Scheme()
    ranges = quantize.calibrate(fragile, batches(2), scheme)
    kept = [each.node for each in found.kept]
    for node in kept:
        rest = [other for other in kept if other != node]
        assert judge(quantize.int8(fragile, ranges, scheme, rest)) > 1


class Needs(_Judge):
    """Holds the bound with these nodes in float."""

    def spent(self, keep):
        self.asked += 1
        return 0.5 if {"n3", "n40"} <= set(keep) else 2.0


def test_many_that_are_not_needed_are_given_back_in_few_judgements():
    names = [f"n{at}" for at in range(64)]
    judge = Needs(None, None, None)
    errors = {name: 1.0 + at for at, name in enumerate(names)}
    assert judge.given_back(names, errors) == ["n3", "n40"]
    assert judge.asked < 30


def test_a_killed_guard_goes_on_to_the_same_model(fragile, guarded, tmp_path):
    found, bound = guarded
    path = tmp_path / "guard.jsonl"
    asked, judge = guard(fragile, bound, Record(path, "key"))
    asked.guarded()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"key": "spe')  # torn by the kill
    asked, again = guard(fragile, bound, Record(path, "key"))
    resumed = asked.guarded()
    assert resumed.kept == found.kept
    assert resumed.model.SerializeToString(deterministic=True) == found.model.SerializeToString(
        deterministic=True
    )
    assert again.judged < judge.judged
    with pytest.raises(NasctlError, match="record of another"):
        Record(path, "other")


def test_what_is_always_in_float_is_not_counted(fragile):
    node = convolution(fragile)
    asked, _ = guard(fragile, bound=10.0, always=[node])
    found = asked.guarded()
    session = onnxruntime.load(found.model.SerializeToString())
    assert onnxruntime.observed_precision(session) == "int8 3, fp32 1"
    assert found.nodes == len(quantize.quantized(fragile, Scheme())) - 1


def test_a_bound_that_nothing_holds_is_one_clear_error(fragile):
    asked = Guard(fragile, batches(1), Scheme(), run, lambda model: 2.0)
    with pytest.raises(NasctlError, match="not held even with every node in float"):
        asked.guarded()


def test_the_relative_error_is_that_of_the_worst_output():
    one, zero = np.ones((2, 3)), np.zeros((2, 3))
    assert relative_error([[one, one]], [[one, zero]]) == 1
    assert relative_error([[one, one]], [[one, one * np.nan]]) == np.inf
    assert relative_error([[one], [one]], [[one], [zero]]) == pytest.approx(0.5**0.5)


# ---- the speed guard -----------------------------------------------------------------------------


def variant(name, ms, spent=0.0, spread=0.02, noisy=""):
    return Variant(name, spent, Timing(ms, spread, ms, ms, ms, 10, noisy))


@pytest.mark.parametrize(
    ("others", "taken", "said"),
    [
        ([variant("a", 0.5, 0.9)], "a", "x2.00 of float's speed, 0.90 of the bound: taken"),
        ([variant("a", 0.5, 1.1)], "float", "but spends 1.10 of the accuracy bound"),
        ([variant("a", 0.5, float("nan"))], "float", "but spends nan"),
        ([variant("a", 1.3, 0.1)], "float", "a: x0.77 of float's speed, slower"),
        ([variant("a", 0.99, 0.1)], "float", "not faster beyond the spread"),
        ([variant("a", 0.6), variant("b", 0.5)], "b", "a: .* slower than b"),
        ([variant("a", 0.6), variant("b", 0.5, 2.0)], "a", "b: .* but spends"),
        ([variant("a", 0.8, noisy="busy")], "float", "busy: such a figure decides nothing"),
        ([variant("a", 0.7, spread=0.3, noisy="busy")], "float", "busy: such a figure decides"),
        (
            [variant("a", 0.5, noisy="busy")],
            "a",
            "x2.00 of float's speed, 0.00 of the bound: taken",
        ),
        ([], "float", "float is kept"),
    ],
)
def test_the_fastest_inside_the_bound_is_taken_and_all_are_explained(others, taken, said):
    import re

    choice = fastest([variant("float", 1.0), *others])
    assert choice.name == taken
    assert re.search(said, "\n".join(choice.why))
    assert len(choice.why) == len(others) + (taken == "float")
