"""Progress of a download: the hub client's own bars in a terminal, a line now and then where there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

LINE_EVERY_S = 10.0


def logged_bar(log: Callable[[float], None], *, every_s: float = LINE_EVERY_S) -> type[Any]:
    """A class for `snapshot_download(tqdm_class=...)`. Where its bars are not shown, `log` gets the share of all bytes
    that is there, at most once in `every_s`.
    """
    from huggingface_hub.utils import tqdm

    lock = threading.Lock()
    last_logged_s = time.monotonic()

    class LoggedBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            self._num_bytes = 0.0
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal last_logged_s
            if self.disable and self._counts_bytes:
                with lock:  # files come side by side
                    self._num_bytes += n or 0
                    is_due = time.monotonic() - last_logged_s >= every_s
                    if is_due and self.total:
                        last_logged_s = time.monotonic()
                        log(min(1.0, self._num_bytes / self.total))
            return super().update(n)

    return LoggedBar
