"""Recompute a folder of golden vectors through the functions that the scripts call, and compare.

    python -m tests.parity tests/golden [--data DIR]

FOLDER holds any subset of the items 1_… to 9_…; cases come from their manifests, metadata and file lists. Maps and
edges named assets/sampleA/… are read from DIR/sampleA (default: FOLDER/../data). One line per comparison,
errors of normal draws in units in the last place:

    <item>/<case> <quantity> <error> <tolerance> pass|FAIL|skip

Exit code 0 with at least one pass and no FAIL, 1 on any FAIL, 2 when there is nothing to run.
"""

import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Before torch, as MKL reads it once: its exp is off by 5.7e-7 with Intel's AVX2 and AVX-512, by 1e-4 after 28 steps.
os.environ["MKL_CBWR"] = "COMPATIBLE"

import cv2
import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel, FluxControlNetModel, FluxTransformer2DModel

from models.flux.lora import add_lora, lora_state, require_fit
from models.flux.network import anchor_schedule, shifted_schedule
from models.loading import keymaps
from models.loading.files import MODEL_KINDS, build_empty
from tests.models.parity_models import formula_image, ggi_cases, image_cases, largest, read_case, training_steps
from utils import layout as arcs
from utils.cli import InputError, Parser, run_script
from utils.correspondence import gather_indices, latent_mask, read_map, resize_map, unreliable_mask, warp_image
from utils.noise import blend_noise

EXACT = 0.0


@dataclass(frozen=True)
class Check:
    """One comparison; error None means that its input is absent."""

    case: str
    quantity: str
    error: float | None
    tolerance: float

    @property
    def verdict(self) -> str:
        if self.error is None:
            return "skip"
        return "pass" if self.error <= self.tolerance else "FAIL"  # NaN fails


@dataclass(frozen=True)
class Golden:
    """The folders of the vectors and of the data that they name."""

    folder: Path
    data: Path

    def item(self, prefix: str) -> Path | None:
        return next((path for path in sorted(self.folder.iterdir()) if path.name.startswith(f"{prefix}_")), None)

    def named(self, name: str, item: Path) -> Path | None:
        """A file named in a manifest: assets/… in the data folder, anything else beside the manifest."""
        path = self.data / name.removeprefix("assets/") if name.startswith("assets/") else item / name
        return path if path.exists() else None


def mismatches(found: object, wanted: object) -> float:
    """Number of unequal values; inf for another shape."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float((found != wanted).sum()) if found.shape == wanted.shape else float("inf")


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def correspondence(golden: Golden, item: Path) -> Iterator[Check]:
    manifest = json.loads((item / "manifest.json").read_text())
    for entry in manifest.get("warp", []):
        path = golden.named(entry["colorcode"], item)
        if path is None:
            yield Check(entry["name"], "warp", None, EXACT)
            continue
        yield from _checks(entry["name"], lambda: _warp(entry, read_map(path), item))  # noqa: B023
    for entry in manifest.get("noise", []):
        path = golden.named(entry["colorcode"], item)
        if path is None:
            yield Check(entry["name"], "flow", None, EXACT)
            continue
        yield from _checks(entry["name"], lambda: _flow(entry, read_map(path), item))  # noqa: B023


def _checks(case: str, rows: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The checks of one case; a case that raises counts as failed, and the others still run."""
    try:
        yield from rows()
    except Exception:
        traceback.print_exc()
        yield Check(case, "raised", float("inf"), EXACT)


def _warp(entry: dict, code: np.ndarray, item: Path) -> Iterator[Check]:
    name, width, height = entry["name"], entry["width"], entry["height"]
    image = formula_image(height, width, *(entry["image_formula"][k] for k in ("a", "b", "c", "off")))
    resized = resize_map(code, width, height)
    yield Check(name, "resized_map", float(sha256(resized[..., ::-1]) != entry["resized_colorcode_sha256"]), EXACT)
    indices = dict(zip(("x1", "y1", "x2", "y2"), gather_indices(resized), strict=True))
    yield Check(name, "valid_pixels", abs(len(indices["x1"]) - entry["n_valid"]), EXACT)
    wrong = sum(sha256(indices[k].astype(np.int32)) != digest for k, digest in entry["corr_sha256"].items())
    yield Check(name, "correspondences", float(wrong), EXACT)
    warped = warp_image(image, resized)
    yield Check(name, "warped_sha256", float(sha256(warped) != entry["warped_sha256"]), EXACT)
    stored = item / f"{name}.warped.png"
    if stored.exists():
        yield Check(name, "warped", mismatches(warped, cv2.imread(str(stored))[..., ::-1]), EXACT)
    kernel, dilations = entry["mask_dilation"]
    mask = unreliable_mask(resized, dilations) if kernel == 5 else np.zeros(0)
    stored = item / f"{name}.mask.png"
    if stored.exists():
        yield Check(name, "mask", mismatches(255 * mask, cv2.imread(str(stored), cv2.IMREAD_GRAYSCALE)), EXACT)
    yield Check(name, "mask_ones", abs(float(mask.sum()) - entry["mask_ones"]), EXACT)
    stored = item / f"{name}.latent_mask.npz"
    if stored.exists():
        wanted = np.load(stored, allow_pickle=False)["mask_latent"]
        yield Check(name, "latent_mask", mismatches(latent_mask(mask), wanted), EXACT)


def _flow(entry: dict, code: np.ndarray, item: Path) -> Iterator[Check]:
    wanted = np.load(item / f"{entry['name']}.flow.npz", allow_pickle=False)
    x1, y1, x2, y2 = gather_indices(code)
    dx, dy = (np.full(code.shape[:2], -10000) for _ in range(2))
    dx[y1, x1], dy[y1, x1] = x2 - x1, y2 - y1  # several targets of one source: the last one wins
    for quantity, found in (("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2), ("dx", dx), ("dy", dy)):
        yield Check(entry["name"], quantity, mismatches(found, wanted[quantity]), EXACT)


def schedules(golden: Golden, item: Path) -> Iterator[Check]:
    for name, entry in json.loads((item / "schedules.json").read_text()).items():
        if "requested" in entry:
            width, height = (arcs.floor_to(side, 16) for side in entry["requested"])
            yield Check(name, "rounded_size", mismatches((width, height), entry["rounded_to_16"]), EXACT)
            found = anchor_schedule(entry["num_steps"], width, height)
        else:
            found = shifted_schedule(entry["num_steps"], entry["image_seq_len"])
        yield Check(name, "timesteps", largest(found, torch.tensor(entry["timesteps"])), 1e-6)


def noise_mixes(golden: Golden, item: Path) -> Iterator[Check]:
    for file in sorted(item.glob("*.safetensors")):
        tensors, _ = read_case(file)
        for key, wanted in tensors.items():
            if match := re.fullmatch(r"mixed_alpha_([\d.]+)(_bf16)?", key):
                found = blend_noise(tensors["noise_background"], tensors["noise_foreground"], float(match[1]))
                found = found.to(wanted.dtype)
                yield Check(file.stem, key, largest(found, wanted), 1e-6)


def inventories(golden: Golden, item: Path) -> Iterator[Check]:
    """Every key of a full-size checkpoint is read with the right shape, on the meta device."""
    for file in sorted(item.glob("*.json")):
        entry = json.loads(file.read_text())
        yield from _checks(file.stem, lambda: [Check(file.stem, "keys", _inventory(entry), EXACT)])  # noqa: B023


def _inventory(entry: dict) -> float:
    """Number of wrong keys of one checkpoint; raises on a missing, unexpected or wrongly shaped one."""
    tensors = {key: torch.empty(shape, device="meta") for key, shape in entry["tensors"].items()}
    if any(".processor." in key for key in tensors):
        return _lora_errors(tensors)
    if "config" in entry:
        cls, (config, state) = CogVideoXTransformer3DModel, keymaps.ggi_transformer(entry["config"], tensors)
    else:
        kind = "autoencoder" if "ae_params" in entry else "controlnet" if "controlnet_depth" in entry else "flux"
        cls, convert, params = MODEL_KINDS[kind]
        config, state = convert(tensors, entry.get(params))
    build_empty(cls, config, state).load_state_dict(state, strict=True, assign=True)
    return EXACT


def _lora_errors(tensors: dict[str, torch.Tensor]) -> float:
    """Number of keys or shapes in which a LoRA of that size differs when our loader reads or our saver writes it."""
    rank, hidden = tensors["double_blocks.0.processor.qkv_lora1.down.weight"].shape
    count = lambda kind: 1 + max((int(k.split(".")[1]) for k in tensors if k.startswith(kind)), default=-1)  # noqa: E731
    doubles, singles = count("double_blocks"), count("single_blocks")
    cls = FluxTransformer2DModel if singles else FluxControlNetModel
    with torch.device("meta"):
        model = cls(
            num_layers=doubles, num_single_layers=singles, attention_head_dim=hidden // 2, num_attention_heads=2
        )
        require_fit("the inventory", keymaps.lora_to_peft(tensors), model.config)
        add_lora(model, rank)
    found = {key: tensor.shape for key, tensor in lora_state(model).items()}
    wanted = {key: tensor.shape for key, tensor in tensors.items()}
    return float(sum(found.get(key) != wanted.get(key) for key in found | wanted))


def layout(golden: Golden, item: Path) -> Iterator[Check]:
    entries = json.loads((item / "layout.json").read_text())
    for i, entry in enumerate(entries.get("sag", [])):
        for quantity, found, wanted in _sag_layout(golden, entry):
            yield Check(f"sag{i}", quantity, None if found is None else float(found != wanted), EXACT)
    if ggi := entries.get("ggi"):
        for quantity, found, wanted in _ggi_layout(ggi):
            yield Check("ggi", quantity, float(found != wanted), EXACT)
    for name, entry in entries.get("corres_indices", {}).items():
        found = arcs.latent_frame_numbers(entry["hed_first"], entry["hed_last"])[1:]
        yield Check(name, "corres_indices", float(found != entry["corres"]), EXACT)
    for name, wanted in entries.get("resize_list_indices", {}).items():
        found = arcs.resample_indices(*map(int, name.split("->")))
        yield Check(name, "resample_indices", float(found != wanted), EXACT)
    for text, digest in entries.get("hash_examples", {}).items():
        name = arcs.anchor_run_name("x", [text], 1, 1, 1)
        yield Check("hash", digest, float(f"-{digest}_" not in name), EXACT)


def _sag_layout(golden: Golden, entry: dict) -> Iterator[tuple[str, object, object]]:
    """(quantity, found, wanted) of one recorded anchor-view call."""
    folder = Path(entry["image"][0]).parents[2]
    count = len(entry["corres_end"])
    scene = arcs.Scene(folder, tuple(arcs.Arc(i, folder / f"arc{i}") for i in range(count)), (0, 0), (0, 0))
    yield "edge_frames", [str(p) for p in scene.anchor_edge_paths], entry["image"]
    yield "corres_end", [str(arc.corres_end_path) for arc in scene.arcs], entry["corres_end"]
    given = list(entry["prompt"])
    while len(given) > 1 and given[-1] == given[-2]:
        given.pop()
    prompts = arcs.pad_prompts(given, count + 1)
    yield "prompts", prompts, entry["prompt"]
    lora = Path(entry["lora_local_path"])
    pfix, epoch = lora.parents[1].name, int(lora.parent.name.removeprefix("checkpoint-"))
    name = arcs.anchor_run_name(pfix, prompts, epoch, entry["seed"], entry["num_replacement"])
    yield "run_folder", str(folder / arcs.MULTIVIEWS / name), entry["save_path"]
    loras = [str(path) for path in arcs.lora_paths(lora.parents[2], pfix, epoch)]
    yield "lora_files", loras, [entry["lora_local_path"], entry["control_lora_local_path"]]
    real = golden.named(str(folder), folder)
    size = arcs.load_scene(real).edge_size if real else None
    yield "edge_size", size, (entry["width"], entry["height"])


def _ggi_layout(entry: dict) -> Iterator[tuple[str, object, object]]:
    """(quantity, found, wanted) of the recorded in-between calls."""
    folder, calls = Path(entry["target"]), entry["calls"]
    for call in calls[:1]:
        ckpt = Path(call["path_ckpt"])
        epoch = int(ckpt.parent.name.removeprefix("checkpoint-"))
        degradation = float(re.match(r"d([\d.]+)_", Path(call["output_path"]).name)[1])
        name = arcs.video_run_name(degradation, epoch, call["num_inference_steps"])
        yield "output_folder", str(folder / name), call["output_path"]
        yield "transformer", str(arcs.ggi_transformer_folder(ckpt.parents[1], epoch)), call["path_ckpt"]
        yield "edge_indices", arcs.edge_frame_indices(call["num_frames"]), call["cond_frame_source_index"]
    saved = [arcs.frame_path(folder, i).name for i in range(arcs.ARC_FRAMES * len(calls))]
    yield "saved_frames", (len(saved), saved[0], saved[-1]), (entry["n_saved"], entry["first"], entry["last"])


ITEMS: dict[str, Callable[[Golden, Path], Iterator[Check]]] = {
    "1": correspondence,
    "1b": correspondence,
    "2": schedules,
    "3": lambda golden, item: (Check(*row) for row in image_cases(golden, item)),
    "4": lambda golden, item: (Check(*row) for row in image_cases(golden, item)),
    "5": lambda golden, item: (Check(*row) for row in training_steps(golden, item)),
    "6": lambda golden, item: (Check(*row) for row in ggi_cases(item)),
    "7": noise_mixes,
    "8": inventories,
    "9": layout,
}


def checks(golden: Golden) -> Iterator[tuple[str, Check]]:
    """(item folder, check) for everything in the folder. An item that raises counts as failed."""
    for prefix, run in ITEMS.items():
        item = golden.item(prefix)
        if item is None:
            continue
        try:
            for check in run(golden, item):
                yield item.name, check
        except Exception:
            traceback.print_exc()
            yield item.name, Check("-", "raised", float("inf"), EXACT)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of golden vectors")
    parser.add_argument("--data", type=Path, help="folder that holds sampleA (default: FOLDER/../data)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise InputError(f"{args.folder} is not a folder")
    torch.set_num_threads(1)  # as recorded
    golden = Golden(args.folder, args.data or args.folder.absolute().parent / "data")
    verdicts = []
    for item, check in checks(golden):
        error = "-" if check.error is None else f"{check.error:.3g}"
        print(f"{item}/{check.case} {check.quantity} {error} {check.tolerance:g} {check.verdict}", flush=True)
        verdicts.append(check.verdict)
    if "FAIL" in verdicts:
        sys.exit(1)
    if "pass" not in verdicts:
        raise InputError(f"{args.folder} holds nothing to run")


if __name__ == "__main__":
    run_script(main)
