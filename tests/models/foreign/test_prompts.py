"""Prompts that are longer than an encoder reads, that hold any character, or that are no text at all."""

from pathlib import Path

import pytest
import torch

from models.flux.network import encode_flux_prompts
from models.inbetween.pipeline import encode_video_prompts
from models.prompts import cut_off, warn_of_cuts
from models.weights import WEIGHTS, load_preset
from tests.support.helpers import ALIGN, ANCHORS, GGI, call
from utils.cli import InputError
from utils.data.clips import read_captions
from utils.layout import anchor_run_name, cut_name

LIMIT = load_preset("tiny").max_sequence_length  # of both encoders
SHORT, LONG = "a town", " ".join(f"house {i}" for i in range(40))
FLUX, VIDEO = WEIGHTS / "tiny" / "flux", WEIGHTS / "tiny" / "cogvideox"


def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("folder", [FLUX / "tokenizer", FLUX / "tokenizer_2", VIDEO / "tokenizer"])
@pytest.mark.parametrize("prompt", [LONG, "家と空 𠮷🏠 " * 20, "i, " * 60])
def test_what_is_cut_off_is_what_the_encoder_does_not_see(folder: Path, prompt: str):
    reader = tokenizer(folder)
    seen = lambda text: reader(text, truncation=True, max_length=LIMIT).input_ids  # noqa: E731
    cut = cut_off(reader, prompt, LIMIT)
    assert cut and prompt.endswith(cut)
    assert seen(prompt[: -len(cut)] + cut[:1] + "?" * len(cut))[: LIMIT - 2] == seen(prompt)[: LIMIT - 2]
    assert cut_off(reader, SHORT, LIMIT) == cut_off(reader, "", LIMIT) == ""
    assert not cut_off(reader, prompt, len(reader(prompt).input_ids))
    assert cut_off(reader, prompt, len(reader(prompt).input_ids) - 1)


def test_every_encoder_says_what_it_cuts_off(capsys: pytest.CaptureFixture):
    encode_flux_prompts(FLUX, [SHORT, LONG], "cpu", torch.float32, LIMIT)
    clip, t5 = capsys.readouterr().err.splitlines()
    for line, name, folder in ((clip, "CLIP", "tokenizer"), (t5, "T5", "tokenizer_2")):
        assert line.startswith(f"warning: {name} reads {LIMIT} tokens of a prompt; not this: ")
        assert cut_off(tokenizer(FLUX / folder), LONG, LIMIT)[:20] in line
    encode_video_prompts(VIDEO, [LONG, SHORT, LONG], "cpu", torch.float32, LIMIT)
    assert capsys.readouterr().err.startswith(f"warning: T5 reads {LIMIT} tokens of a prompt; not this: ")
    encode_video_prompts(VIDEO, [SHORT, ""], "cpu", torch.float32, LIMIT)
    assert capsys.readouterr().err == ""


def test_a_data_set_of_long_captions_takes_few_lines(capsys: pytest.CaptureFixture):
    warn_of_cuts("T5", tokenizer(VIDEO / "tokenizer"), [f"{i} {LONG}\n{LONG}" for i in range(50)], LIMIT)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and max(map(len, lines)) < 400 and "more characters" in lines[0] and "47" in lines[3]


def test_names_of_any_characters_fit_into_a_file_system(tmp_path: Path):
    for prompt in ("𠮷" * 60, "家" * 60, "e\u0301" * 60, "x" * 200):
        for pfix in ("town", "町" * 60, "t" * 200):
            name = anchor_run_name(pfix, [prompt] * 2, 400, 42, 12)
            (tmp_path / name).mkdir()
            assert len(name.encode()) <= max(200, len(pfix.encode()) + 50) and name.endswith("_e400_s000042_r12_ip1")
    assert anchor_run_name("t", ["𠮷" * 60], 1, 1, 1) != anchor_run_name("t", ["𠮷" * 61], 1, 1, 1)
    assert anchor_run_name("town", ["家 and sky"], 400, 42, 12) == "town_p家_and_sky-93961e01_e400_s000042_r12_ip1"
    assert cut_name("a家b", 3) == "a" and cut_name("a家b", 4) == "a家"


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (ANCHORS, ("--target", "x", "--pfix", "a", "--prompt", "a \udce4")),
        (ANCHORS, ("--target", "x", "--pfix", "a", "--neg_prompt", "\ud83d")),
        (ANCHORS, ("--target", "x", "--pfix", "\ud83d")),
        (ANCHORS, ("--target", "x", "--pfix", "家" * 70)),
        (ALIGN, ("--path_image", "x", "--pfix", "a", "--prompt", "\udcff")),
        (GGI, ("--target", "x", "--prompt", "\udcff")),
    ],
)
def test_half_a_character_and_endless_names_are_refused(script: str, flags: tuple, capfd: pytest.CaptureFixture):
    assert call(script, *flags) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and flags[-2] in error
    assert "is not UTF-8" in error or "is longer than 200 bytes" in error


def test_a_caption_with_half_a_character_is_refused(tmp_path: Path):
    (tmp_path / "captions.json").write_text('{"a": "fine", "b": "\\ud83d"}')
    with pytest.raises(InputError, match="that of b holds half a character"):
        read_captions(tmp_path / "captions.json")
