"""Append-only files: what a kill or a full disk leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from hw_profiles import lines
from nas.errors import NasctlError


def test_a_torn_line_is_cut_off_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "folder" / "a.jsonl"
    lines.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a":')
    assert lines.whole(path) == [b'{"a": 1}']
    lines.append(path, {"a": 2})
    assert lines.whole(path) == [b'{"a": 1}', b'{"a": 2}']


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    with pytest.raises(NasctlError, match=r"a\.jsonl: cannot write: No space left"):
        lines.append(tmp_path / "a.jsonl", {"a": 1})
