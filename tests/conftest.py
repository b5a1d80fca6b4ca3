"""What every test shares: seeded property tests, one thread of torch, no settings of the person who runs them."""

import os
import random
from pathlib import PurePath
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile(
    "seeded", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide `TDML_…` variables and colour preferences, and seed what draws without a generator of its own."""
    for name in [name for name in os.environ if name.startswith("TDML_")]:
        monkeypatch.delenv(name)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    random.seed(0)


def _is_network(path: str) -> bool:
    """Whether a file's tests start whole networks of processes."""
    return bool({"end_to_end", "testnet"} & set(PurePath(path).parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the networks of processes, which take longest."""
    items.sort(key=lambda item: not _is_network(item.nodeid.split("::")[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep each file on one process of a parallel run, and all networks of processes on the same one.

    A network of peers takes both cores of a small machine; two at once would test the machine. Marks for groups do not
    do it: with pytest 9.2 they do not reach the plugin's scheduler.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return "networks" if _is_network(path) else path

    return ByFile(config, log)
