"""Wan VACE as stage 3: what it is given and what it denoises, against diffusers' own pipeline called by hand."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanVACEPipeline
from PIL import Image

from models.foreign import require_wan
from models.inbetween.stage import ArcInputs
from models.inbetween.stages import WanVaceStage
from models.loading.fit import require_fit
from models.runtime.runtime import plain_runtime
from models.settings import WanVaceSettings
from models.weights import WAN_STAGE, load_preset
from tests.support.wan import SCHEDULER, wan_folder, wan_paths
from utils.cli import InputError
from utils.edges import scribble
from utils.scene.carry import CarriedVideo

WIDTH, HEIGHT = SIZE = (48, 32)
PROMPT = "a town"
SETTINGS = WanVaceSettings(num_inference_steps=2, neg_prompt="fog")
GREY = 128


def make_stage(style: np.ndarray | None = None, **settings: object) -> WanVaceStage:
    runtime = plain_runtime(load_preset("full"), "wan_vace", "float32")
    stage = WanVaceStage(runtime, wan_paths(), [PROMPT], replace(SETTINGS, **settings), SIZE, style)
    stage.pipe.set_progress_bar_config(disable=True)
    return stage


@pytest.fixture(scope="module")
def shared() -> WanVaceStage:
    return make_stage()


@pytest.fixture(scope="module")
def arc() -> ArcInputs:
    rng = np.random.default_rng(0)
    start, end = rng.integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    control = np.zeros((46, HEIGHT, WIDTH, 3), np.uint8)
    for i, frame in enumerate(control):
        frame[:, 1 + i % 40 : 5 + i % 40] = 255
        frame[12:16] = 160
    noise = rng.standard_normal((13, HEIGHT // 8, WIDTH // 8, 16), dtype=np.float32)
    return ArcInputs(1, start, end, control, noise, PROMPT)


class GroupMasks(WanVACEPipeline):
    """The first latent frame is frame 0 alone, which is given."""

    def prepare_masks(self, *arguments, **options):
        masks = super().prepare_masks(*arguments, **options)
        masks[:, :, 0] = 0
        return masks


def by_hand(
    stage: WanVaceStage, video: list[np.ndarray], mask: list[int], cls: type = WanVACEPipeline, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """(conditions that the transformer was given, latents) of diffusers' own call."""
    own, settings = stage.pipe, stage.settings
    scheduler = UniPCMultistepScheduler(**SCHEDULER, flow_shift=3.0)
    pipe = cls(tokenizer=None, text_encoder=None, vae=own.vae, transformer=own.transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    given = []
    hook = own.transformer.register_forward_pre_hook(
        lambda _, __, inputs: given.append(inputs["control_hidden_states"]), with_kwargs=True
    )
    latents = pipe(
        video=[Image.fromarray(frame) for frame in video],
        mask=[Image.new("L", SIZE, value) for value in mask],
        height=HEIGHT,
        width=WIDTH,
        num_frames=49,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        conditioning_scale=settings.control_weight,
        prompt_embeds=stage.texts[PROMPT],
        negative_prompt_embeds=stage.texts["fog"],
        output_type="latent",
        **options,
    ).frames
    hook.remove()
    return given[0], latents


def video_of(arc: ArcInputs, draw: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    return [arc.start, *map(draw, arc.edges[1:45]), *[arc.end] * 4]


MASK = [0, *[255] * 44, *[0] * 4]


@pytest.mark.parametrize("latent_mask", ["nearest", "groups"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("control", ["edges", "depth"])
def test_same_as_the_pipeline_by_hand(
    shared: WanVaceStage, arc: ArcInputs, control: str, guidance: float, latent_mask: str
):
    stage = shared.with_settings(guidance_scale=guidance, latent_mask=latent_mask, control_weight=0.8)
    stage.control = control
    video = video_of(arc, scribble if control == "edges" else lambda frame: frame)
    cls = GroupMasks if latent_mask == "groups" else WanVACEPipeline
    conditions, latents = by_hand(stage, video, MASK, cls, latents=stage.start_noise(arc))
    assert (stage.conditions(arc) - conditions).abs().max() < 1e-5
    assert (stage.denoise(arc) - latents).abs().max() < 1e-5


MISTAKES = {
    "mask flipped": lambda arc: (video_of(arc, scribble), [255 - value for value in MASK]),
    "control not inverted": lambda arc: (video_of(arc, lambda frame: frame), MASK),
    "end frame left out": lambda arc: ([*video_of(arc, scribble)[:45], *[np.full_like(arc.end, GREY)] * 4], MASK),
    "end frame not given": lambda arc: (video_of(arc, scribble), [0, *[255] * 48]),
    "one copy of the end": lambda arc: (
        [*video_of(arc, scribble)[:45], arc.end, *[np.full_like(arc.end, GREY)] * 3],
        MASK,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_seen(shared: WanVaceStage, arc: ArcInputs, name: str):
    conditions, latents = by_hand(shared, *MISTAKES[name](arc), latents=shared.start_noise(arc))
    assert (shared.conditions(arc) - conditions).abs().max() > 1e-2
    assert (shared.denoise(arc) - latents).abs().max() > 1e-3


def test_what_each_mask_says(shared: WanVaceStage, arc: ArcInputs):
    """Of 13 latent frames: diffusers takes the first for free, although it is the start anchor."""
    said = {}
    for name in ("nearest", "groups"):
        cells = shared.with_settings(latent_mask=name).conditions(arc)[0, 32:]
        assert cells.shape == (64, 13, HEIGHT // 8, WIDTH // 8)
        assert (cells == cells[:1, :, :1, :1]).all()
        said[name] = cells[0, :, 0, 0].tolist()
    assert said == {"nearest": [1.0] * 12 + [0.0], "groups": [0.0] + [1.0] * 11 + [0.0]}


def test_style_reference_goes_before_the_frames(shared: WanVaceStage, arc: ArcInputs):
    style = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    stage = make_stage(style)
    noise = stage.start_noise(arc)
    assert torch.equal(noise[:, :, 1:], shared.start_noise(arc))
    options = {"reference_images": [Image.fromarray(style)], "latents": noise}
    conditions, latents = by_hand(stage, video_of(arc, scribble), MASK, **options)
    assert (stage.conditions(arc) - conditions).abs().max() < 1e-5
    found = stage.denoise(arc)
    assert found.shape[2] == 14 and (found - latents).abs().max() < 1e-5
    assert stage.decode(found).shape == (49, HEIGHT, WIDTH, 3)


def test_decoded_as_diffusers_does(shared: WanVaceStage, arc: ArcInputs):
    latents = torch.randn(1, 16, 13, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))
    config = shared.pipe.vae.config
    mean, deviation = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    video = shared.pipe.vae.decode(latents * deviation + mean).sample
    wanted = shared.pipe.video_processor.postprocess_video(video, output_type="pil")[0]
    assert np.array_equal(shared.decode(latents), np.stack([np.asarray(frame) for frame in wanted]))


def test_noise_is_fresh_unless_wanted(shared: WanVaceStage, arc: ArcInputs):
    fresh = shared.start_noise(replace(arc, noise=None))
    assert torch.equal(shared.start_noise(arc), fresh)
    warped = shared.with_settings(degradation=0.0).start_noise(arc)
    assert torch.equal(warped[0].permute(1, 2, 3, 0), torch.from_numpy(arc.noise))
    with pytest.raises(ValueError, match="degradation must be 1"):
        shared.with_settings(degradation=0.5).start_noise(replace(arc, noise=None))


def test_carried_anchors_replace_latents_where_they_are_seen(shared: WanVaceStage, arc: ArcInputs):
    rng = np.random.default_rng(2)
    frames = rng.integers(0, 256, (46, HEIGHT, WIDTH, 3), dtype=np.uint8)
    seen = np.zeros((46, HEIGHT, WIDTH), bool)
    seen[:, :, : WIDTH // 2] = True
    guided = replace(arc, carried=CarriedVideo(frames, seen, seen))
    stage = shared.with_settings(num_inference_steps=3, num_replacement=3)
    video = np.concatenate([frames, frames[-1:].repeat(3, axis=0)])
    wanted = stage.encode(video)
    found = stage.denoise(guided)
    left = WIDTH // 16
    assert torch.equal(found[..., :left], wanted[..., :left])
    assert (found[..., left:] - wanted[..., left:]).abs().max() > 0.1


def test_replaced_latents_are_those_that_the_next_step_goes_on_from(shared: WanVaceStage, arc: ArcInputs):
    """The scheduler's corrector would put what it makes of the latents before in their place."""
    frames = np.random.default_rng(2).integers(0, 256, (46, HEIGHT, WIDTH, 3), dtype=np.uint8)
    seen = np.ones((46, HEIGHT, WIDTH), bool)
    guided = replace(arc, carried=CarriedVideo(frames, seen, seen))
    stage = shared.with_settings(num_inference_steps=3, num_replacement=1, guidance_scale=1.0)
    samples, velocities = [], []

    def listen(_, __, inputs: dict, output: tuple) -> None:
        samples.append(inputs["hidden_states"])
        velocities.append(output[0])

    hook = stage.pipe.transformer.register_forward_hook(listen, with_kwargs=True)
    stage.denoise(guided)
    hook.remove()

    def two_steps(**options: object) -> torch.Tensor:
        scheduler = UniPCMultistepScheduler(**SCHEDULER, flow_shift=3.0, **options)
        scheduler.set_timesteps(3)
        for step in (0, 1):
            after = scheduler.step(velocities[step], scheduler.timesteps[step], samples[step]).prev_sample
        sigma = scheduler.sigmas[1]
        carried = stage.encode(np.concatenate([frames, frames[-1:].repeat(3, axis=0)]))
        assert (samples[1] - (1 - sigma) * carried - sigma * stage.start_noise(guided)).abs().max() < 1e-5
        return after

    assert (samples[2] - two_steps(disable_corrector=[0])).abs().max() < 1e-5
    assert (samples[2] - two_steps()).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("part", "entries", "words"),
    [
        ("vae", {"latents_std": [1.0] * 3}, "numbers in latents_std: 3; .* need 16"),
        ("vae", {"latents_mean": None}, "numbers in latents_mean: None"),
        ("vae", {"z_dim": 8}, "z_dim 8"),
    ],
)
def test_what_is_no_wan_vace_is_named(tmp_path: Path, part: str, entries: dict, words: str):
    require_fit(wan_paths())
    folder = shutil.copytree(wan_folder(), tmp_path / "wan")
    config = folder / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | entries))
    with pytest.raises(InputError, match=words):
        require_wan(dict.fromkeys(WAN_STAGE, folder))
