"""Check that the files of a weight set's components are complete, before anything is loaded.

`require_whole` reads no weights: a second is enough for the largest networks. Whether a network's tensors fit its
configuration, and tokenizers their encoders: `models/loading/fit.py`. Nothing heavy is imported here.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from utils.cli import InputError
from utils.files import read_json

FLUX_TEXT_FILES = [
    "model_index.json",
    "scheduler/*",
    "tokenizer/*",
    "tokenizer_2/*",
    "text_encoder/*",
    "text_encoder_2/*",
]
# component -> (preset entry it comes from, sub-folder in a pipeline repository, files needed from there)
COMPONENTS = {
    "flux_transformer": ("flux", "transformer", ["transformer/*"]),
    "flux_vae": ("flux", "vae", ["vae/*"]),
    "flux_text": ("flux", None, FLUX_TEXT_FILES),
    "controlnet": ("controlnet", None, ["*.safetensors", "*.json"]),
    "cogvideox_vae": ("cogvideox", "vae", ["vae/*"]),
    "cogvideox_transformer": ("cogvideox", "transformer", ["transformer/*"]),
    "cogvideox_text": ("cogvideox", None, ["model_index.json", "scheduler/*", "tokenizer/*", "text_encoder/*"]),
    "wan_vae": ("wan", "vae", ["vae/*"]),
    "wan_transformer": ("wan", "transformer", ["transformer/*"]),
    "wan_text": ("wan", None, ["model_index.json", "scheduler/*", "tokenizer/*", "text_encoder/*"]),
}
CONVERTIBLE = {  # component -> its kind in models.convert
    "flux_transformer": "flux",
    "flux_vae": "autoencoder",
    "controlnet": "controlnet",
    "inbetween": "ggi",
}
# component -> class of the network that its config.json must name
NETWORKS = {
    "flux_transformer": "FluxTransformer2DModel",
    "flux_vae": "AutoencoderKL",
    "controlnet": "FluxControlNetModel",
    "cogvideox_transformer": "CogVideoXTransformer3DModel",
    "cogvideox_vae": "AutoencoderKLCogVideoX",
    "inbetween": "CogVideoXTransformer3DModel",
    "wan_transformer": "WanVACETransformer3DModel",
    "wan_vae": "AutoencoderKLWan",
}
SIZES = ("in_channels", "sample_width", "sample_height", "temporal_compression_ratio", "max_text_seq_length")
NEEDED = {  # class -> numbers of its config.json that the stages read themselves
    "CogVideoXTransformer3DModel": (*SIZES, "use_learned_positional_embeddings"),
    "AutoencoderKL": ("scaling_factor", "shift_factor"),
    "AutoencoderKLCogVideoX": ("scaling_factor",),
    "WanVACETransformer3DModel": ("in_channels", "num_layers"),
}
# Numbers, or all of a list, that must be above zero wherever they stand: they divide, or are counts
POSITIVE = (
    *SIZES,
    "scaling_factor",
    "latents_std",
    "norm_num_groups",
    "num_attention_heads",
    "num_heads",
    "relative_attention_max_distance",
    "spatial_interpolation_scale",
    "temporal_interpolation_scale",
)
# component -> {tokenizer: the text encoder that it serves}, folders of the pipeline
ENCODERS = {
    "flux_text": {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    "cogvideox_text": {"tokenizer": "text_encoder"},
    "wan_text": {"tokenizer": "text_encoder"},
}
# class in transformers of each text encoder
ENCODER_CLASSES = {
    "flux_text": {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
    "cogvideox_text": {"text_encoder": "T5EncoderModel"},
    "wan_text": {"text_encoder": "UMT5EncoderModel"},
}
SNR = ("prediction_type", "rescale_betas_zero_snr", "snr_shift_scale")
SCHEDULES = {  # entries of scheduler_config.json, for which diffusers would silently use other values
    "flux_text": (),  # FLUX's schedule is computed (`models/flux/network.py`)
    "cogvideox_text": ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", *SNR, "timestep_spacing"),
    "wan_text": ("num_train_timesteps",),  # the rest is set (`models/inbetween/stages.py`)
}
UNBOUNDED = ("lambda_min_clipped",)  # entry of a scheduler's config that is -Infinity when it is off
# A tokenizer is one file, or those of its kind (the last word of its class in transformers).
TOKENIZER = "tokenizer.json"
VOCABULARIES = {"CLIPTokenizer": ("vocab.json", "merges.txt"), "T5Tokenizer": ("spiece.model",)}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHARD = re.compile(r"(?P<stem>.+)-\d+-of-\d+\.safetensors")
MAGIC = {  # first bytes of other files that are often named .safetensors
    b"version https://git-lfs": "a Git LFS pointer: run git lfs pull",
    b"<": "a web page, not weights: download the file itself",
    b"PK\x03\x04": "a pickle or another zip archive: convert it to safetensors",
    b"\x80\x02": "a pickle: convert it to safetensors",
    b"GGUF": "GGUF, which is not read here: use safetensors",
}


def component_folder(name: str, path: Path) -> Path:
    """Folder of a component's config.json: the pipeline's sub-folder or `path` itself. A file is returned as is."""
    subfolder = COMPONENTS[name][1] if name in COMPONENTS else None
    return path / subfolder if subfolder and (path / subfolder).is_dir() else path


class IncompleteError(InputError):
    """A file of a component is not there: a download may bring it."""


def require_whole(name: str, folder: Path) -> None:
    """Raise InputError, in one line with the file's name, unless the component's files are whole.

    folder: of its config.json or, for text, of the pipeline; or a weight file in the reference's format.
    IncompleteError: a file is missing.
    """
    try:
        if folder.is_file():
            _require_file(folder, name in CONVERTIBLE and name != "inbetween")
        elif name in ENCODERS:
            _require_text(name, folder)
        elif name not in NETWORKS:  # of captions
            require_json(folder / "config.json")
            require_weights(folder, "model", pickles=True)
        else:
            require_kind(name, folder)
            require_weights(folder, "diffusion_pytorch_model", any_name=name == "inbetween")
    except InputError as error:
        raise type(error)(f"{name}: {error}") from error


def _require_file(path: Path, convertible: bool) -> None:
    if path.suffix in PICKLES:
        raise InputError(_pickle(path))
    if not convertible:
        raise InputError(f"{path} is a file; a folder in diffusers format, with config.json, is needed")
    open_weights(path, "np")


def _require_text(name: str, folder: Path) -> None:
    index = require_json(folder / "model_index.json")
    _require_class(folder, index, "scheduler", "diffusers")
    for tokenizer, encoder in ENCODERS[name].items():
        _require_class(folder, index, tokenizer, "transformers")
        _require_class(folder, index, encoder, "transformers", ENCODER_CLASSES[name][encoder])
    schedule = require_json(folder / "scheduler" / "scheduler_config.json")
    if lost := [key for key in SCHEDULES[name] if key not in schedule]:
        raise InputError(f"{folder / 'scheduler' / 'scheduler_config.json'} says no {lost[0]}: it is damaged")
    for tokenizer, encoder in ENCODERS[name].items():
        _require_tokenizer(folder / tokenizer, index[tokenizer][1].removesuffix("Fast"))
        config = folder / encoder / "config.json"
        require_numbers(config, ENCODER_CLASSES[name][encoder], require_json(config))
        require_weights(folder / encoder, "model")


def _require_class(folder: Path, index: Mapping, part: str, library: str, wanted: str | None = None) -> None:
    """Raise InputError unless model_index.json names a class of this library for a part. wanted: the only one."""
    where, entry = folder / "model_index.json", index.get(part)
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
        raise InputError(f"{where} names no {part}: it is damaged or of another pipeline")
    if entry[0] != library or wanted not in (None, entry[1]):
        raise InputError(
            f"{where} names {entry[1]} of {entry[0]} for {part}; {wanted or 'a class'} of {library} is needed: it is "
            "damaged or of another pipeline"
        )


def _require_tokenizer(folder: Path, kind: str) -> None:
    require_json(folder / "tokenizer_config.json")
    if (folder / TOKENIZER).is_file():
        require_json(folder / TOKENIZER)
        return
    for file in VOCABULARIES.get(kind, (TOKENIZER,)):
        if not (folder / file).is_file():
            raise IncompleteError(f"{folder / file} is missing: the tokenizer would know no words")


def require_json(path: Path) -> dict:
    """Read a JSON object. Raises IncompleteError when it is missing, InputError when it is damaged or holds NaN."""
    if not path.is_file():
        raise IncompleteError(f"{path} is missing")
    data = read_json(path)
    _require_finite(path, data)
    return data


def _require_finite(path: Path, value: object, key: str = "") -> None:
    """Raise InputError for NaN and infinity anywhere in a value of JSON. key: that it stands under."""
    if isinstance(value, float) and not math.isfinite(value) and key not in UNBOUNDED:
        raise InputError(f"{path} says {key} {value}: it is damaged, fetch it again")
    if isinstance(value, Mapping):
        for inner, entry in value.items():
            _require_finite(path, entry, inner)
    elif isinstance(value, list):
        for entry in value:
            _require_finite(path, entry, key)


def require_kind(name: str, folder: Path) -> None:
    """Raise InputError unless config.json is that of the component's network."""
    config, wanted = require_json(folder / "config.json"), NETWORKS[name]
    found = config.get("_class_name") or config.get("architectures") or wanted
    if found != wanted:
        raise InputError(f"{folder} holds {found}; {wanted} is needed")
    require_numbers(folder / "config.json", wanted, config)


def require_numbers(path: Path, network: str, config: Mapping) -> None:
    """Raise InputError unless the numbers in a network's config are those of one that can compute."""
    for key in NEEDED.get(network, ()):
        if not isinstance(config.get(key), int | float):
            raise InputError(f"{path} says no {key}: it is damaged")
    _require_finite(path, config)
    for key in POSITIVE:
        values = config.get(key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int | float) and value <= 0:
                raise InputError(f"{path} says {key} {value}, which must be above 0: it is damaged, fetch it again")


def require_weights(folder: Path, stem: str, *, any_name: bool = False, pickles: bool = False) -> None:
    """Raise InputError unless the folder's weights are whole safetensors files, all shards included.

    stem: of the names that the library loads. any_name: files of other names are loaded too. pickles: they may lie
    beside, and are not loaded.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix in PICKLES)
    if found and not (pickles and any(folder.glob("*.safetensors"))):
        raise InputError(_pickle(found[0]))
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.is_file():
        _require_shards(index)
    elif single.is_file():
        open_weights(single, "np")
    else:
        found = sorted(folder.glob("*.safetensors"))
        if shards := [match for path in found if (match := SHARD.fullmatch(path.name))]:
            raise IncompleteError(f"{folder / shards[0]['stem']}.safetensors.index.json is missing")
        if not (any_name and found):
            raise IncompleteError(_no_weights(folder, stem, found))
        for path in found:
            open_weights(path, "np")


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that `require_weights` checked: all shards, or the only file."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{stem}.safetensors"]
    return [folder / shard for shard in sorted(set(read_json(index)["weight_map"].values()))]


def _require_shards(index: Path) -> None:
    """Raise InputError unless every shard of an index is there and holds the tensors that are looked for in it."""
    places = require_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(shard, str) for shard in places.values()) or not places:
        raise InputError(f"{index} is damaged: it has no weight_map")
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if not path.is_file():
            raise IncompleteError(f"{path} is missing")
        held = set(open_weights(path, "np").keys())
        if lost := sorted(key for key, place in places.items() if place == shard and key not in held):
            raise InputError(f"{path} lacks {lost[0]}, which {index.name} says it holds: fetch both again")


def _no_weights(folder: Path, stem: str, found: list[Path]) -> str:
    variants = [path for path in found if path.name.startswith(f"{stem}.")]
    if not variants:
        return f"{folder / stem}.safetensors is missing"
    variant = variants[0].name.removeprefix(f"{stem}.").removesuffix(".safetensors")
    return (
        f"{folder} holds only the variant {variant} ({variants[0].name}): rename it to {stem}.safetensors to use it, "
        "or fetch the weights without variant"
    )


def _pickle(path: Path) -> str:
    return (
        f"{path} is a pickle, which may run code when it is read: load it where you trust it (from_pretrained with "
        "use_safetensors=False), write it with save_pretrained, which makes safetensors, and leave the pickle out"
    )


def open_weights(path: Path, framework: str = "pt") -> safe_open:
    """Open a safetensors file. framework: of its tensors, pt or np. Raises InputError if it is missing or damaged."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; a .safetensors file is needed")
    if not path.is_file():
        raise IncompleteError(f"{path} does not exist")
    try:
        return safe_open(path, framework)
    except Exception as error:  # safetensors does not export its exception type
        with path.open("rb") as file:
            begin = file.read(512).lstrip()
        kind = next((what for magic, what in MAGIC.items() if begin.startswith(magic)), None)
        if kind:
            raise InputError(f"{path} is {kind}") from error
        raise InputError(
            f"{path} is not a readable safetensors file ({error}), cut short? Remove it, then fetch or make it again"
        ) from error
