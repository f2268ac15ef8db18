"""Where weights come from: the presets `full` and `tiny`, hub repositories, local folders and files.

    python -m models.weights check
    python -m models.weights fetch --weights full
    python -m models.weights fetch --backbone wan_vace

`check` lists which weights are on this machine, `fetch` downloads the rest. The scripts do the same: `locate`
turns every component of a stage into a local path before anything is loaded, so that a gated repository or a missing
file is reported at once. A component is named by a repo id (`org/name`, `org/name@revision`), by a file in a
repository (`org/name/file.safetensors`), by a local folder in diffusers format, or by a local reference-format file.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from models import hub
from models.loading.whole import (
    COMPONENTS,
    CONVERTIBLE,
    IncompleteError,
    component_folder,
    open_weights,
    require_whole,
)
from utils.cli import InputError, Parser, heavy_imports, positive_int, run_script
from utils.files import file_sha256, known_sha256, read_json, show_bytes
from utils.layout import floor_to, ggi_transformer_folder
from utils.runs import Run

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "checkpoints"  # <name>/preset.json beside each weight set

FLUX_STAGE = ("flux_transformer", "flux_vae", "flux_text", "controlnet")
GGI_STAGE = ("cogvideox_vae", "cogvideox_text")
WAN_STAGE = ("wan_vae", "wan_transformer", "wan_text")
EPOCH = 1350  # the released in-between transformer's
RELEASE = "https://drive.google.com/drive/folders/1IhI9qDv6tH5T7XzeEjx27UYw2EqZ7MKY"  # its authors' folder
FLOW_LORA = (
    "I2V5B_final_i38800_nearest_lora_weights.safetensors of https://huggingface.co/Eyeline-Labs/Go-with-the-Flow"
)
CAPTION_MODEL, CAPTION_FILES = "Salesforce/blip2-opt-2.7b", ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes and sources of one weight set (`preset.json`). Sizes are (width, height) in pixels."""

    name: str
    image_size: tuple[int, int] | None  # size of anchors; None: that of the edge frames
    image_multiple: int  # sides of anchors are rounded down to a multiple of it
    training_multiple: int  # the same for sides of training crops
    resolution: int  # long side of training crops
    mask_dilations: int  # growth of the unreliable area around a warped anchor
    video_size: tuple[int, int]
    num_frames: int
    edges: str  # edge detector for reference pictures: lines or hed
    dtype: str  # of the weights; --dtype auto may compute float32 ones in bfloat16 (`models/precision.py`)
    max_sequence_length: int  # tokens of T5 for FLUX
    vae_tiling: bool  # decode videos in tiles; changes the numbers slightly
    flux: str
    controlnet: str
    cogvideox: str
    ggi_transformer: str | None  # None: --model_path/checkpoint-<epoch>/transformer
    wan: str | None = None  # None: has no Wan VACE
    video_sizes: tuple[tuple[int, int], ...] = ()  # to choose from, where there are several

    def anchor_size(self, edge_size: tuple[int, int]) -> tuple[int, int]:
        """Size of anchors that nobody chose: the weights' own, else that of the edge frames, rounded down."""
        return self.image_size or tuple(floor_to(side, self.image_multiple) for side in edge_size)


def load_preset(name: str, video: str | None = None) -> Preset:
    """Read `checkpoints/<name>/preset.json`. video: a video model of its own, whose entries and name replace those."""
    folder = WEIGHTS / name
    entries = read_json(folder / "preset.json") | (read_json(WEIGHTS / video / "preset.json") if video else {})
    for key in ("flux", "controlnet", "cogvideox", "ggi_transformer"):
        if entries[key] and (folder / entries[key]).exists():
            entries[key] = str(folder / entries[key])  # paths in a preset are relative to it
    for key in ("image_size", "video_size"):
        entries[key] = entries[key] and tuple(entries[key])
    entries["video_sizes"] = tuple(map(tuple, entries.get("video_sizes", ())))
    return Preset(name=video or name, **entries)


def add_weight_flags(parser: argparse.ArgumentParser, components: Iterable[str]) -> None:
    """--weights, --device, --dtype, and one flag per component and per repository that components come from."""
    group = parser.add_argument_group("weights")
    add_source_flags(group, tuple(components))
    device = group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, or cuda:N but in training; auto takes a GPU if any"
    )
    device.decides = False
    group.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="precision of the networks; auto: bfloat16 for full, and for tiny where the device computes in it, else "
        "float32; in alignment as --mixed_precision, in train_ggi.py float32 for tiny",
    )


def add_source_flags(group: argparse._ActionsContainer, components: Sequence[str]) -> None:
    """--weights, and where each component comes from."""
    group.add_argument("--weights", choices=["full", "tiny"], default="full", help="weight set")
    for name in dict.fromkeys(COMPONENTS[c][0] for c in components):
        group.add_argument(f"--{name}", metavar="REPO|PATH", help=f"another {name}: repo id or local path")
    for name in components:
        source, _, _ = COMPONENTS[name]
        if source != name:
            group.add_argument(
                f"--{name}", metavar="REPO|PATH", help=f"another {name}; overrides --{source} for this part"
            )


def locate(args: argparse.Namespace, preset: Preset, components: Iterable[str]) -> dict[str, Path]:
    """Local paths of all components. Downloads missing ones, after checking access to all of them and disk space."""
    return _fetch_missing({name: _source(args, preset, name) for name in components})


def _source(args: argparse.Namespace, preset: Preset, name: str) -> str:
    origin = COMPONENTS[name][0]
    return getattr(args, name, None) or getattr(args, origin, None) or getattr(preset, origin)


def caption_source(given: str | None) -> Path:
    """Local path of BLIP-2. If it is not available, raises InputError that says how to do without."""
    try:
        return _fetch_missing({"caption_model": given or CAPTION_MODEL})["caption_model"]
    except InputError as error:
        raise InputError(
            f"no --prompt, and no model to write one ({error}); give --prompt '…', '' is allowed"
        ) from error


def _patterns(name: str) -> list[str]:
    """Files of a repository that a component needs."""
    return COMPONENTS[name][2] if name in COMPONENTS else CAPTION_FILES


def find_local(name: str, text: str) -> Path | None:
    """A component's path on this machine, None if a repository is not in the hub's cache.

    Raises InputError if the source is neither a path nor a repo id, or its files are damaged; IncompleteError if some
    are missing.
    """
    path = Path(text)
    if not path.exists():
        source = hub.parse_source(text)
        if source is None:
            raise InputError(f"{name}: {text} does not exist")
        path = hub.find_cached(source, _patterns(name))
    if path is not None:
        require_whole(name, component_folder(name, path))
    return path


def _find_or_lack(name: str, text: str) -> Path | str:
    """`find_local`, or what a download may bring: the file that is missing, or the whole repository."""
    try:
        return find_local(name, text) or f"{text} is not in the local cache"
    except IncompleteError as error:
        if Path(text).exists():
            raise
        return str(error).removeprefix(f"{name}: ")


def _fetch_missing(texts: dict[str, str]) -> dict[str, Path]:
    """{component: local path} from {component: source}; downloads what is missing."""
    found = {name: _find_or_lack(name, text) for name, text in texts.items()}
    sources = {name: hub.parse_source(texts[name]) for name, path in found.items() if isinstance(path, str)}
    for name, source in sources.items():
        hub.check_access(name, source, found[name], _other_commits(name, texts[name]))
        if other := _other_commits(name, texts[name]):
            print(f"{name}: {found[name]}{other}", file=sys.stderr)
    missing = {name: hub.list_missing(name, source, _patterns(name)) for name, source in sources.items()}
    hub.require_space(size for files in missing.values() for size in files.values())
    for name, source in sources.items():
        hub.download(name, source, _patterns(name), missing[name])
    return found | {name: find_local(name, texts[name]) for name in sources}


def find_inbetween(preset: Preset, model_path: Path | None, epoch: int) -> Path:
    """Folder of the 48-channel transformer. Raises InputError when it is not there."""
    if model_path is None and preset.ggi_transformer:
        if epoch != EPOCH:
            raise InputError(f"--epoch {epoch} goes with --model_path: the {preset.name} weights have one transformer")
        require_whole("inbetween", Path(preset.ggi_transformer))
        return Path(preset.ggi_transformer)
    folder = ggi_transformer_folder(model_path or Path("checkpoints"), epoch)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} holds no transformer: download checkpoint-{EPOCH} from {RELEASE} into checkpoints, so that "
            f"{ggi_transformer_folder(Path('checkpoints'), EPOCH)}/config.json is there, or pass --model_path and "
            "--epoch"
        )
    require_whole("inbetween", folder)
    return folder


def weight_hashes(paths: dict[str, Path]) -> dict[str, dict[str, str]]:
    """{component: {file: sha256}} of the weight files of each component, for the manifest."""
    hashes = {}
    for name, path in paths.items():
        folder = component_folder(name, path) if name in COMPONENTS else path
        root = folder.parent if folder.is_file() else folder
        hashes[name] = {str(file.relative_to(root)): file_sha256(file) for file in _weight_files(name, path)}
    return hashes


def require_hashes(paths: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """`weight_hashes`. Raises InputError when one of the paths holds no weights."""
    hashes = weight_hashes(paths)
    for name, path in paths.items():
        if not hashes[name]:
            raise InputError(f"{name}: {path} holds no weights")
    return hashes


def require_same_weights(
    run: Run, args: argparse.Namespace, preset: Preset, components: Iterable[str], **others: Path
) -> None:
    """Raise InputError when local weights have changed since the finished run used them.

    others: further components and their folders.
    """
    sources = {name: Path(_source(args, preset, name)) for name in components} | others
    now = weight_hashes({name: path for name, path in sources.items() if path.exists()})
    before = run.manifest.get("weights", {})
    changed = [name for name in now if now[name] != before.get(name)]
    if changed:
        raise InputError(f"{run.folder} was made with other weights ({', '.join(changed)}); pass --overwrite")


# --- the command ---


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m models.weights")
    parser.add_argument("action", choices=["check", "fetch"], help="say what is there, or download what is missing")
    parser.add_argument("--hashes", action="store_true", help="read all downloaded files and compare their SHA-256")
    parser.add_argument("--model_path", type=Path, help="folder with checkpoint-<epoch>/transformer, as of ggi.py")
    parser.add_argument("--epoch", type=positive_int, default=EPOCH, help="training step of that transformer")
    backbone = {"choices": ["cogvideox", "wan_vace"], "default": "cogvideox", "help": "video model, as of ggi.py"}
    parser.add_argument("--backbone", **backbone)
    add_source_flags(parser.add_argument_group("weights"), (*FLUX_STAGE, *GGI_STAGE, *WAN_STAGE))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    open_model = args.backbone == "wan_vace"
    if open_model and args.weights != "full":
        raise InputError(f"--weights {args.weights} has no Wan VACE")
    preset = load_preset(args.weights, args.backbone if open_model else None)
    stage = WAN_STAGE if open_model else GGI_STAGE
    texts = {name: _source(args, preset, name) for name in (*FLUX_STAGE, *stage)}
    if args.action == "fetch":
        _fetch_missing(texts)
    find = {name: partial(_find_present, name, text) for name, text in texts.items()}
    if not open_model:
        find["inbetween"] = partial(find_inbetween, preset, args.model_path, args.epoch)
    paths, faults = _find_sound(find, args.action == "check")
    if args.weights == "full" and not open_model:
        print(f"{'by hand':17} checkpoint-{EPOCH}, the in-between transformer: {RELEASE} into checkpoints/")
        print(f"{'':17} LoRA of Go-with-the-Flow, for train_ggi.py --lora: {FLOW_LORA}")
    absent = [name for name, text in texts.items() if name in faults and faults[name].startswith("missing: ")]
    if absent:
        raise InputError(
            f"{len(absent)} components are missing: python -m models.weights fetch"
            + (" --backbone wan_vace" if open_model else "")
        )
    if faults:
        raise InputError("; ".join(f"{name}: {fault}" for name, fault in faults.items()))
    if args.hashes:
        _require_undamaged({name: paths[name] for name in texts})


def _find_present(name: str, text: str) -> Path:
    """`find_local`. Raises IncompleteError if something is missing, and says what brings it."""
    found = _find_or_lack(name, text)
    if isinstance(found, Path):
        return found
    if found.startswith(text):
        raise IncompleteError(f"missing: {text}{_other_commits(name, text)}")
    raise IncompleteError(f"{found}; python -m models.weights fetch brings it")


def _find_sound(find: Mapping[str, Callable[[], Path]], thoroughly: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """Find and check all components, a line for each: ({component: path}, {component: what is wrong with it}).

    thoroughly: also whether tensors fit configurations, and tokenizers their encoders.
    """
    if thoroughly:
        with heavy_imports():
            from models.loading.fit import require_fit

    paths, faults = {}, {}
    for name, find_path in find.items():
        try:
            paths[name] = find_path()
            if thoroughly:
                require_fit({name: paths[name]})
            print(f"{name:17} {_describe(name, paths[name])}")
        except InputError as fault:
            faults[name] = str(fault).removeprefix(f"{name}: ")
            print(f"{name:17} {faults[name]}")
    return paths, faults


def _other_commits(name: str, text: str) -> str:
    """What to say of whole snapshots of the same repository at other commits; empty if there are none."""
    found = []
    for other in hub.other_commits(hub.parse_source(text)):
        with suppress(InputError):
            found += [other] if find_local(name, other) else []
    flag = COMPONENTS[name][0] if name in COMPONENTS else name
    return f" (the cache holds another commit: --{flag} {found[0]} takes it)" if found else ""


def _weight_files(name: str, path: Path) -> list[Path]:
    """Weight files of a component, sorted."""
    folder = component_folder(name, path) if name in COMPONENTS else path
    if folder.is_file():
        return [folder]
    return sorted(folder.glob("text_encoder*/*.safetensors" if name.endswith("_text") else "*.safetensors"))


def _describe(name: str, path: Path) -> str:
    """Size and path of a component, and the command for a copy that loads faster, if there is one."""
    files = _weight_files(name, path)
    found = f"{show_bytes(sum(file.stat().st_size for file in files)):>8}  {path}"
    kind = CONVERTIBLE.get(name)
    if kind and (path.is_file() or _holds_lora(files)):
        found += f"\n{'':27} converted on loading; once for all: python -m models.convert {kind} {path} FOLDER"
    return found


def _holds_lora(files: Sequence[Path]) -> bool:
    """Whether the files hold weights with an unmerged LoRA, as the paper's authors saved them."""
    for file in files:
        with open_weights(file, "np") as handle:
            if any(".lora_" in key for key in handle.keys()):  # noqa: SIM118 - not a dict
                return True
    return False


def _require_undamaged(paths: dict[str, Path]) -> None:
    from tqdm import tqdm

    files = [file for name, path in paths.items() for file in _weight_files(name, path)]
    known = [file for file in files if known_sha256(file)]
    print(f"{len(known)} of {len(files)} files have a hash to compare with: those in the hub's cache")
    if damaged := hub.find_damaged(tqdm(known, desc="hashes", unit="file")):
        raise InputError(f"{damaged[0]} is damaged; remove it, then: python -m models.weights fetch")


if __name__ == "__main__":
    run_script(main)
