from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import contract
from benchmarks.__main__ import listing


def test_rows_survive_a_kill_at_every_byte(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = contract.Rows(path)
    rows.add({"seed": 0, "method": "a"}, {"score": 1.5})
    first = len(path.read_bytes())
    rows.add({"seed": 1, "method": "a"}, {"score": 2.5})
    whole = path.read_bytes()
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        again = contract.Rows(path)
        assert again.get({"method": "a", "seed": 0}) == {"score": 1.5}
        assert again.get({"seed": 1, "method": "a"}) is None
        again.add({"seed": 1, "method": "a"}, {"score": 2.5})
        assert path.read_bytes() == whole


def test_last_line_is_the_contract(capsys):
    outcome = contract.Outcome("mine")
    outcome.figures["error"] = 3.0
    outcome.aim("error", "<= 2", 3.0, 3.0 <= 2)
    assert outcome.finish() == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(record) == {"benchmark", "figures", "aims", "seconds", "machine"}
    assert record["aims"]["error"] == {"aim": "<= 2", "got": 3.0, "met": False}


def test_save_writes_the_same_record(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(contract, "RESULTS", tmp_path / "results")
    contract.Outcome("mine", {"error": 1.0}).finish(save=True)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "results/mine.json").read_text()) == printed


def test_table_lines_up():
    lines = contract.table(("name", "x"), [["a", 1.23456], ["long name", 10]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].endswith("1.23")


@pytest.mark.parametrize("name", ["latency_transfer"])
def test_every_benchmark_says_what_it_is_and_skips_without_data(name, tmp_path):
    assert dict(listing())[name]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick"],
        env={"PATH": "", "NASCTL_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["benchmark"] == name
    if not record["figures"]:
        assert done.stdout.startswith("skipped: ")
