"""The log on standard error: plain lines, or one JSON object per line."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Literal

import orjson


class JSONFormatter(logging.Formatter):
    """One line of JSON per record; `extra={"fields": {...}}` joins it, and a traceback stays in the same line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **getattr(record, "fields", {"message": record.getMessage()}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure_logging(log_format: Literal["text", "json"], level: str) -> None:
    """Send everything from `level` up to standard error, in place of what was configured before."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JSONFormatter()
        if log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "uvicorn"):  # one line per call to a member; what our own lines say already
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
