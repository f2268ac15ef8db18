"""Training of the tiny networks on the synthetic world: every stage end to end, start values, batches, bad input."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from synthetic.pictures import DETECTED, STYLES, VIEWS, TownPictures
from tests.support.helpers import ROOT
from tests.synthetic.synthetic_train_common import train
from utils.files import write_json
from utils.runs import MANIFEST


def smooth(*shape: int) -> torch.Tensor:
    """Patches of colour in [-1, 1], as a picture has them: [*shape, 32, 48] with 8x8 patches."""
    torch.manual_seed(3)
    return (2 * torch.rand(*shape, 4, 6) - 1).repeat_interleave(8, -2).repeat_interleave(8, -1)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("seed", [0, 1])
def test_fresh_autoencoders_carry_colours(kind: str, seed: int):
    """The initial weights pass colours through: each channel on its own, before any training."""
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


def test_errors_between_neighbouring_pixels_and_frames_are_weighted():
    """Each weight adds its share of the errors in the differences, and nothing where it is 0."""
    from synthetic.tiny_models import video_vae
    from synthetic.training.vae import ReconstructionObjective

    torch.manual_seed(0)
    vae, pixels, eps = video_vae(), smooth(1, 3, 9), torch.zeros(1, 16, 3, 4, 6)
    with torch.no_grad():
        plain, sharp, moved = (
            float(ReconstructionObjective(vae, *weights)(pixels, eps)["loss"]) for weights in ((), (2.0,), (0.0, 3.0))
        )
        error = (vae.decode(vae.encode(pixels).latent_dist.mean).sample - pixels).numpy()
    columns, rows, frames = (
        np.sqrt(np.square(np.diff(error, axis=axis)) + 1e-4).mean(dtype=np.float64) for axis in (4, 3, 2)
    )
    assert sharp - plain == pytest.approx(2 * (columns + rows), rel=1e-3)
    assert moved - plain == pytest.approx(3 * frames, rel=1e-3)


def test_text_encoders_draw_nothing():
    """The data of a step depend on seed, step and item alone, so that resumed and distributed runs get the same."""
    from synthetic.tiny_models import clip_text, t5_text

    for model in (clip_text()[0], t5_text()[0]):
        ids = torch.arange(8)[None]
        assert torch.equal(model(ids)[0], model(ids)[0])


@pytest.fixture
def towns() -> list[TownPictures]:
    """Two towns of noise, 112x80."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, VIEWS, STYLES, 80, 112, 3), dtype=np.uint8)
    captions = tuple(f"caption {k}" for k in range(STYLES))
    return [
        TownPictures(town, town[:, 0, :, :, 1], town[:, 1, :, :, 1], town[:2, 0, :, :, 2], captions) for town in images
    ]


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
    """Pictures and edges of one colour each keep their own colour in every crop."""
    from synthetic.training.image import draw_captioned

    shades = np.arange(2 * VIEWS * STYLES, dtype=np.uint8).reshape(2, VIEWS, STYLES)
    captions = tuple(f"caption {k}" for k in range(STYLES))
    towns = []
    for one in shades:
        colours = (one, one[:, 0], one[:, 0] + 180, np.array([one[place] + 100 for place in DETECTED]))
        images, edges, coarse, detected = (np.broadcast_to(c[..., None, None], (*c.shape, 80, 112)) for c in colours)
        towns.append(TownPictures(np.repeat(images[..., None], 3, axis=-1), edges, coarse, detected, captions))
    batch = draw_captioned(towns, 0.0)((0, 0, 0), range(60))
    kinds = {"lines": 0, "coarse": 0, "detected": 0, "blank": 0}
    for image, control, caption in zip(batch["images"], batch["control"], batch["captions"], strict=True):
        (shade,), (edge,) = (((one + 1) * 127.5).round().int().unique().tolist() for one in (image, control))
        assert caption == captions[shade % STYLES]
        place = divmod(shade % (VIEWS * STYLES), STYLES)
        if edge == shade + 100:
            assert place in DETECTED
            kinds["detected"] += 1
        else:
            lines = shade - shade % STYLES
            assert edge in (0, lines, lines + 180)
            kinds[{0: "blank", lines: "lines"}.get(edge, "coarse")] += 1
    assert kinds["blank"] < 10 < min(kinds["lines"], kinds["coarse"]) and kinds["detected"] > 5
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
        ("video-vae", ("--motion", -1), "negative"),
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
