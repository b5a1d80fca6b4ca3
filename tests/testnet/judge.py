"""The judge of a testnet. It sees what `tdml-chain -o json` prints of each peer's database, and nothing else.

It shares no code with `chain`: weights, links and hashes are computed here from the inspector's JSON.
"""

import io
import json
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from cli.chain import app
from cli.common import run_app

MOST_BLOCKS = "1000"
SAMPLE = 5
"""Acknowledged transactions that are looked for in each database."""


@dataclass(frozen=True)
class Case:
    """What is judged: databases and peer ids by name, who lies, who told a provable lie, who joined by a snapshot,
    and what was acknowledged.
    """

    databases: dict[str, Path]
    accounts: dict[str, str]
    liars: frozenset[str]
    provable: frozenset[str]
    snapshots: frozenset[str]
    blocks: int
    receipts: tuple[str, ...]


@dataclass
class _Seen:
    """What the databases say together."""

    hashes: dict[int, set[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def inspect(database: Path, *words: str) -> Any:
    """Return the data of one answer of the inspector; raise `AssertionError` when it has none."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        run_app(app, [*words, "--db", str(database), "-o", "json"])
    answer = json.loads(out.getvalue() or "{}")
    assert answer.get("success"), f"{' '.join(words)} of {database.parent.name}: {err.getvalue().strip()}"
    return answer["data"]


def judge(case: Case) -> list[str]:
    """Return what is wrong; nothing for a good testnet."""
    seen = _Seen()
    for name, database in case.databases.items():
        try:
            _peer(case, name, database, seen)
        except AssertionError as error:
            seen.faults.append(f"{name}: {error}")
    forks = [height for height, hashes in seen.hashes.items() if len(hashes) > 1]
    seen.faults += [f"two blocks are final at height {height}" for height in sorted(forks)]
    return seen.faults


def _peer(case: Case, name: str, database: Path, seen: _Seen) -> None:
    check = inspect(database, "db", "check")
    assert check["ok"] is True, f"db check: {check['problem']}"
    if name in case.liars:
        return
    blocks = inspect(database, "blocks", "--count", MOST_BLOCKS)
    for block in blocks:
        seen.hashes.setdefault(block["height"], set()).add(block["hash"])
    assert blocks, "it has no block at all"
    heights = [block["height"] for block in blocks]
    assert heights == list(range(heights[0], heights[0] + len(heights))), "heights are missing"
    assert name not in case.snapshots or heights[0] > 1, "it took every block instead of a snapshot"
    assert heights[-1] >= case.blocks, f"it reached height {heights[-1]} of {case.blocks}"
    _weigh(database, str(heights[-1]))
    _money(database)
    _blame(case, inspect(database, "evidence"), inspect(database, "validators"))
    sample = case.receipts[:: max(1, len(case.receipts) // SAMPLE)] if heights[0] == 1 else ()
    missing = [tx for tx in sample if not _includes(database, tx)]
    assert not missing, f"acknowledged transactions are missing: {missing[:3]}"


def _weigh(database: Path, height: str) -> None:
    """Recompute a block's hash from its header's bytes, and the weight of its certificate."""
    block, certificate = inspect(database, "block", height), inspect(database, "certificate", height)
    computed = blake3(bytes.fromhex(block["raw"]), derive_key_context="tdml 1 header").hexdigest()
    assert computed == block["hash"] == certificate["block_hash"], f"block {height} has another hash"
    parent = inspect(database, "block", str(int(height) - 1))
    assert block["header"]["parent"] == parent["hash"], f"block {height} does not follow {parent['height']}"
    powers = [(int(voter["power"]), voter["signed"]) for voter in certificate["validators"]]
    signed = sum(power for power, did in powers if did)
    assert 3 * signed > 2 * sum(power for power, _ in powers), f"block {height} is signed by {signed} only"
    assert len(certificate["signatures"]) == sum(did for _, did in powers)


def _money(database: Path) -> None:
    supply = inspect(database, "supply")
    held = sum(int(amount) for name, amount in supply.items() if name not in ("issued", "is_conserved"))
    assert held == int(supply["issued"]), f"{held} base units of {supply['issued']}"


def _blame(case: Case, evidence: list[Any], validators: list[Any]) -> None:
    names = {account: name for name, account in case.accounts.items()}
    convicted = Counter(names.get(entry["account"], entry["account"]) for entry in evidence)
    innocent = sorted(set(convicted) - case.provable)
    assert not innocent, f"convicted without having lied: {innocent}"
    assert set(convicted) >= case.provable, f"not convicted: {sorted(case.provable - set(convicted))}"
    assert all(count == 1 for count in convicted.values()), f"convicted twice: {convicted}"
    buried = {names.get(row["validator"], "?") for row in validators if row["is_tombstoned"]}
    assert buried <= case.provable, f"tombstoned without having lied: {sorted(buried - case.provable)}"


def _includes(database: Path, tx: str) -> bool:
    try:
        return bool(inspect(database, "tx", tx)["ok"])
    except AssertionError:
        return False
