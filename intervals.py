"""The 95% interval of a share, for the benchmarks' scores and for rankings."""

import math


def wilson(right, n, z=1.96):
    """95% interval of a share, (low, high) in [0, 1] (Wilson 1927): honest near 0 and 1, unlike +-z sqrt(pq/n)."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    zz = z * z / n
    middle = (p + zz / 2) / (1 + zz)
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return max(0.0, middle - half), min(1.0, middle + half)
