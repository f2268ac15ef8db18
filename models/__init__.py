"""The networks: loading, memory, training, sampling. Libraries are quietened here, before they are imported."""

import logging
import warnings

# diffusers' own ControlNet takes this class from its old place.
warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
# What transformers falls back to is what is wanted: no picture needs torchvision here.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
# Where it is installed, it speaks of faster kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
