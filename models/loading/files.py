"""Checkpoint files, in diffusers' layout or the reference's, read into diffusers' models."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, CogVideoXTransformer3DModel, FluxControlNetModel, FluxTransformer2DModel
from safetensors import safe_open

from models.finite import require_finite_tensors
from models.loading.keymaps import (
    StateDict,
    flux_autoencoder,
    flux_controlnet,
    flux_transformer,
    ggi_transformer,
    merge_tensor,
    merged_names,
)
from models.loading.whole import open_weights
from utils.cli import InputError
from utils.files import read_json

MODEL_KINDS: dict[str, tuple[type, Callable, str]] = {
    "flux": (FluxTransformer2DModel, flux_transformer, "flux_params"),
    "autoencoder": (AutoencoderKL, flux_autoencoder, "ae_params"),
    "controlnet": (FluxControlNetModel, flux_controlnet, "flux_params"),
}


class Shards(Mapping[str, torch.Tensor]):
    """Lazy view of all *.safetensors files of a folder: a tensor is read when asked for, and no file stays open."""

    def __init__(self, folder: Path, files: Sequence[Path] | None = None):
        """files: those to read, instead of all."""
        files = files or sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"{folder} holds no .safetensors file")
        self._file_of: dict[str, Path] = {}
        for file in files:
            with open_weights(file) as handle:
                for key in handle.keys():  # noqa: SIM118 - not a dict
                    if key in self._file_of:
                        raise InputError(f"{self._file_of[key]} and {file} both hold {key}: leave one of them")
                    self._file_of[key] = file

    def __getitem__(self, key: str) -> torch.Tensor:
        with safe_open(self._file_of[key], "pt") as handle:
            return handle.get_tensor(key).clone()  # cloned so that the memory map is released

    def empty_like(self, key: str) -> torch.Tensor:
        """A tensor of the same shape and dtype on the meta device."""
        with safe_open(self._file_of[key], "pt") as handle:
            return torch.empty_like(handle.get_tensor(key), device="meta")  # no data is read from the memory map

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def build_empty(cls: type, config: dict, state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Build a diffusers model on the meta device; its keys and shapes must be exactly those of `state`.

    Raises ValueError naming the first missing, unexpected or misshapen key.
    """
    with torch.device("meta"):
        model = cls.from_config(config)
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{cls.__name__}: missing keys {missing[:3]} ({len(missing)}), unexpected {extra[:3]} ({len(extra)})"
        )
    for key, shape in wanted.items():
        if state[key].shape != shape:
            raise ValueError(f"{cls.__name__}: {key} has shape {tuple(state[key].shape)}, not {tuple(shape)}")
    return model


def build(cls: type, config: dict, state: StateDict) -> torch.nn.Module:
    """Build a diffusers model around the tensors of `state`, without copying. Strict: see `build_empty`."""
    model = build_empty(cls, config, state)
    model.load_state_dict({key: tensor.contiguous() for key, tensor in state.items()}, strict=True, assign=True)
    return model.eval()


def read_weights(path: Path) -> tuple[StateDict, dict]:
    """Read all tensors of a safetensors file, and its metadata with JSON values decoded."""
    with open_weights(path) as handle:
        metadata = {key: _decode(value) for key, value in (handle.metadata() or {}).items()}
        return {key: handle.get_tensor(key) for key in handle.keys()}, metadata  # noqa: SIM118 - not a dict


def read_lora(path: Path) -> tuple[StateDict, dict]:
    """`read_weights` for a LoRA: floating-point numbers, 8-bit ones as bfloat16.

    Raises InputError for integers and for rank 0, FloatingPointError for NaN and infinity.
    """
    tensors, metadata = read_weights(path)
    for key, tensor in tensors.items():
        if tensor.ndim and not tensor.is_floating_point():
            raise InputError(
                f"{path}: {key} holds {tensor.dtype}; quantised LoRAs are not read: convert it to bfloat16"
            )
        if not tensor.numel():
            raise InputError(f"{path}: {key} is empty, {tuple(tensor.shape)}: a LoRA of rank 0 does nothing")
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensors[key] = tensor.to(torch.bfloat16)
    require_finite_tensors(tensors, str(path), "its training diverged, or the file is damaged")
    return tensors, metadata


def _decode(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn any exception of a library in the block into an InputError: the files that it reads are a user's.

    Errors with a message of their own, and running out of memory, pass unchanged.
    """
    try:
        yield
    except (InputError, FloatingPointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {error}") from error


def load_reference_file(kind: str, path: Path) -> torch.nn.Module:
    """Build the diffusers model of a reference-format file. kind: flux, autoencoder or controlnet."""
    cls, convert, params = MODEL_KINDS[kind]
    source, metadata = read_weights(path)
    with blaming(f"{path} is not a {kind} checkpoint"):
        return build(cls, *convert(source, metadata.get(params)))


def reference_layout(kind: str, path: Path) -> tuple[dict, StateDict]:
    """The diffusers config and the tensors, on the meta device, of a reference-format file, from its header alone."""
    with open_weights(path) as handle, torch.device("meta"):
        shapes = {key: torch.empty(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
        params = _decode((handle.metadata() or {}).get(MODEL_KINDS[kind][2], "null"))
    with blaming(f"{path} is not a {kind} checkpoint"):
        return MODEL_KINDS[kind][1](shapes, params)


def reference_config(kind: str, path: Path) -> dict:
    """Derive the diffusers config of a reference-format file from its header alone."""
    return reference_layout(kind, path)[0]


def load_ggi_transformer(folder: Path, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """Load the 48-channel transformer of a folder in either layout, merging and casting tensor by tensor."""
    config = read_json(folder / "config.json") | {"_name_or_path": str(folder)}  # not where it was trained
    source = Shards(folder)
    with blaming(f"{folder} is not a GGI transformer"):
        config, _ = ggi_transformer(config, {})
        state = {name: merge_tensor(source, name).to(dtype) for name in merged_names(source)}
        return build(CogVideoXTransformer3DModel, config, state)
