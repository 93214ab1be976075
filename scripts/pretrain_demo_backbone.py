#!/usr/bin/env python3
"""Make the weights of tiny_resnet from nothing but a seed: contrastive learning on pictures drawn by code.

    scripts/pretrain_demo_backbone.py [--seed 0] [--steps 2600] [--threads 2] [--output .]

SimCLR (Chen et al., 2020): among all views of a batch, the features must tell which two belong to one object. A view
is a random crop, flip and change of colours; half of the pairs are two crops of one picture, half show the object anew,
before another ground and in another light. A small second task, the mean colours of a view's nine fields, keeps what
the first would throw away. Writes the backbone in fp16 as tiny_resnet-HASH.pth and prints its SHA-256, which is the
same for the same seed, number of threads, kind of processor and version of torch.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tl_trainer.data.drawing import Dice, Pattern, any_of, blob, box, ellipse, length, scenes, turned
from tl_trainer.ground.files import write_bytes
from tl_trainer.models.embedded import TinyResNet, TinyResNet_Weights

# glibc returns tensors of this size to the system after every operation; getting them anew costs a third of the time.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}

SCENE = 80  # pixels; the views are 48 of them for three fifths of the steps, then 64
DRAWN_AT_ONCE = 15  # batches
TEMPERATURE = 0.2
LUMA = torch.tensor([0.299, 0.587, 0.114])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument("--steps", type=int, default=2600, help="batches to learn from (default 2600)")
    parser.add_argument("--batch", type=int, default=256, help="pairs of views in a batch (default 256)")
    parser.add_argument("--reuse", type=int, default=6, help="how often a drawn object is used (default 6)")
    parser.add_argument("--threads", type=int, default=2, help="of the processor (default 2)")
    parser.add_argument("--output", type=Path, default=Path(), help="the folder for the file (default the current one)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    backbone = pretrain(args.seed, args.steps, args.batch, args.reuse)
    buffer = io.BytesIO()
    state = backbone.state_dict()
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    file = args.output / f"tiny_resnet-{digest[:8]}.pth"
    write_bytes(file, buffer.getvalue())
    print(f"{file}: {len(buffer.getvalue()) / 1e6:.2f} MB, SHA-256 {digest}")
    return 0


def pretrain(seed: int, steps: int, batch: int, reuse: int) -> TinyResNet:
    torch.manual_seed(seed)
    dice = Dice(seed)
    backbone = TinyResNet()
    projection = nn.Sequential(nn.Linear(320, 384), nn.BatchNorm1d(384), nn.ReLU(), nn.Linear(384, 128))
    colours = nn.Linear(320, 27)
    learners = nn.ModuleList([backbone, projection, colours]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(learners.parameters(), lr=3e-3, weight_decay=0.03)
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    normalise = TinyResNet_Weights.DEFAULT.transforms()
    mean, std = torch.tensor(normalise.mean)[:, None, None], torch.tensor(normalise.std)[:, None, None]
    bar = tqdm(range(steps), unit="step", dynamic_ncols=True)
    for step in bar:
        if step % (DRAWN_AT_ONCE * reuse) == 0:
            drawn = pairs(DRAWN_AT_ONCE * batch, dice)
        if step % DRAWN_AT_ONCE == 0:
            order = dice.order(len(drawn))
        rows = order[step % DRAWN_AT_ONCE * batch :][:batch]
        chosen = torch.cat([drawn[rows, dice.whole(0, 1, batch)] for _ in range(2)])
        views = recoloured(cropped(chosen, 48 if step < 0.6 * steps else 64, dice), dice)
        with torch.autocast("cpu", torch.bfloat16):
            features = backbone(((views - mean) / std).contiguous(memory_format=torch.channels_last))
        contrast = info_nce(projection(features.float()))
        colour = F.mse_loss(colours(features.float()), F.adaptive_avg_pool2d(views, 3).flatten(1))
        optimizer.zero_grad()
        (contrast + colour).backward()
        nn.utils.clip_grad_norm_(learners.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix_str(f"contrast {contrast.item():.2f}, colours {colour.item():.4f}")
    return backbone


def pairs(count: int, dice: Dice) -> Tensor:
    """(count, 2, 3, SCENE, SCENE) uint8: objects, each drawn twice."""
    drawn = []
    for _ in range(0, count, 192):  # so many at once fit into the processor's cache
        look, *views = dice.whole(0, 2**62, 3).tolist()
        draw = partial(scenes, partial(any_of, SHAPES), min(192, count), SCENE)
        drawn.append(torch.stack([draw(Dice(look), Dice(view)) for view in views], dim=1))
    return torch.cat(drawn)[:count]


def cropped(pictures: Tensor, size: int, dice: Dice) -> Tensor:
    """(N, 3, size, size) in [0, 1]: 12 to 100 % of each picture's area, half of them mirrored."""
    count = len(pictures)
    side, ratio = dice.between(0.12, 1, count).sqrt(), torch.exp(dice.between(-0.28, 0.28, count))
    width, height = (side * ratio).clamp(max=1), (side / ratio).clamp(max=1)
    x, y = dice.between(-1, 1, count) * (1 - width), dice.between(-1, 1, count) * (1 - height)
    mirror = torch.where(dice.between(0, 1, count) < 0.5, -1.0, 1.0)
    zero = torch.zeros(count)
    transform = torch.stack([width * mirror, zero, x, zero, height, y], dim=1).view(count, 2, 3)
    grid = F.affine_grid(transform, [count, 3, size, size], align_corners=False)
    return F.grid_sample(pictures.float() / 255, grid, padding_mode="reflection", align_corners=False)


def recoloured(views: Tensor, dice: Dice) -> Tensor:
    """Brightness, contrast, saturation and hue changed in four fifths of the views, and one fifth grey."""
    count = len(views)
    changed = (dice.between(0, 1, count, 1, 1) < 0.8).float()
    brightness, contrast, saturation = (1 + dice.between(-0.4, 0.4, 3, count, 1, 1) * changed).unbind()
    saturation = torch.where(dice.between(0, 1, count, 1, 1) < 0.2, 0.0, saturation)
    turn = dice.between(-0.2, 0.2, count, 1, 1) * math.pi * changed
    grey = torch.full((3, 3), 1 / 3)  # a change of hue is a rotation about the axis of the greys
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    hue = grey + torch.cos(turn) * (torch.eye(3) - grey) + torch.sin(turn) * across
    matrix = brightness * contrast * (saturation * torch.eye(3) + (1 - saturation) * LUMA) @ hue
    mean = brightness * torch.einsum("nchw,c->n", views, LUMA)[:, None, None] / views[0, 0].numel()
    return torch.baddbmm((1 - contrast) * mean, matrix, views.flatten(2)).view_as(views).clamp(0, 1)


def info_nce(projected: Tensor) -> Tensor:
    """The loss of SimCLR for (2N, D), where rows i and i + N belong together."""
    projected = F.normalize(projected, dim=1)
    similar = projected @ projected.T / TEMPERATURE
    similar.fill_diagonal_(-math.inf)
    return F.cross_entropy(similar, torch.arange(len(projected)).roll(len(projected) // 2))


# Shapes, as tl_trainer.data.drawing has them


def polygon(points: Tensor, dice: Dice) -> Tensor:
    """Three to seven straight sides, convex."""
    count = len(points)
    corners = dice.whole(3, 7, count)
    sides = torch.arange(7) % corners[:, None]
    jitter = dice.between(-0.3, 0.3, count, 7).gather(1, sides)
    angles = (sides + jitter) * (2 * math.pi / corners[:, None])
    offsets = dice.between(0.45, 0.8, count, 7).gather(1, sides)
    normals = torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)
    return (torch.einsum("nhwd,nds->nhws", points, normals) - offsets[:, None, None]).amax(-1)


def parts(points: Tensor, dice: Dice) -> Tensor:
    """Two boxes and two ellipses, joined."""
    count = len(points)
    joined = torch.full(points.shape[:-1], math.inf)
    for part in (box, ellipse, box, ellipse):
        centre = dice.between(-0.5, 0.5, count, 1, 1, 2)
        x, y = turned(points - centre, dice.between(-math.pi, math.pi, count)).unbind(-1)
        size = dice.between(0.1, 0.6, 2, count, 1, 1)
        joined = torch.minimum(joined, part(x, y, size[0], size[1]))
    return joined


def stroke(points: Tensor, dice: Dice) -> Tensor:
    """One line through five random points."""
    count = len(points)
    knots = dice.between(-0.9, 0.9, count, 1, 1, 5, 2)
    width = dice.between(0.05, 0.16, count, 1, 1)
    return torch.stack([segment(points, knots[..., k, :], knots[..., k + 1, :], width) for k in range(4)]).amin(0)


def segment(points: Tensor, start: Tensor, end: Tensor, width: Tensor | float) -> Tensor:
    """A line of that half width with round ends."""
    along, offset = end - start, points - start
    part = ((offset * along).sum(-1) / (along * along).sum(-1).clamp(min=1e-6)).clamp(0, 1)
    return length(offset - part[..., None] * along) - width


def branches(points: Tensor, dice: Dice) -> Tensor:
    """A trunk that forks three times."""
    count = len(points)
    width = dice.between(0.05, 0.14, count, 1, 1)
    spread, shrink = dice.between(0.3, 0.9, count, 1, 1), dice.between(0.6, 0.85, count, 1, 1)
    tips = [(torch.tensor([0.0, 0.9]).expand(count, 1, 1, 2), torch.full((count, 1, 1), -math.pi / 2))]
    reach = dice.between(0.5, 0.8, count, 1, 1)
    drawn = torch.full(points.shape[:-1], math.inf)
    for _ in range(3):
        grown = []
        for start, angle in tips:
            end = start + reach[..., None] * torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1)
            drawn = torch.minimum(drawn, segment(points, start, end, width))
            turn = dice.between(-0.3, 0.3, count, 1, 1)
            grown += [(end, angle + turn - spread), (end, angle + turn + spread)]
        tips, reach, width = grown, reach * shrink, width * 0.75
    return drawn


def fractal(points: Tensor, dice: Dice) -> Tensor:
    """The attractor of three random affine contractions (an iterated function system)."""
    count, side, walkers = len(points), 48, 600
    linear = dice.between(-1, 1, count, 3, 2, 2)
    linear = linear * (dice.between(0.45, 0.8, count, 3) / torch.linalg.matrix_norm(linear, 2))[..., None, None]
    shift = dice.between(-1, 1, count, 3, 1, 2)
    place, seen = torch.zeros(count, walkers, 2), []
    for step in range(16):
        chosen = dice.whole(0, 2, count, walkers)[..., None]
        moved = torch.einsum("nwd,nmde->nmwe", place, linear) + shift
        place = moved.gather(1, chosen[:, None].expand(-1, 1, -1, 2))[:, 0]
        if step >= 8:
            seen.append(place)
    found = torch.cat(seen, dim=1)
    low, high = found.amin(1, keepdim=True), found.amax(1, keepdim=True)
    cells = ((found - low) / (high - low).amax(-1, keepdim=True).clamp(min=1e-6) * (side - 1)).round().long()
    marks = torch.zeros(count, side * side).scatter_(1, cells[..., 1] * side + cells[..., 0], 1.0)
    marks = F.avg_pool2d(marks.view(count, 1, side, side), 3, stride=1, padding=1)
    return (0.25 - F.grid_sample(marks, points, align_corners=False)[:, 0]) * 0.2


SHAPES: tuple[Pattern, ...] = (blob, polygon, parts, stroke, branches, fractal)


if __name__ == "__main__":
    if sys.platform == "linux" and not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **MALLOC})
    sys.exit(main())
