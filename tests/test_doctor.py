"""`nasctl doctor` lists what is here and what is not, without importing what it need not."""

import json

from test_layers import loaded_by

from hw_profiles import runtimes


def test_every_runtime_is_listed_with_what_it_lacks(nasctl):
    outcome = nasctl("doctor", "--json")
    assert outcome.code == 0
    rows = {row["what"]: row for row in json.loads(outcome.out)}
    for name in runtimes.names():
        row, runtime = rows[f"runtime {name}"], runtimes.load_module(name)
        assert row["detail"] == (runtime.unavailable() or runtime.version()) != ""
        assert row["ok"] is (None if runtime.unavailable() else True)
    assert rows["runtime onnxruntime"]["ok"] is True
    assert nasctl("doctor").code == 0


def test_the_doctor_does_not_import_torch():
    code = "from cli.main import run\nassert run(['doctor', '--json']) == 0"
    assert loaded_by(code, ["torch", "tensorrt"]) == ""
