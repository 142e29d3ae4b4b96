"""scikit-learn's bundled handwritten digits: 1,797 grey 8x8 images, ten classes, no download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from nas.data.images import Labelled, fit


def read(size: int | None) -> dict[str, Labelled]:
    from sklearn.datasets import load_digits  # a second to import, and only this source needs it

    images, labels = load_digits(return_X_y=True)
    grey = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    if size is not None:
        grey = np.stack([np.asarray(fit(Image.fromarray(image), size)) for image in grey])
    return {"train": Labelled(list(grey), labels.tolist())}
