"""How many cores this process may use."""

import os


def count() -> int:
    """Cores this process may run on, or the machine's where the system doesn't say."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
