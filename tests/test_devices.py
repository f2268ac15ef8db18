"""What lies on the card and what on the CPU, checked in a process that takes a pretend card for its accelerator."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, SECONDS


@pytest.mark.slow
def test_nothing_on_the_card_meets_the_cpu():
    command = [sys.executable, "-m", "pytest", "-q", "tests/on_pretend_card.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stdout
