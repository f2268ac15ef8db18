"""The training loop of whole networks: accelerate, EMA, clipping, curves, sample sheets, and exact resuming.

A training example depends only on the seed, the step and the item's number. No sampler state is kept, so a resumed
run, or several processes that share a global batch, draw exactly what one uninterrupted process would.
"""

import csv
import errno
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import accelerate
import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from models.finite import are_finite, require_finite_weights
from models.runtime.memory import RESIDENT
from models.runtime.optimizers import make_optimizer, page_moments
from models.runtime.parallel import WAIT, require_plain_launch
from models.runtime.sharding import (
    checkpoint_folder,
    find_fault,
    load_state,
    own_parts,
    require_blocks,
    require_shards,
    root_gathered,
    save_state,
    sharding_plugin,
    sharding_wanted,
    whole,
)
from models.settings import TrainSettings
from utils.cli import InputError
from utils.files import atomic_path
from utils.images import plot_curve, write_image
from utils.layout import LOSS_CURVE, LOSS_FILE, SAMPLES_FOLDER, STATE_FOLDER, find_checkpoints
from utils.runs import Run

Draw = Callable[[tuple[int, ...], Iterable[int]], dict]


@dataclass
class Training:
    """What `fit` trains; subclasses say what differs.

    objective(**batch) returns scalars with the key `loss`; its parameters that require gradients are trained.
    draw(step_seed, items) gives the batch of one process. save(folder) writes the weights for use; sheet() paints
    samples, uint8 [H, W, 3]. Both see the averaged weights.
    """

    objective: torch.nn.Module
    draw: Draw
    save: Callable[[Path], None]
    sheet: Callable[[], np.ndarray] | None = None
    attention: Callable[[], AbstractContextManager] = nullcontext  # around every forward and backward pass

    name: ClassVar[str] = "training"  # name of its curves
    kept_states: ClassVar[int | None] = 2  # how many checkpoints keep the state needed to resume; None: all

    def clip_groups(self) -> dict[str, list]:
        """{name of a norm: parameters whose gradients are clipped together}."""
        return {"grad_norm": [p for p in self.objective.parameters() if p.requires_grad]}

    def prepare(self, accelerator) -> None:
        """Called before anything is trained or loaded, for example to choose what a state holds."""

    def begin(self, folder: Path) -> None:
        """Called by the first process when the run has begun, to write further files beside the weights."""


def open_accelerator(run: Run, settings, device: str):
    """Make accelerate's Accelerator for a run. settings: TrainSettings, or any object with its fields."""
    require_plain_launch()
    sharded = sharding_wanted()
    # sharded gradients are reduced after each batch: gradients that wait for the next batch would be full size
    accumulation = accelerate.utils.GradientAccumulationPlugin(
        settings.gradient_accumulation_steps, sync_each_batch=sharded
    )
    accelerator = accelerate.Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_plugin=accumulation,
        fsdp_plugin=sharding_plugin() if sharded else None,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_dir=run.folder,
        cpu=device == "cpu",
        dynamo_backend="no",  # else accelerate takes it from the launcher's configuration
        # Unused outputs, such as the text output of the ControlNet's last block, never get a gradient.
        # Gradients that are views of DDP's buckets are not held twice.
        kwargs_handlers=[
            accelerate.DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
            accelerate.InitProcessGroupKwargs(timeout=WAIT),
        ],
    )
    require_shards(accelerator)
    return accelerator


def fit(
    run: Run,
    training: Training,
    settings: TrainSettings,
    *,
    device: str = "cpu",
    weights: dict | None = None,
    moments: str | None = None,
    resume: int | None = None,
    quiet: bool = False,
) -> None:
    """Train, and leave checkpoint-<step>/ folders in the run.

    weights: hashes of what the training starts from, for the manifest; a run is not continued with others.
    moments: how AdamW's moments are stored (`optimizers.py`; default: 32 bits). resume: step of the checkpoint to
    resume from, 0 to start again (default: the newest one whose state is whole). quiet: show no progress bar.
    """
    accelerator = open_accelerator(run, settings, device)
    trained = _Trained.prepare(accelerator, training, settings, moments)
    first = resume_from(accelerator, trained, run, resume)
    if accelerator.is_main_process:
        processes, before = accelerator.num_processes, run.manifest.get("processes")
        if first and before not in (None, processes):
            change = f"it began with {before} processes and goes on with {processes}, each with its own batch"
            print(f"warning: {run.folder}: {change}: batches have another size from here", file=sys.stderr)
        run.begin(weights=weights or {}, processes=processes)
        training.begin(run.folder)
    accelerator.wait_for_everyone()
    accelerator.init_trackers(training.name)
    losses, total, main = read_losses(run.folder, first), settings.max_train_steps, accelerator.is_main_process
    began, groups = time.monotonic(), training.clip_groups()
    steps = tqdm(range(first, total), training.name, total, initial=first, disable=quiet or not main)
    for step in steps:
        for group in trained.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        values = _backward(accelerator, trained.module, training, settings, step)
        require_finite_loss(values["loss"], step + 1, settings)
        accelerator.unscale_gradients()  # they are scaled in float16
        norms = optimizer_step(trained.optimizer, groups.values(), settings.max_grad_norm)
        if trained.average:
            trained.average.step(trained.parts)
        losses.append(values["loss"])
        rate = {"steps_per_second": (step + 1 - first) / (time.monotonic() - began)}
        accelerator.log(values | dict(zip(groups, norms, strict=True)) | rate, step + 1)
        steps.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
        last = step + 1 == total
        checkpoint = (step + 1) % settings.checkpointing_steps == 0 or last
        if checkpoint:
            trained.require_finite(step + 1, settings)
        if training.sheet and ((step + 1) % settings.sheet_steps == 0 or last):
            trained.paint(accelerator, run.folder / SAMPLES_FOLDER / f"{step + 1:06d}.png")
        if checkpoint:  # after the sheet: a run resumed from its last checkpoint draws none
            write_checkpoint(accelerator, run, step + 1, losses, partial(trained.save, accelerator))
            if main and training.kept_states:
                _forget_states(run, training.kept_states)
    del trained
    end_training(accelerator)
    if main:
        run.finish(steps=settings.max_train_steps)


def resume_from(accelerator, trained: "_Trained", run: Run, wanted: int | None) -> int:
    """Load the state of a checkpoint, and return its step: `wanted`, or the newest one whose state is whole.

    Prints why newer ones are skipped. Returns 0 for a run without checkpoints. Raises InputError when no state can be
    loaded: starting again would replace the trained weights.
    """
    checkpoints = {} if run.replaces or wanted == 0 else find_checkpoints(run.folder)
    faults = []
    for step in [wanted] if wanted else reversed(checkpoints):
        fault = trained.try_to_load(accelerator, checkpoints[step] / STATE_FOLDER)
        if not fault:
            if faults and accelerator.is_main_process:
                print(f"going on from checkpoint-{step}: {faults[0]}", file=sys.stderr, flush=True)
            return step
        faults.append(fault)
    if faults:
        raise InputError(f"{run.folder} cannot be gone on with: {faults[0]}; pass --overwrite to start again")
    return 0


@dataclass
class _Trained:
    """A training prepared by accelerate. parts: this process's part of each parameter; average: EMAModel of them."""

    training: Training
    module: object
    optimizer: object
    parts: list
    average: object | None

    @classmethod
    def prepare(cls, accelerator, training: Training, settings: TrainSettings, moments: str | None) -> "_Trained":
        objective = training.objective
        require_blocks(accelerator, objective)
        training.prepare(accelerator)
        if not accelerator.is_fsdp2:  # FSDP moves the weights itself
            objective.to(accelerator.device)
        require_finite_weights(objective)
        parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        options = (settings.learning_rate, (0.9, settings.beta2), settings.weight_decay, moments or RESIDENT)
        module, optimizer = accelerator.prepare(objective, make_optimizer(parameters, *options))
        parts = own_parts([p for p in objective.parameters() if p.requires_grad])  # sharding makes new parameters
        average = EMAModel(parts, decay=settings.ema_decay, foreach=True) if settings.ema_decay else None
        if average:
            accelerator.register_for_checkpointing(average)
        return cls(training, module, optimizer, parts, average)

    def load(self, accelerator, folder: Path) -> None:
        load_state(accelerator, folder, self.training.objective, self.optimizer, self.average)
        page_moments(self.optimizer)
        if self.average:
            self.average.to(accelerator.device)

    def try_to_load(self, accelerator, folder: Path) -> str:
        """`load`; returns what is wrong in any of the processes, empty if nothing is."""
        fault = find_fault(folder)
        if not fault:
            try:
                self.load(accelerator, folder)
            except (InputError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of any kind: files may be damaged in any way
                fault = f"{folder} is damaged ({error})"
        elsewhere = accelerator.gather(torch.tensor([bool(fault)], device=accelerator.device)).any()
        return fault or ("its state is not whole in another process" if elsewhere else "")

    def require_finite(self, step: int, settings: TrainSettings) -> None:
        """Raise FloatingPointError when a trained weight is NaN or infinite: it must not reach a checkpoint."""
        if not all(are_finite(self.parts)):
            raise FloatingPointError(f"the trained weights hold NaN or infinity at step {step}: {_diverged(settings)}")

    def save(self, accelerator, folder: Path) -> None:
        save_state(accelerator, folder / STATE_FOLDER, self.training.objective, self.optimizer, self.average)
        with averaged(self.average, self.parts):
            self.training.save(folder)

    def paint(self, accelerator, path: Path) -> None:
        """Write a sample sheet. If weights are sharded, all processes compute it together."""
        if not (accelerator.is_main_process or accelerator.is_fsdp2):
            return
        with averaged(self.average, self.parts), root_gathered(self.training.objective):
            picture = self.training.sheet()
        if accelerator.is_main_process:
            write_image(path, picture)


def require_finite_loss(loss: float, step: int, settings: TrainSettings) -> None:
    """Raise FloatingPointError when the loss of a step is NaN or infinite."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}: {_diverged(settings)}")


def _diverged(settings: TrainSettings) -> str:
    """Words of an error: likely causes of a training that diverged, and what is kept of it."""
    fp16 = ", float16 (--mixed_precision fp16) too narrow" if settings.mixed_precision == "fp16" else ""
    return (
        f"--learning_rate {settings.learning_rate:g} is too high{fp16}, or a file that it reads is damaged; the "
        "checkpoints before are kept"
    )


def optimizer_step(optimizer, clip_groups: Iterable[Iterable], max_norm: float = 1.0) -> list[float]:
    """Clip each group of parameters to `max_norm` on its own, step, and clear gradients.

    Returns each group's norm before clipping.
    """
    norms = [float(whole(clip_grad_norm_(list(group), max_norm))) for group in clip_groups]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def _backward(accelerator, module, training: Training, settings: TrainSettings, step: int) -> dict[str, float]:
    """Accumulate the gradients of one optimizer step over its batches; returns the mean of each value."""
    rank, size = accelerator.process_index, settings.train_batch_size
    rows = []
    for micro in range(settings.gradient_accumulation_steps):
        batch = training.draw((settings.seed, step, micro), range(rank * size, (rank + 1) * size))
        with accelerator.accumulate(module), training.attention():
            with forward_precision(accelerator):
                values = module(**_to(batch, accelerator.device))
            accelerator.backward(values["loss"])
        rows.append(torch.stack([value.detach().float() for value in values.values()]))
    mean = accelerator.reduce(torch.stack(rows).mean(dim=0), "mean")
    return dict(zip(values, mean.tolist(), strict=True))


def forward_precision(accelerator) -> AbstractContextManager:
    """Autocast for a sharded module; accelerate adds it to all others itself."""
    return accelerator.autocast() if accelerator.is_fsdp2 else nullcontext()


def _to(batch: dict, device) -> dict:
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}


@contextmanager
def averaged(average, parameters: list) -> Iterator[None]:
    """Use the averaged weights in the block; does nothing without an average."""
    if average is None:
        yield
        return
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)


def write_checkpoint(accelerator, run: Run, step: int, losses: list[float], save: Callable[[Path], None]) -> None:
    """Write checkpoint-<step>/ by calling save(folder); the folder gets its name when complete.

    losses: of all steps so far, written beside it. Call it in every process; the first one writes, or all if sharded.
    """
    if accelerator.is_main_process:
        write_losses(run.folder, losses, step)  # first: a kill in between leaves too many rows, not too few
    checkpoint = run.folder / f"checkpoint-{step}"
    try:
        with checkpoint_folder(accelerator, checkpoint) as temporary:
            if temporary:
                save(temporary)
    except torch.OutOfMemoryError:  # it is also a RuntimeError
        raise
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
        raise OSError(errno.EIO, f"cannot write a checkpoint ({error})", str(checkpoint)) from error
    if accelerator.is_main_process:
        run.save()
    accelerator.wait_for_everyone()


def end_training(accelerator) -> None:
    """Close curves and processes. Drop all references to what `prepare` returned before calling it.

    A DDP module that outlives its process group can hang: it ends the group's threads while holding Python's lock,
    which they wait for.
    """
    accelerator.free_memory()
    accelerator.end_training()


def _forget_states(run: Run, kept: int) -> None:
    """Remove the training state of all but the newest `kept` checkpoints; their weights stay."""
    for path in list(find_checkpoints(run.folder).values())[:-kept]:
        shutil.rmtree(path / STATE_FOLDER, ignore_errors=True)


def read_losses(folder: Path, steps: int) -> list[float]:
    """The losses of the first `steps` steps of an interrupted run; none if its file is missing, short or damaged."""
    path = folder / LOSS_FILE
    if not steps or not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            found = [float(row["loss"]) for row in csv.DictReader(file)][:steps]
    except (KeyError, TypeError, ValueError, csv.Error):
        found = []
    return found if len(found) == steps else []


def write_losses(folder: Path, losses: list[float], last: int) -> None:
    """losses: of the steps up to `last`."""
    rows = enumerate(losses, start=last - len(losses) + 1)
    with atomic_path(folder / LOSS_FILE) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *rows])
    write_image(folder / LOSS_CURVE, plot_curve(losses, "loss"))
