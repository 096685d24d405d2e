"""How many cores this process may use."""

import os


def cores() -> int:
    """Those of its affinity, where the system knows one; a container's quota is not seen."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
