"""Logs: readable lines on a terminal, JSON in the notebook's `logs/society.jsonl`.

Every line carries `society`; lines about an agent carry `agent`, lines about a run `run`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import structlog
from structlog.stdlib import BoundLogger
from structlog.typing import Processor

_SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def configure(file: Path, *, society: str, console: bool) -> None:
    """Send logs to `file` as JSON lines, and to stderr as readable lines.

    On stderr only warnings appear, unless `console` asks for every line.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger("society")
    root.handlers.clear()
    root.propagate = False
    root.setLevel(logging.INFO)
    to_file = logging.FileHandler(file, encoding="utf-8")
    to_file.setFormatter(_formatter(structlog.processors.JSONRenderer()))
    root.addHandler(to_file)
    to_console = _Stderr(logging.INFO if console else logging.WARNING)
    to_console.setFormatter(_formatter(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())))
    root.addHandler(to_console)
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(society=society)


class _Stderr(logging.Handler):
    """Writes to what `sys.stderr` is at the time: a live view puts lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        sys.stderr.write(self.format(record) + "\n")


def close() -> None:
    """Detach and close every handler."""
    root = logging.getLogger("society")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()


def get(name: str, **bound: Any) -> BoundLogger:
    """A logger under `society.`; `bound` values go on each of its lines."""
    logger: BoundLogger = structlog.stdlib.get_logger(f"society.{name}", **bound)
    return logger


def _formatter(renderer: Processor) -> structlog.stdlib.ProcessorFormatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
