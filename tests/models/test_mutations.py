"""Damaged weight, tokenizer and LoRA files load or end in one line (`python -m tests.models.mutations` draws more)."""

from collections import Counter

import pytest

from tests.models.mutations import damage_many
from tests.support.small import small_checkpoints


@pytest.mark.slow
def test_no_damaged_file_ends_in_a_traceback():
    outcomes = Counter(outcome.split(":")[0] for _, outcome in damage_many(small_checkpoints() / "tiny", 60, seed=0))
    assert outcomes.keys() == {"InputError", "FloatingPointError", "loaded"}
