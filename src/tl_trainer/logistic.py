"""Multinomial logistic regression on features, solved to convergence: a path of strengths, many problems at once.

The features are turned into their principal axes first. A rotation changes nothing about the problem, but in these
axes the curvature is nearly diagonal, so that a diagonal preconditioner makes every strength a matter of some ten
steps of L-BFGS (Nocedal & Wright, Numerical Optimization, chapter 7).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MEMORY = 8  # pairs of steps and gradients that L-BFGS remembers
ITERATIONS = 100  # for one strength; a warm start needs some ten
PRECISION = 1e-5  # of the objective: the decrease that a Newton step would still bring
SMALLEST = 1e-3  # nats: an objective below it is as exact as this one
SUFFICIENT = 1e-4  # of the expected decrease: Armijo's condition
HALVINGS = 20
ROUNDING = 1e-6  # of the objective in float32


class Solution(NamedTuple):
    """Of each problem: weight (B, D, C), bias (B, C), logits of all rows (B, N, C), and whether it converged (B,)."""

    strength: float
    weight: Tensor
    bias: Tensor
    logits: Tensor
    converged: Tensor


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


def path(axes: Axes, targets: Tensor, shares: Tensor, strengths: Sequence[float]) -> Iterator[Solution]:
    """The solutions for one strength after the other, each begun at the one before; strong to weak is fastest.

    Minimised is, for each of the B problems, sum_n shares[b, n] * cross_entropy(logits[n], targets[n]) / total +
    strength / 2 * |weight|^2, where total is the sum of all weights that the problem has; the bias is free.

    targets: (N, C), a row the weights of the classes, whose sum is the weight of the row: one-hot for plain labels.
    shares: (B, N), how much each row counts in each problem: 0 leaves it out, though its logits are given too.
    """
    problem = _Problem(axes.rotated, targets, shares)
    point = problem.rotated.new_zeros(len(shares), problem.rotated.shape[1] + 1, targets.shape[1])
    for strength in strengths:
        point, logits, converged = _minimise(problem, point, strength)
        weight = axes.axes @ point[:, :-1]
        bias = point[:, -1] - axes.mean @ weight
        yield Solution(strength, weight, bias, logits.transpose(0, 1), converged)


class _Problem:
    """B weighted cross-entropies over the same rows, whose products with the features are one matrix product."""

    def __init__(self, rotated: Tensor, targets: Tensor, shares: Tensor) -> None:
        self.rotated, self.targets = rotated, targets
        counted = shares * targets.sum(dim=1)
        self.weights = (shares / counted.sum(dim=1, keepdim=True)).T[..., None]  # (N, B, 1)
        self.row_weights = targets.sum(dim=1)[:, None, None]
        self.squares = (rotated.square().T @ (self.weights[..., 0] * self.row_weights[..., 0])).T  # (B, R)

    def __call__(self, point: Tensor, strength: float) -> tuple[Tensor, Tensor, Tensor]:
        """Objective (B,), gradient (B, R + 1, C) and logits (N, B, C) at the point (B, R + 1, C)."""
        problems, width, classes = point.shape
        flat = point[:, :-1].transpose(0, 1).reshape(width - 1, problems * classes)
        logits = (self.rotated @ flat).view(-1, problems, classes) + point[:, -1]
        log_shares = logits.log_softmax(dim=2)
        loss = -(self.weights * self.targets[:, None] * log_shares).sum(dim=(0, 2))
        wrong = self.weights * (self.row_weights * log_shares.exp() - self.targets[:, None])
        slope = (self.rotated.T @ wrong.flatten(1)).view(width - 1, problems, classes).transpose(0, 1)
        slope = slope + strength * point[:, :-1]
        objective = loss + strength / 2 * point[:, :-1].square().sum(dim=(1, 2))
        return objective, torch.cat([slope, wrong.sum(dim=0)[:, None]], dim=1), logits

    def curvature(self, logits: Tensor, strength: float) -> Tensor:
        """(B, R + 1, 1): an estimate of the Hessian's diagonal."""
        shares = logits.softmax(dim=2)
        spread = (self.weights * self.row_weights * shares * (1 - shares)).sum(dim=0).mean(dim=1, keepdim=True)
        spread = spread.clamp(min=1e-6)
        return torch.cat([spread * self.squares + strength, spread], dim=1)[..., None]


def _minimise(problem: _Problem, point: Tensor, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """L-BFGS from `point` on, each problem until it has converged: the point, its logits, and whether it has (B,)."""
    value, slope, logits = problem(point, strength)
    curvature = problem.curvature(logits, strength)
    pairs: list[_Pair] = []
    for _ in range(ITERATIONS):
        converged = _dot(slope, slope / curvature) / 2 <= PRECISION * value.clamp(min=SMALLEST)
        if converged.all():
            break
        move = -_newton_step(slope, curvature, pairs) * ~converged[:, None, None]
        expected = SUFFICIENT * _dot(slope, move)
        for _ in range(HALVINGS):
            reached, after, logits = problem(point + move, strength)
            too_far = reached > value + expected + ROUNDING * value
            if not too_far.any():
                break
            halves = torch.where(too_far, 0.5, 1.0)
            move, expected = move * halves[:, None, None], expected * halves
        change = after - slope
        curved = _dot(move, change)
        pairs = [*pairs, _Pair(move, change, torch.where(curved > 0, 1 / curved, 0))][-MEMORY:]
        point, value, slope = point + move, reached, after
    return point, logits, converged


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
