"""Everything that decides a training run, in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from flatmin.sharpness import MeasureName
from flatmin.train.config_rules import check_config
from flatmin.train.data import DatasetName
from flatmin.train.data.augmentation import CutoutScope
from flatmin.train.data.autoaugment import LevelScale
from flatmin.train.data.crops import PaddingMode
from flatmin.train.data.policies import PolicyName
from flatmin.train.methods import Method, canonical_options, resolved_options
from flatmin.train.models import ModelOptions, Norm, Shortcut
from flatmin.train.schedule import Schedule

__all__ = ["Accelerator", "Method", "RhoScheduleName", "TrainConfig"]

Accelerator = Literal["auto", "cpu", "cuda", "mps"]
RhoScheduleName = Literal["constant", "lr", "warmup", "cosine"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Every field is checked on construction; a value outside its domain raises ``ValueError`` naming the field, the
    rule and the value.
    """

    recipe: tyro.conf.Suppress[str] = "custom"
    """Name of the recipe that these settings were derived from."""
    dataset: DatasetName = "digits"
    """Data set to train on; folder and file are your own, at --dataset-path."""
    dataset_path: Path | None = None
    """Your folder of images, or your file of image arrays (.safetensors or .npz)."""
    image_size: int | None = None
    """Side of the images in pixels; None is 224 for image files, and the size of the others as they are."""
    model: str = "small-cnn"
    """Network: small-cnn, lenet-5, resnet-D, wrn-D-W, shake-shake-D-2xWd, pyramidnet-D-A[-shakedrop], resnet50,
    efficientnet-b0, vit-s-16 and others, or timm/NAME."""
    dropout: float = 0.0
    """Dropout probability inside the blocks of a wide ResNet, or before the head of a timm network."""
    drop_path: float = 0.0
    """Probability of dropping the last block of a timm network (stochastic depth), falling to 0 at the first."""
    shortcut: Shortcut = "pool-pad"
    """Shortcuts of a wide ResNet where its width changes: pooled and padded (authors' release) or a convolution."""
    extra_skips: bool = False
    """Add AutoAugment's skip connections around the groups of a wide ResNet."""
    norm: Norm = "batch"
    """Batch normalisation of a wide ResNet, or none, as where the paper measures Hessians."""
    pretrained: bool = False
    """Begin with the published weights of a timm network, which are downloaded; the head fits the classes at hand."""
    weights: Path | None = None
    """File with weights to begin with, in place of the published ones."""
    freeze_batchnorm: bool = False
    """Use the running statistics of batch norm in training too, and leave them as they are: for fine-tuning."""
    batchnorm: Literal["per-device", "synchronised"] = "per-device"
    """Statistics of batch norm over the images of each device (authors' release), or of all devices together."""
    method: Method = "sam"
    """Plain SGD, or a sharpness-aware method around it (bsam: in its place)."""
    method_options: tyro.conf.Suppress[tuple[tuple[str, Any], ...]] = ()
    """Options of the method, as a mapping or pairs; kept are those that differ from their defaults."""
    epochs: int = 60
    """Passes over the training images; the learning rate falls over them."""
    batch_size: int = 64
    """Images in one optimizer step, over all devices together."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, leaving the schedule as it is."""
    max_epochs: int | None = None
    """Stop after this many epochs, leaving the schedule as it is."""
    seed: int = 0
    """Seed of the initial weights, the order of images, the augmentation, dropout and label noise."""

    micro_batch: int | None = None
    """Images in one perturbation: each batch is cut into micro-batches of so many, which have statistics of batch norm
    of their own too; None makes one of each device's share."""
    sync: Literal["local", "global"] | int | None = None
    """Which micro-batches share a perturbation: none (local), all of a step (global), or those of so many neighbouring
    devices; None is local (the paper's choice), and for methods that can have one alone, global."""

    rho: float = 0.05
    """Radius of the method's neighbourhood; 0 is the base optimizer."""
    rho_schedule: RhoScheduleName = "constant"
    """How the radius changes: in proportion to lr, rising over the warm-up epochs, or half a cosine to zero."""
    rho_min: float = 0.0
    """Radius at a learning rate of zero, where the radius goes with lr."""
    ascent_steps: int = 1
    """Ascent steps to the perturbed weights, each with a pass of its own."""
    second_order: bool = False
    """Keep the term of second order that sam drops, which takes a backward pass through a backward pass."""
    true_ascent_gradient: bool = True
    """Climb along the true gradient of a Shake-Shake or ShakeDrop network, not the one with the gates of its backward
    pass, as in the authors' release."""
    pass_noise: Literal["same", "new", "release"] = "same"
    """Random numbers of the later passes of a step: those of the first, new ones, or as in the authors' release new
    masks (dropout, dropped blocks) with the gates of the first."""

    optimizer: str = "sgd"
    """Base optimizer: sgd, rmsprop (as TensorFlow has it), adamw, torch/CLASS or timm/NAME."""
    optimizer_options: str = ""
    """More arguments of the base optimizer, such as: betas=(0.9, 0.95), eps=1e-6"""
    lr: float = 0.1
    """Learning rate at its highest."""
    schedule: Schedule = "cosine"
    """How the learning rate falls: half a cosine to zero, exponentially, in steps, or not at all."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises linearly from zero."""
    final_lr: float = 0.012
    """Share of the learning rate that an exponential schedule ends with."""
    lr_steps: tuple[float, ...] = (0.3, 0.6, 0.8)
    """Where a schedule in steps drops the learning rate, as shares of the run."""
    lr_factor: float = 0.2
    """What each of these steps multiplies the learning rate by."""
    momentum: float = 0.9
    """Momentum of SGD and RMSProp."""
    nesterov: bool = True
    """Use Nesterov's momentum, in SGD."""
    weight_decay: float = 5e-4
    """Weight decay."""
    weight_decay_in: Literal["base", "loss", "decoupled"] = "base"
    """Decay by the base optimizer's own rule, at w; as half the squared norm in the loss, at w + eps (authors'
    release); or by lr times the decay before each update, whatever the base optimizer."""
    decay_norm_params: bool = True
    """Decay biases and normalisation parameters (at most one dimension) too."""
    gradient_clipping: float = 0.0
    """Largest global norm of the gradient that the base optimizer takes; 0 is off."""
    label_smoothing: float = 0.0
    """Share of the target probability spread evenly over the classes."""
    ema_decay: float = 0.0
    """Decay per step of an average of weights and buffers, which is then what is evaluated; 0 is off."""
    ema_ramp: bool = False
    """Let the decay of the average rise as (1 + t) / (10 + t), as TensorFlow does; it starts at the initial weights."""
    ema_start: int = 0
    """Steps during which the average is a copy of the weights; 1560 in the authors' release."""

    augmentation: str = "none"
    """Random changes to images: none, or basic, autoaugment, randaugment, mixup, cutmix and cutout, joined by +."""
    padding_mode: PaddingMode | None = None
    """What basic pads with before it crops: a reflection (authors' release) or zeros; None suits the data set."""
    cutout_length: int | None = None
    """Side in pixels of the square of cutout; None suits the data set."""
    cutout_per: CutoutScope = "image"
    """A place of the square for each image, or one for the batch (authors' release)."""
    autoaugment_policy: PolicyName | None = None
    """Sub-policies of autoaugment; None suits the data set."""
    autoaugment_scale: LevelScale = "original"
    """Meaning of levels in autoaugment and randaugment: as published, or with the faults of the authors' release."""
    randaugment_num_ops: int = 2
    """Operations that randaugment applies one after another."""
    randaugment_level: float = 9.0
    """Level of the operations of randaugment, 10 being strong."""
    mix_alpha: float = 1.0
    """Parameter of the distribution Beta(alpha, alpha) of the shares in mixup and cutmix."""
    num_train_images: int | None = None
    """Training images, drawn once and the same for every run; None takes all."""
    label_noise: float = 0.0
    """Share of training labels replaced by another class; validation labels stay right."""
    label_noise_kind: Literal["symmetric", "asymmetric"] = "symmetric"
    """The other class is drawn uniformly, or is the one that this class is mistaken for."""
    train_labels: Path | None = None
    """File of labels that replace those of the training images, as flatmin relabel writes it."""
    eval_on: Literal["test", "validation"] = "test"
    """Images to evaluate on: the test set, or a tenth of the training set held out."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    eval_train: bool = False
    """Evaluate on the training images too, without augmentation."""
    top5: bool = False
    """Measure how often the right class is not among the five most likely, too."""
    train_metrics_at: Literal["w", "w+eps"] = "w"
    """Training loss, error and gradient norm at the weights, or at the perturbed ones (authors' release)."""
    max_eval_batches: int | None = None
    """Evaluate on the first batches only, for trials."""

    sharpness_every: int | None = None
    """Epochs between measurements of sharpness, on a fixed sample of the training images; None measures nothing."""
    sharpness_measures: tuple[MeasureName, ...] = ("worst-case",)
    """What is measured: worst-case (the paper's, one step), average-case, eigenvalues, trace."""
    sharpness_budget: float = 0.1
    """Share of the training time for measuring; beyond it measurements are left out, all but the first."""
    sharpness_images: int = 512
    """Training images to measure on, not augmented: the same ones for every run on a data set."""
    sharpness_rho: float = 0.05
    """Radius to measure with, whatever the method's own."""
    sharpness_m: int | None = None
    """Images that share one perturbation in the worst case (m-sharpness); None takes all together."""
    sharpness_batchnorm: Literal["running", "batch"] = "running"
    """Statistics of batch norm in measuring: the running ones, as in evaluation, or each batch's, as in training."""

    accelerator: Accelerator = "auto"
    """Kind of device."""
    devices: str = "1"
    """Devices per node: a count, a list of indices such as 0,2, or auto."""
    num_nodes: int = 1
    """Nodes, each with the same devices; the output directory must be shared by them."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several devices share the work."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "64-true"] = "32-true"
    """Arithmetic; float16 is not supported yet because it needs loss scaling, bf16-mixed does not."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice."""
    compile: bool = False
    """Compile the network's training passes with torch.compile: the first step takes a minute, the others may gain."""

    data_dir: Path = Path("data")
    """Directory with the data sets."""
    num_workers: int = 4
    """Processes that read image files; other images are in memory."""
    output_dir: Path | None = None
    """Directory of this run; None is runs/RECIPE-METHOD-SEED."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints; 0 writes one after every step."""
    checkpoint_every: int | None = None
    """Epochs between checkpoints, beside those by time."""
    num_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    keep_epochs: tuple[int, ...] = ()
    """Numbers of epochs after which a checkpoint is written that is kept for good; 0 is the start."""
    progress_steps: int = 20
    """Steps between updates of the progress bar, which also look for a loss that is not finite."""
    wandb: bool = False
    """Log to Weights & Biases too; WANDB_MODE=offline keeps that on this machine."""
    wandb_project: str = "flatmin"
    """Weights & Biases project."""
    dry_run: bool = False
    """Two steps and a short evaluation in a temporary directory."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: If a value lies outside its domain.
        """
        check_config(self)
        object.__setattr__(self, "method_options", canonical_options(self.method, self.method_options))

    @property
    def model_options(self) -> ModelOptions:
        """What is chosen about the network beside its name."""
        return ModelOptions(**{field.name: getattr(self, field.name) for field in fields(ModelOptions)})

    @property
    def run_dir(self) -> Path:
        """Directory that the run writes to."""
        return self.output_dir or Path("runs") / f"{self.recipe}-{self.method}-{self.seed}"

    def value_of(self, name: str) -> Any:
        """Value of a field, or of ``method.NAME``; None for an option that the method does not have."""
        if name.startswith("method."):
            return resolved_options(self.method, self.method_options).get(name.removeprefix("method."))
        return getattr(self, name)
