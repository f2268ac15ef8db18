"""Flags that state what they decide, flags made from settings, and manifests that are older than a flag."""

from functools import partial
from pathlib import Path

import pytest

from models.settings import AlignmentSettings, AnchorSettings, InbetweenSettings, TrainSettings
from utils.cli import InputError, Parser, add_settings, positive_int, prompt_text, settings_of
from utils.files import read_json
from utils.layout import MANIFEST
from utils.runs import find_unfinished, open_run


def parser() -> Parser:
    made = Parser("A script.")
    made.add_argument("--steps", type=positive_int, default=3)
    made.add_argument("--folder", decides=False)
    made.add_argument_group("weights").add_argument("--weights", default="full")
    return made


def test_flags_say_what_decides_the_result():
    args = parser().parse_args(["--folder", "out", "--steps", "5"])
    assert args.identity() == {"steps": 5, "weights": "full"}
    assert args.defaults()["steps"] == 3 and vars(args).keys() == {"steps", "folder", "weights"}


def test_flags_of_a_subcommand_say_so_too():
    made = Parser("Commands.")
    sub = made.add_subparsers(dest="stage").add_parser("train", doc="Train.")
    sub.add_argument("--rate", default=1)
    sub.add_argument("--folder", decides=False)
    args = made.parse_args(["train", "--folder", "out"])
    assert args.identity() == {"stage": "train", "rate": 1} and args.defaults()["rate"] == 1


@pytest.mark.parametrize("text", [b"caf\xe9".decode("utf-8", "surrogateescape"), "\ud83d"])
def test_prompts_are_utf8(text: str):
    made = Parser("A script.")
    made.add_argument("--prompt", type=prompt_text)
    add_settings(made, AnchorSettings)
    assert made.parse_args(["--prompt", "café 🏠"]).prompt == "café 🏠"
    for flag in ("--prompt", "--neg_prompt"):
        with pytest.raises(InputError, match=f"{flag}: .* is not UTF-8 text"):
            made.parse_args([flag, text])


@pytest.mark.parametrize("settings", [AlignmentSettings, AnchorSettings, InbetweenSettings, TrainSettings])
def test_flags_have_the_settings_defaults(settings: type):
    made = Parser("A stage.")
    add_settings(made, settings)
    assert settings_of(settings, made.parse_args([])) == settings()


def test_settings_take_flags_and_other_defaults():
    made = Parser("A stage.")
    add_settings(made, InbetweenSettings, num_inference_steps=10)
    args = made.parse_args(["--degradation", "0", "--no-chain"])
    assert settings_of(InbetweenSettings, args) == InbetweenSettings(0.0, 10, chain=False)


def test_a_flag_that_is_newer_than_a_manifest_counts_as_its_default(tmp_path: Path):
    old = {"steps": 3, "compile": None}  # as written before the flag had a default
    open_run(tmp_path / "run", old).begin()
    again = partial(open_run, tmp_path / "run", defaults={"compile": False, "cache": 0.1, "device": "auto"})
    assert again({"steps": 3, "compile": False, "cache": 0.1}).manifest["arguments"] == old
    with pytest.raises(InputError, match="compile was False and is now True"):
        again({"steps": 3, "compile": True, "cache": 0.1})
    with pytest.raises(InputError, match=r"cache was 0\.1 and is now 0\.2"):
        again({"steps": 3, "compile": False, "cache": 0.2})


def test_an_unfinished_run_that_is_older_than_a_flag_is_found(tmp_path: Path):
    open_run(tmp_path / "a", {"seed": 7, "steps": 3}).begin()
    assert not read_json(tmp_path / "a" / MANIFEST)["finished"]
    now = {"seed": -1, "steps": 3, "compile": False}
    assert find_unfinished(tmp_path, now, "seed", defaults={"compile": False}) == 7
    assert find_unfinished(tmp_path, now | {"compile": True}, "seed", defaults={"compile": False}) is None
