"""Numbers for things in order of size, so that every run of numbers has its share of the large."""

import math

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def stride(count: int) -> int:
    """The step s of `number = place * s % count`, a numbering of `count` things.

    Without a common factor with `count`, so that each number is taken once, and near `count` over
    the golden ratio: the first places fall as evenly into any parts of the numbers as places can
    (the three-distance theorem).
    """
    nearest = max(1, round(count * GOLDEN))
    for distance in range(count):
        for one in (nearest + distance, nearest - distance):
            if 0 < one <= count and math.gcd(one, count) == 1:
                return one
    return 1
