"""`nasctl`: the commands, their errors and exit codes.

Each verb is a file here that imports nothing heavy before it runs, so that `--help` takes a
fraction of a second. Errors are caught here and nowhere else.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.exceptions import TyperException

from cli import (
    bench,
    build,
    devices,
    distill,
    doctor,
    evaluate,
    export,
    extract,
    ingest,
    profile,
    proxies,
    prune,
    quantize,
    report,
    search,
    spaces,
    train,
    verify,
)
from nas.errors import NasctlError

EPILOG = """Exit codes: 0 done; 1 an expected failure; 2 usage; 3 budget infeasible;
4 budget missed when measured; 5 parity failed; 130 interrupted (the same command goes on)."""

INTERRUPTED = 130

app = typer.Typer(
    name="nasctl",
    help="Hardware-aware architecture search: from task, board and budget to a verified file.",
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # plain help: the decorated one takes as long to load as all else
    context_settings={"help_option_names": ["-h", "--help"]},
)
NETWORKS = (search, train, extract, evaluate, prune, distill, quantize, export, report, proxies)
FILES = (build, verify)
DEVICES = (profile, ingest, bench, devices, spaces, doctor)
for verb in (*NETWORKS, *FILES, *DEVICES):
    app.command(verb.__name__.removeprefix("cli."))(verb.command)


@functools.cache  # reading the options of all verbs takes longer than many a command
def _commands() -> Callable[..., Any]:
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line; exits."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; expected errors become one line on stderr."""
    try:
        code = _commands()(arguments or ["--help"], prog_name="nasctl", standalone_mode=False)
        if code == INTERRUPTED:  # typer's translation of KeyboardInterrupt
            raise KeyboardInterrupt
        return int(code or 0)
    except NasctlError as error:
        print(f"nasctl: {error}", file=sys.stderr)
        return error.exit_code
    except TyperException as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's processes were all typed once
            print(f"nasctl: {error.format_message()} See nasctl --help.", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("nasctl: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    main()
