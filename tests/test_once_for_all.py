from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nas import checkpoint, supernet
from nas import once_for_all as ofa
from nas import space as spaces
from nas.elastic import BatchNorm2d, DepthwiseConv2d, extract
from nas.errors import NasctlError
from nas.recipe import Recipe

RESNET = spaces.load("resnet", channels=1, classes=4, size=8, width=0.3)
MOBILE = spaces.load("mobilenet", channels=1, classes=4, size=8, width=0.2)
BOTH = pytest.mark.parametrize("space", [RESNET, MOBILE], ids=["resnet", "mobilenet"])
RECIPE = Recipe(steps=10, batch=16, lr=0.02)


def shaken(space, seed=0):
    """A largest network whose norms are no identities, in double precision and eval mode."""
    torch.manual_seed(seed)
    net = space.build(space.decode(space.largest)).double().eval()
    for module in net.modules():
        if isinstance(module, BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.3)
    return net


def inputs(arch, n=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(
        (n, 1, arch.resolution, arch.resolution), generator=generator, dtype=torch.float64
    )


def importances(middle):
    return middle.reader.abs().transpose(0, 1).flatten(1).sum(1)


@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_sorting_leaves_the_largest_network_as_it_was(space, training):
    net = shaken(space)
    x = inputs(net.arch)
    before = copy.deepcopy(net)
    ofa.sort_channels_(net)
    old = before.state_dict()
    changed = [name for name, new in net.state_dict().items() if not torch.equal(new, old[name])]
    assert changed, "nothing moved, so nothing is shown"
    with torch.no_grad():
        a, b = net.train(training)(x), before.train(training)(x)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@BOTH
def test_sorting_puts_the_most_important_channels_first(space):
    net = shaken(space)
    ofa.sort_channels_(net)
    found = ofa._blocks(net)
    assert len(found) > 2
    for block in found.values():
        for middle in block.middles()[-1:]:  # a gate is sorted before its readers are reordered
            assert (importances(middle).diff() <= 1e-9).all()


@BOTH
def test_a_banded_sort_keeps_what_smaller_networks_compute(space):
    """The prefix of each served width stays the same set: its own function stays the same."""
    net, x = shaken(space), None
    floor = space.smallest
    served = ofa._served(space, floor)
    archs = [other.arch for other in served]
    before = []
    with torch.no_grad():
        for arch in archs:
            x = inputs(arch)
            before.append(net.train()(x, arch))
        sorted_free = copy.deepcopy(net)
        ofa.sort_channels_(net, served)
        ofa.sort_channels_(sorted_free)
        for arch, expected in zip(archs, before, strict=True):
            x = inputs(arch)
            torch.testing.assert_close(net(x, arch), expected, rtol=0, atol=1e-9)
        smallest = archs[0]
        free = sorted_free.train()(inputs(smallest), smallest)
        assert not torch.allclose(free, before[0], atol=1e-3), "bands were not needed"


def test_transforms_change_nothing_until_they_are_trained():
    net = shaken(MOBILE)
    archs = [MOBILE.decode(row) for row in MOBILE.sample(np.random.default_rng(0), 4)]
    before = [net(inputs(a), a) for a in archs]
    ofa.add_kernel_transforms_(net)
    layers = [m for m in net.modules() if isinstance(m, DepthwiseConv2d) and m.transforms]
    assert layers and all(layer.kernel_size[0] > 3 for layer in layers)
    assert all(torch.equal(net(inputs(a), a), y) for a, y in zip(archs, before, strict=True))


def randomised_transforms(net):
    ofa.add_kernel_transforms_(net)
    generator = torch.Generator().manual_seed(5)
    for layer in net.modules():
        if isinstance(layer, DepthwiseConv2d):
            for matrix in layer.transforms.values():
                noise = torch.randn(matrix.shape, generator=generator)
                matrix.data.add_(0.3 * noise.to(matrix))
    return net


def test_extraction_bakes_trained_transforms():
    plain, net = shaken(MOBILE), randomised_transforms(shaken(MOBILE))
    differs = 0
    for row in MOBILE.sample(np.random.default_rng(1), 6):
        arch = MOBILE.decode(row)
        small = extract(net, MOBILE.build(arch).double())
        assert not any("transforms" in name for name in small.state_dict())
        with torch.no_grad():
            found = small(inputs(arch))
            torch.testing.assert_close(found, net(inputs(arch), arch), rtol=0, atol=1e-10)
            differs += not torch.allclose(found, plain(inputs(arch), arch), atol=1e-3)
    assert differs > 1


def test_transforms_chain_from_size_to_size():
    layer = DepthwiseConv2d(4, 7)
    ofa.add_kernel_transforms_(layer)
    assert set(layer.transforms) == {"3", "5"}
    assert torch.equal(layer.filters(4, 3), layer.weight[:, :, 2:5, 2:5])
    assert torch.equal(layer.filters(2, 5), layer.weight[:2, :, 1:6, 1:6])
    layer.transforms["5"].data.mul_(2)
    layer.transforms["3"].data.mul_(3)
    assert torch.equal(layer.filters(4, 3), 6 * layer.weight[:, :, 2:5, 2:5])
    small = extract(layer, DepthwiseConv2d(2, 3))
    assert torch.equal(small.weight, 6 * layer.weight[:2, :, 2:5, 2:5])


def test_a_state_with_transforms_does_not_slip_into_a_network_without(tmp_path):
    net = MOBILE.build(MOBILE.decode(MOBILE.largest))
    ofa.add_kernel_transforms_(net)
    fresh = MOBILE.build(MOBILE.decode(MOBILE.largest))
    with pytest.raises(NasctlError, match="transforms.3: the network has none of that name"):
        checkpoint.fill(fresh, net.state_dict(), tmp_path / "x")


@BOTH
def test_phases_are_nested_and_end_with_the_whole_space(space):
    lowest = ofa.phases(space)
    assert (lowest[-1] == 0).all()
    for before, after in zip(lowest, lowest[1:], strict=False):
        assert (after <= before).all() and (after < before).any()
    kinds = [ofa._kind(gene.name) for gene in space.genes]
    first = {
        kind
        for kind, floor, size in zip(kinds, lowest[0], space.sizes, strict=True)
        if floor < size - 1
    }
    assert first - {"resolution"} == ({"kernel"} if "kernel" in kinds else {"depth"})


@BOTH
def test_a_phase_runs_only_what_it_allows(space):
    for phase, floor in enumerate(ofa.phases(space)):
        archs = ofa.released(space, RECIPE, floor, phase)
        allowed = {
            space.decode(space.canonical(np.clip(row, floor, space.largest)))
            for step in range(3)
            for row in np.random.default_rng((0, 6, phase, step)).integers(
                floor, space.sizes, (4, len(floor))
            )
        }
        assert {arch for step in range(3) for arch in archs(step)} <= allowed
        assert archs(0) == archs(0) != archs(1)


def trained_largest(task):
    torch.manual_seed(0)
    net = RESNET.build(RESNET.decode(RESNET.largest))
    for _ in supernet.train(net, supernet.alone(net), task, Recipe(steps=15, batch=16, lr=0.1)):
        pass
    teacher = supernet.child(net, RESNET, RESNET.largest, supernet.calibration_images(task))
    return net, teacher


def test_shrinking_goes_on_where_it_was_stopped(tiny, tmp_path):
    net, teacher = trained_largest(tiny)
    stopped, again = copy.deepcopy(net), copy.deepcopy(net)
    steps = list(ofa.shrink(net, RESNET, tiny, RECIPE, teacher))
    assert [step.step for step in steps] == list(range(1, 11))
    half = ofa.shrink(stopped, RESNET, tiny, RECIPE, teacher, folder=tmp_path)
    for _ in range(6):
        next(half)
    half.close()
    rest = list(ofa.shrink(again, RESNET, tiny, RECIPE, teacher, folder=tmp_path))
    assert [step.step for step in rest] == [7, 8, 9, 10]
    wanted = net.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_shrinking_makes_small_networks_work(tiny):
    net, teacher = trained_largest(tiny)
    calibration = supernet.calibration_images(tiny)

    def smallest():
        child = supernet.child(net, RESNET, RESNET.smallest, calibration)
        return supernet.evaluate(child, tiny, tiny.val, 8).cross_entropy

    before = smallest()
    for _ in ofa.shrink(net, RESNET, tiny, Recipe(steps=30, batch=16, lr=0.05), teacher):
        pass
    assert smallest() < 0.7 * before


def test_the_teacher_is_part_of_what_a_state_belongs_to(tiny, tmp_path):
    net, teacher = trained_largest(tiny)
    list(ofa.shrink(copy.deepcopy(net), RESNET, tiny, RECIPE, teacher, folder=tmp_path))
    nn.init.zeros_(teacher.head.weight)
    with pytest.raises(NasctlError, match="another recipe or other data"):
        next(ofa.shrink(net, RESNET, tiny, RECIPE, teacher, folder=tmp_path))
