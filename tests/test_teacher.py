from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from texts import prose, save_teacher

from compress import inherit, teacher
from nas.data import text
from nas.errors import NasctlError, UsageError
from nas.search_spaces.bert import Bert, Space, within


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return teacher.load(str(folder))


def test_it_computes_what_the_library_computes(folder, found):
    import transformers

    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = torch.tensor([[2, 5, 6, 7, 3, 0, 0], [2, 9, 8, 7, 6, 5, 3]])
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=tokens.ne(0).long(), output_hidden_states=True)
    seen = found.net.look(tokens)
    for mine, wanted in zip(seen.features, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(mine[seen.mask], wanted[seen.mask], rtol=0, atol=1e-5)


def test_it_is_frozen_and_says_who_it_is(found):
    assert not found.net.training and not any(p.requires_grad for p in found.net.parameters())
    again = Bert(found.net.arch, found.net.frame, 2)
    again.load_state_dict(found.net.state_dict())
    assert teacher.Teacher(again, found.tokenizer).fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "family 'gpt2'.*allowed: bert"),
        ({"num_attention_heads": 5}, "5 heads do not divide 64 channels"),
        ({"hidden_act": "relu"}, "activation relu; allowed: gelu"),
    ],
)
def test_teachers_that_we_cannot_express_are_refused(tmp_path, folder, change, message):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UsageError, match=message):
        teacher.load(str(tmp_path))


def test_a_teacher_without_a_tokenizer_is_one_line(tmp_path, folder):
    for path in folder.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(NasctlError, match="no tokenizer to read"):
        teacher.load(str(tmp_path))


def test_damaged_weights_are_one_line(tmp_path, folder):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-99])
    with pytest.raises(NasctlError, match="no weights to read"):
        teacher.load(str(tmp_path))


def test_an_absent_teacher_is_one_line_and_nothing_is_downloaded(tmp_path):
    with pytest.raises(NasctlError, match="no configuration to read.*Nothing is downloaded"):
        teacher.load(str(tmp_path / "nowhere"))


def test_without_the_library_the_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NasctlError, match="pip install 'nasctl"):
        teacher.load("any")


# ---- inheriting ----------------------------------------------------------------------------------


def test_the_whole_teacher_is_inherited_bit_by_bit(found):
    net = inherit.inherit(Bert(found.net.arch, found.net.frame, 2), found.net)
    for name, tensor in found.net.state_dict().items():
        assert name.startswith("head") or torch.equal(net.state_dict()[name], tensor), name


def test_a_smaller_network_takes_alternate_layers_and_corners(found):
    grid = within(4, 64, 4, 256)["small"]
    space = Space(size=8, grid=grid, frame=found.net.frame)
    net = inherit.inherit(space.supernet(), found.net)
    assert net.arch.layers == (0, 1, 2) and net.arch.hidden < 64
    for mine, theirs in zip(net.stack(), (0, 1, 2), strict=True):
        source = found.net.stack()[theirs].mlp.expand
        rows, columns = mine.mlp.expand.weight.shape
        assert torch.equal(mine.mlp.expand.weight, source.weight[:rows, :columns])
    chosen = inherit.inherit(space.supernet(), found.net, [0, 2, 3])
    source = found.net.stack()[3].attention.query
    query = chosen.stack()[2].attention.query
    assert torch.equal(query.bias, source.bias[: len(query.bias)])


def test_the_order_of_importance_is_the_same_teacher(found):
    tokens = torch.randint(1, 20, (3, 8), generator=torch.Generator().manual_seed(0))
    again = inherit.ranked(found.net)
    assert not torch.equal(again.words.weight, found.net.words.weight)
    ours, theirs = (net.look(tokens) for net in (again, found.net))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    mean = [seen.features[-1].mean(-1) for seen in (ours, theirs)]
    torch.testing.assert_close(mean[0], mean[1], rtol=0, atol=1e-5)
    norms = [layer.mlp.shrink.weight.norm(dim=0) for layer in again.stack()]
    assert all((norm.diff() <= 1e-6).all() for norm in norms)


def test_layers_that_do_nothing_are_the_least_important(found):
    import copy

    net = copy.deepcopy(found.net)
    for last in (net.stack()[1].attention.output, net.stack()[1].mlp.shrink):
        last.weight.data.zero_()
        last.bias.data.zero_()
    tokens = torch.randint(1, 20, (3, 8), generator=torch.Generator().manual_seed(0))
    assert inherit.important_layers(net, tokens, 3) == [0, 2, 3]


# ---- text ----------------------------------------------------------------------------------------


def test_packing_loses_nothing_but_the_end(tmp_path, found):
    path = tmp_path / "a.txt"
    path.write_text(prose(50))
    n = text.pack([path], 8, found.encode, found.wrapping, tmp_path / "packed.bin")
    rows = text.sequences(tmp_path / "packed.bin", 8)
    plain = [number for line in found.encode(path.read_text().splitlines()) for number in line]
    assert len(rows) == n == len(plain) // 6
    assert rows[:, 1:-1].flatten().tolist() == plain[: 6 * n]
    assert set(rows[:, 0]) == {2} and set(rows[:, -1]) == {3}


def test_a_sample_of_the_text_is_a_share_of_it(tmp_path, found, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(prose(50))
    whole = sum(map(len, found.encode(path.read_text().splitlines())))
    assert text.sampled([path], found.encode) == (whole, 1.0)
    monkeypatch.setattr(text, "LINES", 10)
    tokens, share = text.sampled([path], found.encode)
    assert 0.1 < share < 0.3 and abs(tokens / share / whole - 1) < 0.1


def test_packing_is_the_same_however_lines_are_grouped(tmp_path, found, monkeypatch):
    (tmp_path / "a.txt").write_text(prose(40))
    (tmp_path / "b.txt").write_text(prose(20, seed=1))
    both = [tmp_path / "a.txt", tmp_path / "b.txt"]
    text.pack(both, 8, found.encode, found.wrapping, tmp_path / "one.bin")
    monkeypatch.setattr(text, "LINES", 3)
    text.pack(both, 8, found.encode, found.wrapping, tmp_path / "two.bin")
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()


def test_packing_holds_a_few_lines_in_memory_not_the_text(tmp_path, found, monkeypatch):
    (tmp_path / "a.txt").write_text(prose(500))
    most = []

    def encode(texts):
        most.append(len(texts))
        return found.encode(texts)

    monkeypatch.setattr(text, "LINES", 20)
    text.pack([tmp_path / "a.txt"], 8, encode, found.wrapping, tmp_path / "packed.bin")
    assert max(most) == 20 and len(most) == 25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few for one sequence"),
        (b"the cat\n", "2 tokens in all, too few"),
        (b"the cat sat\n\xff the dog\n", "a.txt, line 2: no UTF-8 at byte 12"),
    ],
)
def test_bad_text_is_one_line_and_leaves_no_file(tmp_path, found, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(NasctlError, match=message):
        text.pack([path], 8, found.encode, found.wrapping, tmp_path / "packed.bin")
    assert not (tmp_path / "packed.bin").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_line(tmp_path, found):
    (tmp_path / "a.txt").write_text(prose(50))
    (tmp_path / "packed.part").symlink_to("/dev/full")
    with pytest.raises(NasctlError, match="packed.bin: cannot write: No space left"):
        text.pack([tmp_path / "a.txt"], 8, found.encode, found.wrapping, tmp_path / "packed.bin")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_absent_text_and_impossible_lengths(tmp_path, found):
    with pytest.raises(NasctlError, match="cannot read"):
        text.pack([tmp_path / "no"], 8, found.encode, found.wrapping, tmp_path / "packed.bin")
    with pytest.raises(UsageError, match="4 or more"):
        text.pack([], 3, found.encode, found.wrapping, tmp_path / "packed.bin")
