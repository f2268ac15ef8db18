"""Golden items 3 to 6: anchor views, LoRA, training steps and in-betweening, through the scripts' own functions.

Each generator yields (case, quantity, error, tolerance); error None means that the input is absent.
"""

import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from models.flux.alignment import Batch, FlowObjective, batch_flow_sample
from models.flux.anchors import Step, decode_anchor, encode_warped, sample_anchor, warp_anchor
from models.flux.lora import FluxModel, add_lora, check_lora, lora_rank, lora_state, set_lora
from models.flux.network import (
    FluxModels,
    Text,
    anchor_schedule,
    control_residuals,
    decode_latents,
    training_schedule,
    velocity,
)
from models.inbetween.pipeline import CogVideoXInbetweenPipeline, ConditionEps
from models.latents import draw_noise, pack, to_signed, token_positions, unpack
from models.loading.files import build, load_ggi_transformer, load_reference_file, read_weights
from models.runtime.optimizers import make_optimizer
from models.runtime.training import optimizer_step
from models.settings import AnchorSettings
from utils.correspondence import read_map
from utils.edges import resize_edges
from utils.images import read_image

LATENT = 1e-4  # absolute, float32
BYTES = 1e-3  # share of values that are off by more than one level
DRAWS = 6  # see `ulps`
MASK_DILATIONS = 12  # of the recorded cases
Row = tuple[str, str, float | None, float]


def load_lora(model: FluxModel, state: Mapping[str, torch.Tensor], weight: float = 1.0) -> list[torch.nn.Parameter]:
    """Add LoRA layers holding `state` (peft names) and return their parameters. weight: see `set_lora`."""
    parameters = add_lora(model, lora_rank(state))
    set_lora(model, state, weight)
    return parameters


def largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference; inf for another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    return (found.detach().double() - wanted.double()).abs().max().item()


def ulps(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference of normal draws, in units in the last place of a float32 near 4; inf for another shape.

    A draw is a radius of at most 5.8 times the sine or cosine of an angle of up to 2 pi, which processors round to one
    such unit or another: 5.25 were seen in 33 million draws.
    """
    return largest(found, wanted) / np.spacing(np.float32(4)).item()


def formula_image(height: int, width: int, a: int, b: int, c: int, off: int) -> np.ndarray:
    """The deterministic test image (a x + b y + c ch + off) mod 256, uint8 [H, W, 3]."""
    y, x, ch = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((a * x + b * y + c * ch + off) % 256).astype(np.uint8)


def off_by_more_than_one(found: np.ndarray, wanted: torch.Tensor) -> float:
    if found.shape != tuple(wanted.shape):
        return float("inf")
    return float((np.abs(found.astype(int) - wanted.numpy()) > 1).mean())


def guarded(case: str, rows: Callable[[], Iterable[tuple]]) -> Iterator[Row]:
    """Rows of one case under its name. A case that raises counts as failed, and the others still run."""
    try:
        for row in rows():
            yield case, *row
    except Exception:
        traceback.print_exc()
        yield case, "raised", float("inf"), 0.0


def metadata(path: Path) -> dict:
    with safe_open(path, "pt") as handle:
        return handle.metadata() or {}


def read_case(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of a case, as recorded, bit for bit.

    Pictures are stored as NAME_levels, uint8. What stands in other tensors is not stored twice: `joined` says of which
    rows it is made, {name: [[other, start, end], …]}.
    """
    tensors, meta = read_weights(path)
    for name, parts in meta.get("joined", {}).items():
        tensors[name] = torch.cat([tensors[other][start:end] for other, start, end in parts])
    for name in [name for name in tensors if name.endswith("_levels")]:
        tensors[name.removesuffix("_levels")] = (tensors.pop(name).float() - 127.5) / 127.5
    return tensors, meta


def load_models(golden, lora: bool, lora_weight: float = 1.0) -> FluxModels | None:
    """The networks of item 3, identified by their metadata; with the LoRAs of item 4 if requested."""
    folder, lora_folder = golden.item("3"), golden.item("4")
    if folder is None or (lora and lora_folder is None):
        return None
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        keys = metadata(path).keys()
        if "ae_params" in keys:
            found["autoencoder"] = path
        elif "flux_params" in keys:
            found["controlnet" if "controlnet_depth" in keys else "flux"] = path
    if len(found) < 3:
        return None
    models = FluxModels(*(load_reference_file(kind, found[kind]) for kind in ("flux", "controlnet", "autoencoder")))
    if lora:
        for model, name in ((models.transformer, "lora"), (models.controlnet, "controlnet.lora")):
            load_lora(model, check_lora(lora_folder / f"{name}.safetensors", model.config), lora_weight)
    return models


# --- items 3 and 4: anchor views ---


def image_cases(golden, item: Path) -> Iterator[Row]:
    for path in sorted(item.glob("*.safetensors")):
        if "num_steps" not in metadata(path):
            continue  # weights
        tensors, meta = read_case(path)
        models = load_models(golden, bool(meta["lora"]), meta.get("lora_weight", 1.0))
        if models is None:
            yield path.stem, "image", None, LATENT
            continue
        yield from guarded(path.stem, lambda: _image(golden, path, models, tensors, meta))  # noqa: B023


def _image(golden, path: Path, models: FluxModels, wanted: dict, meta: dict) -> Iterator[tuple]:
    height, width = wanted["controlnet_cond"].shape[-2:]
    grid = wanted["noise"].shape[-2:]
    yield "noise", ulps(draw_noise(wanted["noise"].shape, meta["seed"]), wanted["noise"]), DRAWS
    yield "timesteps", largest(anchor_schedule(meta["num_steps"], width, height), wanted["timesteps"]), 1e-6
    yield "img_ids", largest(token_positions(*grid, torch.device("cpu"))[None], wanted["img_ids"]), 0.0
    edges = golden.named(meta["hed"], path.parent)
    control = to_signed(resize_edges(read_image(edges), width, height))[None] if edges else None
    yield "controlnet_cond", None if control is None else largest(control, wanted["controlnet_cond"]), LATENT

    replacement = None
    if meta["warped"]:
        yield from _warped(golden, path, wanted, meta)
        mask = wanted["mask_full_u8"].numpy() // 255
        replacement = encode_warped(models, wanted["warped_u8"].numpy(), mask, wanted["ae_eps"])
        moments = models.vae.encode(to_signed(wanted["warped_u8"].numpy())[None]).latent_dist.parameters
        yield "ae_moments", largest(moments, wanted["ae_moments"]), LATENT
        yield "x_1", largest(replacement.latents, wanted["x_1"]), LATENT
        yield "mask", largest(replacement.mask, wanted["mask"]), 0.0

    positive, negative = Text(wanted["txt"], wanted["vec"]), Text(wanted["neg_txt"], wanted["neg_vec"])
    first, _ = control_residuals(
        models, pack(wanted["noise"]), wanted["timesteps"][0], positive, wanted["controlnet_cond"], meta["guidance"]
    )
    yield (
        "controlnet_residuals",
        largest(torch.cat(first)[: len(wanted["cn_res_step0_pos"])], wanted["cn_res_step0_pos"]),
        LATENT,
    )

    names = ("num_steps", "guidance", "true_gs", "timestep_to_start_cfg", "control_weight", "num_replacement")
    settings = AnchorSettings(**{name: meta[name] for name in names})
    steps: list[Step] = []
    latents = sample_anchor(
        models,
        wanted["noise"],
        wanted["controlnet_cond"],
        positive,
        negative,
        settings,
        replacement,
        on_step=steps.append,
    )
    for quantity, found in _traces(steps, settings).items():
        if quantity in wanted:
            yield quantity, largest(found, wanted[quantity]), LATENT
    yield "latent", largest(latents, wanted["latent"]), LATENT
    if "decoded" in wanted:
        yield "decoded", largest(decode_latents(models, latents), wanted["decoded"]), LATENT
    yield "image_u8", off_by_more_than_one(decode_anchor(models, latents), wanted["image_u8"]), BYTES


def _warped(golden, path: Path, wanted: dict, meta: dict) -> Iterator[tuple]:
    """The previous image of the chain, warped along the recorded map."""
    scenario = path.stem.rsplit(".image", 1)[0]
    before = path.with_name(f"{scenario}.image{meta['image_index'] - 1:02d}.safetensors")
    code = golden.named(meta["corres"], path.parent)
    if code is None or not before.exists():
        yield "warped_u8", None, 0.0
        return
    image, mask = warp_anchor(load_file(before)["image_u8"].numpy(), read_map(code), MASK_DILATIONS)
    yield "warped_u8", largest(torch.from_numpy(image), wanted["warped_u8"]), 0.0
    yield "mask_full_u8", largest(torch.from_numpy(255 * mask), wanted["mask_full_u8"]), 0.0


def _traces(steps: list[Step], settings: AnchorSettings) -> dict[str, torch.Tensor]:
    """Per-step tensors as recorded: [N, L, 64]. Where the negative pass was skipped it equals the positive one."""

    def negative(step: Step) -> torch.Tensor:
        if step.index < settings.timestep_to_start_cfg:
            return torch.zeros_like(step.positive)
        return step.positive if step.negative is None else step.negative

    return {
        "step_in": torch.cat([step.tokens_in for step in steps]),
        "pred_pos": torch.cat([step.positive for step in steps]),
        "pred_neg": torch.cat([negative(step) for step in steps]),
        "step_out": torch.cat([step.tokens_out for step in steps]),
    }


# --- item 5: training ---


def training_steps(golden, item: Path) -> Iterator[Row]:
    steps = sorted((read_case(path) for path in item.glob("*.safetensors")), key=lambda step: step[1]["step"])
    models = load_models(golden, lora=True)
    if models is None or not steps or steps[0][1]["step"] != 0:
        yield "-", "training", None, 1e-5
        return
    first = steps[0][1]
    named = {"dit": _lora_parameters(models.transformer), "controlnet": _lora_parameters(models.controlnet)}
    groups = {name: list(parameters.values()) for name, parameters in named.items()}
    options = first["lr"], tuple(first["betas"]), first["weight_decay"]
    optimizer = make_optimizer(groups["dit"] + groups["controlnet"], *options)
    yield "-", "eps", abs(optimizer.defaults["eps"] - first["eps"]), 0
    for wanted, meta in steps:
        case = f"step{meta['step']}"
        yield from ((case, *row) for row in _forward(models, wanted, meta))
        yield from ((case, *row) for row in _gradients(named, wanted, meta))
        clipped = optimizer_step(optimizer, [groups["dit"]], meta["max_grad_norm_dit_only"])[0]
        yield case, "clip_returned", abs(clipped / meta["clip_returned"] - 1), 1e-5
        after = {f"after.dit.{k}": v for k, v in lora_state(models.transformer).items()}
        after |= {f"after.controlnet.{k}": v for k, v in lora_state(models.controlnet).items()}
        stored = [key for key in wanted if key.startswith("after.")]
        if stored:
            off = torch.cat([((after[key] - wanted[key]).abs() > 1e-6).flatten() for key in stored])
            yield case, "lora_after_step", off.float().mean().item(), 1e-3  # share of elements off by more than 1e-6


def _lora_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """LoRA parameters in the order and under the names of `lora_state`."""
    by_storage = {p.data_ptr(): p for name, p in model.named_parameters() if ".lora_" in name}
    return {key: by_storage[tensor.data_ptr()] for key, tensor in lora_state(model).items()}


def _forward(models: FluxModels, wanted: dict, meta: dict) -> Iterator[tuple]:
    """Compare the loss and everything before it, and compute gradients."""
    t = training_schedule()[meta["t_index"]][None]
    noise = unpack(wanted["x_0"], *wanted["ae_eps"].shape[-2:])
    batch = Batch(wanted["image_in"], wanted["controlnet_cond"], noise, wanted["ae_eps"], t, "")
    sample, text = batch_flow_sample(models, batch), Text(wanted["txt"], wanted["vec"])
    yield "t", largest(t, wanted["t"]), 1e-6
    yield "x_t", largest(sample.tokens, wanted["x_t"]), LATENT
    yield "target", largest(sample.target, wanted["target"]), LATENT
    with torch.no_grad():
        residuals, _ = control_residuals(models, sample.tokens, t, text, batch.control, meta["guidance"])
        prediction = velocity(models, sample.tokens, t, text, batch.control, guidance=meta["guidance"])
    for i, residual in enumerate(residuals):
        if f"cn_res_{i}" in wanted:
            yield f"cn_res_{i}", largest(residual, wanted[f"cn_res_{i}"]), LATENT
    yield "model_pred", largest(prediction, wanted["model_pred"]), LATENT
    loss = FlowObjective(models)(sample, text, batch.control)["loss"]
    loss.backward()
    yield "loss", abs(loss.item() / meta["loss"] - 1), 1e-5


def _gradients(named: dict[str, dict], wanted: dict, meta: dict) -> Iterator[tuple]:
    norm = lambda ps: torch.nn.utils.get_total_norm([p.grad for p in ps.values() if p.grad is not None]).item()  # noqa: E731
    recorded = {"dit": meta["grad_norm_dit_before_clip"], "controlnet": meta["grad_norm_controlnet"]}
    for name, value in recorded.items():
        yield f"grad_norm_{name}", abs(norm(named[name]) / value - 1), 1e-5
    without = sorted(key for key, p in named["controlnet"].items() if p.grad is None)
    yield "no_gradient", float(without != sorted(meta["controlnet_lora_without_gradient"])), 0.0
    errors = [
        largest(p.grad, wanted[f"grad.{name}.{key}"]) / wanted[f"grad.{name}.{key}"].abs().max().item()
        for name, parameters in named.items()
        for key, p in parameters.items()
        if f"grad.{name}.{key}" in wanted and p.grad is not None
    ]
    if errors:
        yield "gradients", max(errors), 1e-4  # relative to each tensor's maximum


# --- item 6: in-betweening ---


def ggi_cases(item: Path) -> Iterator[Row]:
    for folder in sorted(path.parent for path in item.glob("*/case.safetensors")):
        wanted, meta = load_file(folder / "case.safetensors"), json.loads((folder / "case.json").read_text())
        yield from guarded(folder.name, lambda: _ggi(_pipeline(folder, meta), wanted, meta))  # noqa: B023


def _pipeline(folder: Path, meta: dict) -> CogVideoXInbetweenPipeline:
    weights = next(
        path for path in (folder / "vae_shared.safetensors", folder.parent / "vae_shared.safetensors") if path.exists()
    )
    vae = build(AutoencoderKLCogVideoX, json.loads((folder / "vae_config.json").read_text()), load_file(weights))
    if meta["use_slicing"]:
        vae.enable_slicing()
    if meta["use_tiling"]:
        vae.enable_tiling()
    scheduler = CogVideoXDDIMScheduler.from_config(json.loads((folder / "scheduler_config.json").read_text()))
    transformer = load_ggi_transformer(folder / "transformer", torch.float32)
    pipeline = CogVideoXInbetweenPipeline(None, None, vae, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _ggi(pipe: CogVideoXInbetweenPipeline, wanted: dict, meta: dict) -> Iterator[tuple]:
    h, w = meta["h"], meta["w"]
    frames, shape = meta["frames"], wanted["noise"].shape
    edges = [formula_image(h, w, 2 + f % 5, 3, 31, 11 * f) for f in range(frames - 3)]
    if "cond_images_u8" in wanted:
        edges = list(wanted["cond_images_u8"].numpy())
    video = to_signed(np.stack(edges + edges[-1:] * 3))[None]
    start, end = (to_signed(formula_image(h, w, *meta[key]))[None] for key in ("img_start", "img_end"))

    drawn = ConditionEps.draw(shape[1], shape[3], shape[4], meta["seed"], arc=0)
    yield "start_eps", ulps(drawn.start, wanted["start_eps"]), DRAWS
    yield "end_eps", ulps(drawn.end, wanted["end_eps"]), DRAWS
    with torch.no_grad():
        for name, pixels in (("cond", video), ("start", start[:, None]), ("end", end[:, None])):
            moments = pipe.vae.encode(pixels.movedim(1, 2)).latent_dist.parameters
            yield f"{name}_moments", largest(moments, wanted[f"{name}_moments"]), LATENT
    eps = ConditionEps(wanted["start_eps"], wanted["end_eps"], wanted["cond_eps"])
    conditions = pipe.encode_conditions(start, end, video, eps, wanted.get("mask_last"))
    yield "image_latents", largest(conditions[:, :, :16], wanted["image_latents"]), LATENT
    yield "cond_latents", largest(conditions[:, :, 16:], wanted["cond_latents"]), LATENT
    cos, sin = pipe._prepare_rotary_positional_embeddings(h, w, shape[1], torch.device("cpu"))
    yield "rope", max(largest(cos, wanted["rope_cos"]), largest(sin, wanted["rope_sin"])), LATENT

    steps, predictions = [], []
    hook = pipe.transformer.register_forward_hook(lambda module, inputs, output: predictions.append(output[0]))
    latents = pipe(
        conditions,
        wanted["noise"],
        wanted["prompt_embeds"],
        wanted["negative_prompt_embeds"],
        num_inference_steps=meta["steps"],
        guidance_scale=meta["gs"],
        on_step=lambda pipe, i, t, tensors: steps.append(tensors["latents"]) or {},
    )
    hook.remove()
    yield "timesteps", largest(pipe.scheduler.timesteps, wanted["timesteps"]), 0.0
    if "noise_pred_uncond_cond" in wanted:
        found = torch.stack(predictions)  # one branch where the second was skipped, because prompts are equal
        recorded = wanted["noise_pred_uncond_cond"]
        yield "noise_pred", largest(found.expand_as(recorded) if found.shape[1] == 1 else found, recorded), LATENT
    yield "step_latents", largest(torch.cat(steps), wanted["step_latents"]), LATENT
    yield "final_latents", largest(latents, wanted["final_latents"]), LATENT
    with torch.no_grad():
        decoded = pipe.decode_latents(latents)[:, :, meta["decoded_video_frame_indices"]]
    yield "decoded_video", largest(decoded, wanted["decoded_video_frames"]), LATENT
    yield "frames_u8", off_by_more_than_one(pipe.decode_video(latents), wanted["frames_u8"]), BYTES
