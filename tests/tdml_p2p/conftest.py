"""Plain logs: rendering a traceback with its locals takes a second each."""

import pytest
import structlog


@pytest.fixture(autouse=True)
def _plain_logs() -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ]
    )
