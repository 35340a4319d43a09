"""Structured logs on standard error: one form for our lines and for those of the libraries."""

from __future__ import annotations

import logging
import sys
from typing import TextIO, cast

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from glasshouse.server.types.configuration import LogSettings

Logger = FilteringBoundLogger

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "console", "json")


def build_logger(settings: LogSettings, stream: TextIO | None = None) -> Logger:
    """A logger that writes to `stream`, standard error by default. It owns no global state."""
    target = stream if stream is not None else sys.stderr
    level = getattr(logging, settings.level.upper())
    logger = structlog.wrap_logger(
        structlog.PrintLogger(target),
        processors=[*_common(), *_rendering(settings, target)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )
    # Bound once: the proxy would be bound again for every line.
    return cast(Logger, logger.bind())


def route_library_logs(settings: LogSettings) -> None:
    """Sends libraries' warnings and errors through the same form. For `main`: it changes the process."""
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_logger_name, *_common()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *_rendering(settings, sys.stderr),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, getattr(logging, settings.level.upper())))


def _common() -> list[Processor]:
    return [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]


def _rendering(settings: LogSettings, stream: TextIO) -> list[Processor]:
    terminal = stream.isatty()
    if settings.format == "json" or (settings.format == "auto" and not terminal):
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    return [structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)]
