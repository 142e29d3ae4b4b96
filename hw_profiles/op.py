"""Op: one operator (or fused block) as a device sees it, and the folds over a list of them.

`ops(arch)`, a list of these in execution order, is the only description of what a network costs:
MACs, parameters, bytes, peak memory, latency and even a whole runnable graph are folds over it.

Units and conventions, once and for all:
* 1 MAC is one multiply-add; batch is 1 (a latency table says which batch it was measured at);
* a sequence of n tokens is n pixels high and 1 wide, and `linear` then runs on every token;
* `params` counts what torch counts before folding: weights, biases and the two affine vectors of a
  batch norm. In the deployed file the norm is folded into weights and bias: see `weights`;
* every spatial operator pads by kernel // 2 on each side ("same" for odd kernels), except a 2x2
  pool with stride 2, which does not pad.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

INPUT = -1  # what an op reads when it reads the network's input

#: what sequences need beside `linear`: a table's rows by number (c_in of them), learned vectors per
#: place, a norm over channels (not folded when deployed), softmax(QK)V in `groups` heads
TOKENS = ("embed", "position", "layernorm", "attention")

KINDS = (
    *("conv", "dwconv", "linear", "avgpool", "maxpool", "gap", "upsample"),
    *("add", "mul", "concat", "act"),
    *TOKENS,
)


@dataclass(frozen=True, slots=True)
class Op:
    """One operator. Equality and hash ignore `reads` and `slot`: an Op is the key of a table."""

    kind: str
    c_in: int
    c_out: int
    h: int  # input height in pixels; 1 for a linear layer
    w: int
    kernel: int = 1
    stride: int = 1  # of an upsampling the whole factor by which height and width grow
    groups: int = 1
    #: fused activation: relu, hswish, hsigmoid, silu, gelu or nothing; zero, alone, forgets its
    #: input
    act: str = ""
    norm: bool = False  # followed by a batch norm, folded when deployed
    bias: bool = False
    #: positions in the op list of what this op reads; INPUT is the network's input
    reads: tuple[int, ...] = field(default=(INPUT,), compare=False)
    #: the part of the network it belongs to; a space declares which genes a slot depends on
    slot: str = field(default="", compare=False)

    @property
    def h_out(self) -> int:
        return self._out(self.h)

    @property
    def w_out(self) -> int:
        return self._out(self.w)

    def _out(self, size: int) -> int:
        if self.kind == "gap":
            return 1
        if self.kind == "upsample":
            return size * self.stride
        pad = 0 if self.kernel % 2 == 0 else self.kernel // 2
        return (size + 2 * pad - self.kernel) // self.stride + 1

    @property
    def weights(self) -> int:
        """Number of multiplied weights (no bias, no norm)."""
        if self.kind in ("conv", "dwconv"):
            return self.c_out * (self.c_in // self.groups) * self.kernel**2
        return self.c_in * self.c_out if self.kind == "linear" else 0

    @property
    def stored(self) -> int:
        """Number of parameters that nothing is multiplied with, biases and batch norms apart."""
        tables = {
            "embed": self.c_in * self.c_out,
            "position": self.c_out * self.h * self.w,
            "layernorm": 2 * self.c_out,
        }
        return tables.get(self.kind, 0)

    @property
    def fuses_add(self) -> bool:
        """A convolution with a second input: a residual added in its epilogue, as kernels do."""
        return self.kind in ("conv", "dwconv") and len(self.reads) > 1

    def deployed(self) -> Op:
        """The operator as a runtime sees it: a batch norm is folded into weights and bias."""
        return replace(self, norm=False, bias=True) if self.norm else self

    @property
    def macs(self) -> int:
        if self.kind == "attention":  # every token with every other, twice: QK and the sum over V
            return 2 * self.c_out * (self.h * self.w) ** 2
        return self.weights * self.h_out * self.w_out

    @property
    def params(self) -> int:
        return self.weights + self.stored + self.c_out * (int(self.bias) + 2 * int(self.norm))

    @property
    def elements_in(self) -> int:
        """Activation elements read, over all inputs."""
        if self.kind == "mul":  # a map times one number per channel (squeeze-excite)
            return self.c_in * (self.h * self.w + 1)
        return self.tensor_in * {"add": 2, "attention": 3}.get(self.kind, 1)

    @property
    def tensor_in(self) -> int:
        """Elements of one of the tensors that it reads: of a table's reader, one number a token."""
        return self.h * self.w * (1 if self.kind == "embed" else self.c_in)

    @property
    def elements_out(self) -> int:
        return self.c_out * self.h_out * self.w_out

    def bytes(self, itemsize: int = 4) -> int:
        """Memory traffic without any cache: activations read and written, weights read once, of a
        table only the rows that are asked for."""
        held = self.weights + self.c_out * int(self.bias or self.norm)
        held += min(self.stored, self.elements_out)
        return itemsize * (self.elements_in + self.elements_out + held)


def to_row(op: Op) -> dict[str, Any]:
    """An operator's dimensions for JSON: all that equality looks at; `Op(**row)` is its inverse."""
    return {f.name: getattr(op, f.name) for f in fields(op) if f.compare}


def macs(ops: Iterable[Op]) -> int:
    return sum(op.macs for op in ops)


def params(ops: Iterable[Op]) -> int:
    return sum(op.params for op in ops)


def live_elements(ops: Sequence[Op]) -> list[int]:
    """Activation elements that are live while each op runs, its inputs and output included.

    A tensor is live from the op that writes it to the last op that reads it; nothing is assumed to
    be computed in place, so a runtime may need less, never more (besides its own workspaces).
    """
    last = {read: at for at, op in enumerate(ops) for read in op.reads}
    live = {INPUT: ops[0].tensor_in}
    sums = []
    for at, op in enumerate(ops):
        live[at] = op.elements_out
        sums.append(sum(live.values()))
        live = {key: size for key, size in live.items() if last.get(key, -2) > at}
    return sums


def peak_activation_bytes(ops: Sequence[Op], itemsize: int = 4) -> int:
    """Largest sum of live activations (`live_elements`) while the ops run in order."""
    return max(live_elements(ops)) * itemsize


@dataclass(frozen=True, slots=True)
class Wire:
    """A tensor on the tape: who wrote it and its shape (channels, height, width)."""

    at: int
    c: int
    h: int
    w: int


class Tape:
    """Writes an op list the way a forward pass reads: each call appends one op and returns a wire.

    >>> tape = Tape(channels=3, size=32)
    >>> x = tape.conv(tape.input, 16, kernel=3, norm=True, act="relu")
    >>> tape.ops[0].macs
    442368
    """

    def __init__(self, channels: int, size: int, width: int | None = None) -> None:
        """For images of `size` x `width` pixels; square ones without a width."""
        self.ops: list[Op] = []
        self.slot = ""
        self.input = Wire(INPUT, channels, size, width or size)

    def conv(
        self,
        x: Wire,
        c_out: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: str = "",
        norm: bool = False,
        bias: bool = False,
    ) -> Wire:
        kind = "dwconv" if groups == x.c == c_out and groups > 1 else "conv"
        return self._append(
            Op(kind, x.c, c_out, x.h, x.w, kernel, stride, groups, act, norm, bias, (x.at,))
        )

    def linear(self, x: Wire, c_out: int, *, act: str = "", bias: bool = True) -> Wire:
        if x.h != 1 or x.w != 1:
            raise ValueError(f"linear reads a vector, not a {x.c} x {x.h} x {x.w} map")
        return self._append(Op("linear", x.c, c_out, 1, 1, act=act, bias=bias, reads=(x.at,)))

    def avgpool(self, x: Wire, *, kernel: int = 2, stride: int = 2) -> Wire:
        return self._append(Op("avgpool", x.c, x.c, x.h, x.w, kernel, stride, reads=(x.at,)))

    def maxpool(self, x: Wire, *, kernel: int = 2, stride: int = 2) -> Wire:
        return self._append(Op("maxpool", x.c, x.c, x.h, x.w, kernel, stride, reads=(x.at,)))

    def gap(self, x: Wire) -> Wire:
        """Global average pool: one number per channel."""
        return self._append(Op("gap", x.c, x.c, x.h, x.w, reads=(x.at,)))

    def upsample(self, x: Wire, factor: int) -> Wire:
        """Bilinear, by a whole factor; corners are not aligned."""
        return self._append(Op("upsample", x.c, x.c, x.h, x.w, stride=factor, reads=(x.at,)))

    @staticmethod
    def flatten(x: Wire) -> Wire:
        """The map as one vector, which a linear layer may read: no operator, nothing moves."""
        return Wire(x.at, x.c * x.h * x.w, 1, 1)

    def add(self, x: Wire, y: Wire, *, act: str = "") -> Wire:
        return self._append(Op("add", x.c, x.c, x.h, x.w, act=act, reads=(x.at, y.at)))

    def mul(self, x: Wire, gate: Wire) -> Wire:
        """Scale each channel of `x` by `gate` (c x 1 x 1)."""
        return self._append(Op("mul", x.c, x.c, x.h, x.w, reads=(x.at, gate.at)))

    def concat(self, *xs: Wire) -> Wire:
        c = sum(wire.c for wire in xs)
        return self._append(
            Op("concat", c, c, xs[0].h, xs[0].w, reads=tuple(wire.at for wire in xs))
        )

    # ---- sequences: as many pixels high as they have tokens, and 1 wide

    def embed(self, x: Wire, rows: int, c: int) -> Wire:
        """A vector per token, looked up in tables of `rows` vectors in all."""
        return self._append(Op("embed", rows, c, x.h * x.w, 1, reads=(x.at,)))

    def position(self, x: Wire) -> Wire:
        """A map as a sequence, with learned vectors added."""
        return self._append(Op("position", x.c, x.c, x.h * x.w, 1, reads=(x.at,)))

    def layernorm(self, x: Wire) -> Wire:
        return self._append(Op("layernorm", x.c, x.c, x.h, x.w, reads=(x.at,)))

    def project(self, x: Wire, c_out: int, *, act: str = "") -> Wire:
        """A linear layer with bias on every token."""
        return self._append(Op("linear", x.c, c_out, x.h, x.w, act=act, bias=True, reads=(x.at,)))

    def attention(self, q: Wire, k: Wire, v: Wire, heads: int) -> Wire:
        reads = (q.at, k.at, v.at)
        return self._append(Op("attention", q.c, q.c, q.h, q.w, groups=heads, reads=reads))

    def act(self, x: Wire, act: str, *, norm: bool = False) -> Wire:
        """An activation that follows no layer, with `norm` behind a batch norm of its own."""
        return self._append(Op("act", x.c, x.c, x.h, x.w, act=act, norm=norm, reads=(x.at,)))

    def _append(self, op: Op) -> Wire:
        # in place: nobody has seen it yet, and a copy would take as long as all else here
        object.__setattr__(op, "slot", self.slot)
        self.ops.append(op)
        return Wire(len(self.ops) - 1, op.c_out, op.h_out, op.w_out)
