"""The solver against scikit-learn's, and against the gradient of torch's own loss."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from tl_trainer import logistic
from tl_trainer.logistic import Axes, Solution, path, promising

STRENGTHS = [10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4]


def noisy(rows: int, width: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Features of classes that overlap, of very different scales and not centred, and the labels."""
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(classes, (rows,), generator=generator)
    middles = torch.randn(classes, width, generator=generator)
    features = (middles[targets] * 0.4 + torch.randn(rows, width, generator=generator)) * torch.logspace(-1, 1, width)
    return features + 3, targets


def solutions(features: Tensor, soft: Tensor, shares: Tensor | None = None) -> list[Solution]:
    shares = torch.ones(1, len(features)) if shares is None else shares
    return list(path(Axes.of(features), soft, shares, STRENGTHS))


def logits(solution: Solution, features: Tensor, problem: int = 0) -> Tensor:
    weight, bias = solution.head(problem)
    return features @ weight.T + bias


@pytest.mark.parametrize("shape", [(200, 12), (40, 90)])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_solution_is_that_of_scikit_learn(shape: tuple[int, int], classes: int) -> None:
    features, targets = noisy(*shape, classes)
    for solution in solutions(features, functional.one_hot(targets, classes).float()):
        assert solution.converged.all()
        torch.testing.assert_close(solution.logits[0], logits(solution, features), atol=1e-3, rtol=1e-3)
        c = 1 / (solution.strength * len(features))
        if classes == 2:  # scikit-learn has one weight for two classes, which its penalty counts once
            c *= 2
        reference = LogisticRegression(C=c, solver="newton-cg", max_iter=10_000, tol=1e-8)  # lbfgs takes minutes here
        reference.fit(features.double().numpy(), targets.numpy())
        expected = torch.from_numpy(reference.predict_proba(features.double().numpy())).float()
        torch.testing.assert_close(logits(solution, features).softmax(dim=1), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_it_minimises_torchs_weighted_cross_entropy(smoothing: float) -> None:
    features, targets = noisy(150, 10)
    weights = torch.tensor([0.5, 1.0, 2.5])
    soft = weights * (functional.one_hot(targets, 3) * (1 - smoothing) + smoothing / 3)
    criterion = nn.CrossEntropyLoss(weights, label_smoothing=smoothing, reduction="sum")
    for solution in solutions(features, soft):
        weight, bias = (part.requires_grad_() for part in solution.head())
        loss = criterion(features @ weight.T + bias, targets) / soft.sum()
        objective = loss + solution.strength / 2 * weight.square().sum()
        by_weight, by_bias = torch.autograd.grad(objective, (weight, bias))
        scale = torch.cat([features, torch.ones(len(features), 1)], dim=1).square().mean(dim=0)
        slope = torch.cat([by_weight, by_bias[:, None]], dim=1)
        assert (slope.square() / scale).sum() < 1e-3 * objective


def test_a_row_without_a_share_is_left_out_and_gets_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "PRECISION", 1e-6)
    features, targets = noisy(120, 30)
    soft = functional.one_hot(targets, 3).float()
    shares = torch.ones(3, 120)
    shares[0, :40] = shares[1, 40:] = 0
    alone = solutions(features[40:], soft[40:])
    for together, solution in zip(solutions(features, soft, shares), alone, strict=True):
        shown = [logits(found, features).softmax(dim=1) for found in (together, solution)]
        torch.testing.assert_close(*shown, atol=0.01, rtol=0)
        assert not torch.allclose(together.logits[0], together.logits[1], atol=0.05)


def test_a_column_without_information_and_two_rows_are_no_problem() -> None:
    features = torch.tensor([[0.0, 1.0, 5.0], [1.0, 1.0, 5.0]])
    found = solutions(features, torch.eye(2))
    for solution in found:
        weight, _ = solution.head()
        assert weight.isfinite().all()
        assert weight[:, 1:].abs().max() < 1e-4
    assert (logits(found[-1], features).argmax(dim=1) == torch.tensor([0, 1])).all()
    same = solutions(torch.ones(4, 3), torch.eye(2).repeat(2, 1))[-1]
    torch.testing.assert_close(logits(same, torch.ones(4, 3)).softmax(dim=1), torch.full((4, 2), 0.5))


@pytest.mark.parametrize(
    ("losses", "count"),
    [
        ([[3.0], [1.0], [1.25], [1.26], [0.1]], 4),
        ([[math.nan], [2.0], [math.nan], [2.6], [0.1]], 4),
        ([[2.0, 1.0], [2.6, 0.9], [2.6, 1.2], [0.1, 0.1]], 3),
        ([[2.0, 1.0], [2.6, 1.3], [0.1, 0.1]], 2),
        ([[math.inf], [math.inf], [1.0]], 3),
    ],
)
def test_a_path_ends_where_all_losses_are_hopeless(losses: list[list[float]], count: int) -> None:
    assert len(list(promising(losses, torch.tensor))) == count


def test_labels_that_do_not_exclude_each_other_are_solved_as_scikit_learn_solves_each_of_them() -> None:
    features, _ = noisy(150, 10)
    generator = torch.Generator().manual_seed(1)
    wanted = features @ torch.randn(10, 3, generator=generator) / 20
    labels = (wanted + torch.randn(150, 3, generator=generator) > wanted.mean(dim=0)).long()
    labels[:30, 0] = -1  # nobody says
    soft = torch.stack([(labels == 0).float(), 2.0 * (labels == 1)], dim=2)
    shares = torch.ones(2, 150)
    shares[0, 100:] = 0
    for solution in path(Axes.of(features), soft, shares, STRENGTHS):
        assert solution.converged.all()
        for problem, rows in enumerate((range(100), range(150))):
            expected = []
            for label in range(3):
                kept = [row for row in rows if labels[row, label] >= 0]
                had = labels[kept, label].numpy()
                weights = 1.0 + had
                c = 1 / (solution.strength * weights.sum())
                reference = LogisticRegression(C=c, solver="newton-cg", max_iter=10_000, tol=1e-8)
                reference.fit(features[kept].double().numpy(), had, sample_weight=weights)
                expected.append(torch.from_numpy(reference.predict_proba(features.double().numpy())[:, 1]).float())
            found = logits(solution, features, problem)
            torch.testing.assert_close(solution.logits[problem], found, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(found.sigmoid(), torch.stack(expected, dim=1), atol=0.02, rtol=0)


def test_a_label_that_no_image_has_or_of_which_nobody_says_does_not_disturb_the_others() -> None:
    features, targets = noisy(80, 6)
    labels = functional.one_hot(targets, 3)
    alone = torch.stack([(1 - labels).float(), labels.float()], dim=2)
    absent = torch.stack([torch.tensor([1.0, 0.0]).repeat(80, 1), torch.zeros(80, 2)], dim=1)
    for one, both in zip(
        solutions(features, alone), solutions(features, torch.cat([alone, absent], dim=1)), strict=True
    ):
        assert both.converged.all()
        torch.testing.assert_close(both.logits[..., :3], one.logits, atol=1e-3, rtol=1e-3)
        assert (both.logits[..., 3] < -3).all()
        assert (both.logits[..., 4] == 0).all()
