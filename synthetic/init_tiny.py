"""Seeded random tiny weights: the same diffusers classes as the full models, small enough for a CPU.

    python -m synthetic.init_tiny [--output checkpoints/tiny] [--seed 0] [--overwrite]

They draw noise, but every key, shape, file and code path is real. 144x96 pixels, 49 frames.
"""

import argparse
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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from utils.cli import InputError, Parser, non_negative_int, run_script
from utils.runs import atomic_path, write_json

WIDTH, HEIGHT, FRAMES = 144, 96, 49
TEXT_DIM, MAX_TOKENS = 32, 32

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
    """CLIP text encoder over single characters."""
    characters = sorted(bytes_to_unicode().values())
    symbols = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_TOKENS)
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
    """T5 encoder over single characters."""
    characters = [chr(c) for c in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -2.0) for c in characters)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS)
    config = T5Config(vocab_size=len(vocab), d_model=TEXT_DIM, d_kv=16, d_ff=2 * TEXT_DIM, num_layers=2, num_heads=2)
    return T5EncoderModel(config), tokenizer


def flux_pipeline() -> FluxPipeline:
    clip, clip_tokenizer = clip_text()
    t5, t5_tokenizer = t5_text()
    transformer = FluxTransformer2DModel(
        num_layers=2, num_single_layers=5, guidance_embeds=True, **flux_sizes()
    )  # five single blocks, so that all four that carry LoRA exist
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, transformer)


def flux_sizes() -> dict:
    """Sizes that transformer and ControlNet share."""
    return {
        "in_channels": 64,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": TEXT_DIM,
        "axes_dims_rope": (4, 14, 14),
    }


def controlnet() -> FluxControlNetModel:
    """XLabs' layout, two double blocks. The zero-initialised outputs are drawn anew: edges must do something."""
    model = FluxControlNetModel(
        patch_size=2,
        num_layers=2,
        num_single_layers=0,
        guidance_embeds=True,
        conditioning_embedding_channels=16,
        **flux_sizes(),
    )
    for name, parameter in model.named_parameters():
        if name.startswith(("controlnet_blocks", "input_hint_block.conv_out")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def cogvideox_pipeline() -> CogVideoXImageToVideoPipeline:
    t5, tokenizer = t5_text()
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=48,
        out_channels=16,
        time_embed_dim=64,
        text_embed_dim=TEXT_DIM,
        num_layers=2,
        sample_width=WIDTH // 8,
        sample_height=HEIGHT // 8,
        sample_frames=FRAMES,
        max_text_seq_length=MAX_TOKENS,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        scaling_factor=0.7,
    )
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
    return CogVideoXImageToVideoPipeline(tokenizer, t5, vae, transformer, scheduler)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("checkpoints/tiny"), help="folder to write")
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
