"""Logistic regression on features, solved to convergence: a path of strengths, many problems at once.

It is multinomial for classes that exclude each other, and one against the rest for labels that do not.

The features are turned into their principal axes first. A rotation changes nothing about the problem, but in these
axes the curvature is nearly diagonal, so that a diagonal preconditioner makes every strength a matter of a few
steps of L-BFGS (Nocedal & Wright, Numerical Optimization, chapter 7), begun where the two strengths before point to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

STRENGTHS = [10 ** (3 - step / 4) for step in range(37)]  # of L2, 1e3 to 1e-6, that are tried
HOPELESS = 1.25  # times the lowest log loss so far: where a path of ever weaker strengths ends

MEMORY = 8  # pairs of steps and gradients that L-BFGS remembers
ITERATIONS = 100  # for one strength; a warm start needs some three
PRECISION = 1e-5  # of the objective: the decrease that a Newton step would still bring
SMALLEST = 1e-3  # nats: an objective below it is as exact as this one
SUFFICIENT = 1e-4  # of the expected decrease: Armijo's condition
HALVINGS = 20
ROUNDING = 1e-6  # of the objective in float32


@dataclass(frozen=True)
class Axes:
    """The principal axes of features: their mean (D,), the axes (D, R), and the features in them (N, R)."""

    mean: Tensor
    axes: Tensor
    rotated: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Axes:
        """From features (N, D), by the smaller of their two Gram matrices."""
        mean = features.mean(dim=0)
        centred = features - mean
        if len(features) > features.shape[1]:
            axes = torch.linalg.eigh(centred.T @ centred).eigenvectors
            return cls(mean, axes, centred @ axes)
        squares, vectors = torch.linalg.eigh(centred.double() @ centred.double().T)
        kept = squares > squares[-1].clamp(min=1e-30) * 1e-12  # the rest is rounding
        lengths = squares[kept].sqrt()
        axes = (centred.double().T @ (vectors[:, kept] / lengths)).to(features.dtype)
        return cls(mean, axes, (vectors[:, kept] * lengths).to(features.dtype))


class Solution(NamedTuple):
    """Of each problem: its point (B, C, R + 1), the logits of all rows (B, N, C), and whether it converged (B,)."""

    strength: float
    axes: Axes
    point: Tensor
    logits: Tensor
    converged: Tensor

    def head(self, problem: int = -1) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) of a problem, for features as they were before the rotation."""
        weight = self.point[problem, :, :-1] @ self.axes.axes.T
        return weight, self.point[problem, :, -1] - weight @ self.axes.mean


def path(axes: Axes, targets: Tensor, shares: Tensor, strengths: Sequence[float]) -> Iterator[Solution]:
    """The solutions for one strength after the other; strong to weak, in equal ratios, is fastest.

    Minimised is, for each of the B problems, sum_n shares[b, n] * cross_entropy(logits[n], targets[n]) / total +
    strength / 2 * |weight|^2, where total is the sum of all weights that the problem has; the bias is free.

    targets: (N, C), a row the weights of the classes, whose sum is the weight of the row: one-hot for plain labels.
    (N, C, 2) are classes that do not exclude each other: the weights of a row without and with the class, both 0 where
    nobody says; then each class is a problem of its own, with the same strength for all.
    shares: (B, N), how much each row counts in each problem: 0 leaves it out, though its logits are given too.
    """
    problem = (
        _Problem(axes.rotated, targets, shares) if targets.ndim == 2 else _OneVsRest(axes.rotated, targets, shares)
    )
    alone = targets.ndim == 3  # each class is
    size = (len(shares) * targets.shape[1], 1) if alone else (len(shares), targets.shape[1])
    point = axes.rotated.new_zeros(*size, axes.rotated.shape[1] + 1)
    here = before = _At(point, problem.logits(point))
    for strength in strengths:
        ahead = _At(2 * here.point - before.point, 2 * here.logits - before.logits)
        closer = problem.objective(ahead, strength)[0] < problem.objective(here, strength)[0]
        reached, converged = _minimise(problem, ahead.where(closer, here), strength)
        found, whole = reached, converged
        if alone:
            found = _At(*(part.view(len(shares), targets.shape[1], -1) for part in reached))
            whole = converged.view(len(shares), -1).all(dim=1)
        yield Solution(strength, axes, found.point, found.logits.transpose(1, 2), whole)
        sound = reached.point.isfinite().all(dim=2).all(dim=1)
        before, here = here, reached.where(sound, here)


Judged = TypeVar("Judged")


def promising(judged: Iterable[Judged], loss_of: Callable[[Judged], Tensor]) -> Iterator[Judged]:
    """What a path gives, each judged by its log loss, up to the first that is hopeless: weaker strengths are worse.

    loss_of: its log loss; or several, () or (K,), which have to be hopeless all at once.
    """
    lowest: Tensor | None = None
    for one in judged:
        yield one
        loss = loss_of(one)
        lowest = loss if lowest is None else lowest.fmin(loss)
        if (loss > HOPELESS * lowest).all():
            return


class _At(NamedTuple):
    """A point (B, C, R + 1), the bias last, and its logits (B, C, N), which are linear in it."""

    point: Tensor
    logits: Tensor

    def where(self, these: Tensor, other: _At) -> _At:
        """The problems `these` (B,) of this one, the rest of the other."""
        return _At(*(torch.where(these[:, None, None], *pair) for pair in zip(self, other, strict=True)))


class _Problem:
    """B weighted cross-entropies over the same rows, whose products with the features are one matrix product.

    Classes come before rows: a product whose long side is the features' own is several times faster on a processor.
    """

    def __init__(self, rotated: Tensor, targets: Tensor, shares: Tensor) -> None:
        self.rotated, self.targets = rotated, targets.T.contiguous()
        self.row_weights = targets.sum(dim=1)
        counted = shares * self.row_weights
        self.weights = (shares / counted.sum(dim=1, keepdim=True))[:, None]  # (B, 1, N)
        self.squares = (self.weights[:, 0] * self.row_weights) @ rotated.square()  # (B, R)

    def logits(self, point: Tensor) -> Tensor:
        """(B, C, R + 1) -> (B, C, N)"""
        problems, classes, _ = point.shape
        products = point[..., :-1].flatten(0, 1) @ self.rotated.T
        return products.view(problems, classes, -1) + point[..., -1:]

    def objective(self, at: _At, strength: float) -> tuple[Tensor, Tensor]:
        """(B,), and the logarithms of the probabilities (B, C, N)."""
        log_shares = at.logits.log_softmax(dim=1)
        loss = -(self.weights * self.targets * log_shares).sum(dim=(1, 2))
        return loss + strength / 2 * at.point[..., :-1].square().sum(dim=(1, 2)), log_shares

    def slope(self, log_shares: Tensor, point: Tensor, strength: float) -> Tensor:
        """The gradient (B, C, R + 1)."""
        wrong = self.weights * (self.row_weights * log_shares.exp() - self.targets)
        of_weight = (wrong.flatten(0, 1) @ self.rotated).view_as(point[..., :-1]) + strength * point[..., :-1]
        return torch.cat([of_weight, wrong.sum(dim=2, keepdim=True)], dim=2)

    def curvature(self, log_shares: Tensor, strength: float) -> Tensor:
        """(B, 1, R + 1): an estimate of the Hessian's diagonal."""
        shares = log_shares.exp()
        spread = (self.weights * self.row_weights * shares * (1 - shares)).sum(dim=2).mean(dim=1, keepdim=True)
        spread = spread.clamp(min=1e-6)
        return torch.cat([spread * self.squares + strength, spread], dim=1)[:, None]


class _OneVsRest:
    """B * C binary cross-entropies over the same rows, (B * C, 1, R + 1) each, with the methods of `_Problem`."""

    def __init__(self, rotated: Tensor, targets: Tensor, shares: Tensor) -> None:
        self.rotated, (without, having) = rotated, targets.permute(2, 1, 0)  # (C, N) each
        counted = shares[:, None] * (without + having)  # (B, C, N)
        total = counted.sum(dim=2, keepdim=True).clamp(min=torch.finfo(rotated.dtype).tiny)  # of a class of no row
        self.weights = (counted / total).flatten(0, 1)[:, None]  # (B * C, 1, N)
        self.targets = (having > 0).to(rotated).repeat(len(shares), 1)[:, None]

    def logits(self, point: Tensor) -> Tensor:
        """(B * C, 1, R + 1) -> (B * C, 1, N)"""
        return point[..., :-1] @ self.rotated.T + point[..., -1:]

    def objective(self, at: _At, strength: float) -> tuple[Tensor, Tensor]:
        """(B * C,), and the probabilities (B * C, 1, N)."""
        losses = functional.softplus(at.logits) - at.logits * self.targets
        loss = (self.weights * losses).sum(dim=(1, 2))
        return loss + strength / 2 * at.point[..., :-1].square().sum(dim=(1, 2)), at.logits.sigmoid()

    def slope(self, shares: Tensor, point: Tensor, strength: float) -> Tensor:
        """The gradient (B * C, 1, R + 1)."""
        wrong = self.weights * (shares - self.targets)
        of_weight = wrong @ self.rotated + strength * point[..., :-1]
        return torch.cat([of_weight, wrong.sum(dim=2, keepdim=True)], dim=2)

    def curvature(self, shares: Tensor, strength: float) -> Tensor:
        """(B * C, 1, R + 1): the Hessian's diagonal."""
        spread = self.weights * shares * (1 - shares)
        of_bias = spread.sum(dim=2, keepdim=True).clamp(min=1e-6)
        return torch.cat([spread @ self.rotated.square() + strength, of_bias], dim=2)


def _minimise(problem: _Problem | _OneVsRest, at: _At, strength: float) -> tuple[_At, Tensor]:
    """L-BFGS, each problem until it has converged: where it ends, and whether it has (B,)."""
    value, log_shares = problem.objective(at, strength)
    slope, curvature = problem.slope(log_shares, at.point, strength), problem.curvature(log_shares, strength)
    pairs: list[_Pair] = []
    for iteration in range(ITERATIONS + 1):
        converged = _dot(slope, slope / curvature) / 2 <= PRECISION * value.clamp(min=SMALLEST)
        if iteration == ITERATIONS or (converged | ~value.isfinite()).all():
            break
        move = -_newton_step(slope, curvature, pairs) * ~converged[:, None, None]
        of_move, expected = problem.logits(move), SUFFICIENT * _dot(slope, move)
        for _ in range(HALVINGS):
            ahead = _At(at.point + move, at.logits + of_move)
            reached, log_shares = problem.objective(ahead, strength)
            too_far = reached > value + expected + ROUNDING * value
            if not too_far.any():
                break
            halves = torch.where(too_far, 0.5, 1.0)
            move, of_move = (part * halves[:, None, None] for part in (move, of_move))
            expected = expected * halves
        after = problem.slope(log_shares, ahead.point, strength)
        change = after - slope
        curved = _dot(move, change)
        pairs = [*pairs, _Pair(move, change, torch.where(curved > 0, 1 / curved, 0))][-MEMORY:]
        at, value, slope = ahead, reached, after
    return at, converged


class _Pair(NamedTuple):
    """A step, the change of the gradient along it, and 1 / their dot product, 0 where that is not positive."""

    move: Tensor
    change: Tensor
    inverse: Tensor


def _newton_step(slope: Tensor, curvature: Tensor, pairs: Sequence[_Pair]) -> Tensor:
    """The gradient times an estimate of the inverse Hessian: the two loops of L-BFGS."""
    step, weights = slope, []
    for pair in reversed(pairs):
        weights.append((pair.inverse * _dot(pair.move, step))[:, None, None])
        step = step - weights[-1] * pair.change
    step = step / curvature
    for pair, weight in zip(pairs, reversed(weights), strict=True):
        step = step + (weight - (pair.inverse * _dot(pair.change, step))[:, None, None]) * pair.move
    return step


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """(B,)"""
    return (first * second).sum(dim=(1, 2))
