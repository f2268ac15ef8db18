"""The networks: loading, memory, training, sampling. Libraries are quietened here, before they are imported."""

import logging
import warnings

# diffusers' own ControlNet imports this class from its deprecated location.
warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
# transformers' fallback is what we want: no picture needs torchvision here.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
# If installed, it logs hints about faster kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
