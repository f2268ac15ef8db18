"""Run a script with its training sharded over CPU processes; accelerate itself shards only on GPUs.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.support.sharded train_ggi --weights tiny …

The environment is the one that `accelerate launch --config_file configs/fsdp.yaml` sets. On a GPU
accelerate marks its state as sharded; this module does so on a CPU. The script, accelerate's preparation of the model,
FSDP2 and its collectives are the real ones.
"""

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch_environment(config: str = "fsdp", *flags: str) -> dict[str, str]:
    """Environment that `accelerate launch --config_file configs/<config>.yaml FLAGS` gives to its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = str(ROOT / "configs" / f"{config}.yaml")
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", path, *flags, "script.py"])
    )
    before = dict(os.environ)
    return {name: value for name, value in prepare_multi_gpu_env(args).items() if before.get(name) != value}


def mark_as_sharded(mixed_precision: str) -> None:
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    from models.runtime.sharding import sharding_plugin

    Accelerator(cpu=True, mixed_precision=mixed_precision)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = sharding_plugin()


def main() -> None:
    script, *arguments = sys.argv[1:]
    os.environ |= {name: value for name, value in launch_environment().items() if "FSDP" in name}
    sys.argv = [f"{script}.py", *arguments]
    precision = arguments[arguments.index("--mixed_precision") + 1] if "--mixed_precision" in arguments else "bf16"
    mark_as_sharded(precision)

    from utils.cli import run_script

    run_script(importlib.import_module(script).main)


if __name__ == "__main__":
    main()
