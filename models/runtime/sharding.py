"""Training with weights, gradients and moments divided among GPUs: FSDP2, as configs/fsdp.yaml asks for.

Each process holds a part of every tensor (a DTensor). A block's weights are gathered while it computes. Other code
that needs full tensors gathers them itself, and every process must take part in that.
"""

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from utils.cli import InputError
from utils.files import atomic_path
from utils.runs import is_first_process

TRAINED = states.StateDictOptions(ignore_frozen_params=True, strict=False)


def sharding_wanted() -> bool:
    """Whether the launcher asks for sharded training."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def sharding_plugin() -> FullyShardedDataParallelPlugin:
    """The launcher's settings; weights and gradients are exchanged in float32, autocast works as in one process."""
    if os.environ.get("FSDP_VERSION") != "2":
        raise InputError("sharded training needs fsdp_version: 2, as in configs/fsdp.yaml")
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def require_shards(accelerator: Accelerator) -> None:
    """Raise InputError when sharding is wanted but accelerate does not shard: on a CPU, or in one process."""
    if sharding_wanted() and not accelerator.is_fsdp2:
        raise InputError(
            "configs/fsdp.yaml needs two GPUs or more; launch with configs/ddp.yaml, or with python alone"
        )


def require_blocks(accelerator: Accelerator, objective: torch.nn.Module) -> None:
    """Raise InputError when a training cannot be sharded: its objective does not name the blocks to gather."""
    if accelerator.is_fsdp2 and not hasattr(objective, "_no_split_modules"):
        raise InputError("this training cannot be sharded (configs/fsdp.yaml): launch it with configs/ddp.yaml")


def require_shardable(memory: str, mixed_precision: str) -> None:
    """Raise InputError for flags that sharded training does not support: quantisation and gradient scaling."""
    if sharding_wanted() and memory not in ("auto", "full"):
        raise InputError(f"--memory {memory} does not go with sharded training (FSDP): leave it out, or use full")
    if sharding_wanted() and mixed_precision == "fp16":
        raise InputError("--mixed_precision fp16 does not go with sharded training (FSDP): use bf16")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, gathered from all processes if it is sharded. Call it in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's state dict. If sharded, the first process gathers it in CPU memory; the others get nothing."""
    state = module.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return state
    found = {}
    for name, tensor in state.items():
        tensor = whole(tensor)  # only one full tensor on the GPU at a time
        if is_first_process():
            found[name] = tensor.cpu()
    return found


def own_parts(parameters: Sequence[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """This process's part of each parameter, sharing its memory; unsharded parameters unchanged."""
    return [
        torch.nn.Parameter(parameter.detach().to_local()) if isinstance(parameter, DTensor) else parameter
        for parameter in parameters
    ]


@contextmanager
def root_gathered(module: torch.nn.Module) -> Iterator[None]:
    """Gather a sharded module so that its submodules can be called directly. (Blocks gather themselves.)"""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


# --- saving and resuming ---


@contextmanager
def checkpoint_folder(accelerator: Accelerator, folder: Path) -> Iterator[Path | None]:
    """A temporary folder, renamed to `folder` if the block succeeds; None in a process that writes nothing.

    If sharded, all processes write into the same folder.
    """
    if not accelerator.is_main_process and not accelerator.is_fsdp2:
        yield None
    elif accelerator.is_main_process:
        with atomic_path(folder) as temporary:
            if accelerator.is_fsdp2:
                broadcast_object_list([str(temporary)])
            yield temporary
            if accelerator.is_fsdp2:
                accelerator.wait_for_everyone()  # before it is renamed
    else:
        yield Path(broadcast_object_list([None])[0])
        accelerator.wait_for_everyone()


def save_state(accelerator: Accelerator, folder: Path, module, optimizer, average=None) -> None:
    """Write what `load_state` needs; each process writes its part. average: EMAModel of the own parts, or None."""
    if not accelerator.is_fsdp2:
        accelerator.save_state(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    dcp.save(_sharded_state(module, optimizer, average), checkpoint_id=folder)
    save_accelerator_state(
        str(folder), [], [], [], [], accelerator.process_index, accelerator.step, accelerator.scaler
    )  # random states


def find_fault(folder: Path) -> str:
    """Why training cannot resume from a state, judged by its files; empty if no fault is found.

    Random states are checked here, because accelerate silently resumes without them.
    """
    if not folder.is_dir():
        return f"{folder} is missing"
    first = folder / "random_states_0.pkl"
    if not first.is_file():
        return f"{first} is missing"
    for path in sorted(file for file in folder.iterdir() if file.suffix in (".bin", ".pkl", ".pt")):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (OSError, zipfile.BadZipFile, NotImplementedError):
            damaged = path
        if damaged:
            return f"{path} is damaged"
    return ""


def load_state(accelerator: Accelerator, folder: Path, module, optimizer, average=None) -> None:
    """Load the state from `save_state`. Raises InputError if only one of the two trainings is sharded."""
    if accelerator.is_fsdp2 != (folder / ".metadata").is_file():
        kinds = ("sharded (configs/fsdp.yaml)", "not sharded")
        before, now = kinds if not accelerator.is_fsdp2 else kinds[::-1]
        raise InputError(f"{folder} is of a training that was {before}; this one is {now}: go on as it was begun")
    if not accelerator.is_fsdp2:
        # Load to the CPU: otherwise each process briefly holds two copies on its GPU.
        accelerator.load_state(folder, map_location="cpu")
        return
    state = _sharded_state(module, optimizer, average)
    # In place. A parameter that never got a gradient (as in the ControlNet's last block) has no moments in the file.
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    states.set_model_state_dict(module, state["model"], options=TRAINED)
    states.set_optimizer_state_dict(module, optimizer.optimizer, state["optimizer"], options=TRAINED)
    if average:
        average.optimization_step = state["average"]["step"]
    loaded = load_accelerator_state(str(folder), [], [], [], [], accelerator.process_index, accelerator.scaler)
    accelerator.step = loaded["step"]


def _sharded_state(module, optimizer, average) -> dict:
    """Trained weights and moments by name, and averaged weights by number, all as DTensors."""
    state = {
        "model": states.get_model_state_dict(module, options=TRAINED),
        "optimizer": states.get_optimizer_state_dict(module, optimizer.optimizer, options=TRAINED),
    }
    if average:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        parts = zip(average.shadow_params, trained, strict=True)
        state["average"] = {"step": average.optimization_step}
        state["average"] |= {str(i): _divided_like(part, parameter) for i, (part, parameter) in enumerate(parts)}
    return state


def _divided_like(part: torch.Tensor, parameter: DTensor) -> DTensor:
    layout = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, run_check=False, **layout)
