"""Training of the in-between transformer: clips from folders, the cache, the objective, and what is saved."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from models.inbetween.clip_cache import END_DRAWS, ClipCache, ClipEncoder
from models.inbetween.frozen_lora import add_frozen_lora, read_frozen_lora
from models.inbetween.pipeline import CogVideoXInbetweenPipeline
from models.inbetween.training import (
    InbetweenObjective,
    draw_batch,
    load_start,
    mix_channels,
    new_transformer,
    rotary_positions,
    save_transformer,
)
from models.loading.files import load_ggi_transformer
from models.loading.networks import load_model
from models.weights import Preset
from tests.support.clips import CAPTIONS, WEIGHTS, moving, write_lora
from tests.support.small import LATENT_SIZE, small_preset
from tests.support.small import SIZE as SMALL
from utils.cli import InputError
from utils.data.clips import FolderClips, crop_to_aspect, find_clips, read_captions
from utils.data.flow import dis_flow, flow_correspondence
from utils.files import read_json
from utils.images import read_image, write_image

SIZE = (144, 96)  # of the clips whose noise is tested
LATENT_SHAPE = (13, 16, *LATENT_SIZE[::-1])


@pytest.fixture(scope="module")
def preset() -> Preset:
    return small_preset()


@pytest.fixture(scope="module")
def scheduler(preset: Preset) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler.from_pretrained(preset.cogvideox, subfolder="scheduler")


@pytest.fixture
def transformer(preset: Preset) -> CogVideoXTransformer3DModel:
    """Other random weights of the small architecture."""
    return new_transformer(read_json(Path(preset.ggi_transformer) / "config.json"), seed=0)


def random_batch(transformer: CogVideoXTransformer3DModel, timesteps: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config, count = transformer.config, len(timesteps)
    frames, channels, h, w = LATENT_SHAPE
    return {
        "latents": torch.randn(count, *LATENT_SHAPE),
        "noise": torch.randn(count, *LATENT_SHAPE),
        "conditions": torch.randn(count, frames, 2 * channels, h, w),
        "text": torch.randn(count, config.max_text_seq_length, config.text_embed_dim),
        "timesteps": torch.tensor(timesteps),
    }


# The objective


def test_weighted_x0_loss_is_the_error_of_v(transformer, scheduler):
    objective = InbetweenObjective(transformer, scheduler)
    batch = random_batch(transformer, [0, 400, 999])
    with torch.no_grad():
        values = objective(**batch)
        noisy = scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        rotary = rotary_positions(transformer.config, *LATENT_SHAPE[2:], LATENT_SHAPE[0])
        predicted = transformer(
            torch.cat([noisy, batch["conditions"]], dim=2), batch["text"], batch["timesteps"], image_rotary_emb=rotary
        ).sample
    velocity = scheduler.get_velocity(batch["latents"], batch["noise"], batch["timesteps"])
    assert values["loss"].item() == pytest.approx((predicted - velocity).square().mean().item(), rel=1e-3)
    assert values["x0_error"] > 0


def test_the_right_velocity_has_no_loss(transformer, scheduler):
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    batch = random_batch(transformer, [300, 700])
    signal = scheduler.alphas_cumprod.float()[batch["timesteps"]].view(-1, 1, 1, 1, 1)
    batch["noise"] = ((1 - signal) / signal).sqrt() * batch["latents"]  # v = sqrt(ᾱ) noise - sqrt(1 - ᾱ) x0 = 0
    assert InbetweenObjective(transformer, scheduler)(**batch)["loss"] < 1e-9


def test_rotary_positions_are_the_pipelines(transformer, scheduler, preset):
    vae = load_model("cogvideox_vae", AutoencoderKLCogVideoX, Path(preset.cogvideox), torch.float32)
    pipe = CogVideoXInbetweenPipeline(None, None, vae, transformer, scheduler)
    wanted = pipe._prepare_rotary_positional_embeddings(SMALL[1], SMALL[0], 13, torch.device("cpu"))
    found = rotary_positions(transformer.config, *LATENT_SHAPE[2:], LATENT_SHAPE[0])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Start weights, LoRA, what is saved


def test_edges_change_nothing_when_32_channels_become_48(transformer, tmp_path):
    narrow = CogVideoXTransformer3DModel.from_config({**transformer.config, "in_channels": 32})
    narrow.save_pretrained(tmp_path)
    wide = load_start(tmp_path)
    batch = random_batch(wide, [10, 900])
    rotary = rotary_positions(wide.config, *LATENT_SHAPE[2:], LATENT_SHAPE[0])
    latents = torch.cat([batch["noise"], batch["conditions"]], dim=2)
    with torch.no_grad():
        found = wide(latents, batch["text"], batch["timesteps"], image_rotary_emb=rotary).sample
        wanted = narrow(latents[:, :, :32], batch["text"], batch["timesteps"], image_rotary_emb=rotary).sample
    assert wide.config.in_channels == 48 and all(p.requires_grad for p in wide.parameters())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    (found := wide.patch_embed(batch["text"], latents).sum()).backward()
    assert wide.patch_embed.proj.weight.grad[:, 32:].abs().sum() > 0  # they learn nevertheless


def test_48_channels_stay_as_they_are(preset):
    folder = Path(preset.ggi_transformer)
    stored, found = load_file(folder / WEIGHTS), load_start(folder).state_dict()
    assert stored.keys() == found.keys()
    assert all(torch.equal(stored[key].float(), found[key]) for key in stored)


def test_a_frozen_lora_is_merged_into_what_is_saved(transformer, scheduler, tmp_path):
    alpha = {"transformer.transformer_blocks.0.attn1.to_q.alpha": torch.tensor(6.0)}
    lora = write_lora(tmp_path / "lora.safetensors", transformer, **alpha)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    add_frozen_lora(transformer, read_frozen_lora(lora, transformer.config), torch.float32)
    frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 4 and all(".lora_" in name for name in frozen)

    save_transformer(transformer, tmp_path / "saved", torch.float32)
    merged = load_ggi_transformer(tmp_path / "saved", torch.float32)
    factors = load_file(lora)
    for name, scale in (("to_q", 2.0), ("to_out.0", 1.0)):
        key = f"transformer_blocks.0.attn1.{name}"
        down, up = (factors[f"transformer.{key}.lora_{factor}.weight"] for factor in "AB")
        update = merged.state_dict()[f"{key}.weight"] - before[f"{key}.weight"]
        torch.testing.assert_close(update, scale * up @ down, atol=1e-4, rtol=1e-4)
    batch = random_batch(transformer, [500])
    with torch.no_grad():
        losses = [InbetweenObjective(model, scheduler)(**batch)["loss"] for model in (transformer, merged)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)


def test_gradients_reach_everything_but_the_lora(transformer, scheduler, tmp_path):
    lora = write_lora(tmp_path / "lora.safetensors", transformer)
    add_frozen_lora(transformer, read_frozen_lora(lora, transformer.config), torch.float32)
    InbetweenObjective(transformer, scheduler)(**random_batch(transformer, [500]))["loss"].backward()
    assert {name for name, p in transformer.named_parameters() if p.grad is None} == {
        name for name, _ in transformer.named_parameters() if ".lora_" in name
    }


@pytest.mark.parametrize("where", ["header", "beside", "nowhere"])
def test_alpha_of_a_whole_lora(transformer, tmp_path, where, capsys):
    """As diffusers writes it into the header, and peft into a file beside; patterns of modules override the rest."""
    path = write_lora(tmp_path / "adapter_model.safetensors", transformer)
    plain = load_file(path)
    rank = plain["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"].shape[0]
    adapter = {"r": rank, "lora_alpha": 2 * rank, "alpha_pattern": {"attn1.to_q": 5 * rank}}
    if where == "header":
        header = {f"transformer.{key}": value for key, value in adapter.items()}
        save_file(plain, path, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    elif where == "beside":
        path.with_name("adapter_config.json").write_text(json.dumps(adapter))
    found = read_frozen_lora(path, transformer.config)
    for name, scale in (("to_q", 5), ("to_out.0", 2)):
        key = f"transformer_blocks.0.attn1.{name}.lora_B.weight"
        wanted = plain[f"transformer.{key}"] * (1 if where == "nowhere" else scale)
        torch.testing.assert_close(found[key], wanted)
    assert ("says no alpha" in capsys.readouterr().err) == (where == "nowhere")


def test_what_diffusers_writes_is_read_with_its_scale(transformer, tmp_path):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    transformer.add_adapter(config)
    transformer.save_lora_adapter(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    found, plain = read_frozen_lora(path, transformer.config), load_file(path)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, plain[key] * (3 if "lora_B" in key else 1))


@pytest.mark.parametrize("damage", [{"lora_alpha": "x"}, {"lora_alpha": 1, "alpha_pattern": [1]}, [1]])
def test_a_damaged_header_is_refused(transformer, tmp_path, damage):
    path = write_lora(tmp_path / "lora.safetensors", transformer)
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(damage)})
    with pytest.raises(InputError, match=r"--lora .* damaged"):
        read_frozen_lora(path, transformer.config)


@pytest.mark.parametrize("wrong", ["name", "shape", "half", "unknown", "empty"])
def test_a_lora_that_does_not_fit_is_refused(transformer, tmp_path, wrong):
    path = write_lora(tmp_path / "lora.safetensors", transformer)
    state = load_file(path)
    key = next(iter(sorted(state)))
    if wrong == "name":
        state = {name.replace("blocks.0", "blocks.99"): value for name, value in state.items()}
    elif wrong == "shape":
        state[key] = state[key][:, :-1].contiguous()
    elif wrong == "half":
        del state[key]
    elif wrong == "unknown":
        state["transformer.something"] = torch.zeros(1)
    else:
        state = {}
    save_file(state, path)
    with pytest.raises(InputError, match="--lora"):
        read_frozen_lora(path, transformer.config)


# Noise


def test_mixed_channels_are_white_and_move_as_before():
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((13, 16, 24, 36))).float()
    noise[1:] = 0.8 * noise[:1] + 0.6 * noise[1:]  # every frame resembles the first
    draws = torch.stack([mix_channels(noise, rng) for _ in range(60)])
    flat = draws.movedim(2, 0).flatten(1)
    torch.testing.assert_close(torch.cov(flat), torch.eye(16), atol=0.02, rtol=0)
    together, wanted = (draws[:, 0] * draws[:, 5]).mean(), (noise[0] * noise[5]).mean()
    assert together.item() == pytest.approx(wanted.item(), abs=1e-5)  # rotations keep scalar products
    neighbours = (draws[..., 1:] * draws[..., :-1]).mean()
    assert abs(neighbours) < 0.01
    with_itself = (draws * noise).mean(dim=(1, 2, 3, 4))
    assert abs(with_itself.mean()) < 0.03 and with_itself.std().item() == pytest.approx(1 / 16, rel=0.3)


def test_noise_follows_the_picture(dataset):
    source = FolderClips(dataset, SIZE)
    noise = source.load(0).noise  # the clip b, uncropped in width: 1.6 px a frame, so 3 cells in 15 frames
    assert noise.shape == (13, SIZE[1] // 8, SIZE[0] // 8, 16) and noise.dtype == np.float32
    share = (noise[4][:, :-3] * noise[0][:, 3:]).mean()
    assert share > 0.7
    assert abs((noise[4] * noise[0]).mean()) < 0.1
    assert noise[4].std() == pytest.approx(1, abs=0.05)


def test_flow_correspondence_points_into_the_source():
    source, target = moving(2, 144, 96, seed=0, pan=5)
    position, visible = flow_correspondence(target, source, dis_flow)
    x, y = np.meshgrid(np.arange(144) + 0.5, np.arange(96) + 0.5)
    error = np.abs(position - np.stack([x + 5, y], axis=-1))[10:-10, 10:-15]
    assert position.dtype == np.float64 and np.median(error) < 0.1
    assert visible[10:-10, 10:-15].mean() > 0.95 and not visible[:, -3:].any()  # the right border was not in view


# Clips from a folder


def test_layouts_are_found(dataset):
    clips = find_clips(dataset)
    assert [(clip.id, len(clip)) for clip in clips] == [("b", 47), ("town/a", 50)]
    assert [path.stem for path in clips[1].paths[:3]] == ["frame_1", "frame_2", "frame_3"]


@pytest.mark.slow
def test_a_clip_is_what_its_files_show(dataset):
    source = FolderClips(dataset, SIZE, captions=dataset.with_suffix(".json"))
    clip = source.load(1)
    assert clip.frames.shape == clip.edges.shape == (46, 96, 144, 3)
    assert clip.frames.dtype == clip.edges.dtype == np.uint8 and clip.edges.max() > 100
    assert clip.caption == "a wall in motion"
    first = crop_to_aspect(read_image(dataset / "town" / "a" / "images_2" / "frame_1.png"), SIZE)
    assert first.shape == (100, 150, 3)
    np.testing.assert_array_equal(clip.frames[0], cv2.resize(first, SIZE, interpolation=cv2.INTER_AREA))
    again = source.load(1)
    np.testing.assert_array_equal(clip.noise, again.noise)
    video = source.load(0).frames[7].astype(int)  # not the same after compression, but closest to its own frame
    distances = [np.abs(video - crop_to_aspect(frame, SIZE)).mean() for frame in moving(12, 144, 112, seed=1)]
    assert np.argmin(distances) == 7


@pytest.mark.slow
def test_windows_and_stride(tmp_path):
    for i in range(100):
        write_image(tmp_path / "x" / f"{i}.png", np.full((96, 144, 3), i, np.uint8))
    source = FolderClips(tmp_path, SIZE, stride=2, windows=3)
    starts = [int(source.load(i).frames[0, 0, 0, 0]) for i in range(len(source))]
    assert starts == [0, 4, 9]
    assert source.load(1).frames[:, 0, 0, 0].tolist() == list(range(4, 4 + 91, 2))
    assert len({source.name(i) for i in range(3)}) == 3
    assert len(FolderClips(tmp_path, SIZE, stride=2, windows=50)) == 10  # all that are different


def test_a_name_stands_for_the_content(dataset, tmp_path):
    def names(folder: Path, **options) -> list[str]:
        source = FolderClips(folder, SIZE, **options)
        return [source.name(i) for i in range(len(source))]

    before = names(dataset)
    copy = shutil.copytree(dataset, tmp_path / "copy")
    assert names(copy) == before
    assert all(re.fullmatch(r"[\w.-]+", name) for name in before)
    write_image(copy / "town" / "a" / "images_2" / "frame_5.png", np.zeros((100, 160, 3), np.uint8))
    assert (names(copy)[0], names(copy)[1] == before[1]) == (before[0], False)
    assert not set(names(dataset, captions=dataset.with_suffix(".json"))) & set(before)


def test_captions_in_csv(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('id,caption\nb,"a wall, moving"\ntown/a,another\n')
    assert read_captions(path) == {"b": "a wall, moving", "town/a": "another"}


# The cache


@pytest.fixture(scope="module")
def cache(preset, dataset, tmp_path_factory) -> ClipCache:
    """Both clips, encoded."""
    vae = load_model("cogvideox_vae", AutoencoderKLCogVideoX, Path(preset.cogvideox), torch.float32)
    encoder = ClipEncoder(vae, SMALL, preset.num_frames, torch.bfloat16)
    source = FolderClips(dataset, SMALL, captions=dataset.with_suffix(".json"))
    cache = ClipCache(tmp_path_factory.mktemp("cache"), source, {"vae": 1}, {"text": 1})
    cache.add_clips(cache.missing_clips(), encoder.encode, quiet=True)
    texts = cache.missing_texts()
    assert texts == sorted(["", *CAPTIONS.values()])
    cache.add_texts({text: torch.full((1, 4, 8), float(i)) for i, text in enumerate(texts)})
    return cache


@pytest.mark.slow
def test_cached_tensors(cache, preset):
    assert cache.missing_clips() == [] and cache.missing_texts() == []
    clip = cache.clip(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in clip.items()}
    ends = (END_DRAWS, *LATENT_SHAPE[1:])
    pair = (2, *LATENT_SHAPE)
    assert shapes == {"video": pair, "edges": pair, "start": ends, "end": ends, "noise": LATENT_SHAPE}
    assert (clip["video"][1] > 0).all()
    loaded = cache.source.load(0)
    torch.testing.assert_close(clip["noise"], torch.from_numpy(loaded.noise).movedim(-1, 1), atol=2e-3, rtol=1e-2)
    assert len({clip["start"][k].sum().item() for k in range(END_DRAWS)}) == END_DRAWS
    assert cache.caption(0) == CAPTIONS["b"]


def test_batches_depend_on_seed_and_item_alone(cache):
    both = draw_batch(cache, (3, 7, 0), [0, 1], 0.0, 1000)
    second = draw_batch(cache, (3, 7, 0), [1], 0.0, 1000)
    assert all(torch.equal(both[name][1:], second[name]) for name in both)
    other = draw_batch(cache, (3, 8, 0), [1], 0.0, 1000)
    assert not torch.equal(other["noise"], second["noise"])
    images = both["conditions"][:, :, :16]
    assert images[:, [0, -1]].abs().sum() > 0 and images[:, 1:-1].abs().sum() == 0
    assert both["noise"].std() == pytest.approx(1, abs=0.05)


def test_captions_are_dropped(cache):
    def texts(dropout: float) -> set[float]:
        return set(draw_batch(cache, (0, 0, 0), range(24), dropout, 1000)["text"][:, 0, 0].tolist())

    assert (texts(0.0), texts(1.0), texts(0.5)) == ({1.0, 2.0}, {0.0}, {0.0, 1.0, 2.0})


def test_damaged_and_foreign_files_are_made_again(cache, capfd):
    path, other = cache.clip_path(0), cache.clip_path(1)
    whole = path.read_bytes()
    for bad in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b"", other.read_bytes()):
        path.write_bytes(bad)
        assert cache.missing_clips() == [0]
        assert capfd.readouterr().err == f"{path} is damaged or foreign and will be made again\n"
        with pytest.raises(InputError, match="run the same command again"):
            cache.clip(0)
    path.write_bytes(whole)
    assert cache.missing_clips() == []
    path.unlink()
    assert (cache.missing_clips(0, 2), cache.missing_clips(1, 2)) == ([0], [])
    assert capfd.readouterr().err == ""
    path.write_bytes(whole)


# Bad input: one line, exit code 2, no model
