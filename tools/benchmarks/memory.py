"""How much memory this process has used."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """The most memory that the process has used so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # What the system counts of resources begins with what the process had before it became this program.
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
