"""Forward and backward passes that proxies read, each run once however many proxies ask.

A proxy (a file in `nas/predictors/`) is a formula `value(seen) -> float` over steps that it reads
off a `Passes`: `seen.read(gradients)` runs the step when first asked for and keeps it. So a proxy
alone and a proxy beside others compute the same number, and one forward pass, one backward pass of
the loss and one of the logits serve most of them.

The network itself is left alone: passes run on parameters that share its memory but not its
gradients, and on copies of its buffers; training flags and torch's random state are put back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from nas.record import RELUS, Layer, Recorder

T = TypeVar("T")
SAME = 1e-6  # of the largest logit: samples that differ by less are not told apart


class Missing(Exception):
    """A proxy has no value for this network; the text says why."""


@dataclass(frozen=True)
class Batch:
    """What proxies look at a network with. Everything random follows from `seed`."""

    inputs: Tensor  # [B, ...], normalised as for training
    labels: Tensor  # int64 [B]
    seed: int = 0
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


@dataclass(frozen=True)
class Score:
    """NaN is missing, and then `reason` says why."""

    value: float
    reason: str = ""
    seconds: float = 0.0  # of the proxy alone: its own and those of every step that it reads


Value = Callable[["Passes"], float]


@dataclass(frozen=True)
class _Done(Generic[T]):
    outcome: T | Missing
    seconds: float  # without the steps that it read
    read: frozenset[Callable[..., Any]]  # those steps, and what they read


@dataclass
class _Frame:
    read: set[Callable[..., Any]] = field(default_factory=set)
    inner_s: float = 0.0


class Passes:
    """One network and one batch; made by `opened`."""

    def __init__(self, net: nn.Module, batch: Batch) -> None:
        self.net, self.batch = net, batch
        self.device = next((p.device for p in net.parameters()), batch.inputs.device)
        self.parameters = {
            name: p.detach().requires_grad_(p.is_floating_point())
            for name, p in net.named_parameters()
        }
        norms = (nn.LayerNorm, nn.RMSNorm)
        of_norms = {id(p) for m in net.modules() if isinstance(m, norms) for p in m.parameters()}
        #: filters and matrices: parameters of two or more dimensions that are no norm's
        self.matrices = [
            name
            for name, p in net.named_parameters()
            if p.dim() > 1 and p.is_floating_point() and id(p) not in of_norms
        ]
        self._done: dict[Callable[..., Any], _Done[Any]] = {}
        self._frames: list[_Frame] = []

    @property
    def weights(self) -> list[Tensor]:
        return [self.parameters[name] for name in self.matrices]

    def read(self, step: Callable[[Passes], T]) -> T:
        """What `step` found; raises Missing, every time, if it found that there is nothing."""
        if step not in self._done:
            self._done[step] = self._timed(step)
        done = self._done[step]
        if self._frames:
            self._frames[-1].read |= {step, *done.read}
        if isinstance(done.outcome, Missing):
            raise done.outcome
        return done.outcome

    def score(self, value: Value) -> Score:
        done = self._timed(value)
        seconds = done.seconds + sum(self._done[step].seconds for step in done.read)
        if isinstance(done.outcome, Missing):
            return Score(math.nan, str(done.outcome), seconds)
        found = float(done.outcome)
        return Score(found, "", seconds) if math.isfinite(found) else _overflow(found, seconds)

    def _timed(self, step: Callable[[Passes], T]) -> _Done[T]:
        self._frames.append(_Frame())
        began = time.perf_counter()
        outcome = attempt(lambda: step(self))
        took = time.perf_counter() - began
        frame = self._frames.pop()
        if self._frames:
            self._frames[-1].inner_s += took
        return _Done(outcome, took - frame.inner_s, frozenset(frame.read))

    def run(
        self, x: Tensor, parameters: Mapping[str, Tensor] | None = None, *, training: bool = True
    ) -> Tensor:
        """The network's logits [B, K] for `x`, with other parameters if given.

        Raises Missing if what comes out is not one row of logits per sample.
        """
        torch.manual_seed(self.batch.seed)  # dropout is the same whoever asks; undone by `opened`
        parameters = self.parameters if parameters is None else parameters
        dtype = next((p.dtype for p in parameters.values() if p.is_floating_point()), x.dtype)
        buffers = {
            name: b.to(dtype, copy=True) if b.is_floating_point() else b.clone()
            for name, b in self.net.named_buffers()
        }
        self.net.train(training)
        logits = functional_call(self.net, {**parameters, **buffers}, (x,))
        if not isinstance(logits, Tensor):
            raise Missing(f"the network gives a {type(logits).__name__}, not one tensor of logits")
        if logits.dim() != 2 or len(logits) != len(x):
            raise Missing(f"the network gives {list(logits.shape)}, not logits [{len(x)}, classes]")
        return logits

    def generator(self, stream: int = 0) -> torch.Generator:
        """On the CPU, so that a seed means the same on every device."""
        return torch.Generator().manual_seed(self.batch.seed + (stream << 32))

    def fresh(self, std: Callable[[Tensor], float]) -> dict[str, Tensor]:
        """Parameters for proxies that bring their own: matrices normal with deviation
        `std(matrix)`, biases 0, the factors of norms 1."""
        generator, found = self.generator(1), dict(self.parameters)  # not the stream of inputs
        for name, p in self.parameters.items():
            if name in self.matrices:
                drawn = torch.randn(p.shape, generator=generator, dtype=torch.float32)
                found[name] = (drawn * std(p)).to(p)
            elif name.endswith(("bias", "weight")):
                found[name] = torch.full_like(p, float(name.endswith("weight")))
        return found

    def noise(self) -> Tensor:
        """Inputs N(0, 1) of the batch's shape."""
        if not self.batch.inputs.is_floating_point():
            raise Missing("the input is not continuous")
        drawn = torch.randn(self.batch.inputs.shape, generator=self.generator())
        return drawn.to(self.device, self.batch.inputs.dtype)


@contextmanager
def opened(net: nn.Module, batch: Batch) -> Iterator[Passes]:
    """Passes over `net`, which afterwards is as it was, as is torch's random state."""
    modes = [(module, module.training) for module in net.modules()]
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with ExitStack() as inside:
        inside.enter_context(torch.random.fork_rng(devices=cuda))
        inside.enter_context(torch.inference_mode(False))
        inside.enter_context(torch.enable_grad())
        inside.enter_context(sdpa_kernel(SDPBackend.MATH))  # others have no second derivative
        try:
            yield Passes(net, batch)
        finally:
            for module, training in modes:
                module.training = training


def measure(net: nn.Module, batch: Batch, proxies: Mapping[str, Value]) -> dict[str, Score]:
    """Every proxy's score, from shared passes. Nothing that a network does is an error."""
    with opened(net, batch) as seen:
        return {name: seen.score(value) for name, value in proxies.items()}


def alone(value: Value, net: nn.Module, batch: Batch) -> float:
    """One proxy's score; NaN is missing."""
    return measure(net, batch, {"": value})[""].value


def attempt(call: Callable[[], T]) -> T | Missing:
    """The one boundary around networks and proxies that are not ours: whatever one raises becomes
    the reason why its score is missing, so that a run over thousands goes on."""
    try:
        return call()
    except Missing as missing:
        return missing
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Missing(f"{type(error).__name__}: {first[:200]}".rstrip(": "))


def _overflow(found: float, seconds: float) -> Score:
    return Score(math.nan, f"overflow: the value is {found}", seconds)


# ---- steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forward:
    inputs: Tensor  # a leaf, [B, ...]
    logits: Tensor  # [B, K]
    loss: Tensor
    record: Recorder


def forward(seen: Passes) -> Forward:
    """One recorded pass in training mode: batch norms use the batch's own statistics.

    Raises Missing for a network whose logits are the same for every sample: it is dead.
    """
    x = seen.batch.inputs.to(seen.device).detach()
    x.requires_grad_(x.is_floating_point())
    with Recorder() as record:
        logits = seen.run(x)
    spread = (logits - logits[:1]).abs().max()
    if not torch.isfinite(spread):
        raise Missing("overflow: the logits are not finite")
    if len(x) > 1 and spread <= SAME * logits.abs().max():
        raise Missing("dead: the logits are the same for every sample")
    return Forward(x, logits, seen.batch.loss(logits, seen.batch.labels.to(seen.device)), record)


@dataclass(frozen=True)
class Gradients:
    weights: list[tuple[Tensor, Tensor]]  # matrices and their gradients
    layers: list[tuple[Layer, Tensor]]  # layers and the gradients of their outputs


def gradients(seen: Passes) -> Gradients:
    """One backward pass of the loss, to matrices and to the outputs of layers."""
    passed = seen.read(forward)
    weights, layers = seen.weights, passed.record.layers
    targets = [*weights, *(layer.output for layer in layers)]
    found = gradient(passed.loss, targets)
    of_weights, of_layers = found[: len(weights)], found[len(weights) :]
    if not any(bool(g.any()) for g in of_weights):
        raise Missing("dead: no gradient reaches any weight")
    return Gradients(
        list(zip(weights, of_weights, strict=True)), list(zip(layers, of_layers, strict=True))
    )


def gradient(of: Tensor, to: list[Tensor], *, differentiable: bool = False) -> list[Tensor]:
    """d of / d to, zeros where there is no way; the graph is kept for whoever comes next."""
    found = torch.autograd.grad(
        of, to, retain_graph=True, create_graph=differentiable, allow_unused=True
    )
    return [torch.zeros_like(t) if g is None else g for t, g in zip(to, found, strict=True)]


def jacobian(seen: Passes) -> Tensor:
    """One backward pass of the sum of logits to the inputs: [B, inputs], float64."""
    passed = seen.read(forward)
    if not passed.inputs.requires_grad:
        raise Missing("the input is not continuous")
    (found,) = gradient(passed.logits.sum(), [passed.inputs])
    if not found.any():
        raise Missing("dead: the logits do not depend on the input")
    return found.flatten(1).double()


def correlation(rows: Tensor) -> Tensor:
    """Of rows [N, D] with each other [N, N]; raises Missing if one is constant."""
    if len(rows) < 2:
        raise Missing("a batch of one has no correlations")
    centred = rows - rows.mean(1, keepdim=True)
    lengths = centred.norm(dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise Missing("dead: a sample's gradient is constant")
    unit = centred / lengths
    return (unit @ unit.T).clamp(-1, 1)


def places(x: Tensor) -> Tensor:
    """Rows of channels, one per sample and place: channels are dimension 1 of images [B, C, ...],
    the last of anything else."""
    return (x.movedim(1, -1) if x.dim() > 3 else x).flatten(0, -2)


def codes(seen: Passes) -> list[Tensor]:
    """Per ReLU, which of its inputs are above zero: bool [B, units]."""
    activations = seen.read(forward).record.activations
    found = [call.entered.detach().flatten(1) > 0 for call in activations if call.name in RELUS]
    if not found:
        raise Missing("no ReLU was seen")
    every = sum(call.left[0].numel() for call in activations)
    if 2 * sum(code.shape[1] for code in found) < every:
        raise Missing("most of its activations are not ReLUs")
    return found
