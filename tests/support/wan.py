"""A small random Wan VACE in diffusers' layout, as `--wan FOLDER` takes it: real classes, two layers of control."""

import fcntl
import functools
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from models.weights import WAN_STAGE
from synthetic.tiny_models import t5_text
from tests.support.small import session_folder
from utils.files import atomic_path

SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}
TEXT_DIM = 32


def wan_pipeline(seed: int = 0) -> WanVACEPipeline:
    """Matrices are drawn wide enough that whatever changes an input changes the pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanVACETransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=TEXT_DIM,
            freq_dim=16,
            ffn_dim=32,
            num_layers=3,
            vace_layers=[0, 2],
            rope_max_seq_len=32,
        )
        vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
        _, tokenizer = t5_text()
        sizes = {"d_model": TEXT_DIM, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        text = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes))
        for network in (transformer, vae):
            for name, parameter in network.named_parameters():
                if parameter.dim() > 1 and "scale_shift" not in name:
                    torch.nn.init.normal_(parameter, std=1.2 * parameter[0].numel() ** -0.5)
    scheduler = UniPCMultistepScheduler(**SCHEDULER, flow_shift=3.0)
    networks = {"vae": vae, "transformer": transformer, "text_encoder": text}
    for network in networks.values():
        network.eval().requires_grad_(False)
    return WanVACEPipeline(tokenizer=tokenizer, scheduler=scheduler, **networks)


@functools.cache
def wan_folder() -> Path:
    """The pipeline on disk; the first worker that asks for it makes it."""
    folder = session_folder() / "wan"
    with (session_folder() / "wan.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with atomic_path(folder) as temporary:
                wan_pipeline().save_pretrained(temporary)
    return folder


def wan_paths() -> dict[str, Path]:
    return dict.fromkeys(WAN_STAGE, wan_folder())
