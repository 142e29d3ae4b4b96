"""PAGCP (being written): prune(job, settings, record) -> Steps."""

from __future__ import annotations

from pathlib import Path

from compress.job import Job, Settings, Steps


def prune(job: Job, settings: Settings = Settings(), record: Path | None = None) -> Steps:
    """One round of PAGCP on `job`; yields Progress, returns Pruned (`compress.job.finish`)."""
    raise NotImplementedError
