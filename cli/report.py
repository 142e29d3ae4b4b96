"""`nasctl report`: show a finished run again and rewrite its page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console


def command(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    json: Annotated[bool, typer.Option("--json", help="Print report.json.")] = False,
) -> None:
    """Summarise a finished run and, of a search, regenerate its report.html."""
    from nas.errors import UsageError

    if not run.is_dir():
        raise UsageError(f"no run directory {run}", where="RUN", next="See the runs/ folder.")
    from deploy import report, verify

    content = verify.read(run / "report.json")
    if json:
        return console.emit_json(content)
    if "counts" in content:  # of a pruning, which has no page
        from cli.prune import say_outcome

        return say_outcome(content, run)
    if "convergence" in content:  # of a search for several tasks
        from cli import many_tasks

        return many_tasks.say_outcome(content, run)
    if "students" in content:  # of a distillation
        from cli import distill

        return distill.say_outcome(content, run)
    from cli.summary import summarise

    report.write(content, run / "report.html")
    summarise(content, run, sum(stage["seconds"] for stage in content["stages"]))
    return None
