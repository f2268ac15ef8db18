"""Commands of the three scripts on scenes of flat walls, with few steps (fixtures: conftest.py)."""

from pathlib import Path

from tests.support.helpers import write_picture
from tests.support.scenes import make_scene
from utils.layout import anchor_run_name

STATE = "/state/"  # alignment resumes from it; its results are the LoRAs
PROMPT, NUM_ARCS = "a town", 2
QUICK_LORA = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--learning_rate", 0.01, "--mixed_precision", "no")
FLOAT32 = ("--dtype", "float32")  # whatever the CPU supports
QUICK_ANCHORS = ("--epoch", 4, "--prompt", PROMPT, "--neg_prompt", "fog", "--num_steps", 3, "--num_replacement", 2)
QUICK_ANCHORS += FLOAT32
QUICK_VIDEO = ("--prompt", PROMPT, "--num_inference_steps", 2, *FLOAT32)
VIDEO = "d0.5_e1350_n2"


def anchor_run(num_arcs: int, seed: int = 1) -> str:
    return anchor_run_name("town", [PROMPT] * (num_arcs + 1), 4, seed, 2)


RUN = anchor_run(NUM_ARCS)


def new_scene(folder: Path, num_arcs: int = NUM_ARCS) -> Path:
    return make_scene(folder, num_arcs, edge_size=(144, 96))


def train(folder: Path, *arguments: object) -> tuple:
    """Arguments that train the LoRA `town` into `folder`."""
    picture = folder.parent / "picture.png"
    if not picture.exists():
        write_picture(picture)
    return ("--path_image", picture, "--pfix", "town", "--output_dir", folder, *QUICK_LORA, *arguments)


def draw(scene: Path, loras: Path, *arguments: object) -> tuple:
    """Arguments that draw the anchors of a scene."""
    return ("--target", scene, "--pfix", "town", "--loras", loras, "--seed", 1, *QUICK_ANCHORS, *arguments)


def last_line(text: str) -> str:
    return text.splitlines()[-1]
