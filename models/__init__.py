"""The networks: loading, memory, training, sampling. Libraries are quietened here, before they are imported.

`from models import …` gives what `PUBLIC` names, which is loaded when it is asked for.
"""

import importlib
import logging
import warnings

PUBLIC = {  # name: its module; docs/python.md
    "AnchorSettings": "models.settings",
    "InbetweenSettings": "models.settings",
    "Anchor": "models.flux.anchors",
    "AnchorStage": "models.flux.anchors",
    "ArcInputs": "models.inbetween.stage",
    "InbetweenStage": "models.inbetween.stage",
    "open_anchor_stage": "models.api",
    "draw_anchors": "models.api",
    "open_inbetween_stage": "models.api",
    "fill_arcs": "models.api",
}

# diffusers' own ControlNet imports this class from its deprecated location.
warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
# transformers' fallback is what we want: no picture needs torchvision here.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
# If installed, it logs hints about faster kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)
