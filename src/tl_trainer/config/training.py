"""The section `train` of the configuration: every key, its range, its default and its description."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from tl_trainer.config.section import NamedSection, Section

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "cosine", "step", "plateau"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Figure = Literal["loss", "top1", "balanced_accuracy", "macro_f1", "map", "micro_f1", "mean"]
# Of each `data.task` the figures by which an epoch may be the best, its default first.
FIGURES_OF: dict[str, tuple[Figure, ...]] = {
    "single": ("top1", "loss", "balanced_accuracy", "macro_f1"),
    "multilabel": ("map", "loss", "macro_f1", "micro_f1"),
    "multitask": ("mean", "loss"),
}
THRESHOLDS = r"^(f1|precision>=(0?\.\d+|1(\.0+)?))$"


class OptimizerSection(NamedSection):
    only_for: ClassVar[dict[str, tuple[str, ...]]] = {
        "momentum": ("sgd",),
        "nesterov": ("sgd",),
        "betas": ("adam", "adamw"),
    }
    name: OptimizerName = Field("adam", description="sgd, adam or adamw.")
    lr: float = Field(1e-3, gt=0, description="The learning rate per step, before the schedule.")
    head_lr: float | None = Field(None, gt=0, description="The learning rate of the head; null is lr.")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty (sgd, adam) or decoupled weight decay (adamw).")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd.")
    nesterov: bool = Field(False, description="Nesterov momentum for sgd.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999],
        min_length=2,
        max_length=2,
        description="How much of the running means of the gradient and of its square adam and adamw keep per update.",
    )
    decay: Literal["all", "weights"] = Field(
        "all",
        description="What weight_decay is for: all, or weights, which are neither biases nor parameters of norms nor "
        "position embeddings.",
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="What the rate is multiplied by with each stage further from the head; 1 is the same for all.",
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerSection:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class ScheduleSection(NamedSection):
    only_for: ClassVar[dict[str, tuple[str, ...]]] = {
        "step_epochs": ("step",),
        "patience": ("plateau",),
        "factor": ("step", "plateau"),
    }
    name: ScheduleName = Field("constant", description="constant, cosine (to 0), step, or plateau (of train.best).")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs over which the rate rises linearly from near 0.")
    step_epochs: int = Field(10, ge=1, description="Epochs between two cuts of step.")
    patience: int = Field(3, ge=0, description="Epochs of a phase without a better one before plateau cuts the rate.")
    factor: float = Field(0.1, gt=0, lt=1, description="What step and plateau multiply the rate by.")


class LossSection(Section):
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Mass of the target spread evenly over all classes.")
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="balanced weighs each class by the inverse of its number of training images; of several labels "
        "per image each, where it is there, by how many images are without it for one with it.",
    )
    focal: float | None = Field(
        None,
        gt=0,
        description="For several labels per image: gamma of the focal loss, such as 2.0, which counts what is right "
        "already for less; null is plain cross-entropy.",
    )


def _by_name(shown: Any) -> BeforeValidator:
    """Take the name alone for a section; `shown` is what the JSON Schema tells."""
    return BeforeValidator(
        lambda given: {"name": given} if isinstance(given, str) else given, json_schema_input_type=shown
    )


class EmaSection(Section):
    decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="How much of the average an update of the weights keeps, such as 0.99; less in the first updates. "
        "null keeps no average.",
    )


class StopSection(Section):
    metric: Figure | None = Field(
        None,
        description="The figure of val by whose standstill a phase ends, one of those of best; null trains all epochs.",
    )
    patience: int = Field(5, ge=1, description="Epochs of a phase without a better one after which it ends.")
    min_delta: float = Field(0.0, ge=0, description="By how much a figure must be better to count, in its own unit.")

    @model_validator(mode="after")
    def _check(self) -> StopSection:
        if self.metric is None and (self.patience, self.min_delta) != (5, 0):
            raise ValueError("patience and min_delta are for a metric; set metric to a figure such as loss")
        return self


class TeacherSection(Section):
    checkpoint: str | None = Field(
        None,
        description="A checkpoint or run of the same classes whose logits are learned beside the labels; what a search "
        "finds is not taught. null is no teacher.",
    )
    temperature: float = Field(
        2.0, gt=0, description="What the logits of teacher and student are divided by before they are compared."
    )
    alpha: float = Field(
        0.5, ge=0, le=1, description="The share of the teacher in the loss; the rest is that of the labels."
    )

    @model_validator(mode="after")
    def _check(self) -> TeacherSection:
        if self.checkpoint is None and (self.temperature, self.alpha) != (2.0, 0.5):
            raise ValueError("temperature and alpha are of a teacher, and there is none; set checkpoint")
        return self


class PhaseSection(Section):
    """What is left out comes from `train`, so that a phase is always complete; a phase that searches is one epoch."""

    trainable: str = Field(description="Where training starts in this phase, as in model.trainable.")
    search: Literal["auto", "off"] = Field("off", description="As in train, for the first phase.")
    augment: bool = Field(
        True,
        description="Whether training images go through transforms.train; false takes transforms.eval, which is the "
        "default of a phase that searches.",
    )
    epochs: int = Field(10, ge=1, description="Passes over the training images.")
    optimizer: Annotated[OptimizerSection, _by_name(OptimizerName | OptimizerSection)] = Field(
        default_factory=OptimizerSection, description="What updates the weights; a name alone is {name: ...}."
    )
    schedule: Annotated[ScheduleSection, _by_name(ScheduleName | ScheduleSection)] = Field(
        default_factory=ScheduleSection, description="How the learning rate changes; a name alone is {name: ...}."
    )

    @model_validator(mode="after")
    def _check(self) -> PhaseSection:
        _check_warmup(self)
        if self.search == "auto" and self.trainable != "head":
            raise ValueError(f"search finds a head, and trainable is {self.trainable}; set it to head")
        return self


class HeadOptions(Section):
    weight: float = Field(1.0, gt=0, description="How much the head counts in the loss, and in the mean figure.")
    best: Figure | None = Field(
        None,
        description="The figure of val by which the head is judged: top1, balanced_accuracy or macro_f1; of several "
        "labels map, macro_f1 or micro_f1; null is the first of these.",
    )


class TrainSection(Section):
    search: Literal["auto", "off"] = Field(
        "auto",
        description="auto finds the head instead of training it for epochs, where the backbone is frozen, its features "
        "are kept and the head is a single Linear, or has hidden layers and is not one of several; off trains it, "
        "which is the default where epochs, optimizer or schedule is set.",
    )
    refit: bool = Field(
        False,
        description="Whether the linear head that was found is solved again on train and val together; the val figures "
        "are then from cross-validation.",
    )
    phases: list[PhaseSection] = Field(
        default_factory=list,
        description="Phases of the run, one after the other, as a list of {trainable, search, augment, epochs, "
        "optimizer, schedule}; what one leaves out is that of train. Empty is a single phase.",
    )
    epochs: int = Field(10, ge=1, description="Passes over the training images.")
    batch_size: int = Field(48, ge=1, description="Images per optimizer step; 2 or more where BatchNorm trains.")
    sampler: Literal["shuffled", "balanced"] = Field(
        "shuffled",
        description="shuffled has an epoch take each training image once, balanced every class equally often: as often "
        "as the mean class, so that images of small classes come several times, and of large ones not all.",
    )
    optimizer: Annotated[OptimizerSection, _by_name(OptimizerName | OptimizerSection)] = Field(
        default_factory=OptimizerSection, description="What updates the weights; a name alone is {name: ...}."
    )
    schedule: Annotated[ScheduleSection, _by_name(ScheduleName | ScheduleSection)] = Field(
        default_factory=ScheduleSection, description="How the learning rate changes; a name alone is {name: ...}."
    )
    best: Figure = Field(
        "top1",
        description="The figure of val by which an epoch is the best: loss, top1, balanced_accuracy or macro_f1; of "
        "several labels per image map (the default there), loss, macro_f1 or micro_f1; of several heads mean (of their "
        "own figures, the default there) or loss; of equal ones the lower loss. schedule: plateau goes by it too.",
    )
    thresholds: Annotated[float, Field(gt=0, lt=1)] | Annotated[str, Field(pattern=THRESHOLDS)] = Field(
        "f1",
        description="For several labels per image: from which probability on each is predicted: f1 (the best F1 on "
        "val), precision>=0.9 (the lowest with this precision on val), or a number such as 0.5.",
    )
    stop: StopSection = Field(default_factory=StopSection, description="When a phase ends before its last epoch.")
    heads: dict[str, HeadOptions] = Field(
        default_factory=dict,
        description="For several heads, by their columns: {species: {weight: 2.0, best: balanced_accuracy}}.",
    )
    loss: LossSection = Field(default_factory=LossSection, description="Cross-entropy and its options.")
    mixup: float | None = Field(
        None,
        gt=0,
        description="Each training image becomes a weighted mean of two, and so does its target: alpha of the weight's "
        "Beta distribution, such as 0.2; null mixes none. The training loss is then that of mixed images.",
    )
    cutmix: float | None = Field(
        None,
        gt=0,
        description="Each training image gets a rectangle of another one, and its target that share: alpha as in "
        "mixup, such as 1.0; null cuts none. With mixup each batch draws one of both.",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="The largest norm of all gradients together; null does not limit it."
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="Batches per update of the weights, which takes the mean gradient over their images; where "
        "loss.class_weights is balanced, each batch counts by its images.",
    )
    ema: EmaSection = Field(
        default_factory=EmaSection,
        description="A moving average of the weights, which is evaluated beside them; the better one is an epoch's.",
    )
    teacher: TeacherSection = Field(
        default_factory=TeacherSection,
        description="Distillation: alpha * temperature^2 * KL(teacher, student) + (1 - alpha) * the labels' loss.",
    )
    soup: int | None = Field(
        None,
        ge=2,
        description="How many of the best epochs of the last phase have their weights averaged when it ends; the mean "
        "becomes best.pth unless it is worse than the best. null averages none.",
    )
    freeze_batchnorm: bool = Field(
        False,
        description="Whether BatchNorm keeps its statistics, weights and biases also in stages that train.",
    )
    precision: Precision = Field(
        "auto",
        description="fp32, bf16, fp16 (CUDA), or auto: for what is frozen bf16 where the device has it natively, for "
        "the stages that train bf16 on a GPU.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_phases(cls, train: Any) -> Any:
        phases = train.get("phases") if isinstance(train, dict) else None
        if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
            return train
        for number, phase in enumerate(phases):
            if "trainable" not in phase:
                raise ValueError(f"phases[{number}] has no trainable; set it to head, a stage name or all")
        taken = any("epochs" not in phase and phase.get("search") != "auto" for phase in phases)
        filled = [_filled(phase, train) for phase in phases]
        epochs = [phase["epochs"] for phase in filled if type(phase["epochs"]) is int]
        if epochs and not taken and train.get("epochs", sum(epochs)) != sum(epochs):
            raise ValueError(f"epochs is {train['epochs']}, and its phases have {sum(epochs)}; set them in the phases")
        return {**train, "phases": filled}

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        if not self.phases:
            _check_warmup(self)
        elif self.search == "auto" and "search" in self.model_fields_set:
            raise ValueError("search is for a run without phases; set it in the first phase")
        elif any(phase.search == "auto" for phase in self.phases[1:]):
            raise ValueError("search is for the first phase: the others go on with its head")
        self._check_search()
        if self.sampler == self.loss.class_weights == "balanced":
            raise ValueError("sampler and loss.class_weights are both balanced, which corrects twice; keep one of them")
        if self.teacher.checkpoint is not None and (self.mixup or self.cutmix):
            raise ValueError(
                "the logits of a teacher are kept for single images, not for mixtures of two; leave out mixup and "
                "cutmix, or teacher"
            )
        trains = {"epochs", "phases", "best", "sampler", "mixup", "cutmix", "soup", "clip_norm", "accumulate"}
        sections = (self.optimizer, self.schedule, self.stop, self.ema, self.teacher)
        says_how = self.model_fields_set & trains or any(section.model_fields_set for section in sections)
        says_how = says_how or self.loss.focal is not None or self._judges_heads
        if says_how and "search" not in self.model_fields_set:  # whoever says how to train wants it trained
            object.__setattr__(self, "search", "off")
        if self.refit and self.search == "off":
            raise ValueError(
                "refit is for a head that is found: set search: auto, and leave out epochs, optimizer, schedule "
                "and phases"
            )
        last = self.phases[-1].epochs if self.phases else self.epochs
        if self.soup is not None and self.soup > last:
            where = "the last phase has" if self.phases else "there are"
            raise ValueError(f"soup is {self.soup}, and {where} {last} epochs to average; lower soup")
        if self.phases:
            object.__setattr__(self, "epochs", sum(phase.epochs for phase in self.phases))
        return self

    def _check_search(self) -> None:
        """Refuse what only epochs can do where no phase trains for epochs."""
        searches = all(phase.search == "auto" for phase in self.phases) if self.phases else self.search == "auto"
        if searches and (self.phases or "search" in self.model_fields_set) and (names := self.by_epochs):
            raise ValueError(
                f"{names[0]} is for training by epochs, and search finds the head without; leave out {names[0]}, or "
                "set search: off"
            )

    @property
    def by_epochs(self) -> list[str]:
        """The keys that are set and mean nothing where no weights are trained by epochs."""
        asked = {
            "best": self.best not in (figures[0] for figures in FIGURES_OF.values()),
            "stop": self.stop.metric,
            "sampler": self.sampler != "shuffled",
            "mixup": self.mixup,
            "cutmix": self.cutmix,
            "soup": self.soup,
            "clip_norm": self.clip_norm,
            "accumulate": self.accumulate > 1,
            "loss.focal": self.loss.focal,
            "ema": self.ema.decay,
            "teacher": self.teacher.checkpoint,
            "the best of heads": self._judges_heads,
        }
        return [name for name, value in asked.items() if value]

    @property
    def _judges_heads(self) -> bool:
        """Whether the figure by which a head is judged is set."""
        return any(options.best is not None for options in self.heads.values())

    def as_phase(self, trainable: str) -> PhaseSection:
        """The whole run as one phase."""
        return PhaseSection(
            trainable=trainable,
            search=self.search,
            epochs=self.epochs,
            optimizer=self.optimizer,
            schedule=self.schedule,
        )

    def after_a_search(self, trainable: str) -> TrainSection:
        """The same with a phase before it that finds the head."""
        first = PhaseSection(trainable="head", search="auto", augment=False, epochs=1)
        trained = self.model_copy(update={"search": "off"})
        phases = [first, trained.as_phase(trainable)]
        return trained.model_copy(update={"phases": phases, "epochs": sum(phase.epochs for phase in phases)})


def _filled(phase: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    """The phase with what it leaves out: of its optimizer and its schedule each key that its name has.

    One that searches takes only defaults, with which the head is trained where no search is possible.
    """
    searches = phase.get("search") == "auto"
    found = {"epochs": 1 if searches else train.get("epochs", 10), "augment": not searches, **phase}
    sections: dict[str, type[NamedSection]] = {"optimizer": OptimizerSection, "schedule": ScheduleSection}
    for key, section in sections.items():
        own, others = (
            {"name": given} if isinstance(given, str) else given or {}
            for given in (phase.get(key), None if searches else train.get(key))
        )
        if isinstance(own, dict) and isinstance(others, dict):
            name = own.get("name", others.get("name", section.model_fields["name"].default))
            only_for = section.only_for
            found[key] = {k: v for k, v in others.items() if k not in only_for or name in only_for[k]} | own
    return found


def _check_warmup(section: PhaseSection | TrainSection) -> None:
    warmup = section.schedule.warmup_epochs
    if warmup > section.epochs:
        raise ValueError(f"schedule.warmup_epochs is {warmup:g}, more than epochs ({section.epochs})")
