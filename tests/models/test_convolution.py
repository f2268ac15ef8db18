"""The video VAE's convolutions by oneDNN: the same values and gradients as torch's own."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
from torch import nn
from torch.profiler import profile

from models.inbetween.pipeline import prepare_vae
from models.latents import draw_noise
from models.loading.networks import load_model
from models.runtime.convolution import OneDnnConv3d, use_onednn
from models.weights import load_preset

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


def kernels(layer: nn.Module, x: torch.Tensor) -> set[str]:
    with profile() as run, torch.no_grad():
        layer(x)
    return {event.key for event in run.key_averages()}


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_torchs(dtype: torch.dtype):
    layer, x = CogVideoXSafeConv3d(4, 5, 3, stride=(1, 2, 2)).to(dtype), draw_noise((1, 4, 4, 11, 12), 1).to(dtype)
    results = []
    for change in (lambda _: None, use_onednn):
        change(layer)
        source = x.clone().requires_grad_()
        layer.zero_grad()
        output = layer(source)
        output.square().sum().backward()
        results.append([output.detach(), source.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    assert type(layer) is OneDnnConv3d
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert ("aten::slow_conv3d_forward" in kernels(layer, x)) == (dtype == torch.float64)


@needs_onednn
def test_small_videos_are_decoded_without_the_slow_loop():
    """Without `prepare_vae` they are decoded by it; if not, torch no longer needs our layer."""
    vae = load_model("cogvideox_vae", AutoencoderKLCogVideoX, Path(load_preset("tiny").cogvideox), torch.float32)
    latents = draw_noise((1, 16, 3, 4, 6), 0)
    with torch.no_grad():
        before = vae.decode(latents).sample
    assert "aten::slow_conv3d_forward" in kernels(vae.decoder, latents)
    prepare_vae(vae, tiling=False)
    assert "aten::slow_conv3d_forward" not in kernels(vae.decoder, latents)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(latents).sample, before, rtol=0, atol=1e-4)
