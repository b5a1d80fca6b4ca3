"""What `status` and the page show of a peer, as plain JSON values; amounts are strings of base units."""

import json
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chain.keys import peer_id
from chain.records import Task, Worker
from chain.state import State, Table
from tdml_p2p.health import Vitals, Warn, warnings
from tdml_p2p.http_audits import audit_rows, evictions, recent_audits
from tdml_p2p.listen import inbound
from tdml_p2p.reachability import Reachability, judge

if TYPE_CHECKING:
    from tdml_p2p.peer import Peer

LOSS_POINTS = 400
CLOSED_TASKS = 4
MAX_METRICS_BYTES = 8 << 20


def build_status(peer: "Peer") -> dict[str, Any]:
    """Return the status of `peer`, and bring its gauges up to date."""
    state, engine = peer.engine.state, peer.engine.status()
    workers = own_workers(state, peer.key.account)
    reach = judge(peer.network.addresses, inbound(peer.network))
    found = warnings(_vitals(peer, engine, reach))
    connected = peer.network.peers()
    seats = [_seat(peer, worker) for worker in workers if worker.is_seated]
    _set_gauges(peer, len(connected), len(seats), reach, found)
    return {
        "peer": peer.name,
        "name": peer.config.public_name,
        "version": package_version(),
        "chain_id": peer.genesis.chain_id.hex(),
        "network": peer.genesis.name.decode("utf-8", "replace"),
        "invite": peer.invite,
        "status_url": peer.status_url,
        "addresses": list(peer.network.addresses),
        "uptime": round(peer.uptime(), 1),
        **_consensus(peer, state, engine),
        "peers": list(connected),
        "seats": seats,
        "declined": _declined(peer),
        **audit_rows(state, peer.key.account),
        **_funds(peer, state, workers),
        "reachability": {
            "verdict": str(reach.verdict),
            "detail": reach.detail,
            "steps": list(reach.steps),
        },
        "warnings": [{"code": str(w.code), "message": w.message, "hint": w.hint} for w in found],
        "chain": engine,
        "network_counters": peer.network.status(),
    }


def _consensus(peer: "Peer", state: State, engine: dict[str, Any]) -> dict[str, Any]:
    return {
        "height": state.height,
        "finality": {
            "p50": peer.metrics.finality_quantile(0.5),
            "p99": peer.metrics.finality_quantile(0.99),
            "block_age": peer.chain.block_age(),
        },
        "view": engine["view"],
        "syncing": engine["syncing"],
        "validators": [{"peer": peer_id(member), "power": str(power)} for member, power in state.validators().members],
        "is_validator": peer.key.account in state.validators(),
    }


def _funds(peer: "Peer", state: State, workers: list[Worker]) -> dict[str, Any]:
    account = state.account(peer.key.account)
    return {
        "balance": str(account.balance),
        "bonded": str(account.bonded),
        "bond": str(account.bonded),
        "earnings": str(sum(worker.earned for worker in workers)),
    }


def build_page(peer: "Peer") -> dict[str, Any]:
    """Return everything that the status page shows."""
    state = peer.engine.state
    return {
        "status": build_status(peer),
        "tasks": [_task(peer, state, task) for task in recent_tasks(state)],
        "blocks": list(peer.chain.tail),
        "audits": recent_audits(state),
        "evictions": evictions(state),
    }


def recent_tasks(state: State) -> list[Task]:
    """Return the open tasks and the newest closed ones, newest first."""
    newest: list[Task] = sorted(state.tables[Table.TASKS].values(), key=lambda task: -task.posted_at)
    return [task for place, task in enumerate(newest) if task.is_open or place < CLOSED_TASKS]


def own_workers(state: State, account: bytes) -> list[Worker]:
    """Return the seats and applications of `account` in every task."""
    found = (state.worker(task, account) for task in state.tables[Table.TASKS])
    return [worker for worker in found if worker is not None]


def loss_curve(path: Path) -> list[tuple[int, float]]:
    """Return (step, loss) from a task's `metrics.jsonl`, thinned to a few hundred points."""
    if not path.is_file() or path.stat().st_size > MAX_METRICS_BYTES:
        return []
    points: dict[int, float] = {}
    with path.open("rb") as lines:
        for line in lines:
            try:
                found = json.loads(line)
                step, loss = int(found["step"]), float(found["loss"])
            except (ValueError, KeyError, TypeError):
                continue
            if math.isfinite(loss):
                points[step] = loss
    ordered = sorted(points.items())
    return ordered[:: max(1, -(-len(ordered) // LOSS_POINTS))]


def package_version() -> str:
    """Return the version of the installed package, or that of a source tree."""
    try:
        return version("tdml")
    except PackageNotFoundError:
        return "0+source"


def _declined(peer: "Peer") -> list[dict[str, str]]:
    """Return the open tasks that this peer is too small for, and why."""
    found = {} if peer.swarm is None else peer.swarm.applicant.declined
    return [{"task": task.hex(), "reason": reason} for task, reason in found.items()]


def _seat(peer: "Peer", worker: Worker) -> dict[str, Any]:
    done = {} if peer.swarm is None else peer.swarm.progress(worker.task)
    return done | {
        "task": worker.task.hex(),
        "stage": worker.stage,
        "bond": str(worker.bond + worker.withheld),
        "settled_cells": worker.settled_cells,
        "lease_until": worker.lease_until,
    }


def _task(peer: "Peer", state: State, task: Task) -> dict[str, Any]:
    stages: list[list[dict[str, Any]]] = [[] for _ in range(task.stages)]
    for worker in state.workers(task.id):
        if 0 <= worker.stage < task.stages:
            stages[worker.stage].append(
                {
                    "peer": peer_id(worker.account),
                    "status": str(worker.state),
                    "settled_cells": worker.settled_cells,
                }
            )
    return {
        "task": task.id.hex(),
        "status": str(task.state),
        "settled": task.settled,
        "steps": task.steps,
        "stages": stages,
        "loss": loss_curve(peer.home.tasks_path / task.id.hex() / "metrics.jsonl"),
    }


def _vitals(peer: "Peer", engine: dict[str, Any], reach: Reachability) -> Vitals:
    state = peer.engine.state
    own = state.validator(peer.key.account)
    return Vitals(
        uptime=peer.uptime(),
        peers=len(peer.network.peers()),
        height=state.height,
        best_height=engine["target_height"],
        block_age=peer.chain.block_age(),
        powers=tuple(power for _, power in state.validators().members),
        halted=engine["halted"],
        old_tip=engine["warning"],
        clock_behind=engine["clock_behind_ms"] / 1000,
        is_jailed=own is not None and own.is_jailed and bool(state.account(peer.key.account).bonded),
        is_reachable=reach.is_reachable,
    )


def _set_gauges(peer: "Peer", peers: int, seats: int, reach: Reachability, found: tuple[Warn, ...]) -> None:
    account = peer.engine.state.account(peer.key.account)
    metrics, network = peer.metrics, peer.network
    metrics.peers.set(peers)
    metrics.height.set(peer.engine.state.height)
    metrics.seats.set(seats)
    metrics.balance.set(account.balance)
    metrics.bonded.set(account.bonded)
    metrics.warnings.set(len(found))
    metrics.reachable.set(-1 if reach.is_reachable is None else int(reach.is_reachable))
    counters = network.status()
    metrics.advance(metrics.gossip_drops, "gossip-failed", counters["gossip"].get("failed", 0))
    for reason, count in counters["refused"].items():
        metrics.advance(metrics.refused.labels(reason), f"refused {reason}", count)
    for direction, total in (
        ("sent", network.tensors.bytes_sent),
        ("received", network.tensors.inbound.bytes_received),
    ):
        metrics.advance(metrics.tensor_bytes.labels(direction), f"tensor bytes {direction}", total)
