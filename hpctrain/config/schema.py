"""What a run can be asked for: one frozen section per concern, a docstring under every field.

Nothing here imports torch, reads data or knows how many ranks there are; arithmetic that needs the world
size is in ``hpctrain.config.plan``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from hpctrain.config.checkpoint import CheckpointConfig
from hpctrain.config.comm import CommConfig
from hpctrain.config.launch import LaunchConfig
from hpctrain.config.section import (
    Counts,
    Epochs,
    Fraction,
    NonNegativeFloat,
    Pair,
    PerChannel,
    Positive,
    PositiveFloat,
    PositivePerChannel,
    Section,
)


class DenseConfig(Section):
    """Fully connected net on flattened pictures."""

    name: Literal["dense"]
    """the only net of this kind"""
    hidden_layers: Annotated[int, Field(ge=0)] = 1
    """number of hidden layers"""
    neurons: Positive = 128
    """width of each hidden layer"""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """share of hidden activations dropped in training"""
    batch_norm: bool = False
    """batch normalisation before each hidden activation"""


class ResNetConfig(Section):
    """Residual nets: CIFAR's resnet20 and the ImageNet family in its v1.5 form (stride on the 3x3)."""

    name: Literal["resnet20", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    """depth of the net"""
    zero_gamma: bool = False
    """start the last batch norm of every residual branch at zero (Goyal et al. 2017, section 5.1)"""
    fc_std: PositiveFloat | None = None
    """standard deviation of the classifier's initial weights; none keeps torch's default"""
    he_init: bool = True
    """convolutions from He's normal distribution (fan out); false keeps torch's default"""


ModelConfig = Annotated[DenseConfig | ResNetConfig, Field(discriminator="name")]


class DataConfig(Section):
    """Where the pictures come from and what is done to them."""

    path: str | None = None
    """packed folder (of `hpctrain data pack`) or image folder; the synthetic loader needs none"""
    builtin: Literal["digits"] | None = None
    """a small set that is made at `path` when nothing is there"""
    loader: Literal["auto", "dali", "torch", "synthetic"] = "auto"
    """auto takes DALI where it works, else torch, and says so"""
    image_size: Positive = 224
    """side of the square given to the model, in pixels"""
    channels: Literal[1, 3] = 3
    """3 for RGB (grey pictures are spread), 1 for grey"""
    num_classes: Positive | None = None
    """number of classes; none takes what the data set has (1,000 for synthetic)"""
    val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """share of a data set without validation part that is held out, the same for every run"""
    crop: Literal["random", "centre"] = "random"
    """training window: random area and aspect (Szegedy et al. 2015), or the one evaluation uses"""
    crop_area: Pair = (0.08, 1.0)
    """smallest and largest share of the picture's area in a random window"""
    crop_aspect: Pair = (0.75, 4 / 3)
    """narrowest and widest aspect of a random window"""
    flip: bool = True
    """mirror training pictures at random"""
    eval_crop: Annotated[float, Field(gt=0.0, le=1.0)] = 0.875
    """side of evaluation's centre window, as a share of the shorter side (224 / 256)"""
    mean: PerChannel = (123.675, 116.28, 103.53)
    """subtracted per channel, on the scale 0-255; grey pictures use the average"""
    std: PositivePerChannel = (58.395, 57.12, 57.375)
    """divisor per channel, on the scale 0-255; grey pictures use the average"""
    threads: Positive | None = None
    """decoding threads a rank; none takes the cores at hand"""
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """where DALI decodes; auto takes the device that trains"""
    shuffle_block: Positive = 1024
    """samples read in one piece by the windowed shuffle"""
    shuffle_window: Positive = 64
    """blocks mixed with each other; a set smaller than one window gets a full permutation"""
    max_corrupt_share: Fraction = 0.001
    """share of the training set that may fail to decode before the job stops"""
    synthetic_samples: Positive = 1_281_167
    """length of the synthetic training set"""
    log_samples: bool = False
    """write which samples each optimizer step was trained on to samples/ of the run directory"""

    def conflicts(self) -> Iterator[str]:
        smallest, largest = self.crop_area
        if not smallest <= largest <= 1.0:
            yield f"crop_area is [{smallest:g}, {largest:g}], but shares of the area rise and end at 1 at most"
        narrowest, widest = self.crop_aspect
        if narrowest > widest:
            yield f"crop_aspect is [{narrowest:g}, {widest:g}]: put the smaller aspect first"
        if self.decode == "gpu" and self.loader in ("torch", "synthetic"):
            yield f"decode=gpu needs DALI, but loader is {self.loader}: set loader to dali, or decode to cpu"
        if self.builtin is not None and self.path is None:
            yield f"builtin={self.builtin} makes its set at path, which is not set: name a folder, such as data/digits"


class OptimizerConfig(Section):
    """The rule that moves the parameters."""

    name: Literal["sgd", "adam", "rmsprop"] = "sgd"
    """sgd, or torch's adam or rmsprop"""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """momentum of sgd and rmsprop, first beta of adam"""
    nesterov: bool = False
    """Nesterov's form of momentum; sgd only"""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty on weights"""
    decay_norm_and_bias: bool = False
    """apply weight decay to normalisation layers and biases too"""

    def conflicts(self) -> Iterator[str]:
        if self.nesterov and self.name != "sgd":
            yield f"nesterov is a form of sgd's momentum, but name is {self.name}: set nesterov to false or name to sgd"
        elif self.nesterov and self.momentum == 0.0:
            yield "nesterov needs momentum, which is 0: set momentum (0.9 is usual) or nesterov to false"


class ScheduleConfig(Section):
    """Learning rate as a function of the step."""

    kind: Literal["constant", "step", "cosine", "poly"] = "cosine"
    """course after warm-up"""
    lr: PositiveFloat = 0.1
    """peak learning rate, at a global batch of `reference_batch`"""
    reference_batch: Positive | None = None
    """scale lr by global batch / this (linear rule); none takes lr as it is"""
    warmup_epochs: NonNegativeFloat = 0.0
    """epochs of linear warm-up"""
    warmup_start: NonNegativeFloat = 0.0
    """learning rate at the first step of warm-up, as it is: `reference_batch` does not scale it"""
    milestones: Epochs = (30.0, 60.0, 80.0)
    """epochs at which `step` multiplies by gamma"""
    gamma: PositiveFloat = 0.1
    """factor of `step`"""
    power: PositiveFloat = 2.0
    """exponent of `poly`"""
    final_lr: NonNegativeFloat = 0.0
    """where `cosine` and `poly` end; scaled by batch as lr is"""

    def conflicts(self) -> Iterator[str]:
        if any(late <= early for early, late in pairwise(self.milestones)):
            yield f"milestones are {list(self.milestones)}, but must rise from each to the next"
        if self.kind == "step" and self.milestones and self.milestones[0] < self.warmup_epochs:
            yield (
                f"the first of milestones, epoch {self.milestones[0]:g}, lies within the warm-up of "
                f"{self.warmup_epochs:g} epochs (warmup_epochs): shorten the warm-up or move the milestone"
            )
        if self.kind in ("cosine", "poly") and self.final_lr > self.lr:
            yield f"final_lr is {self.final_lr:g}, above lr ({self.lr:g}), but {self.kind} falls: lower final_lr"


class EarlyStoppingConfig(Section):
    """Stop when the monitored figure no longer improves."""

    monitor: Literal["val_top1", "val_loss"] = "val_top1"
    """figure of each evaluation that is watched"""
    patience: Positive = 5
    """evaluations without improvement before the run stops"""
    min_delta: NonNegativeFloat = 0.0
    """smallest change that counts as improvement"""


class TrainConfig(Section):
    """How long and in what portions."""

    epochs: Positive = 90
    """passes over the training set"""
    batch_per_worker: Positive = 32
    """pictures of one worker in one forward pass"""
    accumulation: Positive = 1
    """forward/backward passes before one exchange and optimizer step"""
    max_steps: Positive | None = None
    """stop after this many optimizer steps, if earlier"""
    target_accuracy: Fraction | None = None
    """stop at the first evaluation with this top-1"""
    last_batch: Literal["drop", "pad"] = "drop"
    """samples of an epoch beyond its last full global batch: drop them, or pad from the epoch's start"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """autocast type of forward and backward; parameters stay fp32"""
    channels_last: bool = False
    """NHWC memory format"""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """share of the target spread over all classes"""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """evaluate an exponential moving average of the parameters with this decay a step"""
    early_stopping: EarlyStoppingConfig | None = None
    """off unless given"""
    eval_every_epochs: Positive | None = 1
    """epochs between evaluations; the end of the run is always evaluated; none evaluates never"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one"""

    def conflicts(self) -> Iterator[str]:
        for key in ("target_accuracy", "early_stopping"):
            if self.eval_every_epochs is None and getattr(self, key) is not None:
                yield f"{key} waits for evaluations, but eval_every_epochs is none: set it, or leave {key} out"


class GradientsConfig(Section):
    """From each rank's gradients to their mean."""

    compression: Literal["none", "fp16", "bf16", "fp16_ef"] = "none"
    """type on the wire; fp16_ef: what rounding takes away is added to the next step's gradients"""
    reduction: Literal["auto", "engine", "ordered", "grid", "central"] = "auto"
    """auto: the fastest where the run is; engine: its own all-reduce; ordered: pairwise tree over worker numbers, the
    same bits on every engine; grid: along nodes, then across; central: a parameter server, as a baseline"""
    grid: Counts | None = None
    """ranks in a row, and rows, of reduction grid; by default a row is a node, or the grid is nearly square"""
    bucket_mib: PositiveFloat = 16.0
    """size of a bucket, in MiB of fp32 gradients"""
    last_bucket_mib: PositiveFloat = 1.0
    """size of the bucket that is ready last, which nothing hides"""
    clip_norm: PositiveFloat | None = None
    """largest norm of all mean gradients together; longer ones are shrunk to it"""
    check_every_steps: Positive = 200
    """steps between comparisons of the ranks' parameters"""


class ParallelConfig(Section):
    """Workers: the units of the global batch."""

    virtual_workers: Positive | None = None
    """number of workers; none is one a rank"""


class LogConfig(Section):
    """What is told while the run goes on."""

    every_steps: Positive = 20
    """steps between lines of steps.jsonl and the progress display"""
    tensorboard: bool = True
    """write TensorBoard scalars"""


class Config(Section):
    """A run, whole."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """the only source of randomness: initial weights, order, crops, flips, dropout"""
    model: ModelConfig
    """the net; see `model.name`"""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    comm: CommConfig = CommConfig()
    gradients: GradientsConfig = GradientsConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    launch: LaunchConfig = LaunchConfig()

    def conflicts(self) -> Iterator[str]:
        if self.schedule.warmup_epochs > self.train.epochs:
            yield (
                f"schedule.warmup_epochs is {self.schedule.warmup_epochs:g}, longer than the training of "
                f"{self.train.epochs} epochs (train.epochs): shorten it, or stop early with train.max_steps"
            )
        if self.data.decode == "gpu" and self.train.device == "cpu":
            yield "data.decode=gpu needs a GPU, but train.device is cpu: set data.decode to cpu or auto"
