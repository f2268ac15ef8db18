"""Import what the scripts import, early or late: tests/support/warm.py forks them from a process that has done so."""

import gc
import importlib
from pathlib import Path

from utils.cli import set_up_libraries

ROOT = Path(__file__).parents[2]
MODELS = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "models").rglob("[a-z]*.py"))
LIBRARIES = ("accelerate", "cv2", "imageio_ffmpeg", "PIL.Image", "pytest", "scipy.ndimage", "tqdm", "transformers")
PARTS = ("diffusers.training_utils", "torch.distributed.fsdp", "torch.utils.tensorboard", "torch._dynamo")

set_up_libraries()
for name in (*LIBRARIES, *PARTS, *MODELS):
    importlib.import_module(name)
importlib.import_module("synthetic.tiny_models")
gc.collect()
gc.freeze()  # no garbage collection has to scan these objects, and so copy their pages in a forked process
