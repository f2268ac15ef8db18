"""The scene folder: its arcs, their numbering, and the names of everything in it. File names are defined here only.

arc0/hed/0001.png ... 0046.png      soft edges, white on black
arc0/PASS/0001.png ... 0046.png     depth, normal, ..., if they were asked for; exr/0001.exr
arc0/corres/0004.png ... 0046.png   12 correspondence maps between latent frames
arc0/corres_end.png                 from the arc's first frame to its last
arc0/noises.npy                     flow-warped noise for 90x60 latents (others: noises_WxH.npy)
arc1/hed/0046.png ...               neighbouring arcs share their boundary frame
multiviews/<run>/image_00.png ...   anchors: the first frame of arc 0 and the last frame of every arc
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.cli import LONGEST_NAME, InputError
from utils.correspondence import read_map
from utils.files import read_json
from utils.images import open_picture

ARC_STEPS = 45  # steps between the two anchors of an arc
ARC_FRAMES = ARC_STEPS + 1
PADDING_FRAMES = 3
LATENT_FRAMES = 13  # CogVideoX: 49 frames in 4x temporal compression
NOISE_CHANNELS = 16
SCENE_FILE, CAMERAS_FILE = "scene.glb", "cameras.json"  # the mesh and the path, as preprocess.py used them
PREVIEW_FOLDER = "preview"
PASSES_FOLDER = "passes"  # videos of passes, and the table of ids
REFERENCE_LATENT_SIZE = (90, 60)  # width, height; the size whose noise file has no size in its name
REFERENCE_MAP_SIZE = (360, 240)
MAP_SCALE = 4  # pixels of a map across a latent cell


@dataclass(frozen=True)
class Arc:
    """One interval of the camera path: 46 frames, numbered from `first` to `first + 45` over the whole scene."""

    index: int
    folder: Path

    @property
    def first(self) -> int:
        return ARC_STEPS * self.index + 1

    @property
    def last(self) -> int:
        return self.first + ARC_STEPS

    @property
    def edge_paths(self) -> list[Path]:
        return [self.folder / "hed" / f"{n:04d}.png" for n in range(self.first, self.last + 1)]

    def control_paths(self, control: str) -> list[Path]:
        """What a video model may be controlled by. control: edges, or depth (`preprocess.py --passes depth`)."""
        return {"edges": self.edge_paths, "depth": self.pass_paths("depth")}[control]

    def pass_paths(self, name: str) -> list[Path]:
        """Files of a pass, one per frame (`preprocess.py --passes`); exr: files of floats."""
        suffix = ".exr" if name == "exr" else ".png"
        return [self.folder / name / f"{path.stem}{suffix}" for path in self.edge_paths]

    def has_control(self, control: str) -> bool:
        return all(path.is_file() for path in self.control_paths(control))

    @property
    def corres_paths(self) -> list[Path]:
        return [self.folder / "corres" / f"{n:04d}.png" for n in latent_frame_numbers(self.first, self.last)[1:]]

    @property
    def corres_end_path(self) -> Path:
        return self.folder / "corres_end.png"

    @property
    def input_paths(self) -> list[Path]:
        """Edge frames and maps: what an arc cannot do without. (Noise is made where it is missing.)"""
        return [*self.edge_paths, *self.corres_paths, self.corres_end_path]

    def noise_path(self, latent_size: tuple[int, int] = REFERENCE_LATENT_SIZE) -> Path:
        """latent_size: width, height."""
        name = "noises" if latent_size == REFERENCE_LATENT_SIZE else "noises_{}x{}".format(*latent_size)
        return self.folder / f"{name}.npy"


@dataclass(frozen=True)
class Scene:
    """A validated scene folder. Sizes are (width, height) in pixels."""

    folder: Path
    arcs: tuple[Arc, ...]
    edge_size: tuple[int, int]
    map_size: tuple[int, int]

    @property
    def anchor_edge_paths(self) -> list[Path]:
        """Edge frames of the anchors: the first frame of arc 0, then the last frame of every arc."""
        return [self.arcs[0].edge_paths[0]] + [arc.edge_paths[-1] for arc in self.arcs]

    @property
    def anchor_inputs(self) -> list[Path]:
        """What decides the anchors: their edge frames, and the correspondences between them."""
        return [*self.anchor_edge_paths, *(arc.corres_end_path for arc in self.arcs)]

    @property
    def geometry_paths(self) -> list[Path]:
        """The mesh and the cameras."""
        return [self.folder / SCENE_FILE, self.folder / CAMERAS_FILE]

    @property
    def edge_paths(self) -> list[Path]:
        """The edge frames of all arcs, those that two arcs share twice."""
        return [path for arc in self.arcs for path in arc.edge_paths]

    @property
    def num_frames(self) -> int:
        """Number of frames along the whole path, shared ones counted once: 45 N + 1."""
        return ARC_STEPS * len(self.arcs) + 1


def count_arcs(poses: int) -> int:
    """Number of arcs of a path of 45 N + 1 poses."""
    if poses < ARC_FRAMES or (poses - 1) % ARC_STEPS:
        raise ValueError(f"{poses} poses are not {ARC_STEPS} N + 1")
    return (poses - 1) // ARC_STEPS


def latent_frame_numbers(first: int, last: int) -> list[int]:
    """Frame numbers that the 13 latent frames of an arc stand for, both ends included."""
    return np.linspace(first, last, LATENT_FRAMES).astype(int).tolist()


def resample_indices(n: int, m: int) -> list[int]:
    """Nearest-neighbour resampling of n items to m: index_k = round_half_even(k (n - 1) / (m - 1))."""
    return [round(k * (n - 1) / (m - 1)) for k in range(m)]


def edge_frame_indices(num_frames: int) -> list[int]:
    """Which of an arc's 46 edge frames each frame of the video model sees.

    The model's last 3 frames repeat the arc's last one, so that its last latent frame holds the end anchor alone.
    """
    indices = resample_indices(ARC_FRAMES, num_frames - PADDING_FRAMES)
    return indices + indices[-1:] * PADDING_FRAMES


def same_aspect(edge_size: tuple[int, int], map_size: tuple[int, int]) -> bool:
    """Whether maps and edges have the same aspect, to within a pixel of the maps' width."""
    return abs(edge_size[0] * map_size[1] / edge_size[1] - map_size[0]) <= 1


def fit_sizes(
    edge_size: tuple[int, int], map_size: tuple[int, int] | None = None, latent_size: tuple[int, int] | None = None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(map size, latent size) for edges of a size: those that are given, and what follows for the others.

    The paper's 360x240 and 90x60 where they fit; else about as many latent cells, in even numbers (a video's sides are
    multiples of 16 pixels), of the edges' aspect, with four map pixels across each.
    """
    aspect = edge_size[0] / edge_size[1] if map_size is None else map_size[0] / map_size[1]
    area = REFERENCE_LATENT_SIZE[0] * REFERENCE_LATENT_SIZE[1]

    def distance(cells: tuple[int, int]) -> float:
        odd = any(side % 2 for side in cells)
        return abs(math.log(cells[0] * cells[1] / area)) + 50 * abs(math.log(cells[0] / cells[1] / aspect)) + 100 * odd

    if map_size is None and same_aspect(edge_size, REFERENCE_MAP_SIZE):
        width, height = latent_size or REFERENCE_LATENT_SIZE
        scale = REFERENCE_MAP_SIZE[0] // width
        map_size = REFERENCE_MAP_SIZE if (scale * width, scale * height) == REFERENCE_MAP_SIZE else None
    if map_size and latent_size is None:
        scales = [s for s in range(1, min(map_size) + 1) if not (map_size[0] % s or map_size[1] % s)]
        latent_size = min(((map_size[0] // s, map_size[1] // s) for s in scales), key=distance)
    if latent_size is None:
        rows = range(2, 4 * round(math.sqrt(area / aspect)) + 4, 2)
        cells = [(max(2, 2 * round(aspect * row / 2)), row) for row in rows]
        fitting = [c for c in cells if same_aspect(edge_size, (MAP_SCALE * c[0], MAP_SCALE * c[1]))]
        latent_size = min(fitting or cells, key=distance)
    return map_size or (MAP_SCALE * latent_size[0], MAP_SCALE * latent_size[1]), latent_size


def floor_to(side: int, multiple: int) -> int:
    """The largest multiple of `multiple` that is not above `side`."""
    return side // multiple * multiple


def load_scene(folder: Path) -> Scene:
    """Read and check a scene folder; every file that the stages need must be there and readable.

    Raises InputError naming the first thing that is wrong.
    """
    if not folder.is_dir():
        raise InputError(f"scene folder {folder} does not exist")
    arcs = _find_arcs(folder)
    edge_sizes, map_sizes = {}, {}
    for arc in arcs:
        _check_numbering(arc)
        edge_sizes.update({path: _edge_size(path) for path in arc.edge_paths})
        maps = [*arc.corres_paths, arc.corres_end_path]
        map_sizes.update({path: read_map(path).shape[1::-1] for path in maps})
    return Scene(folder, arcs, _one_size(edge_sizes), _one_size(map_sizes))


def _find_arcs(folder: Path) -> tuple[Arc, ...]:
    found = {int(m[1]) for path in folder.iterdir() if path.is_dir() and (m := re.fullmatch(r"arc(\d+)", path.name))}
    if not found:
        raise InputError(f"{folder} holds no arcs: expected folders arc0, arc1, … as written by preprocess.py")
    missing = sorted(set(range(max(found) + 1)) - found)
    if missing:
        raise InputError(f"{folder} holds arc{max(found)} but not arc{missing[0]}: arcs are numbered without gaps")
    return tuple(Arc(i, folder / f"arc{i}") for i in sorted(found))


def _check_numbering(arc: Arc) -> None:
    """The frames and maps present must be exactly those that the arc's position in the path requires."""
    for wanted in (arc.edge_paths, arc.corres_paths):
        parent = wanted[0].parent
        present = {path.name for path in parent.glob("*.png")} if parent.is_dir() else set()
        missing = [path.name for path in wanted if path.name not in present]
        extra = sorted(present - {path.name for path in wanted})
        span = f"arc{arc.index} needs {len(wanted)} files {wanted[0].name} … {wanted[-1].name}"
        if missing:
            raise InputError(f"{parent / missing[0]} is missing ({span})")
        if extra:
            raise InputError(f"{parent / extra[0]} does not belong there ({span})")


def _edge_size(path: Path) -> tuple[int, int]:
    with open_picture(path) as image:
        size = image.size
        image.verify()  # checksums only: pixels are decoded when they are used
    return size


def _one_size(sizes: dict[Path, tuple[int, int]]) -> tuple[int, int]:
    (first_path, first), *others = sizes.items()
    for path, size in others:
        if size != first:
            raise InputError(
                f"{path} is {size[0]}x{size[1]}, but {first_path} is {first[0]}x{first[1]}: all files of one kind "
                "must have one size"
            )
    return first


# --- runs: anchors of a scene, videos of anchors, LoRAs ---

MANIFEST = "run.json"  # in every folder that a script owns
SCENE_MANIFEST = "preprocess.json"  # the same in a scene folder, which holds runs of its own
MULTIVIEWS = "multiviews"
CONTACT_SHEET, VIDEO_FILE = "contact_sheet.png", "video.mp4"
LOSS_FILE, LOSS_CURVE = "loss.csv", "loss.png"
SAMPLES_FOLDER = "samples"  # in a training run: sample sheets
STATE_FOLDER = "state"  # in a checkpoint: the state from which an interrupted training resumes
# Files of an anchor run; its videos are subfolders.
ANCHOR_FILES = ("image_*.png", "warped_x_*.png", "mask_*.png", "latents_*.safetensors", CONTACT_SHEET)


def scene_seed(folder: Path) -> int:
    """The seed that preprocess.py was given for a scene folder; 0 if it did not write it."""
    manifest = folder / SCENE_MANIFEST
    arguments = read_json(manifest).get("arguments") if manifest.is_file() else None
    seed = arguments.get("seed") if isinstance(arguments, dict) else None
    return seed if isinstance(seed, int) and seed >= 0 else 0


def pad_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """One prompt per anchor: the last one is repeated. Raises InputError when there are more than `count`."""
    if len(prompts) > count:
        raise InputError(f"{len(prompts)} prompts for {count} anchors: give at most one for each")
    return [*prompts, *[prompts[-1]] * (count - len(prompts))]


def anchor_run_name(pfix: str, prompts: Sequence[str], epoch: int, seed: int, num_replacement: int) -> str:
    """Folder name of a set of anchors. prompts: one per anchor (`pad_prompts`)."""
    shown = re.sub(r"[^\w.-]", "_", prompts[0])[:60]
    digest = hashlib.sha256("".join(prompts).encode()).hexdigest()[:8]
    start, end = f"{pfix}_p", f"-{digest}_e{epoch:03d}_s{seed:06d}_r{num_replacement:02d}_ip1"
    return start + cut_name(shown, max(0, LONGEST_NAME - len((start + end).encode()))) + end


def cut_name(text: str, most: int = LONGEST_NAME) -> str:
    """The beginning of a text in at most this many bytes of UTF-8, without half a character."""
    return text.encode()[:most].decode(errors="ignore")


def anchor_path(run: Path, k: int) -> Path:
    return run / f"image_{k:02d}.png"


def warped_path(run: Path, k: int) -> Path:
    """The previous anchor, warped to anchor k."""
    return run / f"warped_x_{k:02d}.png"


def mask_path(run: Path, k: int) -> Path:
    """White where anchor k was generated freely."""
    return run / f"mask_{k:02d}.png"


def find_anchors(run: Path, count: int) -> list[Path]:
    """The finished anchors of a run. Raises InputError unless they are exactly image_00 … image_<count - 1>."""
    if not run.is_dir():
        raise InputError(f"run folder {run} does not exist: give a folder that sag_generate_anchor_view.py wrote")
    paths = [anchor_path(run, k) for k in range(count)]
    present = set(run.glob("image_*.png"))
    missing, extra = [p for p in paths if p not in present], sorted(present - set(paths))
    if missing:
        raise InputError(f"{missing[0]} is missing: the scene needs {count} anchors; run sag_generate_anchor_view.py")
    if extra:
        raise InputError(f"{extra[0]}: the scene has {count} anchors only; are these anchors of another scene?")
    return paths


def find_scene(run: Path) -> Path:
    """The scene folder that a run of anchors, a video's folder in it, or a file in either was made for.

    It is the folder that contains the run, else the one named in a manifest. Raises InputError if neither exists.
    """
    folders = [run.absolute(), *run.absolute().parents[:2]]
    for folder in folders:
        if folder.parent.name == MULTIVIEWS and (folder.parent.parent / "arc0").is_dir():
            return folder.parent.parent
    for folder in folders:
        if (folder / MANIFEST).is_file() and (noted := read_json(folder / MANIFEST).get("scene")):
            return Path(noted)
    raise InputError(f"{run} does not lie in a scene folder: pass --scene")


def video_run_name(degradation: float, epoch: int, steps: int) -> str:
    return f"d{degradation}_e{epoch}_n{steps}"


def frame_path(run: Path, index: int) -> Path:
    """Frame of a video run: one running index over all arcs, 46 per arc, from 0."""
    return run / f"{index:04d}.png"


def chain_path(run: Path, arc: int) -> Path:
    """The generated frame that arc `arc` starts from when arcs are chained."""
    return run / "chain" / f"start_{arc:02d}.png"


def anchor_latents_path(run: Path, k: int) -> Path:
    """Latents of anchor k, kept from the end of denoising until its picture is written."""
    return run / f"latents_{k:02d}.safetensors"


def latents_path(run: Path, arc: int) -> Path:
    """Latents of an arc, kept from the end of denoising until its frames are written."""
    return run / "chain" / f"latents_{arc:02d}.safetensors"


def lora_paths(loras: Path, pfix: str, epoch: int) -> tuple[Path, Path]:
    """(FLUX LoRA, ControlNet LoRA) of a training checkpoint."""
    return checkpoint_lora_paths(loras / pfix / f"checkpoint-{epoch}")


def checkpoint_lora_paths(checkpoint: Path) -> tuple[Path, Path]:
    return checkpoint / "lora.safetensors", checkpoint / "controlnet.lora.safetensors"


def find_checkpoints(run: Path) -> dict[int, Path]:
    """{step: folder} of the checkpoints of a training run, in order."""
    steps = {
        int(m[1]): path for path in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return dict(sorted(steps.items()))


def find_lora(loras: Path, pfix: str, epoch: int) -> tuple[Path, Path]:
    """Like `lora_paths`. Raises InputError, naming the LoRAs that exist, when one of the two is missing."""
    paths = lora_paths(loras, pfix, epoch)
    missing = [path for path in paths if not path.is_file()]
    if not missing:
        return paths
    exist = [
        f"{p.name} (epochs {', '.join(map(str, e))})" for p in sorted(loras.glob("*")) if (e := find_checkpoints(p))
    ]
    raise InputError(f"{missing[0]} does not exist; {loras} holds {'; '.join(exist) or 'no LoRA'}")


def ggi_transformer_folder(model_path: Path, epoch: int) -> Path:
    return model_path / f"checkpoint-{epoch}" / "transformer"


def lora_sources(path: Path) -> list[Path]:
    """The files that decide what a LoRA of another program does: itself, and peft's configuration of it."""
    config = path.with_name("adapter_config.json")
    return [path, config] if path.name == "adapter_model.safetensors" and config.is_file() else [path]
