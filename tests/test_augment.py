import time

import pytest
import torch

from nas.data.augment import augment


def _batch(n=8, channels=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def _run(images, seed=0, *, flip, pad):
    return augment(images, torch.Generator().manual_seed(seed), flip=flip, pad=pad)


def test_keeps_shape_and_dtype_and_leaves_its_input_alone():
    images = _batch()
    before = images.clone()
    out = _run(images, flip=True, pad=3)
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    assert torch.equal(images, before)


def test_without_flip_and_pad_nothing_changes():
    images = _batch()
    assert torch.equal(_run(images, flip=False, pad=0), images)


def test_every_image_is_a_crop_of_its_reflected_self():
    """Oracle: all shifts made one by one with torch's own reflection padding."""
    pad, size = 2, 6
    images = _batch(n=40, size=size)
    padded = torch.nn.functional.pad(images.float(), (pad,) * 4, mode="reflect").byte()
    seen = set()
    for canvas, out in zip(padded, _run(images, flip=False, pad=pad), strict=True):
        shifts = [
            (y, x)
            for y in range(2 * pad + 1)
            for x in range(2 * pad + 1)
            if torch.equal(canvas[:, y : y + size, x : x + size], out)
        ]
        assert len(shifts) == 1
        seen.add(shifts[0])
    assert len(seen) > 10, "offsets are drawn per image"
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(2 * pad + 1))


def test_flip_mirrors_about_half_and_only_sideways():
    images = _batch(n=400)
    out = _run(images, flip=True, pad=0)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    kept = (out == images).flatten(1).all(1)
    assert bool((mirrored ^ kept).all())
    assert 150 < int(mirrored.sum()) < 250


def test_without_flip_no_image_is_mirrored():
    images = _batch(n=100)
    assert torch.equal(_run(images, flip=False, pad=0), images)
    marked = torch.zeros(100, 1, 8, 8, dtype=torch.uint8)
    marked[:, :, :, :4] = 255  # a shift by one keeps the left half bright, a mirror does not
    assert bool((_run(marked, flip=False, pad=1)[:, :, :, 1] == 255).all())


def test_the_generator_decides():
    images = _batch(n=32)
    assert torch.equal(_run(images, 1, flip=True, pad=2), _run(images, 1, flip=True, pad=2))
    assert not torch.equal(_run(images, 1, flip=True, pad=2), _run(images, 2, flip=True, pad=2))


def test_global_generator_is_not_touched():
    before = torch.random.get_rng_state()
    _run(_batch(), flip=True, pad=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_works_on_images_that_are_not_contiguous():
    images = _batch(n=16).to(memory_format=torch.channels_last)
    plain = _run(images.contiguous(), flip=True, pad=2)
    assert torch.equal(_run(images, flip=True, pad=2), plain)


def test_pad_as_large_as_the_image_is_refused():
    with pytest.raises(AssertionError, match="reflection"):
        _run(_batch(size=4), flip=False, pad=4)


@pytest.mark.slow
def test_thirty_thousand_images_a_second_on_one_thread():
    images, generator = _batch(n=256, size=32), torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            augment(images, generator, flip=True, pad=4)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert 256 / min(seconds) > 30_000
