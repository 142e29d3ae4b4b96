"""Pictures, folders and parquet files that the tests of tasks are made of."""

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nas.errors import NasctlError
from nas.tasks import load


def picture(seed=0, size=(8, 8), mode="RGB"):
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def png(seed=0, **kinds):
    out = io.BytesIO()
    picture(seed, **kinds).save(out, "PNG")
    return out.getvalue()


def write_folder(root, counts, start=0, **kinds):
    """Class folders with that many different pictures each."""
    for offset, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            (root / name / f"{i:03}.png").write_bytes(png(start + 1000 * offset + i, **kinds))
    return root


def write_parquet(path, labels, images=None, names=("image", "label")):
    images = images or [png(i) for i in range(len(labels))]
    pq.write_table(pa.table({names[0]: images, names[1]: labels}), path)
    return path


def keys(split):
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in split.images]


def chw(picture):
    return np.moveaxis(np.asarray(picture), 2, 0).tobytes()


def message_of(data, kind=NasctlError, **options):
    with pytest.raises(kind) as caught:
        load(str(data), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
