"""What a forward pass did, whoever called it: layers, activations and norms, by torch function.

Hooks on modules see neither `F.relu(x)` nor the projections inside attention; a TorchFunctionMode
sees every call of a torch function. In-place activations are run out of place, so that what was
recorded stays what it was, and attention is spelled out, so that its four linear layers are layers.

Not seen: a matrix product with a weight that is no `linear` or convolution, recurrent layers, and
activations made of arithmetic (`x * sigmoid(x)` counts as a sigmoid).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
#: piecewise linear with the one corner at zero that codes are made of
RELUS = ("relu", "relu6", "leaky_relu", "prelu")
SMOOTH = ("gelu", "silu", "mish", "hardswish", "elu", "celu", "selu", "softplus", "tanh")
GATES = ("sigmoid", "hardsigmoid", "logsigmoid")
NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")


def _hard_sigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """torch's own has no second derivative."""
    return (x / 6 + 0.5).clamp(0, 1)


#: what runs in the place of what was called
INSTEAD: dict[str, Callable[..., Tensor]] = {
    "relu_": torch.relu,
    "leaky_relu_": F.leaky_relu,
    "elu_": F.elu,
    "hardsigmoid": _hard_sigmoid,
}


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer and what it gave."""

    weight: Tensor
    output: Tensor  # channels are dimension 1 of a convolution's, the last of a linear layer's
    channel: int  # that dimension

    @property
    def fan_in(self) -> float:
        """Weights per output channel."""
        return self.weight.numel() / self.output.shape[self.channel]


@dataclass(frozen=True)
class Call:
    """An activation or a norm: its name, what entered and what left."""

    name: str
    entered: Tensor
    left: Tensor


class Recorder(TorchFunctionMode):
    """`with Recorder() as seen: net(x)` fills its lists in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.activations: list[Call] = []
        self.norms: list[Call] = []
        self.opaque: list[str] = []  # calls with weights that were not looked into
        self.last_map: Tensor | None = None  # of a layer or activation: [B, C, H, W] or [B, T, C]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            call = _signature(func).bind(*args, **(kwargs or {})).arguments
            if _plain(call):
                with self:
                    return _attention(call)
            self.opaque.append("attention with masks of padding or extra keys")
        func, args, kwargs = _instead(func, name, args, kwargs or {})
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and args and isinstance(args[0], Tensor):
            self._note(name.rstrip("_"), args, kwargs, out)
        return out

    def _note(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor
    ) -> None:
        if name in CONVOLUTIONS or name in TRANSPOSED or name == "linear":
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.layers.append(Layer(weight, out, out.dim() - 1 if name == "linear" else 1))
        elif name in NORMS:
            self.norms.append(Call(name, args[0], out))
            return
        elif name == "hardtanh":  # how torch runs ReLU6
            low = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
            self.activations.append(Call("relu" if low == 0 else "tanh", args[0], out))
        elif name in RELUS or name in SMOOTH or name in GATES:
            self.activations.append(Call(name, args[0], out))
        else:
            return
        if out.dim() > 2 and name not in GATES:
            self.last_map = out


@cache
def _signature(func: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(func)


def _instead(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]:
    if name in INSTEAD:
        return INSTEAD[name], args, kwargs
    if not inspect.isfunction(func) or "inplace" not in _signature(func).parameters:
        return func, args, kwargs
    call = _signature(func).bind(*args, **kwargs)
    call.arguments["inplace"] = False
    return func, call.args, call.kwargs


def _plain(call: Mapping[str, Any]) -> bool:
    extra = ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask", "add_zero_attn")
    return call["query"].dim() == 3 and not any(
        call.get(name) is not None and call.get(name) is not False for name in extra
    )


def _attention(call: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` on [T, B, C], from its arguments by name; samples first
    inside, as everywhere else."""
    names = ("query", "key", "value")
    sources = [call[name].transpose(0, 1) for name in names]
    if call.get("use_separate_proj_weight"):
        weights = [call[f"{name[0]}_proj_weight"] for name in names]
    else:
        weights = call["in_proj_weight"].chunk(3)
    bias = call["in_proj_bias"]
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    heads = call["num_heads"]
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, T, d]
        for x, w, b in zip(sources, weights, biases, strict=True)
    )
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    mask = call.get("attn_mask")
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
        scores = scores + (mask.view(-1, heads, *mask.shape[1:]) if mask.dim() == 3 else mask)
    shares = scores.softmax(-1)
    kept = F.dropout(shares, call["dropout_p"], training=call.get("training", True))
    joined = (kept @ v).transpose(1, 2).flatten(2)
    out = F.linear(joined, call["out_proj_weight"], call["out_proj_bias"]).transpose(0, 1)
    if not call.get("need_weights", True):
        return out, None
    return out, shares.mean(1) if call.get("average_attn_weights", True) else shares
