"""A folder of class folders of images, or train / val / test folders of those."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from nas.data.images import Encoded, Labelled, decode
from nas.errors import NasctlError

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_LAYOUT = "a folder per class with images in it, or train, val and test folders of those"


def read(root: Path, size: int | None) -> dict[str, Labelled]:
    return {name: decode(_pictures(path), size) for name, path in _split_folders(root).items()}


def _split_folders(root: Path) -> dict[str, Path]:
    """A class may be called 'train', so the names mean splits only when nothing else is there."""
    folders = _subfolders(root)
    names = [folder.name.lower() for folder in folders]
    if "train" not in names or not set(names) <= set(_SPLITS):
        return {"train": root}
    splits = {_SPLITS[name]: folder for name, folder in zip(names, folders, strict=True)}
    if len(splits) < len(folders):
        raise NasctlError(
            f"two folders for one split: {', '.join(sorted(names))}",
            where=str(root),
            allowed="one each of train, val and test",
        )
    return splits


def _subfolders(root: Path) -> list[Path]:
    """Sorted by name, so that the order in which the disk lists them never matters."""
    visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    suffixes = set(Image.registered_extensions())
    loose = [path for path in visible if path.is_file() and path.suffix.lower() in suffixes]
    if loose:
        raise NasctlError(
            f"{len(loose)} images outside a class folder", where=str(loose[0]), allowed=_LAYOUT
        )
    return [path for path in visible if path.is_dir()]


def _pictures(root: Path) -> list[Encoded]:
    folders = _subfolders(root)
    if not folders:
        raise NasctlError("no class folders", where=str(root), allowed=_LAYOUT)
    suffixes = set(Image.registered_extensions())
    return [
        Encoded(str(path), path, folder.name)
        for folder in folders
        for path in _images_under(folder, suffixes)
    ]


def _images_under(folder: Path, suffixes: set[str]) -> list[Path]:
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and _is_image(path, suffixes)
    ]
    if not paths:
        raise NasctlError(
            "class folder without images",
            where=str(folder),
            allowed=_LAYOUT,
            next="Add images or remove the folder",
        )
    return paths


def _is_image(path: Path, suffixes: set[str]) -> bool:
    """Files without a suffix are taken as images, so that none is passed over by its name."""
    return not path.suffix or path.suffix.lower() in suffixes
