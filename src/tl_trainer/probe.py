"""Which of several backbones, or weights of one: each is judged by the head that is found on its features.

Measuring is reliable where transferability scores are not, and on kept features it costs one pass over the images for
each backbone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from tl_trainer.assembly import Setup, set_up
from tl_trainer.candidates import Found
from tl_trainer.config.data import expand
from tl_trainer.config.load import Loaded
from tl_trainer.config.schema import Config
from tl_trainer.errors import ConfigError, Interrupted, RunError, SettingError
from tl_trainer.feeds import close
from tl_trainer.ground.files import make_folder
from tl_trainer.ground.machine import seconds_of
from tl_trainer.ground.signals import StopRequest
from tl_trainer.metrics import wilson
from tl_trainer.models.backbones import check_tensors, resolve_weights
from tl_trainer.search import NotSearchable, find_head
from tl_trainer.settings import check_settings, located

log = logging.getLogger(__name__)

FASTER = 2  # times as many images a second, for which a backbone is taken that cannot be told from the best
TIMED, TIMES = 8, 3  # images at once, and how often, of which the fastest counts
SAID_LATER = ("tl_trainer.data", "tl_trainer.assembly")  # loggers whose lines come with the run


@dataclass(frozen=True)
class Probe:
    """A backbone that was probed; a row of the table and of result.json.

    top1, loss: of the best head on the images that judge it, and the 95% interval of the former. images_per_second:
    through the frozen backbone, without reading them. seconds: of the probe, most of them for features.
    """

    backbone: str
    weights: str
    top1: float
    interval: list[float]
    loss: float
    head: str
    images: int
    judged_by: str
    images_per_second: float
    parameters: int
    seconds: float
    taken: bool = False


def probe(loaded: Loaded, stop: StopRequest) -> Loaded:
    """Compare the entries of the list that `model` has; the configuration with the one that goes on, and all rows.

    Raises a TrainerError, before any image is read for what cannot be compared, and Interrupted where `stop` asks.
    """
    [key] = loaded.lists
    with located(loaded):
        _check(loaded.config, f"model.{key}")
    candidates = [loaded.taking(config) for config in loaded.each]
    _check_all(candidates)
    make_folder(expand(loaded.config.output.dir), "--output")
    with located(loaded):
        _fetch_all(candidates, f"model.{key}")

    def pause() -> None:
        if stop.signal is not None:
            raise Interrupted(
                stop.signal, "stopped while backbones were compared; the same command goes on, with the kept features"
            )

    probes = []
    for number, candidate in enumerate(candidates, 1):
        model = candidate.config.model
        log.info("comparing %d of %d: %s (%s)", number, len(candidates), model.backbone, model.weights)
        probes.append(_probed(candidate, pause))
        pause()
    place = chosen(probes)
    probes[place] = replace(probes[place], taken=True)
    ranked = sorted(probes, key=_rank)
    log.info("judged by %s, the best first:\n%s", probes[0].judged_by, "\n".join(_lines(ranked)))
    return replace(candidates[place], probed=[asdict(row) for row in ranked])


def chosen(probes: Sequence[Probe]) -> int:
    """The place of the one that goes on.

    It is the one that is right most often, unless others are within one standard error of it and FASTER times as fast:
    then the fastest of these.
    """
    best = min(probes, key=_rank)
    least = best.top1 - _error(best)
    others = [row for row in probes if row.top1 >= least and row.images_per_second >= FASTER * best.images_per_second]
    return probes.index(max(others, key=lambda row: row.images_per_second, default=best))


def _rank(row: Probe) -> tuple[float, float]:
    return -row.top1, row.loss


def _error(row: Probe) -> float:
    return float((row.top1 * (1 - row.top1) / row.images) ** 0.5)


def _check(config: Config, key: str) -> None:
    """Raise SettingError where heads cannot be found, so that there is nothing to compare by."""
    trains = [phase for phase in config.phases if phase.search == "off"]
    obstacle = None
    if config.data.task == "multitask":
        obstacle = "there are several heads, by which backbones are not compared yet"
    elif config.data.task != "single":
        obstacle = "images may have several labels, by whose mean average precision backbones are not told apart yet"
    elif config.model.extra:
        obstacle = "model.extra trains new stages"
    elif trains and trains[-1].trainable != "head":
        obstacle = "the backbone is to be fine-tuned"
    elif trains:
        obstacle = "the head is to be trained (train.search is off where epochs, optimizer or schedule are set)"
    elif config.features.cache == "off":
        obstacle = "features.cache is off"
    elif config.model.head.dropout and not config.model.head.hidden:
        obstacle = "the head has dropout"
    if obstacle:
        raise SettingError(
            key, f"is a list, which is compared by heads that are found on kept features, and here {obstacle}; name one"
        )


def _check_all(candidates: Sequence[Loaded]) -> None:
    """Raise ConfigError for what is wrong with any of them, each sentence once."""
    lines: dict[str, None] = {}
    for candidate in candidates:
        try:
            check_settings(candidate)
        except ConfigError as error:
            lines |= dict.fromkeys(str(error).splitlines())
    if lines:
        raise ConfigError("\n".join(lines))


def _fetch_all(candidates: Sequence[Loaded], key: str) -> None:
    """Download the weights that are not here, so that none is missing later; two of the same are refused."""
    known, missing = dict[tuple[str, str], str](), list[Callable[[], object]]()
    for config in (candidate.config for candidate in candidates):
        model = config.model
        weights = resolve_weights(model.backbone, model.weights, config.transforms.size, model.weights_from)
        check_tensors(model.backbone, weights, model.tap)
        same = known.setdefault((model.backbone, weights.label), model.weights)
        if same != model.weights:
            raise SettingError(key, f"{same} and {model.weights} are the same weights; leave one of them out")
        if weights.fetch is not None and not weights.here():
            missing.append(weights.fetch)
    for fetch in missing:
        fetch()


def _probed(candidate: Loaded, pause: Callable[[], None]) -> Probe:
    """The best head on the features of one backbone; neither test images nor train.refit have a part in it."""
    started, config = time.perf_counter(), candidate.config
    train = config.train.model_copy(update={"refit": False})
    with _without(SAID_LATER):
        setup = set_up(candidate.taking(config.model_copy(update={"train": train})))
    parts, dataset = setup.parts, setup.dataset
    splits = {name: dataset.split(name) for name in ("train", "val")}
    setup = replace(setup, dataset=replace(dataset, splits=splits))
    feeds = setup.feeds()
    try:
        found = find_head(setup, feeds, pause)
    except NotSearchable as obstacle:
        what = f"{parts.backbone['name']} cannot be compared, since its head is not found"
        raise RunError(f"{what}: {obstacle}; name one backbone") from None
    finally:
        close(feeds)
    assert isinstance(found, Found)  # `_check` refuses several heads
    best = found.best
    assert best.loss is not None
    return Probe(
        backbone=parts.backbone["name"],
        weights=parts.backbone["weights"],
        top1=best.top1,
        interval=wilson(best.top1, found.images),
        loss=best.loss,
        head=f"{best.method}, {best.settings}",
        images=found.images,
        judged_by=found.judged,
        images_per_second=round(_speed(setup), 1),
        parameters=sum(parameter.numel() for parameter in parts.network.classifier.backbone.parameters()),
        seconds=round(time.perf_counter() - started, 3),
    )


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Within the block these loggers say nothing but errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _speed(setup: Setup) -> float:
    """Images a second through the frozen backbone."""
    network, sample = setup.parts.network, setup.dataset.split("val").sample(TIMED)
    images = [setup.parts.pipeline.image(sample.open(index)) for index in range(len(sample))]
    batch = torch.stack(images).to(network.device)
    network.features(batch)  # the first takes longer
    return len(images) / min(seconds_of(network.device, lambda: network.features(batch)) for _ in range(TIMES))


def _lines(ranked: Sequence[Probe]) -> list[str]:
    """The rows as a table, and why the one goes on."""
    names = max(len(row.backbone) for row in ranked)
    weights = max(7, *(len(row.weights) for row in ranked))
    lines = [f"  {'backbone':{names}}  {'weights':{weights}}   top-1  95% interval     images/s  parameters"]
    for row in ranked:
        low, high = row.interval
        lines.append(
            f"{'>' if row.taken else ' '} {row.backbone:{names}}  {row.weights:{weights}}  {row.top1:6.1%}  "
            f"{low:.1%} to {high:.1%}  {row.images_per_second:8.0f}  {row.parameters / 1e6:9.1f}M"
        )
    best, [taken] = ranked[0], [row for row in ranked if row.taken]
    why = "the best"
    if taken is not best:
        times = taken.images_per_second / best.images_per_second
        why = f"within a standard error ({_error(best):.1%}) of the best, and {times:.1f} times as fast"
    return [*lines, f"{taken.backbone} ({taken.weights}) goes on: {why}"]
