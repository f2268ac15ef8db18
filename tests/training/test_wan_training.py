"""A LoRA on Wan VACE: what is trained and on what, killed runs, and the file in diffusers and in ggi.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanVACEPipeline, WanVACETransformer3DModel
from safetensors.torch import load_file

from models.inbetween.clip_cache import ClipCache
from models.inbetween.stage import ArcInputs
from models.inbetween.stages import WanVaceStage
from models.inbetween.wan_loading import merge_lora
from models.inbetween.wan_training import WanClipEncoder, WanTraining, draw_item, lora_parameters, open_wan_cache
from models.runtime.runtime import plain_runtime
from models.settings import TrainSettings, WanTrainSettings
from models.weights import load_preset
from tests.models.foreign.test_wan_vace import SETTINGS, SIZE
from tests.support.clips import TRAIN, arguments, moving
from tests.support.helpers import GGI, assert_same, call, contents, kill_at
from tests.support.scenes import make_scene
from tests.support.small import HEIGHT, LATENT_SIZE, WIDTH
from tests.support.wan import wan_folder, wan_paths, wan_pipeline
from utils.data.clips import Clip
from utils.images import read_image, write_image

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
BLOCKS = [f"blocks.{i}" for i in range(3)] + [f"vace_blocks.{i}" for i in range(2)]
LAYERS = {f"{block}.attn{k}.{name}" for block in BLOCKS for k in (1, 2) for name in TARGETS}
LAYERS |= {f"{block}.ffn.net.{name}" for block in BLOCKS for name in ("0.proj", "2")}


def quick(dataset: Path, folder: Path, steps: int, *more: object) -> tuple:
    networks = ("--backbone", "wan_vace", "--weights", "full", "--wan", wan_folder(), "--edges", "lines")
    small = ("--width", WIDTH, "--height", HEIGHT, "--lora_rank", 4, "--dtype", "float32", "--mixed_precision", "no")
    given = arguments(dataset, folder, steps)
    return (*given, *networks, *small, "--report_to", "none", *more)


class OneClip:
    """A source of one clip."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        frames = np.array(moving(46, WIDTH, HEIGHT, seed=0))
        edges = np.repeat(rng.integers(0, 2, (46, HEIGHT, WIDTH, 1), dtype=np.uint8) * 255, 3, axis=-1)
        noise = rng.standard_normal((13, *LATENT_SIZE[::-1], 16), dtype=np.float32)
        self.clip = Clip(frames, edges, noise, "a wall")

    def __len__(self) -> int:
        return 1

    def name(self, i: int) -> str:
        return "one"

    def identity(self) -> dict:
        return {}

    def load(self, i: int) -> Clip:
        return self.clip


@pytest.fixture(scope="module")
def stage() -> WanVaceStage:
    runtime = plain_runtime(load_preset("full", "wan_vace"), "wan_vace", "float32")
    return WanVaceStage(runtime, wan_paths(), ["a wall", ""], SETTINGS, SIZE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, stage: WanVaceStage) -> ClipCache:
    source = OneClip()
    weights = {"wan_text": {}, "wan_vae": {}}
    made = open_wan_cache(tmp_path_factory.mktemp("cache"), source, weights, SIZE, "float32")
    made.add_clips([0], WanClipEncoder(stage.pipe.vae, stage.pipe.transformer.config, SIZE).encode, quiet=True)
    made.add_texts({text: stage.texts[text] for text in made.missing_texts()})
    return made


@pytest.fixture
def training(cache: ClipCache) -> WanTraining:
    runtime = plain_runtime(load_preset("full", "wan_vace"), "training", "float32")
    return WanTraining(runtime, wan_paths(), cache, TrainSettings(), WanTrainSettings(lora_rank=4))


def test_clips_are_encoded_as_an_arc_is(cache: ClipCache, stage: WanVaceStage):
    clip, stored = cache.source.clip, cache.clip(0)
    arc = ArcInputs(0, clip.frames[0], clip.frames[-1], clip.edges, clip.noise, "a wall")
    assert (stored["conditions"] - stage.conditions(arc)[0]).abs().max() < 5e-3  # float16
    video = np.concatenate([clip.frames, clip.frames[-1:].repeat(3, axis=0)])
    assert (stored["video"] - stage.encode(video)[0]).abs().max() < 5e-3


def test_examples_depend_on_their_seed_alone(cache: ClipCache):
    first, again, other = (draw_item(cache, (0, step, 0), 0.0) for step in (1, 1, 2))
    assert first.keys() == {"latents", "noise", "conditions", "text", "sigma"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["noise"].shape == first["latents"].shape == (16, 13, *LATENT_SIZE[::-1])
    assert first["noise"].std() == pytest.approx(1, abs=0.1)
    assert not torch.equal(first["noise"], other["noise"]) and first["sigma"] != other["sigma"]
    assert torch.equal(draw_item(cache, (0, 1, 0), 1.0)["text"], cache.text(""))
    levels = torch.stack([draw_item(cache, (0, 0, i), 0.0)["sigma"] for i in range(200)])
    assert levels.mean() == pytest.approx(0.676, abs=0.05)  # of 3u / (1 + 2u): more noise than half


def test_loss_is_that_of_flow_matching(training: WanTraining):
    batch = training.draw_batch((0, 0), [0])
    sigma = batch["sigma"]
    noisy = (1 - sigma) * batch["latents"] + sigma * batch["noise"]
    with torch.no_grad():
        velocity = wan_pipeline().transformer(
            hidden_states=noisy,
            timestep=1000 * sigma,
            encoder_hidden_states=batch["text"],
            control_hidden_states=batch["conditions"],
        )[0]
        found = training.objective(**batch)["loss"]  # a new LoRA changes nothing
    assert found == pytest.approx((velocity - batch["noise"] + batch["latents"]).square().mean().item(), rel=1e-5)


def test_two_steps_change_every_layer_and_nothing_else(training: WanTraining):
    found = {name.rpartition(".lora_")[0] for name in lora_parameters(training.transformer)}
    assert found == LAYERS
    before = {name: tensor.clone() for name, tensor in training.transformer.state_dict().items()}
    parameters = [p for p in training.objective.parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(LAYERS)
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    for step in range(2):
        training.objective(**training.draw_batch((0, step), [0]))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = training.transformer.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if ".lora_" in name}


@pytest.mark.slow
def test_loss_falls_on_one_clip(training: WanTraining):
    batch = training.draw_batch((0, 0), range(2))
    optimizer = torch.optim.AdamW([p for p in training.objective.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(25):
        loss = training.objective(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    assert call(TRAIN, *quick(dataset, folder, 4)) == 0
    return folder / "run"


@pytest.mark.slow
def test_killed_and_continued_to_the_same_lora(tmp_path: Path, dataset: Path, trained: Path):
    kill_at(tmp_path / "run" / "checkpoint-2", TRAIN, *quick(dataset, tmp_path, 4))
    assert call(TRAIN, *quick(dataset, tmp_path, 4)) == 0
    assert_same(contents(tmp_path / "run", "/state/"), contents(trained, "/state/"))
    early, late = (load_file(trained / f"checkpoint-{step}" / "lora.safetensors") for step in (2, 4))
    assert early.keys() == late.keys() and any(not torch.equal(early[name], late[name]) for name in late)


@pytest.mark.slow
def test_the_file_loads_in_diffusers_and_is_merged_as_trained(trained: Path, cache: ClipCache):
    path = trained / "checkpoint-4" / "lora.safetensors"
    loaded, merged, plain = wan_pipeline(), wan_pipeline(), wan_pipeline()
    WanVACEPipeline.load_lora_weights(loaded, path.parent, weight_name=path.name)
    merge_lora(merged, path)
    names = {name for name, _ in merged.transformer.named_parameters()}
    assert names == {name for name, _ in plain.transformer.named_parameters()}

    def pass_of(transformer: WanVACETransformer3DModel) -> torch.Tensor:
        item = draw_item(cache, (0, 0, 0), 0.0)
        with torch.no_grad():
            return transformer(
                hidden_states=item["noise"][None],
                timestep=torch.tensor([500.0]),
                encoder_hidden_states=item["text"][None],
                control_hidden_states=item["conditions"][None],
            )[0]

    by_diffusers, by_us, without = (pass_of(pipe.transformer) for pipe in (loaded, merged, plain))
    assert (by_diffusers - by_us).abs().max() < 1e-4 < 1e-2 < (by_us - without).abs().max()


@pytest.mark.slow
def test_ggi_takes_the_lora(tmp_path: Path, trained: Path):
    target = make_scene(tmp_path / "scene", 1, edge_size=(72, 48)) / "multiviews" / "run"
    for k in (0, 1):
        write_image(target / f"image_{k:02d}.png", moving(1, 72, 48, seed=k)[0])
    command = ("--backbone", "wan_vace", "--target", target, "--weights", "full", "--wan", wan_folder(), "--dtype")
    command += ("float32", "--width", WIDTH, "--height", HEIGHT, "--num_inference_steps", 2, "--prompt", "")
    lora = trained / "checkpoint-4" / "lora.safetensors"
    for name, flags in {"without": (), "with": ("--lora", lora)}.items():
        assert call(GGI, *command, "--output_dir", tmp_path / name, *flags) == 0
    frames = [read_image(next((tmp_path / name).glob("*/0020.png"))).astype(int) for name in ("without", "with")]
    assert np.abs(frames[0] - frames[1]).mean() > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        (("--width", 50), "multiples of 16"),
        (("--from_scratch",), "unrecognized arguments: --from_scratch"),
        (("--lora", "x.safetensors"), "--lora"),
        (("--weights", "tiny"), "--weights tiny has no Wan VACE"),
        (("--lora_rank", 0), "not a positive whole number"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, dataset: Path, flags: tuple, telling: str, capsys: pytest.CaptureFixture):
    assert call(TRAIN, *quick(dataset, tmp_path, 2, *flags)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and telling in error
    assert not (tmp_path / "run").exists()
