"""The training loop of whole networks: accelerate, EMA, clipping, curves, sample sheets, and exact resuming.

What a step sees depends on the seed, the step and the item's number alone: no sampler state is kept, so that a resumed
run draws what an uninterrupted one would have drawn, and so do several processes that share a global batch.
"""

import argparse
import csv
import errno
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from utils.cli import decay, non_negative_float, non_negative_int, positive_float, positive_int, seed
from utils.files import atomic_path
from utils.images import plot_curve, write_image
from utils.layout import LOSS_CURVE, LOSS_FILE, SAMPLES_FOLDER, STATE_FOLDER, find_checkpoints
from utils.runs import Run

KEPT_STATES = 2  # checkpoints that keep what is needed to go on from them; older ones keep their weights
Draw = Callable[[tuple[int, ...], Iterable[int]], dict]


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained; the flags of `add_training_flags`."""

    max_train_steps: int
    checkpointing_steps: int
    sheet_steps: int
    learning_rate: float
    warmup_steps: int
    decay_steps: int
    train_batch_size: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    ema_decay: float
    beta2: float
    weight_decay: float
    mixed_precision: str
    seed: int
    report_to: str

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant, then linear to zero over the last `decay_steps` steps. step: from 0."""
        rise = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        fall = min(1.0, (self.max_train_steps - step) / max(self.decay_steps, 1))
        return self.learning_rate * min(rise, fall)


FREE_SETTINGS = {  # may change between attempts: how far, how often and where, not what
    "max_train_steps",
    "decay_steps",
    "checkpointing_steps",
    "sheet_steps",
    "report_to",
}


def add_training_flags(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """One flag for each field of TrainSettings. defaults: those that differ from the ones here."""

    def add(name: str, default: object, **options: object) -> None:
        parser.add_argument(f"--{name}", default=defaults.get(name, default), **options)

    add("max_train_steps", 1000, type=positive_int, help="optimizer steps; may be raised later to go on")
    add("checkpointing_steps", 500, type=positive_int, help="steps between checkpoints")
    add("sheet_steps", 500, type=positive_int, help="steps between sample sheets")
    add("learning_rate", 1e-4, type=positive_float, help="peak learning rate of AdamW")
    add("warmup_steps", 100, type=non_negative_int, help="first steps, over which the learning rate rises")
    add("decay_steps", 0, type=non_negative_int, help="last steps, over which the learning rate falls to zero")
    add("train_batch_size", 1, type=positive_int, help="items per process and step")
    add("gradient_accumulation_steps", 1, type=positive_int, help="batches per optimizer step")
    add("max_grad_norm", 1.0, type=positive_float, help="gradients are clipped to this norm")
    add("ema_decay", 0.999, type=decay, help="decay of the averaged weights that are saved; 0 saves the raw ones")
    add("beta2", 0.999, type=decay, help="second beta of AdamW; the first is 0.9")
    add("weight_decay", 0.01, type=non_negative_float, help="weight decay of AdamW")
    add(
        "mixed_precision",
        "auto",
        choices=["auto", "bf16", "no"],
        help="precision of the computation, weights are float32; auto: bf16 for full weights, and for tiny ones where "
        "the device computes in it, else no",
    )
    add("seed", 0, type=seed, help="seed of start values, data order, noise and timesteps")
    add("report_to", "tensorboard", choices=["tensorboard", "none"], help="where curves are logged")


def training_settings(args: argparse.Namespace) -> TrainSettings:
    return TrainSettings(**{field.name: getattr(args, field.name) for field in fields(TrainSettings)})


def open_accelerator(run: Run, settings, device: str):
    """accelerate's Accelerator of a run. settings: TrainSettings, or anything else with its fields."""
    import accelerate

    from models.runtime.parallel import WAIT
    from models.runtime.sharding import require_shards, sharding_plugin, sharding_wanted

    sharded = sharding_wanted()
    # gradients that wait for the next batch are whole: sharded ones are reduced at once
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
        # Some outputs go unused, such as the text output of the ControlNet's last block: they never get a gradient.
        # Gradients that lie in DDP's buckets are not held twice.
        kwargs_handlers=[
            accelerate.DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
            accelerate.InitProcessGroupKwargs(timeout=WAIT),
        ],
    )
    require_shards(accelerator)
    return accelerator


def is_trained(run: Run, settings: TrainSettings) -> bool:
    """Whether the run has a checkpoint of the last step."""
    return not run.replaces and max(find_checkpoints(run.folder), default=0) >= settings.max_train_steps


def fit(
    run: Run,
    objective,
    settings: TrainSettings,
    draw: Draw,
    save: Callable[[Path], None],
    sheet: Callable[[], np.ndarray] | None = None,
    *,
    device: str = "cpu",
    weights: dict | None = None,
    moments: str | None = None,
) -> None:
    """Train the parameters of `objective` that require gradients, and leave checkpoint-<step>/ folders in the run.

    objective(**batch) returns scalars with the key `loss`. draw(step_seed, items) gives the batch of one process.
    save(folder) writes the weights for use; sheet() paints samples, uint8 [H, W, 3]. Both see the averaged weights.
    weights: hashes of what the training starts from, for the manifest; a run is not continued with others.
    moments: how AdamW's are kept (`models/runtime/optimizers.py`; default: 32 bits).
    """
    from diffusers.training_utils import EMAModel
    from tqdm import tqdm

    from models.runtime.memory import RESIDENT
    from models.runtime.optimizers import make_optimizer, page_moments
    from models.runtime.sharding import load_state, own_parts, require_blocks, root_gathered, save_state, whole

    accelerator = open_accelerator(run, settings, device)
    require_blocks(accelerator, objective)
    if not accelerator.is_fsdp2:  # it moves what it divides
        objective.to(accelerator.device)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    betas = (0.9, settings.beta2)
    optimizer = make_optimizer(parameters, settings.learning_rate, betas, settings.weight_decay, moments or RESIDENT)
    module, optimizer = accelerator.prepare(objective, optimizer)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]  # sharding makes new
    parts = own_parts(parameters)
    average = EMAModel(parts, decay=settings.ema_decay, foreach=True) if settings.ema_decay else None
    if average:
        accelerator.register_for_checkpointing(average)
    checkpoints = {} if run.replaces else find_checkpoints(run.folder)
    first = max((step for step, path in checkpoints.items() if (path / STATE_FOLDER).is_dir()), default=0)
    if first:
        load_state(accelerator, checkpoints[first] / STATE_FOLDER, objective, optimizer, average)
        page_moments(optimizer)
        if average:
            average.to(accelerator.device)
    if accelerator.is_main_process:
        run.begin(weights=weights or {})
    accelerator.wait_for_everyone()
    accelerator.init_trackers("training")
    losses = read_losses(run.folder, first)
    began, total = time.monotonic(), settings.max_train_steps

    def save_average(folder: Path) -> None:
        save_state(accelerator, folder / STATE_FOLDER, objective, optimizer, average)
        with averaged(average, parts):
            save(folder)

    steps = tqdm(range(first, total), "train", total, initial=first, disable=not accelerator.is_main_process)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        values = _backward(accelerator, module, settings, draw, step)
        norm = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            average.step(parts)
        losses.append(values["loss"])
        rate = (step + 1 - first) / (time.monotonic() - began)
        accelerator.log(values | {"grad_norm": float(whole(norm)), "steps_per_second": rate}, step + 1)
        steps.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
        last = step + 1 == total
        painting = accelerator.is_main_process or accelerator.is_fsdp2  # of divided weights by all processes together
        if sheet and painting and ((step + 1) % settings.sheet_steps == 0 or last):
            with averaged(average, parts), root_gathered(objective):
                picture = sheet()
            if accelerator.is_main_process:
                write_image(run.folder / SAMPLES_FOLDER / f"{step + 1:06d}.png", picture)
        if (step + 1) % settings.checkpointing_steps == 0 or last:  # after its sheet: the last one ends the run
            write_checkpoint(accelerator, run, step + 1, losses, save_average)
            if accelerator.is_main_process:
                _forget_states(run)
    del module
    end_training(accelerator)
    if accelerator.is_main_process:
        run.finish(steps=settings.max_train_steps)


def _backward(accelerator, module, settings: TrainSettings, draw: Draw, step: int) -> dict[str, float]:
    """Gradients of one optimizer step, accumulated over its batches; the mean values over all of them."""
    import torch

    rank, size = accelerator.process_index, settings.train_batch_size
    rows = []
    for micro in range(settings.gradient_accumulation_steps):
        batch = draw((settings.seed, step, micro), range(rank * size, (rank + 1) * size))
        with accelerator.accumulate(module):
            with forward_precision(accelerator):
                values = module(**_to(batch, accelerator.device))
            accelerator.backward(values["loss"])
        rows.append(torch.stack([value.detach().float() for value in values.values()]))
    mean = accelerator.reduce(torch.stack(rows).mean(dim=0), "mean")
    return dict(zip(values, mean.tolist(), strict=True))


def forward_precision(accelerator) -> AbstractContextManager:
    """Autocast for a sharded module: accelerate gives it to all others itself."""
    return accelerator.autocast() if accelerator.is_fsdp2 else nullcontext()


def _to(batch: dict, device) -> dict:
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}


@contextmanager
def averaged(average, parameters: list) -> Iterator[None]:
    """Put the averaged weights in place for the block; with none, nothing happens."""
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
    """checkpoint-<step>/ with what save(folder) writes; it gets its name when complete.

    losses: of all steps so far, written beside it. Call it in every process; the first one writes, or all if sharded.
    """
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    from models.runtime.sharding import checkpoint_folder

    if accelerator.is_main_process:
        write_losses(run.folder, losses)  # before the checkpoint: a kill in between leaves rows too many, not too few
    checkpoint = run.folder / f"checkpoint-{step}"
    try:
        with checkpoint_folder(accelerator, checkpoint) as temporary:
            if temporary:
                save(temporary)
    except OutOfMemoryError:  # a RuntimeError, too
        raise
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
        raise OSError(errno.EIO, f"cannot write a checkpoint ({error})", str(checkpoint)) from error
    if accelerator.is_main_process:
        run.save()
    accelerator.wait_for_everyone()


def end_training(accelerator) -> None:
    """Close curves and processes. Let go of what `prepare` gave first.

    A DDP module that outlives its process group can hang: it ends the group's threads while it holds Python's lock,
    which they wait for.
    """
    accelerator.free_memory()
    accelerator.end_training()


def _forget_states(run: Run) -> None:
    """Remove what is needed to go on from old checkpoints; their weights stay."""
    for path in list(find_checkpoints(run.folder).values())[:-KEPT_STATES]:
        shutil.rmtree(path / STATE_FOLDER, ignore_errors=True)


def read_losses(folder: Path, steps: int) -> list[float]:
    """The losses of the first `steps` steps of an interrupted run."""
    path = folder / LOSS_FILE
    if not steps or not path.exists():
        return []
    with path.open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)][:steps]


def write_losses(folder: Path, losses: list[float]) -> None:
    with atomic_path(folder / LOSS_FILE) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(losses, start=1)])
    write_image(folder / LOSS_CURVE, plot_curve(losses, "loss"))
