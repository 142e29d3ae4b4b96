"""The user's own code: a task `my_pkg.my_mod:task` (a callable without arguments or the object
itself), or any other named thing of theirs."""

from __future__ import annotations

import importlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nas.errors import NasctlError, UsageError

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_reference(data: str) -> bool:
    return _FORM.fullmatch(data) is not None


def require_typed(typed: str | None, said: str) -> None:
    """Raises NasctlError for data that are code which nobody typed: a file says so (`said`), which
    may be a stranger's."""
    if typed is None and is_reference(said):
        raise NasctlError(
            "the data are code, which is not run because a file says so",
            where=said,
            next=f"Name it yourself: --data {said}",
        )


def read(reference: str) -> object:
    """Import, look up, call. The caller checks what came back."""
    found = attribute(reference, f"--data {reference}")
    return call(found, f"--data {reference}") if callable(found) else found


def attribute(reference: str, where: str) -> Any:
    """What `my_pkg.my_mod:name` names; `where` is the flag that an error is blamed on."""
    module_name, name = reference.split(":")
    with _from_here(), _users_code(where, module_name):
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
        try:
            return getattr(module, name)
        except AttributeError:
            names = sorted(name for name in vars(module) if not name.startswith("_"))
            raise UsageError(
                f"module '{module_name}' has no '{name}'", where=where, allowed=names[:12]
            ) from None


def call(function: Callable[..., Any], where: str, **arguments: Any) -> Any:
    """Run the user's own function inside the boundary around code that is not ours."""
    with _from_here(), _users_code(where, ""):
        return function(**arguments)


@contextmanager
def _from_here() -> Iterator[None]:
    """Let imports see the current folder, which an installed command does not search."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


@contextmanager
def _users_code(where: str, module_name: str) -> Iterator[None]:
    """The one boundary around code that is not ours: whatever it raises becomes one line."""
    try:
        yield
    except NasctlError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _failed(error, where) from error
        raise UsageError(
            f"no module named '{error.name}'",
            where=where,
            allowed="a module in the current folder or an installed one",
            next=f"Searched from {Path.cwd()}",
        ) from error
    except (Exception, SystemExit) as error:
        raise _failed(error, where) from error


def _failed(error: BaseException, where: str) -> NasctlError:
    place = _place(error)
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return NasctlError(f"the module failed with {reason} ({place})", where=where)


def _place(error: BaseException) -> str:
    """The last line of the user's own code on the way; a syntax error carries its place."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    libraries = ("<", sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    if not own:  # the call itself failed, say for a missing argument
        return "on the call"
    return f"{own[-1].filename}:{own[-1].lineno}"
