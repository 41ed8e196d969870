"""Where this package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ENSEMBLE_CACHE`, else `~/.cache/ensemble-server`: conversions, merges, digests."""
    return Path(os.environ.get("ENSEMBLE_CACHE") or "~/.cache/ensemble-server").expanduser()
