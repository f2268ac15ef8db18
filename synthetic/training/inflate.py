"""Start a video autoencoder from an image autoencoder: each 2D kernel becomes the current frame's slice of a 3D one.

Before any training it encodes each frame as the image autoencoder does, averages over the frames that share a latent
frame, and repeats what it decodes.
"""

import re

import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX

NAMES = (  # image autoencoder -> CogVideoX's; norms of the decoder are wrapped, as are causal convolutions
    (r"^(\w+)\.conv_norm_out\.", r"\1.norm_out."),
    (r"^(decoder\..*norm(?:1|2|_out))\.", r"\1.norm_layer."),
    (r"((?:^|\.)(?:conv_in|conv_out|conv1|conv2))\.", r"\1.conv."),
)


@torch.no_grad()
def inflate(image_vae: AutoencoderKL, video_vae: AutoencoderKLCogVideoX) -> None:
    """Copy all weights of `image_vae` into `video_vae`, which has the same widths, in place.

    Kernel slices of earlier frames become zero, and the decoder's norms start without modulation. Raises ValueError
    when a weight has no counterpart.
    """
    target = video_vae.state_dict()
    for name, weight in image_vae.state_dict().items():
        place = name
        for pattern, replacement in NAMES:
            place = re.sub(pattern, replacement, place)
        if place not in target or target[place].shape[:2] != weight.shape[:2]:
            raise ValueError(f"{name} of the image autoencoder has no place in the video autoencoder ({place})")
        if target[place].dim() == weight.dim():
            target[place].copy_(weight)
        else:
            target[place].zero_()
            target[place][:, :, -1] = weight
    for name, weight in target.items():
        if ".conv_y." in name or ".conv_b." in name:
            weight.fill_(float(name.endswith("conv_y.conv.bias")))
