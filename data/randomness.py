"""Random numbers that depend on a key alone, never on what was drawn before.

A resumed run, and a run at another number of ranks, must draw the same numbers for the same pack.
So every use names its own stream by (seed, purpose, two numbers) and nothing shares a generator.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for: equal numbers for two purposes would tie them together."""

    GROUPS = 0  # (epoch, 0): the order of an epoch's row groups
    SAMPLES = 1  # (epoch, window): the order of a window's samples
    MASKS = 2  # (pack position, 0): which history items are hidden
    NEGATIVES = 3  # (pack position, 0): the drawn candidates
    EVALUATION = 4  # (0, window): the order of evaluation samples
    REORDERS = 5  # (pack position, 0): which samples change their order, and how


def generator(seed: int, purpose: Purpose, first: int, second: int = 0) -> np.random.Generator:
    """The generator of one stream.

    Philox is a function of a key and a 256-bit counter. The seed and the purpose are its key, the
    two numbers the counter's upper half; a stream walks the lower half, so no two streams meet.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, first, second], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
