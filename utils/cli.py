"""Command line of all scripts: flags, argument types, and errors as one line with exit code 2, never a traceback."""

import argparse
import dataclasses
import errno
import gc
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BAD_INPUT, FAILED, INTERRUPTED = 2, 3, 130
LARGEST_SIDE = 16384  # pixels; limit of the sizes that flags accept
LONGEST_NAME = 200  # bytes of a folder's name: file systems take 255, and names of runs are longer than their LoRA's


class InputError(ValueError):
    """Invalid user input. The message says what is wrong, where, and what to do, in one line."""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the module docstring as written, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class Arguments(argparse.Namespace):
    """Parsed flags, which know whether they decide the result."""

    __slots__ = ("actions",)  # not among the flags of vars()

    def identity(self) -> dict[str, object]:
        """{flag: value} of flags that decide the result, for a manifest; not those for folders, speed or length."""
        free = {action.dest for action in self.actions if not getattr(action, "decides", True)}
        return {name: value for name, value in vars(self).items() if name not in free}

    def defaults(self) -> dict[str, object]:
        """Values to assume for flags that an older manifest lacks."""
        return {action.dest: action.default for action in self.actions}


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, as the scripts do. doc: the module docstring."""

    def __init__(self, doc: str, prog: str | None = None):
        super().__init__(prog=prog, description=doc, formatter_class=Help)

    def add_argument(self, *names: str, decides: bool = True, **options) -> argparse.Action:
        """Like argparse's own. decides: whether the value decides the result, see `Arguments.identity`."""
        action = super().add_argument(*names, **options)
        action.decides = decides
        return action

    def parse_args(self, args=None, namespace=None) -> Arguments:
        found = super().parse_args(args, namespace or Arguments())
        found.actions = [*self._actions]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.actions += action.choices[getattr(found, action.dest)]._actions
        return found

    def error(self, message: str) -> None:
        raise InputError(f"{message}; see {self.prog} --help")


def flag(default: object, about: str, **options: object) -> dataclasses.Field:
    """A field of a settings dataclass from which a flag is made. options: those of `Parser.add_argument`."""
    return dataclasses.field(default=default, metadata={"help": about, **options})


def add_settings(parser: Parser, settings: type, **defaults: object) -> None:
    """Add a flag for each field of a settings dataclass. defaults: those that differ from the dataclass's."""
    for field in dataclasses.fields(settings):
        default = defaults.get(field.name, field.default)
        parser.add_argument(f"--{field.name}", default=default, **field.metadata)


def settings_of(settings: type, args: argparse.Namespace):
    """The settings that the flags of `add_settings` gave."""
    return settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(settings)})


def run_script(main: Callable[[], None]) -> None:
    """Call `main` and exit: 0, 2 for bad input, 3 when the work fails (disk full, I/O error, NaN), 130 on Ctrl-C."""
    set_up_libraries()
    try:
        main()
    except InputError as error:
        _stop(error, BAD_INPUT)
    except FloatingPointError as error:  # NaN or infinity where a number belongs
        _stop(error, FAILED)
    except OSError as error:
        hint = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        where = f": {error.filename}" if error.filename else ""
        _stop(f"{error.strerror or error}{where}{hint}", FAILED)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not worth importing for this
            raise
        _stop(f"out of memory ({error}); try a smaller --memory mode", FAILED)
    except KeyboardInterrupt:
        _stop("interrupted; run the same command again to continue", INTERRUPTED)


def set_up_libraries() -> None:
    """Set environment variables that the libraries read when they are imported or first used; those set are kept."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # errors are still raised
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    # OpenMP threads that spin while they wait are many times slower when anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Who holds torch to older instructions holds oneDNN to them as well: where oneDNN sees AMX, torch's attention asks
    # for a layout in bfloat16 that its own older kernels refuse.
    if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import the heavy libraries inside the block, and exclude their objects from garbage collection.

    They are half a million permanent objects: collections would cost two seconds of the imports and two at the exit.
    """
    if "diffusers" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def _stop(message: object, code: int) -> None:
    one_line = " ".join(str(message).split())
    print(f"error: {one_line}", file=sys.stderr, flush=True)
    sys.exit(code)


def positive_int(text: str) -> int:
    """argparse type: an integer above 0."""
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def non_negative_int(text: str) -> int:
    """argparse type: an integer of 0 or more."""
    value = _number(int, text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def seed(text: str) -> int:
    """argparse type: a seed from 0 to 2^63 - 1, which leaves room for seed + 1, … in 64 bits."""
    value = non_negative_int(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not below 2^63")
    return value


def seed_or_draw(text: str) -> int:
    """argparse type: a seed, or -1 to have one drawn."""
    return -1 if text == "-1" else seed(text)


def folder_name(name: str) -> str:
    """argparse type: one plain folder name."""
    if prompt_text(name) in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise argparse.ArgumentTypeError(f"{name!r} is not one plain folder name")
    if len(name.encode()) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"{name[:20]!r}… is longer than {LONGEST_NAME} bytes")
    return name


def prompt_text(text: str) -> str:
    """argparse type: text that can be written as UTF-8: no bytes of another encoding, no halves of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text: save or type it as UTF-8") from error
    return text


def finite_float(text: str) -> float:
    """argparse type: a number that is not NaN or infinite."""
    value = _number(float, text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = finite_float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def guidance_float(text: str) -> float:
    """argparse type: a guidance scale of 1 (off) or more."""
    value = finite_float(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1, which means no guidance: use 1")
    return value


def _number(kind: type, text: str) -> int | float:
    try:
        return kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error


def non_negative_float(text: str) -> float:
    """argparse type: a finite number of 0 or more."""
    value = finite_float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def decay(text: str) -> float:
    """argparse type: a number in [0, 1), the decay of a running mean."""
    value = unit_float(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text} would keep everything: use a number below 1")
    return value


def unit_float(text: str) -> float:
    """argparse type: a number in [0, 1]."""
    value = _number(float, text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def size(text: str) -> tuple[int, int]:
    """argparse type: `WIDTHxHEIGHT`, for example 1080x720."""
    width, _, height = text.partition("x")
    if not re.fullmatch(r"0*[1-9][0-9]*x0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, for example 90x60")
    if max(int(width), int(height)) > LARGEST_SIDE:
        raise argparse.ArgumentTypeError(f"{text!r} has a side above {LARGEST_SIDE}")
    return int(width), int(height)


def require_writable(folder: Path) -> None:
    """Raise InputError unless `folder` can be made and written to. Creates nothing."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"cannot write to {folder}: {existing} is not a folder")
    # Permission bits count for root too: a read-only folder is meant to stay unchanged.
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.stat().st_mode & 0o222:
        raise InputError(f"cannot write to {folder}: {existing} is read-only; write elsewhere")
