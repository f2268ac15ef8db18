"""What lies on the card and what on the CPU, checked in a process that takes a pretend card for its accelerator."""

import pytest

from tests.helpers import end, start_module


@pytest.mark.slow
def test_nothing_on_the_card_meets_the_cpu():
    result = end(start_module("pytest", "-q", "tests/on_pretend_card.py"))
    assert result.returncode == 0, result.stdout
