"""One architecture search for many tasks, FBNetV5-style (arXiv 2111.10007).

Every task has a distribution over networks; each step draws a few networks from their mixture, all
tasks tell their loss of each (one pass of a shared backbone and its heads), and every distribution
takes a step by the unbiased estimate of `nas.mixture`. The abstract promises a cost that does not
grow with the tasks; how in detail is not public, so what follows is ours:

* losses count by their normal scores among the last WINDOW losses of the task, so that no task's
  scale or outlier drives anything;
* a task's budget is a hinge on its latency in microseconds, relative to the budget, and what it
  weighs rises for as long as the task's networks are above it on average (dual ascent: losses are
  graded, so whatever they are worth, no fixed weight would hold every budget);
* an entropy bonus that falls linearly to zero keeps distributions from settling early.

`ask` and `tell` are functions of a frozen State and of (seed, step): who keeps the State goes on
after a kill to the same result. Imports without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from nas import mixture
from nas.errors import NasctlError
from nas.mixture import Array, Policies
from nas.space import Genes

WINDOW = 128  # networks whose losses grade a new one
LIMIT = 6.0  # of a logit: every task keeps a share in every option, so that weights stay tame
DECAYS = (0.9, 0.99)  # Adam's
SETTLED = 0.1  # entropy below which a task counts as settled
LONE = 1.5  # effective networks per step below which a task hears next to nothing
#: seven pairs of these two were tried, on invented landscapes (12 seeds, 81 to 224 steps)
RISE = 0.15  # of the logarithm of a hinge's weight, in a step whose latencies are twice the aim
AIM = 0.95  # of a budget, for the mean: so most networks of the distribution are inside
HEAVIEST = 100.0  # a hinge's weight, as a multiple of the plan's


@dataclass(frozen=True)
class Plan:
    """A search of `steps` x `samples` networks. `budgets_us` has one latency per task, or None."""

    steps: int
    samples: int = 8
    lr: float = 0.4
    entropy: float = 0.2  # of the bonus at the first step
    weight: float = 2.0  # of a latency twice the budget, in deviations of the loss, at least
    budgets_us: tuple[float | None, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 2:
            raise NasctlError(
                f"{self.steps} steps of {self.samples} networks",
                where="plan",
                allowed="1 step or more of 2 networks or more: each is graded by the others",
            )


@dataclass(frozen=True)
class State:
    """Everything that a search is between two steps."""

    logits: Array  # [T, G, K]
    first: Array  # Adam's moments
    second: Array
    losses: Array  # [n <= WINDOW, T], the latest last
    price: Array  # [T], of a latency above the budget: a multiple >= 1 of the plan's weight
    step: int = 0

    @property
    def policies(self) -> Policies:
        return Policies(self.logits)


@dataclass(frozen=True)
class Report:
    """What a step says of each task [T]."""

    step: int
    entropy: Array  # of the distribution, 1 at first and 0 when settled
    effective: Array  # networks of the step that the task's estimate is worth
    loss: Array  # weighted mean of the step's networks, in the task's own unit
    scale: Array  # deviation of the task's losses in the window, likewise
    latency_us: Array  # weighted mean; NaN without latencies
    likeliest: Genes  # [T, G]

    @property
    def settled(self) -> NDArray[np.bool_]:
        return self.entropy < SETTLED

    @property
    def starved(self) -> NDArray[np.bool_]:
        """Tasks that the step taught next to nothing: the others' distributions have left theirs,
        or they have no labels."""
        return self.effective < LONE


def start(tasks: int, sizes: NDArray[np.int64]) -> State:
    """Uniform distributions over genes of `sizes` [G] options."""
    logits = mixture.uniform(tasks, sizes).logits
    moments = np.zeros_like(logits), np.zeros_like(logits)
    return State(logits, *moments, np.zeros((0, tasks)), np.ones(tasks))


def ask(plan: Plan, state: State) -> Genes:
    """The networks of the next step [samples, G]; the same ones may come again."""
    rng = np.random.default_rng((plan.seed, 50, state.step))
    return mixture.draw(state.policies, rng, plan.samples)


def tell(
    plan: Plan, state: State, rows: Genes, losses: Array, latency_us: Array | None = None
) -> tuple[State, Report]:
    """The state after a step whose networks had these losses [samples, T] (NaN: none known) and
    latencies in microseconds [samples, T] of what each task would deploy (NaN: no budget).

    Raises NasctlError if a task has no loss of any network yet, or budgets come without latencies.
    """
    window = np.concatenate([state.losses, losses])
    if (mute := ~np.isfinite(window).any(0)).any():
        raise NasctlError(
            f"no loss of any network for task {int(mute.argmax())}",
            where="tasks",
            next="Are any images labelled for it?",
        )
    policies = state.policies
    score = _graded(state.losses if state.step else losses, losses)
    score = score + plan.weight * state.price * _excess(plan, latency_us, losses.shape)
    towards = mixture.gradient(policies, rows, score)
    towards -= plan.entropy * (1 - state.step / plan.steps) * _entropy_gradient(policies)
    after = replace(_adam(state, towards, plan.lr), losses=window[-WINDOW:], step=state.step + 1)
    report = _report(after, policies, rows, losses, latency_us)
    return replace(after, price=_priced(plan, state, report)), report


def search(
    plan: Plan,
    state: State,
    evaluate: Callable[[Genes], Array],
    latency_us: Callable[[Genes], Array] | None = None,
) -> Iterator[tuple[State, Report]]:
    """From `state` to the end of the plan, where a network's losses do not change meanwhile: tables
    and trained supernets. One that is being trained has its own step between `ask` and `tell`."""
    while state.step < plan.steps:
        rows = ask(plan, state)
        said = None if latency_us is None else latency_us(rows)
        state, report = tell(plan, state, rows, evaluate(rows), said)
        yield state, report


def finalists(plan: Plan, state: State, known: Genes, n: int) -> Genes:
    """`n` networks [<= n, G] to judge at the end that are not in `known`: each task's likeliest,
    then draws from the mixture, which is flattened until it gives enough new ones."""
    seen = {tuple(row) for row in known.tolist()}
    found: list[tuple[int, ...]] = []
    rows = state.policies.likeliest()
    for attempt in range(200):
        for row in map(tuple, rows.tolist()):
            if row not in seen and len(found) < n:
                seen.add(row)
                found.append(row)
        if len(found) == n:
            break
        rng = np.random.default_rng((plan.seed, 51, attempt))
        rows = mixture.draw(Policies(state.logits / 1.1**attempt), rng, max(n, plan.samples))
    return np.array(found, np.int64).reshape(-1, state.logits.shape[1])


def _graded(window: Array, losses: Array) -> Array:
    """Normal scores [M, T] of losses by their place among those of the window; NaN stays."""
    scores = np.full(losses.shape, np.nan)
    for t, (past, now) in enumerate(zip(window.T, losses.T, strict=True)):
        past = np.sort(past[np.isfinite(past)])
        known = np.isfinite(now)
        if len(past) == 0:  # the task's first losses: any constant gives the same gradient
            scores[known, t] = 0.0
            continue
        below, upto = (np.searchsorted(past, now[known], side) for side in ("left", "right"))
        scores[known, t] = ndtri(((below + upto) / 2 + 0.5) / (len(past) + 1))
    return scores


def _excess(plan: Plan, latency_us: Array | None, shape: tuple[int, int]) -> Array:
    """Share by which each latency is above its task's budget [M, T]; 0 inside."""
    if not any(budget is not None for budget in plan.budgets_us):
        return np.zeros(shape)
    if latency_us is None or len(plan.budgets_us) != shape[1]:
        raise NasctlError(
            f"{len(plan.budgets_us)} budgets for {shape[1]} tasks, latencies "
            f"{'missing' if latency_us is None else 'given'}",
            where="budgets_us",
            allowed="one budget per task, and a latency of every network",
        )
    most = np.array([np.nan if b is None else b for b in plan.budgets_us])
    return np.nan_to_num(np.maximum(0.0, latency_us / most - 1))


def _priced(plan: Plan, state: State, report: Report) -> Array:
    """The next step's prices: up while a task's networks are above AIM on average."""
    if not any(budget is not None for budget in plan.budgets_us):
        return state.price
    most = np.array([np.nan if b is None else b for b in plan.budgets_us])
    above = np.nan_to_num(np.clip(report.latency_us / (AIM * most) - 1, -1.0, 1.0))
    return np.clip(state.price * np.exp(RISE * above), 1.0, HEAVIEST)


def _entropy_gradient(policies: Policies) -> Array:
    """d entropy (nats, per gene) / d logits [T, G, K]."""
    log = np.maximum(policies.log_probs, -1e3)
    entropy = -(policies.probs * log).sum(2, keepdims=True)
    return -policies.probs * (log + entropy)


def _adam(state: State, gradient: Array, lr: float) -> State:
    """A step of Adam (arXiv 1412.6980) on logits that are kept centred and within LIMIT."""
    count = state.step + 1
    first = DECAYS[0] * state.first + (1 - DECAYS[0]) * gradient
    second = DECAYS[1] * state.second + (1 - DECAYS[1]) * np.square(gradient)
    unbiased = [m / (1 - d**count) for m, d in zip((first, second), DECAYS, strict=True)]
    there = np.isfinite(state.logits)
    moved = np.where(there, state.logits - lr * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8), 0.0)
    moved -= moved.sum(2, keepdims=True) / there.sum(2, keepdims=True)
    logits = np.where(there, np.clip(moved, -LIMIT, LIMIT), -np.inf)
    return replace(state, logits=logits, first=first, second=second)


def _report(
    after: State, asked: Policies, rows: Genes, losses: Array, latency_us: Array | None
) -> Report:
    known = np.isfinite(losses)
    weight = np.where(known, mixture.weights(asked, rows), 0.0)
    mass = np.maximum(weight.sum(0), np.finfo(float).tiny)
    nothing = np.full(losses.shape[1], np.nan)
    latency = nothing if latency_us is None else (weight * latency_us).sum(0) / mass
    return Report(
        step=after.step,
        entropy=after.policies.entropy(),
        effective=len(rows) * mixture.effective(weight),
        loss=(weight * np.where(known, losses, 0.0)).sum(0) / mass,
        scale=np.nanstd(after.losses, axis=0),
        latency_us=latency,
        likeliest=after.policies.likeliest(),
    )
