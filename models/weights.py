"""Where weights come from: the presets `full` and `tiny`, hub repositories, local folders and files.

`locate` turns every component of a stage into a local path before anything is loaded, so that a gated repository or a
missing file is reported at once. A component is named on the command line by a repo id (`org/name`), by a file in a
repository (`org/name/file.safetensors`), by a local folder in diffusers format, or by a local reference-format file.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from utils.cli import InputError
from utils.runs import Run, file_sha256, read_json

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "checkpoints"  # <name>/preset.json beside each weight set

FLUX_TEXT_FILES = [
    "model_index.json",
    "scheduler/*",
    "tokenizer/*",
    "tokenizer_2/*",
    "text_encoder/*",
    "text_encoder_2/*",
]
# component -> (preset entry it comes from, sub-folder in a pipeline repository, files needed from there)
COMPONENTS = {
    "flux_transformer": ("flux", "transformer", ["transformer/*"]),
    "flux_vae": ("flux", "vae", ["vae/*"]),
    "flux_text": ("flux", None, FLUX_TEXT_FILES),
    "controlnet": ("controlnet", None, ["*.safetensors", "*.json"]),
    "cogvideox_vae": ("cogvideox", "vae", ["vae/*"]),
    "cogvideox_transformer": ("cogvideox", "transformer", ["transformer/*"]),
    "cogvideox_text": ("cogvideox", None, ["model_index.json", "scheduler/*", "tokenizer/*", "text_encoder/*"]),
}
FLUX_STAGE = ("flux_transformer", "flux_vae", "flux_text", "controlnet")
GGI_STAGE = ("cogvideox_vae", "cogvideox_text")
CAPTION_MODEL, CAPTION_FILES = "Salesforce/blip2-opt-2.7b", ["*.json", "*.safetensors", "*.txt"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """What one weight set can do, and where it lives (`preset.json`). Sizes are (width, height) in pixels."""

    name: str
    image_size: tuple[int, int] | None  # anchors; None: the size of the edge frames
    image_multiple: int  # sides of anchors are floored to it
    training_multiple: int  # sides of training crops
    resolution: int  # long side of training crops
    mask_dilations: int  # growth of the unreliable area around a warped anchor
    video_size: tuple[int, int]
    num_frames: int
    edges: str  # edge detector for reference pictures: lines or hed
    dtype: str
    max_sequence_length: int  # tokens of T5 for FLUX
    vae_tiling: bool  # decode videos in tiles; changes the numbers slightly
    flux: str
    controlnet: str
    cogvideox: str
    ggi_transformer: str | None  # None: --model_path/checkpoint-<epoch>/transformer


def load_preset(name: str) -> Preset:
    """Read `checkpoints/<name>/preset.json`."""
    folder = WEIGHTS / name
    entries = read_json(folder / "preset.json")
    for key in ("flux", "controlnet", "cogvideox", "ggi_transformer"):
        if entries[key] and (folder / entries[key]).exists():
            entries[key] = str(folder / entries[key])  # paths in a preset are relative to it
    for key in ("image_size", "video_size"):
        entries[key] = entries[key] and tuple(entries[key])
    return Preset(name=name, **entries)


def add_weight_flags(parser: argparse.ArgumentParser, components: Iterable[str]) -> None:
    """--weights, --device, --dtype, and one flag per component and per repository that components come from."""
    components = tuple(components)
    group = parser.add_argument_group("weights")
    group.add_argument("--weights", choices=["full", "tiny"], default="full", help="weight set")
    for name in dict.fromkeys(COMPONENTS[c][0] for c in components):
        group.add_argument(f"--{name}", metavar="REPO|PATH", help=f"another {name}: repo id or local path")
    for name in components:
        source, _, _ = COMPONENTS[name]
        if source != name:
            group.add_argument(
                f"--{name}", metavar="REPO|PATH", help=f"another {name}; overrides --{source} for this part"
            )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one")
    group.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="precision of the networks (default: bfloat16 for full, float32 for tiny; in training --mixed_precision)",
    )


def resolve_device(name: str) -> str:
    """Turn --device into a torch device string. Raises InputError when there is no such device."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return "cpu"
    if not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise InputError(f"--device {name}: this machine has no such CUDA device; use --device cpu")
    return name


def use_offload(args: argparse.Namespace, device: str) -> bool:
    """Whether --offload applies; on the CPU there is nowhere to stream weights to."""
    if args.offload and device == "cpu":
        print("--offload has no effect on the CPU", file=sys.stderr)
    return args.offload and device != "cpu"


def locate(args: argparse.Namespace, preset: Preset, components: Iterable[str]) -> dict[str, Path]:
    """Local paths of all components; access to every one is checked before the first is downloaded."""
    sources = {name: _source(args, preset, name) for name in components}
    for name, source in sources.items():
        _check_access(name, source)
    return {name: _fetch(name, source) for name, source in sources.items()}


def _source(args: argparse.Namespace, preset: Preset, name: str) -> str:
    origin = COMPONENTS[name][0]
    return getattr(args, name, None) or getattr(args, origin, None) or getattr(preset, origin)


def caption_source(given: str | None) -> Path:
    """Local path of BLIP-2. Raises InputError, saying how to do without, when it is not at hand."""
    source = given or CAPTION_MODEL
    try:
        _check_access("caption_model", source)
        return _fetch("caption_model", source)
    except InputError as error:
        raise InputError(
            f"no --prompt, and no model to write one ({error}); give --prompt '…', '' is allowed"
        ) from error


def _split_repo(source: str) -> tuple[str, str | None]:
    """'org/name/file' -> ('org/name', 'file')."""
    parts = source.split("/", 2)
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else None


def _is_repo(source: str) -> bool:
    parts = source.split("/")
    return len(parts) >= 2 and not source.startswith((".", "/", "~")) and all(parts)


def _cached(name: str, source: str) -> Path | None:
    """The component in the hub's local cache, if it is complete enough to load."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, file = _split_repo(source)
    if file:
        path = try_to_load_from_cache(repo, file)
        return Path(path) if isinstance(path, str) else None
    try:
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=_patterns(name)))
    except LocalEntryNotFoundError:
        return None
    return folder if is_whole(folder, _patterns(name)) else None


def _patterns(name: str) -> list[str]:
    """Files of a repository that a component needs."""
    return COMPONENTS[name][2] if name in COMPONENTS else CAPTION_FILES


def is_whole(folder: Path, patterns: Iterable[str]) -> bool:
    """Whether all that `patterns` ask for is there, weights and their shards: a download may have been cut short."""
    for pattern in patterns:
        files = list(folder.glob(pattern))
        holds_weights = pattern.startswith(("transformer", "vae", "text_encoder"))
        if not files or (holds_weights and not any(file.suffix == ".safetensors" for file in files)):
            return False
        for index in (file for file in files if file.name.endswith(".safetensors.index.json")):
            shards = set(read_json(index)["weight_map"].values())
            if not all((index.parent / shard).exists() for shard in shards):
                return False
    return True


def _check_access(name: str, source: str) -> None:
    """Raise InputError unless `source` is on disk, cached, or open to this user on the hub."""
    if Path(source).exists():
        return
    if not _is_repo(source):
        raise InputError(f"{name}: {source} does not exist")
    if _cached(name, source):
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repo, _ = _split_repo(source)
    url = f"https://huggingface.co/{repo}"
    instead = f"or pass a local copy with --{name}"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise InputError(f"{name}: {repo} is not in the local cache and HF_HUB_OFFLINE is set; unset it, {instead}")
    try:
        HfApi().auth_check(repo)
    except GatedRepoError as error:
        raise InputError(
            f"{name}: {repo} is gated: accept its licence at {url}, run `hf auth login`, then try again, {instead}"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: there is no repository {repo} on the hub, nor a local path; check the spelling"
        ) from error
    except Exception as error:  # whatever the HTTP library of the day raises: no network, proxy, server error
        raise InputError(
            f"{name}: {repo} is not in the local cache and {url} cannot be reached; go online, {instead}"
        ) from error


def _fetch(name: str, source: str) -> Path:
    """The component's local path; downloads what is missing (interrupted downloads resume)."""
    if Path(source).exists():
        return Path(source)
    if cached := _cached(name, source):
        return cached
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, file = _split_repo(source)
    if file:
        return Path(hf_hub_download(repo, file))
    return Path(snapshot_download(repo, allow_patterns=_patterns(name)))


def component_folder(name: str, path: Path) -> Path:
    """Where a component's config.json lies: in the pipeline's sub-folder or in `path` itself. Files stay files."""
    subfolder = COMPONENTS[name][1]
    return path / subfolder if subfolder and (path / subfolder).is_dir() else path


def weight_hashes(paths: dict[str, Path]) -> dict[str, dict[str, str]]:
    """{component: {file: sha256}} of the weight files of each component, for the manifest."""
    hashes = {}
    for name, path in paths.items():
        folder = component_folder(name, path) if name in COMPONENTS else path
        pattern = "text_encoder*/*.safetensors" if name.endswith("_text") else "*.safetensors"
        files = [folder] if folder.is_file() else sorted(folder.glob(pattern))
        root = folder.parent if folder.is_file() else folder
        hashes[name] = {str(file.relative_to(root)): file_sha256(file) for file in files}
    return hashes


def require_same_weights(
    run: Run, args: argparse.Namespace, preset: Preset, components: Iterable[str], **others: Path
) -> None:
    """Raise InputError when local weights have changed since the finished run was made with them.

    others: further components and their folders.
    """
    sources = {name: Path(_source(args, preset, name)) for name in components} | others
    now = weight_hashes({name: path for name, path in sources.items() if path.exists()})
    before = run.manifest.get("weights", {})
    changed = [name for name in now if now[name] != before.get(name)]
    if changed:
        raise InputError(f"{run.folder} was made with other weights ({', '.join(changed)}); pass --overwrite")
