"""Import what the scripts import, early or late: tests/support/warm.py forks them from a process that has done so."""

import gc
import importlib
import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODELS = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "models").rglob("[a-z]*.py"))
LIBRARIES = ("accelerate", "cv2", "imageio_ffmpeg", "PIL.Image", "pytest", "scipy.ndimage", "tqdm", "transformers")
PARTS = ("diffusers.training_utils", "torch.distributed.fsdp", "torch.utils.tensorboard", "torch._dynamo")

for library in ("TRANSFORMERS", "DIFFUSERS"):  # as `utils.cli.run_script` does
    os.environ.setdefault(f"{library}_VERBOSITY", "error")
for name in (*LIBRARIES, *PARTS, *MODELS):
    importlib.import_module(name)
importlib.import_module("synthetic.tiny_models")
gc.collect()
gc.freeze()  # no garbage collection has to scan these objects, and so copy their pages in a forked process
