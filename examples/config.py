"""The flags of train.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

import methods
import optimizers
from epochs import SaveTimes
from errors import UserError
from locations import AnyPath, LocalPath


@dataclasses.dataclass(frozen=True)
class Config:
    """Train an image classifier with a stochastic backward pass, or without."""

    recipe: str | None = None
    """Flags for a row of the paper's tables: a file in examples/recipes. Flags given here win."""
    model: str = "resnet_small"
    """resnet_small, resnet18, resnet34, resnet50, mobilenet_v2, densenet121; vit_mini, vit_ti,
    vit_s, vit_b, vit_l with a patch size, as in vit_mini/2; or a network of your own in Flax NNX or
    Linen, as package.module:function."""
    dataset: str = "digits"
    """digits, mnist, fashion_mnist, cifar10, cifar100, svhn_cropped or imagenet2012, or another
    name in PREPROCESSING of examples/data.py, which prepares a set once. digits comes with
    scikit-learn."""
    data_folder: LocalPath | None = None
    """A folder of images to train on instead, with a subfolder for each class."""
    image_size: int | None = None
    """Side of the images, which are resized to it; None: that of the data set, and 224 for
    --data-folder."""
    weights: LocalPath | None = None
    """Pretrained weights to begin with: a .npz file of vision_transformer or big_vision or a
    .safetensors file of timm for a ViT, a .safetensors file with torchvision's names for other
    models; see examples/recipes/README.md. With another number of classes the head is new."""
    method: Annotated[methods.Name, tyro.conf.arg(help=methods.HELP)] = "cdb"
    rate: float | None = None
    """Probability of dropping; None: that of the method, named above."""
    layer_rate: float = 1.0
    """Probability that a layer is masked in a step (cdb, cdb_after, cdb_frozen)."""
    channel_choice: Literal["bernoulli", "exact", "window", "chunk"] | None = None
    """Draws each channel independently, a fixed number, a block that wraps around, or one of equal
    chunks (cdb*, algorithm_1); None: window for cdb_compact, else bernoulli."""
    hold: int = 100
    """Steps for which the same channels learn (cdb_compact)."""
    on_switch: Literal["carry", "reset"] = "carry"
    """When other channels learn: moments stay with those that are kept again, or all start again
    (cdb_compact)."""
    skip_dropped: bool = False
    """Do not compute what is dropped: saves time."""
    drop_epoch_batch: int = 1
    """Batches of the epochs with dropping are this many times as large (layer_drop_back)."""
    drop_epoch_learning_rate: Literal["double", "fixed", "relative"] = "double"
    """What happens to the learning rate in these epochs; relative divides it by 1 - rate
    (layer_drop_back)."""
    exempt: tuple[str, ...] = ("head",)
    """Paths of layers that always learn in full. released exempts the first ones instead."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step, over all devices."""
    keep_partial_batch: bool = False
    """End an epoch with the images that do not fill a batch. Otherwise these are left out."""
    rotation: float = 0.0
    """Rotates training images by up to this many degrees."""
    standardise: bool = False
    """Standardises images by the statistics of the training set, not to between -1 and 1."""
    dropout_rate: float = 0.0
    """Dropout of the model, with any method but dropout, which has --rate."""
    label_smoothing: float = 0.0
    """Part of the target that is spread over all classes."""
    mixup: float = 0.0
    """Averages pairs of images, with weights from Beta(a, a) of this a; 0 for none."""
    cutmix: float = 0.0
    """Pastes a box of one image into another, its area from Beta(a, a) of this a; 0 for none."""
    optimizer: optimizers.Name = "adamw"
    """AdamW, SGD with Nesterov momentum 0.9, Lion or LAMB."""
    learning_rate: float = 3e-3
    """The highest of the schedule."""
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: rises over a twentieth of the steps, then falls to zero.
    step: times 0.1 after 30, 60 and 85 % of the steps."""
    weight_decay: float = 1e-2
    """Added to the gradient with sgd, decoupled otherwise."""
    decays: Literal["kernels", "all"] = "kernels"
    """Which parameters decay: all, or kernels and other matrices, but not biases, the scales of
    norms, position embeddings and class tokens."""
    clip_norm: float | None = None
    """Largest global norm of the gradient, after the mask; a longer one is scaled down to it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass. Parameters are float32 always."""
    seed: int = 0
    """Of initial parameters, order of the data, augmentation, dropout and dropped channels."""
    run_dir: AnyPath = Path("runs/train")
    """Where results and checkpoints go: a folder, or a bucket such as gs://name/folder."""
    resume: bool = False
    """Go on from the last checkpoint in --run-dir, if there is one."""
    save_every: str | None = None
    """Also save this often, not only after each epoch: 500 means steps, 10m minutes."""
    keep: int = 2
    """Checkpoints to keep: the newest ones."""
    go_on_if_not_finite: bool = False
    """Go on if the loss or a parameter is NaN or infinite."""
    data_dir: AnyPath | None = None
    """Where TensorFlow Datasets keeps its sets."""
    workers: int = 0
    """Processes that read and augment images; 0 uses threads."""
    mesh: str = ""
    """Axes of devices, such as data=4,fsdp=2: batches are split over both, parameters and optimizer
    state over fsdp. Empty: all devices in data."""
    distributed: Literal["auto", "always", "never"] = "auto"
    """Join other processes. auto: if Slurm, MPI or the variables of a TPU pod tell of several; some
    pods have none and need always. JAX finds the others on TPU pods, under Slurm and Open MPI 4;
    elsewhere give all three:"""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    process_count: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "learning_rate", "hold", "drop_epoch_batch", "keep")
        positive += ("clip_norm",)
        for name in (*positive, "weight_decay", "workers", "rotation", "mixup", "cutmix"):
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            if value is None:
                continue
            if name in positive and not 0 < value < float("inf"):
                raise UserError(f"{flag} {value} must be positive, and finite.")
            if not 0 <= value < float("inf"):
                raise UserError(f"{flag} {value} must be at least 0, and finite.")
        if self.workers > MOST_WORKERS:
            raise UserError(f"--workers {self.workers} must be at most {MOST_WORKERS}.")
        if self.image_size is not None and not 0 < self.image_size <= LARGEST_IMAGE:
            raise UserError(f"--image-size {self.image_size} must be 1 to {LARGEST_IMAGE}.")
        if self.rate is None:
            object.__setattr__(self, "rate", methods.METHODS[self.method].rate)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(
                f"--label-smoothing {self.label_smoothing} must be at least 0 and less than 1."
            )
        for name in ("rate", "dropout_rate"):
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            if not 0.0 <= value <= 1.0:
                raise UserError(f"{flag} {value} must be a probability between 0 and 1.")
        if self.data_folder is not None and self.dataset != DEFAULTS["dataset"]:
            raise UserError(
                f"--data-folder {self.data_folder} is trained on in place of a data set; leave out "
                f"--dataset {self.dataset}."
            )
        methods.check(self)
        SaveTimes(self.save_every)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} must be at least 0 and less than 2**32.")


MOST_WORKERS = 512
LARGEST_IMAGE = 4096
# What may differ between a run and its continuation.
NOT_SETTINGS = {"recipe", "run_dir", "resume", "data_dir", "workers", "mesh"}
NOT_SETTINGS |= {"save_every", "keep", "go_on_if_not_finite"}
NOT_SETTINGS |= {"distributed", "coordinator", "process_count", "process_id"}
DEFAULTS = {x.name: x.default for x in dataclasses.fields(Config) if x.name not in NOT_SETTINGS}
