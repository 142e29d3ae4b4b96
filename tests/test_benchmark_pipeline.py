"""benchmarks.pipeline: what is as fast is chosen, what is compared is fair, what fails is left out,
rows are of one machine and name no folder."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import (
    contract,
    pipeline,
    pipeline_chain,
    pipeline_int8,
    pipeline_rows,
    pipeline_stages,
    pipeline_stranger,
)
from benchmarks.pipeline import DIGITS, FULL, Seed
from benchmarks.pipeline_stages import Experiment, Made
from deploy import bundle as bundles
from hw_profiles.protocol import Timing
from nas import file
from nas.errors import NasctlError
from nas.search_spaces.fbnetv5 import stem_strides


@pytest.fixture
def experiment(tmp_path):
    return Experiment(DIGITS, 0, contract.Rows(tmp_path / "rows.jsonl"), tmp_path)


def test_a_row_is_made_once_and_names_its_data_not_a_folder(experiment, monkeypatch):
    setting = replace(DIGITS, data="/somewhere/tiny_imagenet_20")
    e = replace(experiment, setting=setting)
    assert e.row(lambda: {"ms": 1.0}, what="budget")["ms"] == 1.0
    assert e.row(lambda: pytest.fail("made again"), what="budget")["ms"] == 1.0
    assert "somewhere" not in e.rows.path.read_text()
    other = replace(e, setting=replace(setting, own=2.0))
    assert other.row(lambda: {"ms": 2.0}, what="budget")["ms"] == 2.0
    monkeypatch.setattr(pipeline_stages, "machine", lambda: {"design": "another"})
    assert e.row(lambda: {"ms": 3.0}, what="budget")["ms"] == 3.0


def test_a_row_tells_the_load_and_is_made_again_where_its_file_differs(experiment):
    path = experiment.folder / "model.onnx"
    made = iter(b"ab")

    def work():
        path.write_bytes(bytes([next(made)]))
        return {"file": path.name, "sha256": file.sha256(path)}

    first = experiment.row(work, experiment.there, chain="whole")
    assert len(first["load"]) == 3
    assert experiment.row(work, experiment.there, chain="whole") == first
    path.write_bytes(b"changed")
    second = experiment.row(work, experiment.there, chain="whole")
    assert second["sha256"] != first["sha256"]
    assert experiment.row(work, experiment.there, chain="whole") == second


def ending(monkeypatch, *codes, leaves=None):
    """Verbs that end with these codes in turn, of which the last leaves a file; what was typed."""
    typed, left = [], list(codes)

    def run(words):
        typed.append(words)
        code = left.pop(0)
        if leaves and not left:
            leaves.parent.mkdir(parents=True, exist_ok=True)
            leaves.touch()
        return code

    monkeypatch.setattr(pipeline_rows.main, "run", run)
    return typed


def test_a_missed_budget_that_left_no_file_is_typed_again(tmp_path, monkeypatch):
    left = tmp_path / "run" / "manifest.json"
    typed = ending(monkeypatch, 4, 4, 0, leaves=left)
    assert pipeline_rows.typed(["search"], left)[0] == 0 and len(typed) == 3
    typed = ending(monkeypatch, 4)  # which has left one
    assert pipeline_rows.typed(["search"], left)[0] == 4 and len(typed) == 1
    left.unlink()
    ending(monkeypatch, 4, 4, 4)
    with pytest.raises(NasctlError, match="search ended with 4"):
        pipeline_rows.typed(["search"], left)
    ending(monkeypatch, 130)
    with pytest.raises(KeyboardInterrupt):
        pipeline_rows.typed(["search"], left)


def test_a_stopped_pruning_begins_again_and_a_search_goes_on(experiment, monkeypatch):
    for verb, again in (("prune", True), ("search", False)):
        run = experiment.folder / f"whole.{verb}"
        run.mkdir()
        (run / "state").touch()
        typed = ending(monkeypatch, 3, leaves=run / f"bundle/{bundles.MANIFEST}")
        if again:
            made = experiment.pruned("whole", Made(experiment.folder, {"search": 0}))
            assert made == Made(run, {"search": 0, "prune": 3})
            made = experiment.pruned("whole", Made(experiment.folder, {"search": 0}))
        else:
            made = experiment.searched("whole", 1.0)
        assert made.codes[verb] == 3 and len(typed) == 1  # a row by then
        assert (run / "state").exists() is not again


def test_quantizing_is_repeated_while_the_machine_is_busy(experiment, monkeypatch):
    run = experiment.folder / "run"
    monkeypatch.setattr(
        pipeline_stages, "typed", lambda words, left: (typed.append(words) or 0, "")
    )
    busy = (
        "u8: x1.20 of model.onnx's speed, but the machine was busy: such a figure decides nothing"
    )
    for told, times, code in (([[busy], ["u8: taken"]], 2, 0), ([[busy]] * 5, 3, "busy")):
        typed, why = [], iter(told)
        monkeypatch.setattr(pipeline_stages, "told_of", lambda run, why=why: {"why": next(why)})
        e = replace(experiment, seed=times)
        assert e.quantized(Made(run, {})).codes == {"quantize": code}
        assert len(typed) == times


def test_an_engine_is_timed_beside_its_onnx_file(experiment, monkeypatch):
    run = experiment.folder / "run"
    path = run / "bundle" / "engines" / "model.ort"
    path.parent.mkdir(parents=True)
    path.write_text("engine")
    car = {"sha256": file.sha256(path), "bytes": 6, "observed": "int8", "runtime": "onnxruntime"}
    (path.parent / "model.ort.json").write_text(json.dumps(car))
    onnx = run / "bundle" / "model.onnx"
    sealed = SimpleNamespace(of=lambda role: ["engines/model.ort"], model=onnx)
    timed = []

    def timings(paths, seed, runtime):
        timed.append((list(paths), runtime))
        return [Timing(ms, 0, 0, 0, 0, 10, "busy" if ms > 1 else "") for ms in (2.0, 1.0)]

    monkeypatch.setattr(pipeline_stages.bundles, "read", lambda folder: sealed)
    monkeypatch.setattr(pipeline_stages, "file_timings", timings)
    monkeypatch.setattr(
        pipeline_stages, "typed", lambda words, left: (4 if words[0] == "verify" else 0, "")
    )
    row = experiment.engine(run, "ort")
    assert timed == [([onnx, path], "onnxruntime")]
    assert (row["ms"], row["ratio"], row["noisy"]) == (1.0, 0.5, "busy")
    assert row["codes"] == {"build": 0, "verify": 4}
    assert experiment.there(row)


def test_the_random_network_is_the_one_nearest_in_milliseconds(experiment, monkeypatch):
    space, like = experiment.space, experiment.folder / "run"
    (like / "bundle").mkdir(parents=True)
    (like / "bundle" / "arch.json").write_text(json.dumps({"genes": space.smallest.tolist()}))
    drawn = space.sample(np.random.default_rng((0, 71)), pipeline_chain.DRAWN)
    for at, share in ((3, 1.01), (7, 0.99)):
        took = [2.0, *(2 * share if at == each else 2.1 for each in range(len(drawn)))]
        monkeypatch.setattr(pipeline_chain, "graph_ms", lambda graphs, seed, took=took: took)
        found = pipeline_chain.at_random(experiment, like)
        assert found["genes"] == drawn[at].tolist()
        assert found["share"] == pytest.approx(share)


def test_on_fewer_pixels_the_widest_network_that_is_not_slower(experiment, monkeypatch, tmp_path):
    widths = pipeline_chain.WIDTHS
    assert widths[0] == 0.25 and widths[-1] == 2.0
    assert all(wide / narrow < 1.16 for narrow, wide in zip(widths, widths[1:], strict=False))
    took = [1.0]
    monkeypatch.setattr(pipeline_chain, "graph_ms", lambda graphs, seed: [*took, *widths])
    assert pipeline_chain.on_less(experiment, tmp_path)["width"] == max(w for w in widths if w <= 1)
    took = [0.1]
    with pytest.raises(NasctlError, match="no smaller input that is as fast"):
        pipeline_chain.on_less(experiment, tmp_path)


def test_the_smaller_input_is_one_on_which_the_same_network_costs_less():
    assert FULL.small < FULL.size and stem_strides(FULL.small) == stem_strides(FULL.size)


def test_as_much_work_counts_search_moves_ranking_and_own_training(experiment):
    e = replace(experiment, setting=replace(DIGITS, search=5.0, own=1.0))  # 8 steps per epoch
    (e.folder / "finalists.json").write_text(json.dumps({".": [{}] * 6}))
    moves = 8  # every fourth of the last 30 steps
    ranking = 6 * 3 * len(e.task.val) / 16  # two losses and the metrics of each
    assert pipeline_chain.work(e, e.folder) == round(40 + (moves * 9 + ranking) / 3) + 8


def test_as_much_work_as_a_pruning_is_what_it_took_and_at_least_what_it_trains(
    experiment, monkeypatch
):
    monkeypatch.setattr(pipeline_chain, "whole", lambda e: Made(e.folder, {}))
    monkeypatch.setattr(pipeline_chain, "step_seconds", lambda *asked: 0.5)
    for seed, (seconds, epochs) in enumerate(((40.0, 10.0), (1.0, 1.25 * 2 * (1 + 1 / 1.8)))):
        monkeypatch.setattr(
            Experiment, "pruning", lambda e, name, model, took=seconds: {"cpu_seconds": took}
        )
        e = replace(experiment, seed=seed, setting=replace(DIGITS, tuning=2.0, pruned=40))
        assert pipeline_chain.recovery(e) == pytest.approx(epochs)  # of 8 steps


def test_without_pruning_the_budget_is_the_share_that_pruning_left(experiment, monkeypatch):
    timed = {"before": {"median_ms": 2.0}, "after": {"median_ms": 1.5}}
    (experiment.folder / "report.json").write_text(json.dumps({"latency": timed}))
    asked = []
    monkeypatch.setattr(pipeline_chain, "whole", lambda e: Made(e.folder, {}))
    monkeypatch.setattr(pipeline_chain, "budget_ms", lambda e: 4.0)
    monkeypatch.setattr(pipeline_chain, "recovery", lambda e: 5.0)
    monkeypatch.setattr(Experiment, "quantized", lambda e, made: made)
    monkeypatch.setattr(
        Experiment,
        "searched",
        lambda e, name, ms, more: asked.append((ms, more)) or Made(e.folder, {}),
    )
    pipeline_chain.no_pruning(experiment)
    assert asked == [(3.0, 5.0)]


def chain_row(name, share=60, sha256=None):
    seen = [float(at < share) for at in range(64)]
    return {
        "file": f"{name}.onnx",
        "sha256": sha256 or name,
        "bytes": 1000,
        "test": {"digit": share / 64},
        "val": {"digit": share / 64},
        "evidence": {"digit": seen, "odd": seen},
        "codes": {"search": 0, "prune": 3},
    }


@pytest.mark.parametrize(
    ("ms", "noisy", "said", "met"),
    [
        (1.0, "", "equal", True),
        (1.2, "", "the rival had less time", False),
        (0.8, "", "the rival had more time", True),
        (1.0, "busy", "in doubt", None),
    ],
)
def test_a_gain_counts_at_no_more_milliseconds_and_beyond_doubt(
    experiment, capsys, ms, noisy, said, met
):
    rows = {"whole": chain_row("whole"), "no search": chain_row("no search", 30)}
    timing = {"median_ms": 1.0, "p95_ms": 1.0, "noisy": noisy}
    seed = Seed(0, rows, {"whole": {**timing, "median_ms": ms}, "no search": timing})
    outcome = contract.Outcome("pipeline")
    pipeline.compared(outcome, experiment.task.goals, [seed], "no search")
    assert outcome.figures["digit: whole against no search"] == pytest.approx(1.0)
    assert outcome.aims.get("digit_against_no_search", {"met": None})["met"] is met
    assert said in capsys.readouterr().out
    assert "prune 3" in pipeline.line(seed, "whole") and noisy in pipeline.line(seed, "whole")


def test_what_comes_to_no_file_is_left_out_and_the_rest_compared(experiment, monkeypatch, capsys):
    e = replace(experiment, setting=replace(DIGITS, hw="cpu"))
    made = {name: chain_row(name) for name in pipeline_chain.CHAINS}
    made["no INT8"] = chain_row("no INT8", sha256="whole")  # the whole chain's own file

    def chain(name):
        def work(e):
            if name == "no pruning":
                raise NasctlError("nasctl search ended with 3")
            return Made(e.folder / name, {})

        return work

    def engine(e, run, name):
        raise NasctlError("nasctl verify ended with 5")

    sessions = []

    def timings(paths, seed):
        noisy = "busy" if len(sessions) < 4 else ""
        sessions.append([path.name for path in paths])
        return [Timing(1.0, 0.0, 1.0, 1.0, 1.0, 10, noisy) for _ in paths]

    monkeypatch.setattr(pipeline, "CHAINS", {name: chain(name) for name in made})
    monkeypatch.setattr(pipeline, "judged", lambda e, run: made[run.name])
    monkeypatch.setattr(pipeline, "file_timings", timings)
    monkeypatch.setattr(Experiment, "engine", engine)
    monkeypatch.setattr(Experiment, "there", lambda e, row: True)
    outcome = contract.Outcome("pipeline")
    pipeline.run(outcome, [e], list(made))
    said = capsys.readouterr().out
    assert "no pruning, seed 0: no file: nasctl search ended with 3" in said
    assert "no INT8, seed 0: not applicable: the speed guard kept float" in said
    assert said.count("verify ended with 5") == 2
    assert sessions == [["whole.onnx", "no search.onnx", "smaller input.onnx"]] * 3
    assert not outcome.aims  # the last session too was in doubt
    assert "digit: whole against smaller input" in outcome.figures
    pipeline.run(outcome, [e], list(made))
    assert len(sessions) == 5  # what is in doubt is measured again by the next call
    assert {name.partition("_against_")[2] for name in outcome.aims} == {
        "no_search",
        "smaller_input",
    }
    pipeline.run(outcome, [e], list(made))
    assert len(sessions) == 5


def test_without_the_whole_chain_there_is_nothing_to_rival(experiment, monkeypatch, capsys):
    def nothing(e):
        raise NasctlError("nasctl prune ended with 3")

    chains = {"whole": nothing, "no search": lambda e: pytest.fail("a rival of nothing")}
    monkeypatch.setattr(pipeline, "CHAINS", chains)
    pipeline.run(contract.Outcome("pipeline"), [experiment], list(chains))
    assert "whole, seed 0: no file" in capsys.readouterr().out


def test_choosing_int8_networks_by_float_milliseconds():
    work, fp32 = np.arange(1.0, 21), np.arange(1.0, 21)
    same = pipeline_int8.judged(work, fp32, fp32 / 2)
    assert same["kendall"] == 1 and same["missed"] == same["lost"] == 0
    assert same["int8 / fp32"] == 0.5
    int8 = fp32 / 2
    int8[::2] *= 1.5  # every other network gains nothing
    mixed = pipeline_int8.judged(work, fp32, int8)
    assert mixed["missed"] > 0 and mixed["kendall"] < 1
    assert mixed["highest"] == 0.75 and mixed["lowest"] == 0.5


def test_networks_in_doubt_are_left_out_and_a_row_needs_enough_others(tmp_path, monkeypatch):
    def network(at, noisy=""):
        return {"macs": at, "ms": [float(at), 0.9 * at, 0.5 * at], "noisy": ["", noisy, ""]}

    sure = [network(at) for at in range(1, 13)]
    monkeypatch.setattr(pipeline_int8.space, "names", lambda: ["resnet"])
    monkeypatch.setattr(pipeline_int8, "RUNTIMES", ("onnxruntime",))
    for busy, kept in ((3, True), (4, False)):
        found = [network(40 + at, "busy") for at in range(busy)] + sure[busy:]
        monkeypatch.setattr(pipeline_int8, "measured", lambda *asked, found=found: found)
        rows = contract.Rows(tmp_path / f"{busy}.jsonl")
        outcome = contract.Outcome("pipeline_int8")
        pipeline_int8.run(outcome, rows)
        assert bool(outcome.figures) is bool(rows.done) is kept
    (key,) = contract.Rows(tmp_path / "3.jsonl").done
    assert json.loads(key)["machine"] == pipeline_rows.machine()
    assert pipeline_int8.figures(sure[:2])[2].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(("busy", "times"), [(1, 2), (9, 3)])
def test_a_session_of_too_many_in_doubt_is_repeated(monkeypatch, busy, times):
    sessions = []

    def session(paths, setting, rng, plan):
        sessions.append(len(paths))
        noisy = "busy" if len(sessions) <= busy else ""
        ms = [2.0 + at for at in range(len(paths))]
        return SimpleNamespace(timings=[Timing(each, 0, 0, 0, 0, 10, noisy) for each in ms])

    monkeypatch.setattr(pipeline_int8, "forms", lambda model, runtime: [model, model])
    monkeypatch.setattr(pipeline_int8.measure, "fresh_session", session)
    found = pipeline_int8.measured("resnet", "onnxruntime", 2, 3)
    assert sessions == [4] * times
    assert [network["ms"] for network in found] == [[2.0, 3.0], [4.0, 5.0]]
    assert [network["noisy"] for network in found] == 2 * [2 * ["busy" if busy > 3 else ""]]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A finished search, and what its exports and the stranger's script end with."""
    report = tmp_path / "digits" / "report.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"front": [{"high_ms": 1.0}, {"high_ms": 2.0}]}))
    codes = {}

    def typed(words, left):
        share = float(left.stem.removeprefix("digits-"))
        code = codes.get(share, 0)
        if code == 3:
            raise NasctlError("nasctl export ended with 3")
        left.write_text("file")
        return code, json.dumps({"measured": {"timing": {"median_ms": 0.9}}}) if not code else ""

    monkeypatch.setattr(pipeline_stranger, "typed", typed)
    late = {"median_ms": 1.3, "p95_ms": 9.0}
    monkeypatch.setattr(pipeline_stranger, "stranger", lambda path: late)
    return codes


def test_a_budget_is_held_by_the_middle_of_the_strangers_medians(tmp_path, finished):
    rows = contract.Rows(tmp_path / "rows.jsonl")
    outcome = contract.Outcome("pipeline_stranger")
    pipeline_stranger.run(outcome, rows, tmp_path)
    held = [share for share in pipeline_stranger.SHARES if share >= 0.3]
    assert outcome.figures["budgets held"] == pytest.approx(
        len(held) / len(pipeline_stranger.SHARES)
    )
    assert outcome.aims.keys() == {"stranger_median"}  # the p95 is told
    assert not outcome.aims["stranger_median"]["met"]
    assert outcome.figures["budgets held at the p95"] == 0
    known = len(rows.done)
    report = tmp_path / "digits" / "report.json"
    report.write_text(report.read_text() + " ")  # another search
    pipeline_stranger.run(outcome, rows, tmp_path)
    assert len(rows.done) == 2 * known


def test_budgets_that_nothing_fits_or_that_we_missed_leave_a_report(tmp_path, finished, capsys):
    first, *others = pipeline_stranger.SHARES
    finished.update({first: 3, **dict.fromkeys(others, 4)})
    outcome = contract.Outcome("pipeline_stranger")
    pipeline_stranger.run(outcome, contract.Rows(tmp_path / "rows.jsonl"), tmp_path)
    assert "10% of the way: not measured" in capsys.readouterr().out
    assert "theirs over ours" not in outcome.figures  # ours are all above the budget
    assert np.isfinite(list(outcome.figures.values())).all()
    finished.update(dict.fromkeys(pipeline_stranger.SHARES, 3))
    nothing = contract.Outcome("pipeline_stranger")
    pipeline_stranger.run(nothing, contract.Rows(tmp_path / "none.jsonl"), tmp_path)
    assert not nothing.figures and not nothing.aims
