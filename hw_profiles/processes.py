"""Processes of our own that never outlive the one that began them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def fresh() -> ProcessPoolExecutor:
    """One process that shares nothing with this one, and ends with it however that ends."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent)


def end_with_parent() -> None:
    """Called in a worker: it holds both ends of its queue, so it would wait for ever for a parent
    that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
