"""Training of the tiny networks on the synthetic world: every stage end to end, start values, batches, bad input."""

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
from synthetic.pictures import SIZE, cached_town, draw_town
from tests.support.helpers import ROOT, assert_same, contents, exit_code, kill_at, start_module
from tests.synthetic.synthetic_train_common import train
from utils.data.tensor_cache import write_arrays
from utils.files import file_sha256, read_json
from utils.images import read_image
from utils.layout import LOSS_FILE, SAMPLES_FOLDER, STATE_FOLDER
from utils.runs import MANIFEST

slow = pytest.mark.slow


QUICK = ("--max_train_steps", 2, "--checkpointing_steps", 1, "--warmup_steps", 0, "--decay_steps", 0,
         "--train_batch_size", 2, "--report_to", "none", "--ema_decay", 0.5)  # fmt: skip


WEIGHTS = "diffusion_pytorch_model.safetensors"


def store(folder: Path, version: int, arrays: dict[str, np.ndarray], **counts: int) -> Path:
    """Store the same arrays in a cache as the first towns or clips of some splits."""
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


def test_lines_of_the_coarse_mesh_are_near_the_true_ones(pictures: Path):
    town = cached_town("train", 0, pictures)
    likeness = [np.corrcoef(town.edges.ravel(), other.ravel())[0, 1] for other in (town.coarse, town.coarse[::-1])]
    assert 0.3 < likeness[0] < 0.95 and likeness[1] < likeness[0] / 2


def on_pictures(folder: Path, pictures: Path, *arguments: object) -> tuple:
    return ("--towns", 2, "--cache_dir", pictures, "--output_dir", folder, *QUICK, *arguments)


@pytest.fixture(scope="session")
def vae_run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "run"
    assert train("vae", *on_pictures(folder, pictures)) == 0
    return folder


def assert_run(run: Path, parts: set[str], rows: int, columns: int) -> None:
    """Two checkpoints, the curve, and a sample sheet of `rows` x `columns` pictures."""
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
    """It starts from the image autoencoder; each latent stands for four frames."""
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
    assert (after[:, :, 0] != 0).any()  # kernel slices of earlier frames are trained

    # The decoder alone, on other weights of the loss: they are part of it, and latents stay as they are.
    start = tmp_path / "run" / "checkpoint-2"
    common = ("--clips", 1, "--cache_dir", clips, *QUICK, "--max_train_steps", 1, "--init_from", start)
    losses = []
    for name, weight in (("plain", 0), ("weighted", 2)):
        weights = ("--edge_share", 0, "--sharpness", weight, "--motion", weight)
        assert train("video-vae", *common, "--output_dir", tmp_path / name, "--decoder_only", *weights) == 0
        losses.append(float((tmp_path / name / LOSS_FILE).read_text().splitlines()[1].split(",")[1]))
    assert losses[1] > 1.2 * losses[0]
    folders = [folder / "vae" for folder in (start, tmp_path / "weighted" / "checkpoint-1")]
    assert len({read_json(folder / "config.json")["scaling_factor"] for folder in folders}) == 1
    stored = [load_file(folder / WEIGHTS) for folder in folders]
    kept = {name for name, tensor in stored[0].items() if torch.equal(tensor, stored[1][name])}
    assert {name for name in stored[0] if name.startswith("encoder.")} <= kept < set(stored[0])


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


@slow
def test_parts_are_put_together(tmp_path: Path, vae_run: Path, capsys: pytest.CaptureFixture):
    """Parts that are not given come from the base; without a base they are random, and the same every time."""

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
