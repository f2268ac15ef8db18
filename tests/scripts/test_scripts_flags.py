"""Every flag of the three scripts changes their results, except where it must not."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor

from tests.support.helpers import ALIGN, ANCHORS, GGI, assert_same, call, contents, probe_video, write_picture
from tests.support.small import LATENT_SIZE, small_checkpoints
from tests.support.stages import PROMPT, QUICK_VIDEO, RUN, STATE, VIDEO, anchor_run, draw, new_scene, train
from utils.images import read_image, write_image
from utils.layout import anchor_run_name
from utils.runs import MANIFEST

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flag_lora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("flags") / "loras"
    assert call(ALIGN, *train(folder, "--max_train_steps", 2)) == 0
    return contents(folder / "town", STATE)


@pytest.mark.parametrize(
    "flags",
    [
        ("--prompt", "exterior"),
        ("--learning_rate", 0.02),
        ("--rank", 8),
        ("--resolution", 32),
        ("--train_batch_size", 2),
        ("--gradient_accumulation_steps", 2),
        ("--mixed_precision", "bf16"),
        ("--seed", 1),
    ],
    ids=lambda flags: flags[0],
)
def test_alignment_flag(tmp_path: Path, flag_lora: dict[str, bytes], flags: tuple):
    assert call(ALIGN, *train(tmp_path / "loras", "--max_train_steps", 2, "--report_to", "none", *flags)) == 0
    found = contents(tmp_path / "loras" / "town", STATE)
    assert found.keys() == flag_lora.keys()
    for name in ("lora", "controlnet.lora"):
        path = f"checkpoint-2/{name}.safetensors"
        assert found[path] != flag_lora[path]


def test_alignment_takes_several_pictures_and_ready_edges(tmp_path: Path, flag_lora: dict[str, bytes]):
    pictures = [write_picture(tmp_path / f"{name}.png", seed=i) for i, name in enumerate(("a", "b"))]
    edges = tmp_path / "edges.png"
    write_image(edges, np.full((160, 200, 3), 90, np.uint8))
    arguments = ("--path_image", *pictures, "--prompt", "exterior", "interior", "--path_edges", edges, edges)
    # argparse keeps the last --path_image.
    assert call(ALIGN, *train(tmp_path / "loras", "--max_train_steps", 2, *arguments)) == 0
    folder = tmp_path / "loras" / "town"
    names = {"00_a.png", "00_a.edges.png", "01_b.png", "01_b.edges.png"}
    assert {path.name for path in (folder / "references").iterdir()} == names
    assert (read_image(folder / "references" / "01_b.edges.png") == 90).all()
    path = "checkpoint-2/controlnet.lora.safetensors"
    assert (folder / path).read_bytes() != flag_lora[path]


def test_event_log_only_where_wanted(tmp_path: Path, loras: Path):
    assert list((loras / "town").rglob("*tfevents*"))
    assert call(ALIGN, *train(tmp_path / "loras", "--max_train_steps", 1, "--report_to", "none")) == 0
    assert not list((tmp_path / "loras").rglob("*tfevents*"))


ANCHOR_FLAGS = [
    ("--prompt", "a city"),
    ("--neg_prompt", "rain"),
    ("--num_steps", 4),
    ("--guidance", 2),
    ("--true_gs", 2),
    ("--timestep_to_start_cfg", 0),
    ("--control_weight", 0.4),
    ("--lora_weight", 0.5),
    ("--epoch", 2),
    ("--seed", 2),
    ("--dtype", "bfloat16"),
    ("--width", 64),
    ("--height", 48),
]
LATER_ANCHOR_FLAGS = [("--num_replacement", 3), ("--use_else_noise",), ("--prompt", PROMPT, "a city")]


@pytest.mark.parametrize("flags", ANCHOR_FLAGS + LATER_ANCHOR_FLAGS, ids=lambda flags: " ".join(map(str, flags)))
def test_anchor_flag(tmp_path: Path, loras: Path, one_arc: Path, flags: tuple):
    before = one_arc / "multiviews" / anchor_run(1)
    assert call(ANCHORS, *draw(one_arc, loras, "--output_dir", tmp_path, *flags)) == 0
    (after,) = tmp_path.iterdir()
    changed = [
        (before / name).read_bytes() != (after / name).read_bytes() for name in ("image_00.png", "image_01.png")
    ]
    assert changed == [flags not in LATER_ANCHOR_FLAGS, True]


def test_run_is_named_after_its_arguments(tmp_path: Path, loras: Path, one_arc: Path):
    prompts = ("it's a town / 2", "another")
    arguments = ("--output_dir", tmp_path, "--prompt", *prompts, "--epoch", 2, "--seed", 77, "--num_replacement", 1)
    assert call(ANCHORS, *draw(one_arc, loras, *arguments)) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name == anchor_run_name("town", prompts, 2, 77, 1)
    assert re.fullmatch(r"town_pit_s_a_town___2-[0-9a-f]{8}_e002_s000077_r01_ip1", folder.name)


@pytest.fixture(scope="module")
def flag_video(tmp_path_factory: pytest.TempPathFactory, one_arc: Path) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("flags")
    target = one_arc / "multiviews" / anchor_run(1)
    assert call(GGI, "--target", target, *QUICK_VIDEO, "--output_dir", folder) == 0
    return contents(folder / VIDEO)


@pytest.mark.parametrize(
    "flags, frames_change, name",
    [
        (("--prompt", "green walls"), True, VIDEO),
        (("--degradation", 0.0), True, "d0.0_e1350_n2"),
        (("--num_inference_steps", 3), True, "d0.5_e1350_n3"),
        (("--guidance_scale", 1), True, VIDEO),
        (("--seed", 1), True, VIDEO),
        (("--dtype", "bfloat16"), True, VIDEO),
        (("--fps", 24), False, VIDEO),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_video_flag(
    tmp_path: Path, one_arc: Path, flag_video: dict[str, bytes], flags: tuple, frames_change: bool, name: str
):
    target = one_arc / "multiviews" / anchor_run(1)
    assert call(GGI, "--target", target, *QUICK_VIDEO, "--output_dir", tmp_path, *flags) == 0
    found = contents(tmp_path / name)
    assert found.keys() == flag_video.keys()
    assert found["video.mp4"] != flag_video["video.mp4"]
    frames = [f"{i:04d}.png" for i in range(46)]
    assert all((found[frame] != flag_video[frame]) == frames_change for frame in frames)
    assert probe_video(tmp_path / name / "video.mp4")[0]["fps"] == (24 if "--fps" in flags else 12)


def test_chain_changes_later_arcs_only(unchained: Path, filmed: Path):
    target = filmed / "multiviews" / RUN
    changed = [
        (unchained / VIDEO / name).read_bytes() != (target / VIDEO / name).read_bytes()
        for name in (f"{i:04d}.png" for i in range(92))
    ]
    assert not any(changed[:46]) and all(changed[46:])


def test_low_memory_changes_no_frame(filmed: Path, anchored: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert (
        call(GGI, "--target", anchored / "multiviews" / RUN, *QUICK_VIDEO, "--offload", "--output_dir", tmp_path) == 0
    )
    assert "memory low: text " in capsys.readouterr().err
    assert_same(contents(tmp_path / VIDEO), contents(filmed / "multiviews" / RUN / VIDEO))


@pytest.mark.parametrize("script", [ALIGN, ANCHORS, GGI])
def test_attention_flag(script: str, tmp_path: Path, loras: Path, one_arc: Path, monkeypatch: pytest.MonkeyPatch):
    """Only that kernel is allowed while the transformer runs, also when checkpointing recomputes its blocks."""
    video = ("--target", one_arc / "multiviews" / anchor_run(1), *QUICK_VIDEO)
    block, command = {
        ALIGN: (FluxTransformerBlock, train(tmp_path / "loras", "--max_train_steps", 1)),
        ANCHORS: (FluxTransformerBlock, (*draw(one_arc, loras), "--output_dir", tmp_path)),
        GGI: (CogVideoXBlock, (*video, "--output_dir", tmp_path)),
    }[script]
    allowed, forward = [], block.forward

    def watched(self, hidden_states, *arguments, **options):
        if not isinstance(hidden_states, FakeTensor):  # fake tensors are the memory plan's
            allowed.append((torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return forward(self, hidden_states, *arguments, **options)

    monkeypatch.setattr(block, "forward", watched)
    assert call(script, *command, "--attention", "flash") == 0
    assert set(allowed) == {(False, True)}


def test_scene_flag_and_given_noise(tmp_path: Path, one_arc: Path, flag_video: dict[str, bytes]):
    views = shutil.copytree(one_arc / "multiviews" / anchor_run(1), tmp_path / "views")
    (views / MANIFEST).unlink()
    scene = new_scene(tmp_path / "scene", num_arcs=1)
    rng = np.random.default_rng(5)
    width, height = LATENT_SIZE
    noise = rng.standard_normal((13, height, width, 16), dtype=np.float32)
    np.save(scene / "arc0" / f"noises_{width}x{height}.npy", noise)
    assert call(GGI, "--target", views, "--scene", scene, *QUICK_VIDEO) == 0
    found = contents(views / VIDEO, "page")  # the reference is not found from there
    assert found.keys() == {name for name in flag_video if "page" not in name}
    assert found["0000.png"] != flag_video["0000.png"]


def altered(source: Path, target: Path) -> Path:
    """A copy of a model's folder with other weights."""
    shutil.copytree(source, target)
    (weights,) = target.glob("*.safetensors")
    save_file({key: 0.9 * tensor for key, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    return target


@pytest.mark.parametrize("flag, part", [("--controlnet", "controlnet"), ("--flux_vae", "flux/vae")])
def test_other_weights_for_anchors(tmp_path: Path, loras: Path, one_arc: Path, flag: str, part: str):
    model = altered(small_checkpoints() / "tiny" / part, tmp_path / "model")
    assert call(ANCHORS, *draw(one_arc, loras, "--output_dir", tmp_path / "views", flag, model)) == 0
    before, after = one_arc / "multiviews" / anchor_run(1), tmp_path / "views" / anchor_run(1)
    assert (before / "image_00.png").read_bytes() != (after / "image_00.png").read_bytes()


def test_another_transformer_for_the_video(tmp_path: Path, one_arc: Path, flag_video: dict[str, bytes]):
    altered(
        small_checkpoints() / "tiny" / "cogvideox" / "transformer", tmp_path / "model" / "checkpoint-7" / "transformer"
    )
    target = one_arc / "multiviews" / anchor_run(1)
    other = ("--model_path", tmp_path / "model", "--epoch", 7, "--output_dir", tmp_path)
    assert call(GGI, "--target", target, *QUICK_VIDEO, *other) == 0
    assert (tmp_path / "d0.5_e7_n2" / "0020.png").read_bytes() != flag_video["0020.png"]
