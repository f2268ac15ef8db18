"""Run tests.parity on tests/golden unchanged, on folders without vectors, and with mistakes made in the code.

    python -m tests.models.parity_mistakes

Each mistake is made where the scripts would make it, and only its own item detects it. Prints JSON:

    {"runs": [[exit code, lines] of tests/golden, an empty folder, none], "mistakes": {mistake: [failing quantities]}}

Runs in its own process, because tests.parity chooses MKL's instruction set, which works once per process.
"""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models import convert
from models.flux import alignment, anchors, lora
from models.flux import network as flux
from models.inbetween import pipeline as inbetween
from models.loading import files, keymaps
from tests import parity
from tests.models import parity_models
from tests.support.helpers import ROOT, exit_code
from utils import layout as arcs

GOLDEN = ROOT / "tests" / "golden"
Mistake = Callable[[pytest.MonkeyPatch], None]


def narrower_mask(patch: pytest.MonkeyPatch) -> None:
    true_mask = parity.unreliable_mask
    patch.setattr(parity, "unreliable_mask", lambda code, n: true_mask(code, n - 1))


def token_count_in_the_schedule(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parity, "anchor_schedule", lambda n, w, h: flux.shifted_schedule(n, (w // 16) * (h // 16)))


def draws_in_half_precision(patch: pytest.MonkeyPatch) -> None:
    true_draw = parity_models.draw_noise
    patch.setattr(parity_models, "draw_noise", lambda shape, seed: true_draw(shape, seed).half().float())


def more_guidance(patch: pytest.MonkeyPatch) -> None:
    true_velocity = anchors.velocity
    patch.setattr(anchors, "velocity", lambda *a, guidance, **k: true_velocity(*a, guidance=guidance + 0.5, **k))


def unswapped_norm_out(patch: pytest.MonkeyPatch) -> None:
    def unswapped(source, params=None):
        config, state = keymaps.flux_transformer(source, params)
        for part in ("weight", "bias"):
            scale, shift = state[f"norm_out.linear.{part}"].chunk(2)
            state[f"norm_out.linear.{part}"] = torch.cat([shift, scale])
        return config, state

    cls, _, params = convert.MODEL_KINDS["flux"]
    patch.setitem(convert.MODEL_KINDS, "flux", (cls, unswapped, params))


def inverted_mask(patch: pytest.MonkeyPatch) -> None:
    true_encode = parity_models.encode_warped
    patch.setattr(parity_models, "encode_warped", lambda m, image, mask, eps: true_encode(m, image, 1 - mask, eps))


def missing_lora(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parity_models, "load_lora", lambda model, state, weight: None)


def scaled_residuals(patch: pytest.MonkeyPatch) -> None:
    true_velocity = alignment.velocity
    patch.setattr(alignment, "velocity", lambda *a, **k: true_velocity(*a, control_weight=0.8, **k))


def both_loras_clipped_together(patch: pytest.MonkeyPatch) -> None:
    true_step = parity_models.optimizer_step

    def clip_all(optimizer, groups, max_norm):
        return true_step(optimizer, [optimizer.param_groups[0]["params"]], max_norm)

    patch.setattr(parity_models, "optimizer_step", clip_all)


def swapped_condition_channels(patch: pytest.MonkeyPatch) -> None:
    cls = inbetween.CogVideoXInbetweenPipeline
    true_encode = cls.encode_conditions
    patch.setattr(cls, "encode_conditions", lambda *a: true_encode(*a).roll(16, dims=2))


def end_drawn_before_start(patch: pytest.MonkeyPatch) -> None:
    true_draw = parity_models.ConditionEps.draw

    def draw(*arguments, **options):
        eps = true_draw(*arguments, **options)
        return parity_models.ConditionEps(eps.end, eps.start, eps.edges)

    patch.setattr(parity_models.ConditionEps, "draw", draw)


def unmerged_lora(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "merge_tensor", lambda s, n: s[n] if n in s else s[keymaps.with_base(n)])


def mix_that_loses_variance(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parity, "blend_noise", lambda warped, fresh, alpha: alpha * fresh + (1 - alpha) * warped)


def lora_on_one_block_less(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lora, "SINGLE_BLOCKS", range(1, 4))


def another_numbering(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(arcs, "ARC_STEPS", 46)


MISTAKES: dict[str, Mistake] = {  # by item
    "1b narrower mask": narrower_mask,
    "2 token count in the schedule": token_count_in_the_schedule,
    "3 draws in half precision": draws_in_half_precision,
    "3 more guidance": more_guidance,
    "3 unswapped norm_out": unswapped_norm_out,
    "3 inverted mask": inverted_mask,
    "4 missing LoRA": missing_lora,
    "5 scaled residuals": scaled_residuals,
    "5 both LoRAs clipped together": both_loras_clipped_together,
    "6 swapped condition channels": swapped_condition_channels,
    "6 end drawn before start": end_drawn_before_start,
    "6 unmerged LoRA": unmerged_lora,
    "7 mix that loses variance": mix_that_loses_variance,
    "8 LoRA on one block less": lora_on_one_block_less,
    "9 another numbering": another_numbering,
}

DAMAGE = {  # mistake: file of tests/golden, original text, replacement
    "2 another size": ("2_schedule/schedules.json", '"requested":[1080', '"requested":[1100'),
    "8 unknown key": ("8_inventory/flux_ae.json", '"decoder.conv_in.bias"', '"decoder.conv_on.bias"'),
}


def failed(golden: parity.Golden, item: str) -> list[str]:
    """Quantities of an item that fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "ITEMS", {item: parity.ITEMS[item]})
        return [check.quantity for _, check in parity.checks(golden) if check.verdict == "FAIL"]


def damaged(folder: Path, file: str, old: str, new: str) -> parity.Golden:
    """A folder with one changed file of the golden vectors."""
    path = folder / file
    path.parent.mkdir(parents=True)
    path.write_text((GOLDEN / file).read_text().replace(old, new))
    return parity.Golden(folder, folder)


def run(folder: Path) -> tuple[int, list[str]]:
    """Exit code and lines of tests.parity on a folder."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", ["parity", str(folder)])
        return exit_code(parity.main), out.getvalue().splitlines()


def main() -> None:
    golden, found = parity.Golden(GOLDEN, GOLDEN.parent / "data"), {}
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(path) for path in (GOLDEN, Path(folder), Path(folder) / "absent")]
        for mistake, change in DAMAGE.items():
            found[mistake] = failed(damaged(Path(folder) / mistake, *change), mistake.split()[0])
    for mistake, make in MISTAKES.items():
        with pytest.MonkeyPatch.context() as patch:
            make(patch)
            found[mistake] = failed(golden, mistake.split()[0])
    json.dump({"runs": runs, "mistakes": found}, sys.stdout)


if __name__ == "__main__":
    main()
