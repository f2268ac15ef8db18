"""Check networks that a user brings, before loading: each has the expected architecture, and they fit together.

Reads only configurations and the headers of files. Every InputError says in one line what a network is and what is
needed instead.
"""

import inspect
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from models.loading.whole import CONVERTIBLE, NETWORKS, component_folder
from models.settings import CONTROL_MODES
from utils.cli import InputError
from utils.files import read_json
from utils.runs import is_first_process

FLUX_CHANNELS, LATENT_CHANNELS = 64, 16  # of packed latents, and of both VAEs
KNOWN_CHANNELS = {384: "FLUX.1 Fill-dev", 128: "FLUX.1 Canny-dev or Depth-dev"}
# part of a tensor's name that only such files have -> what the file holds
CONTENTS = {
    ".quant_state.": "weights quantised by bitsandbytes",
    "._data": "weights quantised by quanto",
    "lora_": "a LoRA",
    "input_hint_block.14.weight": "controlnet",
    "double_blocks.0.img_attn.qkv.weight": "flux",
    "encoder.down.0.block.0.norm1.weight": "autoencoder",
    "transformer_blocks.0.": "a network under diffusers' names, which belongs into a folder with its config.json",
    "encoder.down_blocks.0.": "a VAE under diffusers' names, which belongs into a folder with its config.json",
}
NUMBERS = (
    "in_channels",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "patch_size",
    "num_layers",
    "num_single_layers",
)
LISTS = {"wan_transformer": ("patch_size",), "wan_vae": ("patch_size",)}  # entries of NUMBERS that are lists, or null
KIND_NAMES = {"flux": "a FLUX transformer", "autoencoder": "a FLUX VAE", "controlnet": "an XLabs ControlNet"}


def require_flux(paths: Mapping[str, Path], control_mode: int | None = None) -> None:
    """Make sure that the components of FLUX_STAGE are FLUX.1 and fit together. control_mode: `--control_mode`."""
    transformer, vae, control = (read_config(n, paths[n]) for n in ("flux_transformer", "flux_vae", "controlnet"))
    t5, clip = (read_encoder("flux_text", paths["flux_text"], part) for part in ("text_encoder_2", "text_encoder"))
    channels = transformer["in_channels"]
    if channels != FLUX_CHANNELS or transformer.get("out_channels") not in (None, FLUX_CHANNELS):
        kind = KNOWN_CHANNELS.get(channels, "no FLUX.1-dev")
        raise InputError(
            f"flux_transformer: {paths['flux_transformer']} is {kind} (in_channels {channels}, out_channels "
            f"{transformer.get('out_channels')}); needed: FLUX.1-dev or a fine-tune of it, in_channels {FLUX_CHANNELS}"
        )
    require_equal("flux_vae", paths, "latent_channels", vae.get("latent_channels"), LATENT_CHANNELS)
    for name, config in (("flux_transformer", transformer), ("controlnet", control)):
        _require_axes(name, paths, config)
        require_equal(
            name, paths, "joint_attention_dim (T5's width)", config["joint_attention_dim"], t5.get("d_model")
        )
        pooled = config["pooled_projection_dim"]
        require_equal(name, paths, "pooled_projection_dim (CLIP's width)", pooled, clip.get("hidden_size"))
    require_control(paths, control, transformer, control_mode)
    if not transformer["guidance_embeds"] and is_first_process():
        print(
            f"note: flux_transformer: {paths['flux_transformer']} has no distilled guidance, as FLUX.1-schnell has "
            "none: --guidance is without effect, and the number of steps is not its own",
            file=sys.stderr,
        )


def _require_axes(name: str, paths: Mapping[str, Path], config: Mapping) -> None:
    """Make sure that positions along three axes are turned, which together have the numbers of one head."""
    axes, head = config["axes_dims_rope"], config["attention_head_dim"]
    even = isinstance(axes, list | tuple) and len(axes) == 3 and all(isinstance(n, int) and n % 2 == 0 for n in axes)
    if not even or min(axes) <= 0 or sum(axes) != head:
        raise InputError(
            f"{name}: {paths[name]} has axes_dims_rope {axes}; needed: three even numbers with the sum {head}, its "
            "attention_head_dim"
        )


def require_control(paths: Mapping[str, Path], control: Mapping, transformer: Mapping, mode: int | None) -> None:
    """Make sure that a ControlNet of this config fits the transformer's, and that it has this mode."""
    width = lambda config: config["num_attention_heads"] * config["attention_head_dim"]  # noqa: E731
    require_equal("controlnet", paths, "width", width(control), width(transformer))
    require_equal("controlnet", paths, "in_channels", control["in_channels"], FLUX_CHANNELS)
    if hint := control.get("conditioning_embedding_channels"):
        hint *= control["patch_size"] ** 2
        require_equal("controlnet", paths, "conditioning_embedding_channels x patch_size²", hint, FLUX_CHANNELS)
    extra = control.get("extra_condition_channels") or 0
    require_equal("controlnet", paths, "extra_condition_channels (a mask, for inpainting)", extra, 0)
    blocks = [(control[key], transformer[key]) for key in ("num_layers", "num_single_layers")]
    if not any(own for own, _ in blocks):
        raise InputError(f"controlnet: {paths['controlnet']} has no blocks, so it controls nothing: it is damaged")
    if any(own > theirs for own, theirs in blocks) and is_first_process():
        print(
            f"note: controlnet: {paths['controlnet']} has more blocks than the transformer: the last are left out",
            file=sys.stderr,
        )
    count = control.get("num_mode")
    if count is None and mode is not None:
        raise InputError(f"--control_mode {mode}: the ControlNet {paths['controlnet']} has no modes; leave it out")
    if count is not None and mode is None:
        raise InputError(f"the ControlNet {paths['controlnet']} has {count} modes: choose one by --control_mode canny")
    if count is not None and mode >= count:
        known = ", ".join(f"{i} {name}" for i, name in enumerate(CONTROL_MODES[:count]))
        raise InputError(f"--control_mode {mode}: the ControlNet {paths['controlnet']} has {count} modes ({known}, …)")


def require_cogvideox(paths: Mapping[str, Path], transformer: Path) -> None:
    """Make sure that the components of GGI_STAGE fit the transformer in this folder, and that it is CogVideoX-5B."""
    require_video_transformer(transformer)
    config, vae = read_config("inbetween", transformer), read_config("cogvideox_vae", paths["cogvideox_vae"])
    require_equal("cogvideox_vae", paths, "latent_channels", vae.get("latent_channels"), LATENT_CHANNELS)
    wide = read_encoder("cogvideox_text", paths["cogvideox_text"], "text_encoder").get("d_model")
    require_equal("inbetween", {"inbetween": transformer}, "text_embed_dim", config["text_embed_dim"], wide)


def require_wan(paths: Mapping[str, Path]) -> None:
    """Make sure that the components of WAN_STAGE are a Wan VACE with the VAE of Wan 2.1, and fit together."""
    transformer, vae = (read_config(name, paths[name]) for name in ("wan_transformer", "wan_vae"))
    require_equal("wan_transformer", paths, "in_channels", transformer["in_channels"], LATENT_CHANNELS)
    require_equal("wan_transformer", paths, "vace_in_channels", transformer["vace_in_channels"], 96)
    require_equal("wan_transformer", paths, "patch_size", list(transformer["patch_size"]), [1, 2, 2])
    require_equal("wan_vae", paths, "z_dim", vae["z_dim"], LATENT_CHANNELS)
    for key in ("latents_mean", "latents_std"):
        count = len(vae[key]) if isinstance(vae[key], list | tuple) else vae[key]
        require_equal("wan_vae", paths, f"numbers in {key}:", count, LATENT_CHANNELS)
    require_equal("wan_vae", paths, "scale_factor_spatial", vae["scale_factor_spatial"], 8)
    wide = read_encoder("wan_text", paths["wan_text"], "text_encoder").get("d_model")
    require_equal("wan_transformer", paths, "text_dim", transformer["text_dim"], wide)


def require_video_transformer(folder: Path) -> None:
    """Make sure that the config in this folder is that of a transformer of CogVideoX-5B. Imports nothing heavy."""
    config = read_folder_config("inbetween", folder)
    if config.get("patch_size_t") is not None or config.get("ofs_embed_dim") is not None:
        raise InputError(
            f"inbetween: {folder} is CogVideoX 1.5 (patch_size_t {config.get('patch_size_t')}, ofs_embed_dim "
            f"{config.get('ofs_embed_dim')}); needed: one made from CogVideoX-5B-I2V, where both are null"
        )
    where = {"inbetween": folder}
    require_equal("inbetween", where, "out_channels", config.get("out_channels", LATENT_CHANNELS), LATENT_CHANNELS)


def read_encoder(name: str, path: Path, part: str) -> dict:
    """The config of one text encoder of a pipeline's folder; transformers reads those that bitsandbytes quantised."""
    if path.is_file():
        raise InputError(f"{name}: {path} is a file; needed: a pipeline's folder with tokenizers and text encoders")
    config = read_json(path / part / "config.json")
    if quantisation_of(config) != "bitsandbytes":
        require_plain(name, path / part, config)
    elif find_spec("bitsandbytes") is None:
        raise InputError(f"{name}: {path / part} is quantised by bitsandbytes: pip install bitsandbytes")
    return config


def read_config(name: str, path: Path) -> dict:
    """A network's config; of a file in the original format, derived from its tensors' shapes."""
    import diffusers

    folder = component_folder(name, path)
    if folder.is_file():
        return read_file_config(name, folder)
    config = read_folder_config(name, folder)
    parameters = inspect.signature(getattr(diffusers, NETWORKS[name]).__init__).parameters
    config = {key: p.default for key, p in parameters.items() if p.default is not p.empty} | config
    numbers = [key for key in NUMBERS if key in config and key not in LISTS.get(name, ())]
    if wrong := [key for key in numbers if type(config[key]) is not int]:
        raise InputError(f"{name}: {folder / 'config.json'}: {wrong[0]} is {config[wrong[0]]!r}, not a whole number")
    return config


def read_folder_config(name: str, folder: Path) -> dict:
    """Read config.json, without defaults, and check its class."""
    config = read_json(folder / "config.json")
    found = config.get("_class_name", NETWORKS[name])
    if found != NETWORKS[name]:
        raise InputError(f"{name}: {folder} holds {found}; needed: {NETWORKS[name]}")
    require_plain(name, folder, config)
    return config


def require_plain(name: str, folder: Path, config: Mapping) -> None:
    """Raise InputError for quantised weights: LoRA is added to plain ones, and `--memory` quantises by itself."""
    if method := quantisation_of(config):
        raise InputError(
            f"{name}: {folder} is quantised ({method}); needed: weights of 16 or 32 bits, of which --memory keeps "
            "fewer bits if need be"
        )


def quantisation_of(config: Mapping) -> str | None:
    """The method by which weights were quantised."""
    entry = config.get("quantization_config")
    return str(entry.get("quant_method", "unknown method") if isinstance(entry, dict) else entry) if entry else None


def read_file_config(name: str, path: Path) -> dict:
    """The config of a network in a single file, from its header."""
    from models.loading.files import reference_config

    wanted, found = CONVERTIBLE.get(name), find_content(path)
    if wanted is None:
        raise InputError(f"{name}: {path} is a file ({KIND_NAMES.get(found, found)}); needed: a folder of diffusers")
    if found != wanted:
        raise InputError(f"{name}: {path} holds {KIND_NAMES.get(found, found)}; needed: {KIND_NAMES[wanted]}")
    return reference_config(wanted, path)


def find_content(path: Path) -> str:
    """What a file of weights holds: a kind of `KIND_NAMES`, or a description."""
    from models.loading.files import open_weights

    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return "weights in GGUF, which are quantised"
    with open_weights(path) as handle:
        keys = list(handle.keys())
        content = next((kind for key, kind in CONTENTS.items() if any(key in k for k in keys)), "unknown weights")
        types = {handle.get_slice(key).get_dtype() for key in keys if key.endswith("weight")}
    integers = ", ".join(sorted(kind for kind in types if kind[0] in "IU"))
    known = content.startswith("weights quantised")
    return f"weights quantised to integers ({integers})" if integers and not known else content


def require_equal(name: str, paths: Mapping[str, Path], what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise InputError(f"{name}: {paths[name]} has {what} {found}; the networks beside it need {wanted}")
