"""A parquet file, or a folder of *train* / *val* / *test* parquet files (or shards of them).

One column holds encoded images: binary, or a struct with a binary field `bytes`, as Hugging Face
writes them. One holds labels: integers or strings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nas.data.images import Encoded, Labelled, decode
from nas.errors import NasctlError

_ROLES = ("train", "val", "test")
_IMAGE_NAMES = ("image", "img", "jpeg", "jpg", "png", "bytes")
_LABEL_NAMES = ("label", "labels", "class", "target")


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


def columns(file: Path) -> list[str]:
    """Their names. Raises NasctlError for what is no parquet file."""
    try:
        return list(pq.read_schema(file).names)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> NasctlError:
    return NasctlError(
        f"unreadable parquet file ({error})",
        where=str(file),
        next="Write or copy the file again",
    )


def read(path: Path, size: int | None) -> dict[str, Labelled]:
    shards = _shards(files_in(path)) if path.is_dir() else {"train": [path]}
    return {
        role: decode([picture for file in files for picture in _pictures(file)], size)
        for role, files in shards.items()
    }


def _shards(files: list[Path]) -> dict[str, list[Path]]:
    """Files by split, read off their names; names without any split word are one unsplit set."""
    roles = {file: [role for role in _ROLES if role in file.stem.lower()] for file in files}
    if not any(roles.values()):
        return {"train": files}
    for file, found in roles.items():
        if len(found) != 1:
            raise NasctlError(
                f"the name says {' and '.join(found) or 'no split'}",
                where=str(file),
                allowed="file names with exactly one of train, val, test",
                next="Rename the file, or pass one parquet file",
            )
    shards = {role: [file for file in files if roles[file] == [role]] for role in _ROLES}
    if not shards["train"]:
        raise NasctlError(
            "no *train*.parquet", where=str(files[0].parent), allowed="*train*, *val*, *test*"
        )
    return {role: files for role, files in shards.items() if files}


def _pictures(file: Path) -> list[Encoded]:
    try:
        schema = pq.read_schema(file)
        image = _column(schema, _is_image, _IMAGE_NAMES, ("image", "binary"), file)
        label = _column(schema, _is_label, _LABEL_NAMES, ("label", "integer or string"), file)
        table = pq.read_table(file, columns=[image, label], partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from error
    if not table.num_rows:
        raise NasctlError("no rows", where=str(file), allowed="one row per image")
    labels = table[label].to_pylist()
    nulls = [row for row, value in enumerate(labels) if value is None]
    if nulls:
        raise NasctlError(
            f"{len(nulls)} of {len(labels)} labels are null, the first in row {nulls[0]}",
            where=f"{file} column '{label}'",
            allowed="an integer or a string in every row",
            next="Drop these rows or label them",
        )
    return [
        Encoded(f"{file} row {row}", content["bytes"] if isinstance(content, dict) else content, y)
        for row, (content, y) in enumerate(zip(table[image].to_pylist(), labels, strict=True))
    ]


def _column(
    schema: pa.Schema,
    fits: Callable[[pa.DataType], bool],
    known: tuple[str, ...],
    kind: tuple[str, str],
    file: Path,
) -> str:
    """The column by its usual name, else the only one of the right type; never a guess."""
    names = [field.name for field in schema if fits(field.type)]
    usual = [name for name in known if name in names]
    if usual or len(names) == 1:
        return (usual or names)[0]
    columns = ", ".join(f"{field.name} ({_short(field.type)})" for field in schema)
    problem = f"several could be: {', '.join(names)}" if names else f"columns are {columns}"
    raise NasctlError(
        f"no clear {kind[0]} column; {problem}",
        where=str(file),
        allowed=f"one {kind[1]} column, or one called {', '.join(known)}",
        next=f"Rename the {kind[0]} column to '{known[0]}'",
    )


def _short(kind: pa.DataType) -> str:
    return "struct" if pa.types.is_struct(kind) else str(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_image(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_label(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
