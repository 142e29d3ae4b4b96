"""Stateless elastic layers of transformers, on sequences [N, S, C].

As in `nas.elastic`: the width is read off `x`, sizes are arguments, a layer asked for its full size
is the plain torch layer. Queries, keys and values have a matrix and a bias each, so that those of
fewer heads are a prefix of each. (In AutoFormer's code the rows of one common matrix are sliced
interleaved and its bias is not: entries change roles between networks; microsoft/Cream issue 121.)
The size of a head is fixed, as in AutoFormer (arXiv 2107.00651, section 3.2) and AutoDistil
(arXiv 2201.12507): the inner width of attention is heads x size, whatever the width around it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nas.elastic import Middle, Residual
from nas.seen import Heads


class Project(nn.Linear):
    """A linear layer on every token, with `out` outputs."""

    def forward(self, x: Tensor, out: int | None = None) -> Tensor:
        out, width = out or self.out_features, x.shape[-1]
        if (out, width) == (self.out_features, self.in_features):
            return super().forward(x)
        return F.linear(x, self.weight[:out, :width], self.bias[:out])


class LayerNorm(nn.LayerNorm):
    """Over the channels that `x` has: mean and variance are those of the active width."""

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[-1]
        if (c,) == self.normalized_shape:
            return super().forward(x)
        return F.layer_norm(x, (c,), self.weight[:c], self.bias[:c], self.eps)


class Table(nn.Embedding):
    """Vectors of `width` channels, looked up by number."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, width: int | None = None) -> Tensor:
        return F.embedding(x, self.weight[:, : width or self.embedding_dim])


class Attention(nn.Module):
    """Scaled dot-product attention with up to `heads` heads of `size` channels."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.query, self.key, self.value = (Project(width, heads * size) for _ in "qkv")
        self.output = Project(heads * size, width)

    def forward(self, x: Tensor, heads: int, mask: Tensor | None = None) -> tuple[Tensor, Heads]:
        """The result [N, S, C], and the queries, keys and values that it was made from.

        `mask` [N, 1, 1, S] is True where there is a token to attend to.
        """
        inner = heads * self.size
        seen = Heads(self.query(x, inner), self.key(x, inner), self.value(x, inner))
        apart = [part.unflatten(2, (heads, self.size)).transpose(1, 2) for part in seen]
        y = F.scaled_dot_product_attention(apart[0], apart[1], apart[2], attn_mask=mask)
        return self.output(y.transpose(1, 2).flatten(2), x.shape[2]), seen


class Mlp(Residual):
    """Two layers with a GELU between; `mid` channels live in the middle."""

    def __init__(self, width: int, mid: int) -> None:
        super().__init__()
        self.expand = Project(width, mid)
        self.shrink = Project(mid, width)

    def forward(self, x: Tensor, mid: int) -> Tensor:
        return self.shrink(F.gelu(self.expand(x, mid)), x.shape[2])

    def middles(self) -> list[Middle]:
        tensors = ((self.expand.weight, 0), (self.expand.bias, 0), (self.shrink.weight, 1))
        return [Middle(tensors, self.shrink.weight)]
