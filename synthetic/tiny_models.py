"""The tiny networks: the same diffusers classes as the full models, small enough for a CPU. 144x96 pixels, 49 frames.

    python -m synthetic.tiny_models --output runs/random [--seed 0] [--overwrite]

The command writes them with random weights, to try code on; `synthetic.train` and `synthetic.assemble` make their own.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from synthetic.styles import vocabulary
from utils.cli import InputError, Parser, non_negative_int, run_script
from utils.files import atomic_path, write_json

COLOURS = 3
LANES = 2 * COLOURS  # each colour and its negative


WIDTH, HEIGHT, FRAMES = 144, 96, 49
TEXT_DIM, MAX_TOKENS = 64, 32
HEADS, HEAD_DIM = 3, 64

PRESET = {
    "image_size": [WIDTH, HEIGHT],
    "image_multiple": 16,
    "training_multiple": 16,
    "resolution": WIDTH,
    "mask_dilations": 2,  # 12 at 1072 pixels, in proportion
    "video_size": [WIDTH, HEIGHT],
    "num_frames": FRAMES,
    "edges": "lines",
    "dtype": "float32",
    "max_sequence_length": MAX_TOKENS,
    "vae_tiling": False,
    "flux": "flux",
    "controlnet": "controlnet",
    "cogvideox": "cogvideox",
    "ggi_transformer": "cogvideox/transformer",
}


def clip_text() -> tuple[CLIPTextModel, CLIPTokenizer]:
    """CLIP text encoder. Its byte pairs are trained until every word of the captions is one token."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator([" ".join(vocabulary())], trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    characters = sorted(bytes_to_unicode().values())
    symbols = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges)]
    symbols = list(dict.fromkeys([*symbols, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    return CLIPTextModel(config), tokenizer


def t5_text() -> tuple[T5EncoderModel, T5Tokenizer]:
    """T5 encoder over the words of the captions; every other word is the unknown token."""
    words = [",", *("▁" + word for word in vocabulary())]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((word, -1.0) for word in words)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS)
    sizes = {"d_model": TEXT_DIM, "d_kv": 32, "d_ff": 2 * TEXT_DIM, "num_layers": 2, "num_heads": 2}
    config = T5Config(
        vocab_size=len(vocab), dropout_rate=0.0, **sizes
    )  # no dropout: the result of a step depends on its seed alone
    return T5EncoderModel(config), tokenizer


def image_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,  # more groups wash colours out, because each is normalised on its own
        mid_block_add_attention=False,
        scaling_factor=1.0,  # measured after training
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    open_highway(vae)
    return vae


def video_vae() -> AutoencoderKLCogVideoX:
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=1,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        scaling_factor=1.0,
    )
    open_highway(vae)
    return vae


def flux_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(num_layers=3, num_single_layers=6, guidance_embeds=True, **flux_sizes())


def flux_sizes() -> dict:
    """Sizes that transformer and ControlNet share."""
    return {
        "in_channels": 64,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": TEXT_DIM,
        "axes_dims_rope": (8, 28, 28),
    }


def controlnet() -> FluxControlNetModel:
    """XLabs' layout, two double blocks. Two zero-initialised layers in a row would learn nothing: both are random."""
    model = FluxControlNetModel(
        patch_size=2,
        num_layers=2,
        num_single_layers=0,
        guidance_embeds=True,
        conditioning_embedding_channels=16,
        **flux_sizes(),
    )
    for name, parameter in model.named_parameters():
        if name.startswith("input_hint_block.conv_out"):
            torch.nn.init.normal_(parameter, std=0.1)
        if name.startswith("controlnet_blocks"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def flux_pipeline() -> FluxPipeline:
    clip, clip_tokenizer = clip_text()
    t5, t5_tokenizer = t5_text()
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler, image_vae(), clip, clip_tokenizer, t5, t5_tokenizer, flux_transformer())


def inbetween_transformer() -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=48,
        out_channels=16,
        time_embed_dim=128,
        text_embed_dim=TEXT_DIM,
        num_layers=8,
        sample_width=WIDTH // 8,
        sample_height=HEIGHT // 8,
        sample_frames=FRAMES,
        max_text_seq_length=MAX_TOKENS,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )


def cogvideox_pipeline() -> CogVideoXImageToVideoPipeline:
    t5, tokenizer = t5_text()
    scheduler = CogVideoXDDIMScheduler(  # the values published with CogVideoX-5B-I2V
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        clip_sample=False,
    )
    return CogVideoXImageToVideoPipeline(tokenizer, t5, video_vae(), inbetween_transformer(), scheduler)


@torch.no_grad()
def open_highway(vae: nn.Module) -> None:
    """Set the start values of an AutoencoderKL or AutoencoderKLCogVideoX in place."""
    for name, module in vae.named_modules():
        last = name.rpartition(".")[2]
        if last == "conv2":  # the residual branch of a block adds nothing to the lanes
            _clear(_conv(module), LANES)
        elif last == "conv_shortcut":
            _pass(_conv(module), torch.eye(LANES))
        elif type(module).__name__.startswith("Downsample") or type(module).__name__ == "CogVideoXDownsample3D":
            _pass(module.conv, torch.eye(LANES) / 4, taps=2)
        elif type(module).__name__.startswith("Upsample") or type(module).__name__ == "CogVideoXUpsample3D":
            _pass(module.conv, torch.eye(LANES))
        elif last in ("conv_y", "conv_b"):  # spatial norms of the video decoder start without modulation
            conv = _conv(module)
            nn.init.zeros_(conv.weight)
            nn.init.constant_(conv.bias, float(last == "conv_y"))
    split = torch.cat([torch.eye(COLOURS), -torch.eye(COLOURS)])  # [6, 3]
    for part in (vae.encoder, vae.decoder):
        _pass(_conv(part.conv_in), split)
        _pass(_conv(part.conv_out), split.T)


def _conv(module: nn.Module) -> nn.Module:
    """The convolution inside CogVideoX's causal wrapper."""
    return getattr(module, "conv", module)


def _clear(conv: nn.Module, outputs: int) -> None:
    conv.weight[:outputs] = 0
    conv.bias[:outputs] = 0


def _pass(conv: nn.Module, matrix: torch.Tensor, taps: int = 1) -> None:
    """The first outputs become `matrix` [out, in] times the first inputs, at the middle of the kernel.

    taps: 2 spreads it over the first 2x2 of the kernel, which is what a stride of 2 covers. In time the kernel's last
    tap is the present frame.
    """
    outputs, inputs = matrix.shape
    _clear(conv, outputs)
    middle = conv.weight.shape[-1] // 2 if taps == 1 else 0
    place = [slice(middle, middle + taps)] * 2
    kernel = conv.weight[:outputs, :inputs, -1] if conv.weight.dim() == 5 else conv.weight[:outputs, :inputs]
    kernel[:, :, place[0], place[1]] = matrix[:, :, None, None]


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.tiny_models")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the random weights")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.output.exists() and not args.overwrite:
        raise InputError(f"{args.output} exists already; pass --overwrite to replace it")
    torch.manual_seed(args.seed)
    with atomic_path(args.output) as folder:
        for name, part in (
            ("flux", flux_pipeline()),
            ("controlnet", controlnet()),
            ("cogvideox", cogvideox_pipeline()),
        ):
            part.to(torch.bfloat16).save_pretrained(folder / name)
        write_json(folder / "preset.json", PRESET)
    print(args.output)


if __name__ == "__main__":
    run_script(main)
