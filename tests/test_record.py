"""What `nas.record` sees of attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.record import Recorder


@pytest.mark.parametrize("mask", [None, "bool", "float", "per head"])
@pytest.mark.parametrize("separate", [False, True])
def test_attention_spelled_out_is_torchs(mask, separate):
    torch.manual_seed(0)
    sizes = {"kdim": 6, "vdim": 5} if separate else {}
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    q = torch.randn(3, 4, 8)
    k, v = (torch.randn(3, 4, 6), torch.randn(3, 4, 5)) if separate else (q, q)
    above = torch.ones(4, 4).triu(1).bool()
    masks = {
        None: None,
        "bool": above,
        "float": torch.randn(4, 4),
        "per head": torch.randn(6, 4, 4),
    }
    for weights in (False, True):
        expected = attention(q, k, v, attn_mask=masks[mask], need_weights=weights)
        with Recorder() as record:
            found = attention(q, k, v, attn_mask=masks[mask], need_weights=weights)
        torch.testing.assert_close(found, expected)
        assert len(record.layers) == 4 and not record.opaque


def test_attention_that_is_not_spelled_out_says_so():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x, padding = torch.randn(3, 4, 8), torch.zeros(3, 4).bool()
    with Recorder() as record:
        found, _ = attention(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(found, attention(x, x, x, key_padding_mask=padding)[0])
    assert record.opaque and not record.layers
