"""A fake daemon, a home of its own, and commands run in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chain_kit import live, names_in
from control_kit import FakeDaemon, Ran, Run, serving

from cli import chain, peer
from cli.common import run_app
from tests.chain.ledger_kit import Ledger
from tests.chain.store_kit import write

APPS = {"tdml-chain": chain.app, "tdml-peer": peer.app}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def of_line(name: str, *arguments: Any) -> Ran:
        code = run_app(APPS[name], [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return of_line


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    """A running peer's control socket."""
    with serving(tmp_path) as fake:
        yield fake


@pytest.fixture(scope="session")
def ledger() -> Ledger:
    """The life of a chain with everything that the inspector shows."""
    return live()


@pytest.fixture(scope="session")
def names(ledger: Ledger) -> dict[str, str]:
    """Its ids, by what they are called in command lines of tests."""
    return names_in(ledger)


@pytest.fixture(scope="session")
def chain_db(ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its database."""
    path = tmp_path_factory.mktemp("cli") / "chain.db"
    write(ledger, path).close()
    return path
