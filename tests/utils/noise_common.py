"""Helpers that the tests of noise share."""

import numpy as np

LATENT, MAP = (90, 60), (360, 240)


CENTRES = np.stack(np.indices(MAP[::-1])[::-1], axis=-1) + 0.5


EVERYWHERE = np.ones(MAP[::-1], bool)
