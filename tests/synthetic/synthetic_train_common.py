"""Helpers that the tests of synthetic.train share."""

import synthetic.assemble
import synthetic.clips
import synthetic.pictures
import synthetic.train
from tests.support.helpers import exit_code, forget_accelerator


def train(stage: str, *arguments: object) -> int:
    """Run a stage in this process; returns the exit code that a shell would see."""
    try:
        return exit_code(lambda: synthetic.train.main([stage, *map(str, arguments)]))
    finally:
        forget_accelerator()
