"""`nasctl search --tasks … --together`: one network with all heads, and what goes on from it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_many_tasks import DATA, LITTLE, SEARCH
from test_multitask_search import problem, search, sides

from cli import many_tasks_stages as stages
from cli import several
from deploy import bundle as bundles
from deploy import verify
from nas import checkpoint, multitask, multitask_together
from nas.errors import NasctlError
from nas.multitask_search import Shared, space_for
from nas.multitask_together import judged, proposed

PRUNE = ["--target", "macs=-10%", "--max-drop", "90%", "--rounds", "1", "--epochs", "0"]
MORE = ["--epochs", "3", "--finetune", "1"]  # scores above 0, losses too
OWN_DATA = ["--data", "two_sides:task"]


@pytest.fixture
def data(workdir):
    (workdir / "two_sides.py").write_text(DATA)
    return workdir


def one_budget(macs=None):
    """A search whose tasks' problems are of the whole network."""
    asked = search()
    object.__setattr__(asked, "problems", {n: problem(asked.space, macs) for n in asked.names})
    return asked


def test_a_part_of_a_space_costs_what_its_own_heads_cost():
    space = space_for(sides(), 0.25)
    rows = space.sample(np.random.default_rng(0), 3)
    whole = space.costs(rows)  # compiled before
    one = space.only("box")
    assert (one.costs(rows) < whole).all()
    np.testing.assert_array_equal(space.only("class", "box").costs(rows), whole)


def test_proposed_first_is_what_all_tasks_like_and_all_are_inside_the_budget():
    asked = one_budget()
    low, high = asked.space.costs(np.stack([asked.space.smallest, asked.space.largest]))[:, 0]
    asked = one_budget((low + high) / 2)
    shared = Shared(asked)
    shared.logits[..., 1] -= 2.0  # both would keep no gate but those that follow
    shared.logits[0, 3, 1], shared.logits[1, 5, 1] = 9.0, 1.5
    rows = proposed(shared, asked)
    assert np.flatnonzero(rows[0]).tolist() == [3]  # the mean of 1.5 and -2 is below 0
    assert [3] in [np.flatnonzero(row).tolist() for row in rows]
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert (asked.space.costs(rows)[:, 0] <= (low + high) / 2).all()


def test_judged_by_the_mean_of_the_tasks_shares(monkeypatch):
    asked = one_budget()
    monkeypatch.setattr(multitask_together, "constant_loss", lambda *_: 2.0)
    losses = {"class": 1.0, "box": 4.0}
    monkeypatch.setattr(
        multitask_together, "validation_loss", lambda net, task: losses[task.goals[0].name]
    )
    (one,) = judged(Shared(asked), asked, 1)
    assert one.loss == pytest.approx((1.0 / 2 + 4.0 / 2) / 2)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("class=5ms", "--latency: one network has one budget; allowed: as 5ms, for all"),
        ("class=5ms,box=6ms", "one network has one budget"),
    ],
)
def test_one_network_has_one_budget(nasctl, data, budget, said):
    result = nasctl(*SEARCH, *LITTLE, "--together", "--latency", budget)
    assert result.code == 2 and said in " ".join(result.err.split())


def test_it_is_of_several_tasks(nasctl, workdir):
    result = nasctl("search", "--together", "--quick")
    assert result.code == 2 and "--together" in result.err


def written(folder, licence=""):
    """The weights of a small network of both tasks, as a search writes them."""
    task = multitask.load("two_sides:task")
    space, genes = space_for(task, 0.25), [0] * 28
    fields = {"data": "two_sides:task", "tasks": ["class", "box"], "space": "fbnetv5"}
    more = {"width": 0.25, "epochs": 1, "finetune": 0, "threads": 1, "licence": licence}
    spec = stages.TasksSpec(**fields, **more)
    net = space.build(space.decode(np.array(genes)))
    path = folder / "model.safetensors"
    checkpoint.write_described(path, net, several.describe(spec, task, space, genes))
    return path, net


def test_a_networks_file_is_read_again_with_its_data_and_no_other(data, monkeypatch):
    monkeypatch.syspath_prepend(str(data))
    path, net = written(data)
    found = several.read(path, "two_sides:task")
    assert checkpoint.digest(found.net) == checkpoint.digest(net)
    assert found.interface.outputs == found.interface.goals == ("class", "box")
    with pytest.raises(NasctlError, match="code, which is not run because a file says so"):
        several.read(path, None)
    (data / "others.py").write_text(DATA.replace("sides()\n", "sides(examples(72))\n"))
    with pytest.raises(NasctlError, match="other data"):
        several.read(path, "others:task")
    checkpoint.write(path, net.state_dict(), {})
    with pytest.raises(NasctlError, match="is not of a search for several tasks"):
        several.read(path, "two_sides:task")


def test_verbs_for_one_task_say_what_it_is(nasctl, data):
    path, _ = written(data)
    result = nasctl("evaluate", path)
    assert result.code == 2 and "is of a search for several tasks" in result.err
    (data / "run").mkdir()
    spec = {"tasks": ["class", "box"], "together": True}
    (data / "run" / "run.json").write_text(json.dumps({"spec": spec, "stages": {}}))
    result = nasctl("extract", "run", "--arch", "smallest")
    said = "this search has one network for class, box. Its file is in run/bundle"
    assert result.code == 1 and said in " ".join(result.err.split())


def test_pruning_says_what_can_go_in_a_network_of_both(nasctl, data):
    path, _ = written(data, licence="MIT")
    result = nasctl("prune", path, *OWN_DATA, *PRUNE, "--dry-run", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["units"] and set(found["spec"]["max_drop"]) == {"class", "box"}
    assert found["spec"]["licence"] == "MIT"  # as the search stated it


@pytest.mark.slow
def test_from_the_search_to_a_pruned_bundle_of_both_tasks(nasctl, data):
    first = nasctl(*SEARCH, *LITTLE, *MORE, "--together", "--json")
    assert first.code == 0, first.err
    found = json.loads(first.out)["tasks"]
    assert found["class"]["genes"] == found["box"]["genes"]
    assert found["class"]["file"]["path"] == "bundle/model.onnx"
    model = bundles.read(data / "run" / "bundle").model
    images = sides().normalise(sides().test.images[:2]).numpy()
    assert set(verify.outputs(model, images)) == {"class", "box"}
    before = model.read_bytes()
    assert nasctl(*SEARCH, *LITTLE, *MORE, "--together").code == 0
    assert model.read_bytes() == before
    held = nasctl("verify", "run", *OWN_DATA, "--json")
    assert held.code == 0, held.err
    assert [one["name"] for one in json.loads(held.out)["chain"]] == ["network = float file"]
    pruned = nasctl("prune", "run", *OWN_DATA, *PRUNE, "--threads", "1", "--run", "less", "--json")
    assert pruned.code == 0, pruned.err
    counts = json.loads(pruned.out)["counts"]["MACs"]
    assert counts["after"] <= 0.9 * counts["before"]
    assert set(verify.outputs(data / "less" / "bundle" / "model.onnx", images)) == {"class", "box"}
