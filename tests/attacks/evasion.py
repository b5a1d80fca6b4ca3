"""Evaders: they read the chain, and cheat only where, as far as anybody can know, the draw is least likely."""

from collections.abc import Callable

from tests.attacks.kit import Place, RealSwarm, auditors_of

Evader = Callable[[RealSwarm, bytes], Callable[[RealSwarm, Place], bool]]


def is_at_the_lowest_rate(swarm: RealSwarm, cheat: bytes) -> bool:
    """Whether no newcomer's, flagged or watched worker's rate holds for it now."""
    worker, task = swarm.state.worker(swarm.task, cheat), swarm.state.task(swarm.task)
    assert worker is not None
    assert task is not None
    is_known = worker.settled_cells >= swarm.state.params.newcomer_cells
    is_bonded = worker.bond + worker.withheld >= task.worker_bond
    return is_known and is_bonded and max(worker.flagged_until, worker.watched_until) <= swarm.state.height


def is_unobserved(swarm: RealSwarm, cheat: bytes) -> bool:
    """Whether no audit of it is open."""
    return not any(audit.worker == cheat for audit in swarm.audits())


def in_quiet_blocks(swarm: RealSwarm, cheat: bytes) -> Callable[[RealSwarm, Place], bool]:
    """Cheat in all that is claimed while none of its audits is open."""
    return lambda one, _: is_at_the_lowest_rate(one, cheat) and is_unobserved(one, cheat)


def one_at_a_time(swarm: RealSwarm, cheat: bytes) -> Callable[[RealSwarm, Place], bool]:
    """Cheat in one cell, and in no other before it has seen that one settle."""
    risked = [0]

    def is_cheating(one: RealSwarm, place: Place) -> bool:
        is_quiet = is_at_the_lowest_rate(one, cheat) and is_unobserved(one, cheat)
        if not is_quiet or one.settled < risked[-1]:
            return False
        risked.append(place.step)
        return True

    return is_cheating


def while_auditors_are_away(swarm: RealSwarm, cheat: bytes) -> Callable[[RealSwarm, Place], bool]:
    """Cheat only while somebody who might be drawn is left out of the draws."""
    honest = [account for account in auditors_of(swarm, cheat) if account not in swarm.characters]

    def is_cheating(one: RealSwarm, _: Place) -> bool:
        away = [account for account in honest if one.state.account(account).absent_until > one.state.height]
        return bool(away) and is_at_the_lowest_rate(one, cheat)

    return is_cheating
