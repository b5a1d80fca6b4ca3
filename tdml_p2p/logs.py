"""Logs of a peer: on stderr, pretty on a terminal and JSON lines elsewhere, libraries included."""

import logging
import os
import sys
from typing import Any, TextIO

import structlog

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_QUIET = {
    "libp2p": logging.CRITICAL,
    "multiaddr": logging.ERROR,
    "hypercorn": logging.ERROR,
    "httpx": logging.WARNING,
    "trio": logging.WARNING,
}
"""Least levels of libraries: libp2p calls every stream that ends, and every dial that fails, an error."""


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever stderr is by then: a live view of a terminal stands in for it while it is drawn."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """The present stderr."""
        return sys.stderr


def configure_logs(level: str) -> None:
    """Send structlog's and the standard library's records of at least `level` to stderr."""
    least = _LEVELS.get(level, logging.INFO)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(least),
        cache_logger_on_first_use=False,
    )
    handler = _StderrHandler()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_last_processors()))
    root = logging.getLogger()
    for other in list(root.handlers):
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(least)
    for name, floor in _QUIET.items():
        logging.getLogger(name).setLevel(max(floor, least) if level != "debug" else logging.WARNING)


def _last_processors() -> list[Any]:
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if sys.stderr.isatty():
        return [strip, structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ)]
    return [strip, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
