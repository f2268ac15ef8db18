"""Training of the tiny networks on the synthetic world: every stage end to end, start values, batches, bad input."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import synthetic.assemble
import synthetic.clips
import synthetic.pictures
import synthetic.train
from synthetic.pictures import DETECTED, SIZE, STYLES, VIEWS, TownPictures, draw_town
from tests.helpers import ROOT, assert_same, contents, exit_code, forget_accelerator, kill_at, start_module
from utils.data.tensor_cache import write_arrays
from utils.files import file_sha256, read_json, write_json
from utils.images import read_image
from utils.layout import LOSS_FILE, SAMPLES_FOLDER, STATE_FOLDER
from utils.runs import MANIFEST

slow = pytest.mark.slow
QUICK = ("--max_train_steps", 2, "--checkpointing_steps", 1, "--warmup_steps", 0, "--decay_steps", 0,
         "--train_batch_size", 2, "--report_to", "none", "--ema_decay", 0.5)  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


def train(stage: str, *arguments: object) -> int:
    """Run a stage in this process; returns the exit code that a shell would see."""
    try:
        return exit_code(lambda: synthetic.train.main([stage, *map(str, arguments)]))
    finally:
        forget_accelerator()


def store(folder: Path, version: int, arrays: dict[str, np.ndarray], **counts: int) -> Path:
    """Put the same arrays into a cache as the first towns or clips of some splits."""
    for split, count in counts.items():
        for number in range(count):
            identity = {"split": split, "number": number, "size": list(SIZE), "version": version}
            write_arrays(folder / f"{split}_{number:05d}.safetensors", arrays, identity)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two towns; the eight held-out ones are one town, which is drawn once."""
    folder = tmp_path_factory.mktemp("pictures")
    version = synthetic.pictures.VERSION
    store(folder, version, draw_town("validation", 0), validation=synthetic.train.HELD_OUT[1])
    return store(folder, version, draw_town("train", 0), train=2)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of one drawn clip, which is held out as well."""
    arrays = synthetic.clips.draw_clip("train", 0)
    return store(tmp_path_factory.mktemp("clips"), synthetic.clips.VERSION, arrays, train=1, validation=3)


def on_pictures(folder: Path, pictures: Path, *arguments: object) -> tuple:
    return ("--towns", 2, "--cache_dir", pictures, "--output_dir", folder, *QUICK, *arguments)


@pytest.fixture(scope="session")
def vae_run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "run"
    assert train("vae", *on_pictures(folder, pictures)) == 0
    return folder


def assert_run(run: Path, parts: set[str], rows: int, columns: int) -> None:
    """Two checkpoints, the curve, and a sample sheet of so many pictures."""
    for step in (1, 2):
        assert {path.name for path in (run / f"checkpoint-{step}").iterdir()} == {*parts, STATE_FOLDER}
    assert len((run / LOSS_FILE).read_text().splitlines()) == 3
    sheet = read_image(run / SAMPLES_FOLDER / "000002.png")
    assert sheet.shape == (rows * SIZE[1], columns * SIZE[0], 3) and sheet.std() > 10
    manifest = read_json(run / MANIFEST)
    assert manifest["finished"] and manifest["steps"] == 2
    assert not list(run.rglob(".*"))


def assert_moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], share: float = 0.95) -> None:
    """The same finite tensors, nearly all of which have changed."""
    assert before.keys() == after.keys()
    assert all(tensor.isfinite().all() for tensor in after.values())
    moved = [not torch.equal(before[name].to(after[name].dtype), after[name]) for name in after]
    assert np.mean(moved) >= share, [name for name, is_moved in zip(after, moved, strict=True) if not is_moved]


# Every stage, two steps


@slow
def test_vae(vae_run: Path):
    from diffusers import AutoencoderKL

    from synthetic.tiny_models import image_vae

    assert_run(vae_run, {"vae"}, rows=2, columns=8)
    first, second = (AutoencoderKL.from_pretrained(vae_run / f"checkpoint-{step}" / "vae") for step in (1, 2))
    stored = load_file(vae_run / "checkpoint-2" / "vae" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    torch.manual_seed(0)
    assert_moved(first.state_dict(), second.state_dict(), 0.8)
    assert_moved(image_vae().state_dict(), second.state_dict(), 0.8)
    assert 0.05 < second.config.scaling_factor < 20 and second.config.shift_factor != 0
    assert first.config.scaling_factor != second.config.scaling_factor  # measured on the weights that are saved


@slow
def test_video_vae(tmp_path: Path, clips: Path, vae_run: Path):
    """Starts from the image autoencoder; latents of four frames each."""
    from diffusers import AutoencoderKLCogVideoX

    start = vae_run / "checkpoint-2" / "vae"
    flags = ("--clips", 1, "--cache_dir", clips, "--output_dir", tmp_path / "run", *QUICK, "--train_batch_size", 1)
    assert train("video-vae", *flags, "--image_vae", start, "--checkpointing_steps", 2) == 0
    vae = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "run" / "checkpoint-2" / "vae")
    sheet = read_image(tmp_path / "run" / SAMPLES_FOLDER / "000002.png")
    assert sheet.shape == (2 * SIZE[1], 3 * synthetic.clips.STYLES * 2 * SIZE[0], 3)
    assert 0.05 < vae.config.scaling_factor < 20
    before, after = load_file(start / WEIGHTS)["encoder.conv_in.weight"], vae.encoder.conv_in.conv.weight
    assert 0 < (after[:, :, -1] - before).abs().max() < 0.05
    assert (after[:, :, 0] != 0).any()  # earlier frames begin to count


@slow
def test_image(tmp_path: Path, pictures: Path, vae_run: Path):
    from diffusers import FluxControlNetModel, FluxPipeline

    from synthetic.tiny_models import controlnet, flux_pipeline

    vae, run = vae_run / "checkpoint-2" / "vae", tmp_path / "run"
    assert train("image", *on_pictures(run, pictures, "--checkpointing_steps", 2), "--vae", vae) == 0
    folder = run / "checkpoint-2"
    sheet = read_image(run / SAMPLES_FOLDER / "000002.png")
    assert sheet.shape == (4 * SIZE[1], 8 * SIZE[0], 3)
    pipeline = FluxPipeline.from_pretrained(folder / "flux", local_files_only=True)
    control = FluxControlNetModel.from_pretrained(folder / "controlnet")
    torch.manual_seed(0)
    fresh, fresh_control = flux_pipeline(), controlnet()
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        assert_moved(getattr(fresh, name).state_dict(), getattr(pipeline, name).state_dict(), 0.5)
    assert_moved(fresh_control.state_dict(), control.state_dict(), 0.5)
    assert_same({"": (folder / "flux" / "vae" / WEIGHTS).read_bytes()}, {"": (vae / WEIGHTS).read_bytes()})
    assert pipeline.vae.config.scaling_factor == read_json(vae / "config.json")["scaling_factor"]
    caption = "white walls, orange evening sky"
    assert pipeline.tokenizer(caption).input_ids == fresh.tokenizer(caption).input_ids
    assert pipeline.tokenizer_2(caption).input_ids == fresh.tokenizer_2(caption).input_ids


# Going on


@slow
def test_killed_training_goes_on_to_the_same_weights(tmp_path: Path, pictures: Path, vae_run: Path):
    run = tmp_path / "run"
    flags = on_pictures(run, pictures)
    kill_at(run / "checkpoint-1", "synthetic.train", "vae", *flags, begin=start_module)
    assert (run / "checkpoint-1").exists() and not (run / "checkpoint-2").exists()
    assert train("vae", *flags) == 0
    assert_same(contents(run, "random_states"), contents(vae_run, "random_states"))


@slow
def test_a_finished_run_says_so_and_other_arguments_are_refused(
    vae_run: Path, pictures: Path, capsys: pytest.CaptureFixture
):
    before = contents(vae_run)
    assert train("vae", *on_pictures(vae_run, pictures)) == 0
    assert "is finished" in capsys.readouterr().out
    assert train("vae", *on_pictures(vae_run, pictures, "--seed", 1, "--max_train_steps", 9)) == 2
    error = capsys.readouterr().err
    assert "seed was 0 and is now 1" in error and "--overwrite" in error and len(error.splitlines()) == 1
    assert_same(contents(vae_run), before)


@slow
def test_init_from_with_the_decoder_alone(tmp_path: Path, pictures: Path, vae_run: Path):
    start = vae_run / "checkpoint-2"
    flags = ("--init_from", start, "--decoder_only", "--max_train_steps", 1, "--seed", 4)
    assert train("vae", *on_pictures(tmp_path / "run", pictures, *flags)) == 0
    before, after = (load_file(path / "vae" / WEIGHTS) for path in (start, tmp_path / "run" / "checkpoint-1"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.startswith("encoder."):
            assert torch.equal(tensor, before[name]), name
        else:
            assert (tensor - before[name]).abs().max() < 0.02, name  # one step away
    assert any(not torch.equal(after[name], before[name]) for name in after)
    configs = [read_json(path / "vae" / "config.json") for path in (start, tmp_path / "run" / "checkpoint-1")]
    assert all(configs[0][key] == configs[1][key] for key in ("scaling_factor", "shift_factor"))


@slow
def test_a_run_is_not_continued_from_other_weights(
    tmp_path: Path, pictures: Path, vae_run: Path, capsys: pytest.CaptureFixture
):
    start, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(vae_run / "checkpoint-1" / "vae", start / "vae")
    flags = ("--init_from", start, "--max_train_steps")
    assert train("vae", *on_pictures(run, pictures, *flags, 1)) == 0
    before = contents(run)
    shutil.copy(vae_run / "checkpoint-2" / "vae" / WEIGHTS, start / "vae")
    assert train("vae", *on_pictures(run, pictures, *flags, 2)) == 2
    assert "begun with other weights" in capsys.readouterr().err
    assert_same(contents(run), before)


# A weight set


@slow
def test_parts_are_put_together(tmp_path: Path, vae_run: Path, capsys: pytest.CaptureFixture):
    """What is not given is the base's; without a base it is random, and the same every time."""

    def assemble(*arguments: object) -> int:
        return exit_code(lambda: synthetic.assemble.main([*map(str, arguments)]))

    def hashes(folder: Path) -> dict[str, str]:
        return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*.safetensors"))}

    tiny, video_vae = ROOT / "checkpoints" / "tiny", tmp_path / "checkpoint-1"
    shutil.copytree(tiny / "cogvideox" / "vae", video_vae / "vae")
    for name in ("a", "b"):
        assert assemble("--video_vae", video_vae, "--output", tmp_path / name) == 0
    first = hashes(tmp_path / "a")
    assert first == hashes(tmp_path / "b") and len(first) == 8
    assert first["cogvideox/vae/" + WEIGHTS] == hashes(tiny)["cogvideox/vae/" + WEIGHTS]
    shutil.copytree(tiny / "cogvideox" / "transformer", video_vae / "transformer")
    common = ("--base", tmp_path / "a", "--inbetween", video_vae)
    assert assemble(*common, "--output", tmp_path / "c") == 0
    changed = {name for name, value in hashes(tmp_path / "c").items() if value != first[name]}
    assert changed == {"cogvideox/transformer/" + WEIGHTS}
    assert read_json(tmp_path / "c" / "preset.json")["num_frames"] == 49

    capsys.readouterr()
    for arguments, telling in (
        ((*common, "--output", tmp_path / "c"), "--overwrite"),
        (("--image", vae_run / "checkpoint-1", "--output", tmp_path / "d"), "holds no flux"),
        (("--base", vae_run / "checkpoint-1", "--output", tmp_path / "d"), "a weight set"),
    ):
        assert assemble(*arguments) == 2
        error = capsys.readouterr().err
        assert telling in error and len(error.splitlines()) == 1
    assert not (tmp_path / "d").exists()


# Start values


def smooth(*shape: int) -> torch.Tensor:
    """Patches of colour in [-1, 1], as a picture has them: [*shape, 32, 48] with 8x8 patches."""
    torch.manual_seed(3)
    return (2 * torch.rand(*shape, 4, 6) - 1).repeat_interleave(8, -2).repeat_interleave(8, -1)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("seed", [0, 1])
def test_fresh_autoencoders_carry_colours(kind: str, seed: int):
    """The highway opens colours from the first step: each channel on its own, before any training."""
    from synthetic.tiny_models import image_vae, video_vae

    torch.manual_seed(seed)
    vae = {"image": image_vae, "video": video_vae}[kind]()
    pixels = smooth(2, 3) if kind == "image" else smooth(1, 3, 1).expand(1, 3, 9, 32, 48)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        output = vae.decode(latents).sample
    assert output.shape == pixels.shape and latents.shape[1] == 16 and latents.shape[-2:] == (4, 6)
    for channel, other in itertools.product(range(3), repeat=2):
        found = np.corrcoef(output[:, channel].flatten(), pixels[:, other].flatten())[0, 1]
        assert found > 0.8 if channel == other else abs(found) < 0.6


def test_an_inflated_autoencoder_sees_single_frames_as_the_image_one():
    from synthetic.tiny_models import image_vae, video_vae
    from synthetic.training.inflate import inflate

    torch.manual_seed(0)
    image, video = image_vae(), video_vae()
    inflate(image, video)
    pixels = smooth(2, 3)
    with torch.no_grad():
        latents = image.encode(pixels).latent_dist.mean
        assert torch.allclose(video.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0], latents, atol=1e-4)
        wanted, found = image.decode(latents).sample, video.decode(latents[:, :, None]).sample
    assert torch.allclose(found[:, :, 0], wanted, atol=1e-3)


def test_text_encoders_draw_nothing():
    """What a step sees depends on seed, step and item alone, so that resumed and shared runs see the same."""
    from synthetic.tiny_models import clip_text, t5_text

    for model in (clip_text()[0], t5_text()[0]):
        ids = torch.arange(8)[None]
        assert torch.equal(model(ids)[0], model(ids)[0])


# Batches


@pytest.fixture
def towns() -> list[TownPictures]:
    """Two towns of noise, 112x80."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, VIEWS, STYLES, 80, 112, 3), dtype=np.uint8)
    captions = tuple(f"caption {k}" for k in range(STYLES))
    return [TownPictures(town, town[:, 0, :, :, 1], town[:2, 0, :, :, 2], captions) for town in images]


def draws_of(towns: list[TownPictures]) -> list:
    from synthetic.training.image import draw_captioned
    from synthetic.training.vae import draw_pictures, draw_segments

    videos = [(np.repeat(town.images[0], 3, axis=0), np.repeat(town.edges, 4, axis=0)) for town in towns]
    return [draw_pictures(towns), draw_segments(videos, 5, 0.5), draw_captioned(towns, 0.5)]


def test_a_batch_does_not_depend_on_how_it_is_shared_out(towns: list[TownPictures]):
    for draw in draws_of(towns):
        whole, parts = draw((0, 7, 0), range(4)), [draw((0, 7, 0), items) for items in (range(2), range(2, 4))]
        for name, value in whole.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, torch.cat([part[name] for part in parts])), name
            elif isinstance(value, tuple):
                assert value == parts[0][name] + parts[1][name]
            else:
                assert value == parts[0][name] == parts[1][name]
        other = draw((0, 8, 0), range(4))
        assert any(isinstance(v, torch.Tensor) and not torch.equal(v, other[name]) for name, v in whole.items())


def test_captions_and_edges_belong_to_their_picture():
    """Pictures of one colour each keep it in every crop; each has its own. So do edges."""
    from synthetic.training.image import draw_captioned

    shades = np.arange(2 * VIEWS * STYLES, dtype=np.uint8).reshape(2, VIEWS, STYLES)
    captions = tuple(f"caption {k}" for k in range(STYLES))
    towns = []
    for one in shades:
        colours = (one, one[:, 0], np.array([one[place] + 100 for place in DETECTED]))
        images, edges, detected = (np.broadcast_to(c[..., None, None], (*c.shape, 80, 112)) for c in colours)
        towns.append(TownPictures(np.repeat(images[..., None], 3, axis=-1), edges, detected, captions))
    batch = draw_captioned(towns, 0.0)((0, 0, 0), range(60))
    kinds = {"lines": 0, "detected": 0, "blank": 0}
    for image, control, caption in zip(batch["images"], batch["control"], batch["captions"], strict=True):
        (shade,), (edge,) = (((one + 1) * 127.5).round().int().unique().tolist() for one in (image, control))
        assert caption == captions[shade % STYLES]
        place = divmod(shade % (VIEWS * STYLES), STYLES)
        if edge == shade + 100:
            assert place in DETECTED
            kinds["detected"] += 1
        else:
            assert edge in (0, shade - shade % STYLES)
            kinds["blank" if edge == 0 else "lines"] += 1
    assert kinds["lines"] > kinds["detected"] > 5 > kinds["blank"] - 4
    assert set(draw_captioned(towns, 1.0)((0, 0, 0), range(12))["captions"]) == {""}


def test_pictures_come_in_the_shapes_of_alignment(towns: list[TownPictures]):
    from synthetic.training.image import draw_captioned

    batches = [draw_captioned(towns, 0.5)((0, step, 0), range(2)) for step in range(24)]
    shapes = {tuple(batch["images"].shape[2:]) for batch in batches}
    assert shapes == {(96, 144), (80, 144), (144, 144)}
    for batch in batches:
        height, width = batch["images"].shape[2:]
        assert batch["control"].shape == batch["images"].shape
        assert batch["noise"].shape[2:] == (height // 8, width // 8)


def test_segments_are_consecutive_frames_or_their_edges():
    from synthetic.training.vae import CROP, draw_segments

    rows = np.arange(20, dtype=np.uint8)[:, None, None, None] * 10
    video = np.broadcast_to(rows, (20, 80, 112, 3))
    edges = np.broadcast_to(255 - rows[..., 0], (20, 80, 112))
    for share, inverse in ((0.0, False), (1.0, True)):
        batch = draw_segments([(video, edges)], 9, share)((0, 0, 0), range(8))
        assert batch["pixels"].shape == (8, 3, 9, *CROP) and batch["eps"].shape == (8, 16, 3, 9, 12)
        levels = ((batch["pixels"][:, 0, :, 0, 0] + 1) * 127.5).round().int()
        step = levels.diff(dim=1)
        assert ((step == 10).all(1) | (step == -10).all(1)).all() and {10, -10} == set(step.flatten().tolist())
        assert (levels % 10 == (5 if inverse else 0)).all()


# Bad input


def refused(capsys: pytest.CaptureFixture, stage: str, *arguments: object) -> str:
    """The one line of a command that ends with exit code 2."""
    assert train(stage, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(
    ("stage", "flags", "telling"),
    [
        ("image", (), "--vae"),
        ("image", ("--vae", "nowhere"), "nowhere"),
        ("image", ("--vae", "README.md"), "README.md"),
        ("image", ("--vae", "docs"), "docs"),
        ("image", ("--vae", "assets", "--caption_dropout", 2), "caption_dropout"),
        ("vae", ("--init_from", "nowhere"), "nowhere"),
        ("vae", ("--init_from", "docs"), "docs"),
        ("image", ("--vae", "checkpoints/tiny/flux"), "AutoencoderKL"),
        ("image", ("--vae", "checkpoints/tiny/controlnet"), "AutoencoderKL"),
        ("image", ("--vae", "checkpoints/tiny/flux/vae", "--init_from", "checkpoints/tiny/flux"), "FluxPipeline"),
        ("vae", ("--towns", 25_001, "--device", "cpu"), "25000"),
        ("video-vae", ("--clips", 25_001, "--device", "cpu"), "25000"),
        ("vae", ("--beta2", 1), "below 1"),
        ("vae", ("--weight_decay", -1), "negative"),
        ("video-vae", ("--image_vae", "nowhere"), "nowhere"),
        ("video-vae", ("--init_from", "docs"), "docs"),
        ("vae", ("--decoder_only",), "--init_from"),
        ("vae", ("--max_train_steps", 0), "positive"),
        ("vae", ("--learning_rate", "fast"), "number"),
        ("vae", ("--vae", "docs"), "--vae"),
        ("statue", (), "statue"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    flags: tuple,
    telling: str,
):
    monkeypatch.chdir(ROOT)
    assert telling in refused(capsys, stage, "--output_dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "--overwrite" in refused(capsys, "vae", "--output_dir", tmp_path)
    write_json(tmp_path / MANIFEST, {"arguments": {"stage": "image"}})
    assert "other arguments" in refused(capsys, "vae", "--output_dir", tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    assert "not valid JSON" in refused(capsys, "vae", "--output_dir", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
