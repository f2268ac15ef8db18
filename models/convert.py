"""Reference-format checkpoints -> diffusers form.

    python -m models.convert flux            flux1-dev.safetensors                   DST_FOLDER
    python -m models.convert autoencoder     ae.safetensors                          DST_FOLDER
    python -m models.convert controlnet      flux-hed-controlnet-v3.safetensors      DST_FOLDER
    python -m models.convert lora            loras/NAME/checkpoint-400/lora.safetensors             DST.safetensors
    python -m models.convert controlnet_lora loras/NAME/checkpoint-400/controlnet.lora.safetensors  DST.safetensors
    python -m models.convert ggi             checkpoints/checkpoint-1350/transformer DST_FOLDER

The scripts convert reference files in memory as they load them; a converted copy loads faster, and other diffusers
programs can read it. Names and sizes: `models/loading/keymaps.py`. Missing, unknown or misshapen keys are errors.
"""

import argparse
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from models.finite import require_finite_tensors
from models.loading.files import MODEL_KINDS, Shards, load_reference_file, read_lora
from models.loading.fit import require_fit
from models.loading.keymaps import (
    lora_to_peft,
    merge_tensor,
    merged_names,
    unfuse_lora,
    with_base,
)
from models.loading.whole import CONVERTIBLE, open_weights
from utils.cli import InputError, Parser, run_script
from utils.files import atomic_path, read_json, write_json

DAMAGE = "its training diverged, or the file is damaged"


def merge_ggi(source: Path, target: Path, max_shard_size: int = 2**30) -> None:
    """Merge the LoRA of `source` shard by shard; no more than one output shard (bytes) is in memory at a time."""
    config = read_json(source / "config.json")
    require_fit({"inbetween": source})  # refuse wrong keys before writing anything
    shards = Shards(source)
    plan = {name: shards.empty_like(name if name in shards else with_base(name)) for name in merged_names(shards)}
    split = split_torch_state_dict_into_shards(
        plan, filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    with atomic_path(target) as folder:
        folder.mkdir()
        for filename, names in split.filename_to_tensors.items():
            tensors = {name: merge_tensor(shards, name) for name in names}
            require_finite_tensors(tensors, str(source), DAMAGE)
            save_file(tensors, folder / filename, {"format": "pt"})
            del tensors
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)
        write_json(folder / "config.json", config)


def convert_lora(source: Path, target: Path, prefix: str) -> None:
    """Write a reference LoRA under diffusers' names: prefix 'transformer.' for FLUX, '' for the ControlNet."""
    tensors, _ = read_lora(source)
    try:
        converted = {prefix + key: tensor for key, tensor in unfuse_lora(lora_to_peft(tensors)).items()}
    except ValueError as error:
        raise InputError(f"{source} is not a LoRA of this project: {error}") from error
    halves = [key for key in converted if _other_factor(key) not in converted]
    if halves or not converted:
        raise InputError(
            f"{source} is not a whole LoRA: " + (f"{halves[0]} stands alone" if halves else "it is empty")
        )
    with atomic_path(target) as temporary:
        save_file(converted, temporary, {"format": "pt"})


def _other_factor(key: str) -> str:
    return key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("lora_B", "lora_A")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, "python -m models.convert")
    parser.add_argument("kind", choices=[*MODEL_KINDS, "lora", "controlnet_lora", "ggi"], help="what SRC holds")
    parser.add_argument("src", type=Path, help="file to convert (ggi: folder)")
    parser.add_argument("dst", type=Path, help="folder to write (LoRAs: .safetensors file); must not exist")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.dst.exists():
        raise InputError(f"{args.dst} exists already; remove it or name another place")
    if args.kind in MODEL_KINDS:
        open_weights(args.src)
        require_fit({next(name for name, kind in CONVERTIBLE.items() if kind == args.kind): args.src})
        model = load_reference_file(args.kind, args.src)
        require_finite_tensors(model.state_dict(), str(args.src), DAMAGE)
        with atomic_path(args.dst) as folder:
            model.save_pretrained(folder)
    elif args.kind == "ggi":
        merge_ggi(args.src, args.dst)
    else:
        convert_lora(args.src, args.dst, prefix="transformer." if args.kind == "lora" else "")
    print(args.dst)


if __name__ == "__main__":
    run_script(main)
