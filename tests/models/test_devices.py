"""Devices of tensors, checked in a process whose accelerator is a pretend GPU."""

import pytest

from tests.support.helpers import end, start_module


@pytest.mark.slow
def test_nothing_on_the_gpu_meets_the_cpu():
    result = end(start_module("pytest", "-q", "tests/support/on_pretend_gpu.py"))
    assert result.returncode == 0, result.stdout
