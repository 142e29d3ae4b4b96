from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.data import randaugment as module
from nas.data.randaugment import COLOUR, GEOMETRY, NAMES, cutout, randaugment


def batch(n=16, channels=3, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(images, seed=0, operations=2, magnitude=0.5):
    return randaugment(images, seeded(seed), operations=operations, magnitude=magnitude)


@given(st.integers(1, 4), st.floats(0, 1), st.sampled_from([1, 3]), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_pixels_stay_pixels_and_the_input_is_left_alone(operations, magnitude, channels, seed):
    images = batch(channels=channels)
    before = images.clone()
    out = run(images, seed, operations, magnitude)
    assert out.shape == images.shape and out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 255
    assert torch.equal(images, before)


def test_without_magnitude_nothing_changes():
    images = batch()
    torch.testing.assert_close(run(images, magnitude=0.0), images.float(), rtol=0, atol=0.02)


def test_it_is_a_function_of_the_generator_and_differs_by_image():
    images = batch()[:1].expand(64, -1, -1, -1)
    assert torch.equal(run(images, 1), run(images, 1))
    assert not torch.equal(run(images, 1), run(images, 2))
    assert len({tuple(row) for row in run(images).flatten(1).tolist()}) > 40


def test_every_operation_is_drawn_equally_often_and_of_either_sign():
    drawn = module._strengths(9000, seeded(), 1, 0.5)
    for name in NAMES:
        values = drawn[name][drawn[name] != 0]
        assert len(values) == pytest.approx(9000 / len(NAMES), rel=0.15), name
        assert values.abs().max() <= 0.5
        assert (values > 0).float().mean() == pytest.approx(0.5, abs=0.06)


def by(n=1, **strengths):
    none = {name: torch.zeros(n) for name in GEOMETRY}
    return {**none, **{name: torch.full((n,), value) for name, value in strengths.items()}}


def test_a_shift_is_a_shift():
    image = batch(n=1, size=16).float()
    moved = module._geometry(image, by(translate_x=0.25))  # a quarter of a half width: 2 pixels
    torch.testing.assert_close(moved[..., :-2], image[..., 2:], rtol=0, atol=1e-3)


def test_a_quarter_turn_is_a_quarter_turn():
    image = batch(n=1, size=16).float()
    turned = module._geometry(image, by(rotate=torch.pi / 2))
    torch.testing.assert_close(turned, image.rot90(1, (2, 3)), rtol=0, atol=0.05)


def colours(**factors):
    return {name: torch.tensor([factors.get(name, 1.0)]) for name in COLOUR}


def test_colour_operations_are_blends():
    image = batch(n=1, size=8).float() / 2
    grey = module._colour(image, colours(saturation=0.0))
    torch.testing.assert_close(grey, image.mean(1, keepdim=True).expand_as(image))
    dark = module._colour(image, colours(brightness=0.5))
    torch.testing.assert_close(dark, image / 2)
    flat = module._colour(image, colours(contrast=0.0))
    torch.testing.assert_close(flat, image.mean().expand_as(image))


@pytest.mark.parametrize("channels", [1, 3])
def test_cutout_replaces_a_square_by_the_mean(channels):
    images = batch(n=300, channels=channels, size=16)
    out = cutout(images, seeded(), share=0.5)
    assert out.dtype == images.dtype
    changed = (out != images).any(1)
    areas = changed.flatten(1).sum(1)
    assert areas.max() <= 64 and areas.float().mean() > 35
    image = int(areas.argmax())
    rows, columns = changed[image].any(1).sum(), changed[image].any(0).sum()
    assert rows == 8 and columns == 8
    mean = images[image].float().mean((1, 2)).byte()
    assert (out[image][:, changed[image]] == mean[:, None]).all()


def test_global_generator_is_not_touched():
    before = torch.random.get_rng_state()
    cutout(run(batch()), seeded(), share=0.3)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
def test_four_thousand_images_a_second_on_one_thread():
    images, generator = batch(n=128, size=32), seeded()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        randaugment(images, generator, operations=2, magnitude=0.5)
        seconds.append(time.perf_counter() - start)
    assert 128 / min(seconds) > 4_000
