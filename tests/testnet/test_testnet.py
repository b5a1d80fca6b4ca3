"""A short testnet of real processes, the judge's own test on what it left behind, and manifests that are none."""

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.end_to_end.processes_kit import assert_nothing_left
from tests.testnet.judge import Case, judge
from tests.testnet.manifest import FAULTS, ManifestError, Shape, check, drawn, load
from tests.testnet.run import begin, run

SPOILT = (
    "UPDATE events SET kind = 'other' WHERE height = 5",
    "DELETE FROM blocks WHERE height = 9",
    "UPDATE blocks SET certificate = (SELECT certificate FROM blocks WHERE height = 8) WHERE height = 9",
)
SHORT = Path(__file__).parent / "manifests" / "short.toml"


@pytest.mark.timeout(400)
async def test_a_short_testnet_with_a_liar(tmp_path: Path) -> None:
    verdict = await run(load(SHORT), tmp_path / "net")
    assert verdict["faults"] == []
    assert verdict["transfers"] > 0
    homes = [tmp_path / "net" / f"peer-{index}" for index in range(6)]
    assert_nothing_left(homes, killed=[homes[1]])
    case = replace(begin(load(SHORT), tmp_path / "other").case(), databases=_copies(homes, tmp_path / "copies"))
    _the_judge_sees_what_is_wrong(replace(case, accounts=verdict["accounts"]))


def _copies(homes: list[Path], folder: Path) -> dict[str, Path]:
    found = {}
    for home in homes[:2]:
        found[home.name] = folder / home.name / "chain.db"
        found[home.name].parent.mkdir(parents=True)
        with closing(sqlite3.connect(home / "chain.db")) as old, closing(sqlite3.connect(found[home.name])) as new:
            old.backup(new)
            new.execute("PRAGMA journal_mode = DELETE")
    return found


def _the_judge_sees_what_is_wrong(case: Case) -> None:
    assert judge(case) == []
    assert "convicted without having lied" in " ".join(judge(replace(case, provable=frozenset())))
    assert "not convicted" in " ".join(judge(replace(case, provable=case.provable | {"peer-0"})))
    assert "it reached height" in " ".join(judge(replace(case, blocks=10**6)))
    assert "instead of a snapshot" in " ".join(judge(replace(case, snapshots=frozenset({"peer-0"}))))
    assert "are missing" in " ".join(judge(replace(case, receipts=("00" * 32,))))
    victim = case.databases["peer-0"]
    for place, spoil in enumerate(SPOILT):
        spoilt = victim.parent.with_name(f"spoilt-{place}") / "chain.db"
        spoilt.parent.mkdir()
        shutil.copy(victim, spoilt)
        with closing(sqlite3.connect(spoilt)) as database:
            database.execute(spoil)
            database.commit()
        assert "db check" in " ".join(judge(replace(case, databases={"peer-0": spoilt}))), spoil


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no manifest"),
        ("peer = [", "no manifest"),
        ("peer = []", "1 to 20 peers"),
        ("[[peer]]\nattack = 'equivocate'", "founds the network"),
        ("[[peer]]\nstart = 3", "founds the network"),
        ("[[peer]]\n[[peer]]\nattack = 'lies'", "attacks are"),
        ("[[peer]]\n[[peer]]\n[[peer]]\nattack = 'invalid'", "a third of the stake"),
        ("[[peer]]\nfaults = [{at = 3, kind = 'flood'}]", "faults are"),
        ("[[peer]]\nfaults = [{at = 3, kind = 'kill', seconds = 0.0}]", "faults are"),
        ("[[peer]]\n[[peer]]\nstart = 5", "has no stake"),
        ("[[peer]]\n[[peer]]\nstake = 0\nsnapshot = true", "no snapshot before"),
        ("[[peer]]\ncolour = 'red'", "no manifest"),
    ],
)
def test_what_is_no_manifest_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "net.toml"
    path.write_text(text)
    with pytest.raises(ManifestError, match=said):
        load(path)


def test_drawn_testnets_can_run_and_hold_every_kind_of_fault() -> None:
    nets = [drawn(seed, Shape()) for seed in range(40)]
    for net in nets:
        check(net)
    assert drawn(3, Shape()) == nets[3]
    assert {fault.kind for net in nets for plan in net.peer for fault in plan.faults} == set(FAULTS)
    assert len({plan.stake for net in nets for plan in net.peer}) == 4
    assert {plan.snapshot for net in nets for plan in net.peer} == {False, True}
    assert len({plan.attack for net in nets for plan in net.peer}) == 5
