"""How log lines look: text for people, one JSON object a line for clusters.

Both carry what `log_context` knows of the call, and the `fields` that a line's `extra` gives.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from services.rpc.log_context import Field, bound

_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class TextFormatter(logging.Formatter):
    """Writes `time level logger: message key=value ...`."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Returns the line without a trace."""
        fields = {**_fields_of(record), **bound()}
        return " ".join((super().formatMessage(record), *(f"{k}={v}" for k, v in fields.items())))


class JsonFormatter(logging.Formatter):
    """Writes one JSON object on one line, whatever the message holds."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "component": self._component,
            **_fields_of(record),
            **bound(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str)


def set_up_logging(log_format: str, level: str, component: str) -> None:
    """Sends every logger's lines, and Python's warnings, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(component) if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(capture=True)
    # It has a line for every request to another engine, as often as there are steps.
    logging.getLogger("httpx2").setLevel(logging.WARNING)


def _fields_of(record: logging.LogRecord) -> Mapping[str, Field]:
    fields: Mapping[str, Field] = getattr(record, "fields", {})
    return fields
