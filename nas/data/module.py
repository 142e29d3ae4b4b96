"""The user's own task: `my_pkg.my_mod:task`, a callable without arguments or the object itself."""

from __future__ import annotations

import importlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nas.errors import NasctlError, UsageError

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_reference(data: str) -> bool:
    return _FORM.fullmatch(data) is not None


def read(reference: str) -> object:
    """Import, look up, call. The caller checks what came back."""
    module_name, attribute = reference.split(":")
    with _from_here(), _users_code(reference, module_name):
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
        try:
            found = getattr(module, attribute)
        except AttributeError:
            names = sorted(name for name in vars(module) if not name.startswith("_"))
            raise UsageError(
                f"module '{module_name}' has no '{attribute}'",
                where=f"--data {reference}",
                allowed=names[:12],
                next="Name a Task, or a callable without arguments that returns one",
            ) from None
        return found() if callable(found) else found


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
def _users_code(reference: str, module_name: str) -> Iterator[None]:
    """The one boundary around code that is not ours: whatever it raises becomes one line."""
    where = f"--data {reference}"
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
