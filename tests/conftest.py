"""What every test shares: seeded property tests, one thread of torch, no settings of the person who runs them."""

import os
import random

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each file on one process of a parallel run, and all networks of processes on the same one.

    A network of peers takes both cores of a small machine; two at once would test the machine. First of all, because
    the plugin that deals out the tests reads the groups in the same hook.
    """
    for item in items:
        networks = {"end_to_end", "testnet"} & set(item.path.parts)
        group = "networks" if networks else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
