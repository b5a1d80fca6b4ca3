"""Budgets, penalties and bans of peers, on a hand-moved clock."""

from dataclasses import dataclass

from tdml_p2p.limits import MAX_TRACKED_PEERS, LimitConfig, Offence, PeerLimits


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, banned: list[str] | None = None, **settings: float) -> PeerLimits:
    into = banned if banned is not None else []
    return PeerLimits(LimitConfig(**settings), clock, into.append)


def test_a_rested_peer_has_a_burst_and_then_its_rate() -> None:
    clock = Clock()
    book = limits(clock, requests=10.0, requests_burst=5.0)
    assert [book.allows_request("a") for _ in range(7)] == [True] * 5 + [False] * 2
    clock.now += 0.25
    assert [book.allows_request("a") for _ in range(3)] == [True, True, False]
    clock.now += 60
    assert [book.allows_request("a") for _ in range(6)] == [True] * 5 + [False]
    assert book.allows_request("b")


def test_penalties_halve_and_the_limit_bans() -> None:
    clock, banned = Clock(), []
    book = limits(clock, banned, penalty_limit=30.0, penalty_halves_after=10.0, ban_seconds=60.0)
    book.charge("a", Offence.PROTOCOL_VIOLATION)
    assert book.penalty("a") == 10
    clock.now += 10
    assert book.penalty("a") == 5
    book.charge("a", Offence.PROTOCOL_VIOLATION)
    book.charge("a", Offence.PROTOCOL_VIOLATION)
    assert banned == []
    book.charge("a", Offence.PROTOCOL_VIOLATION)
    assert banned == ["a"]
    assert book.is_banned("a")
    assert book.banned() == {"a": 60.0}
    assert not book.is_banned("b")
    clock.now += 60
    assert not book.is_banned("a")
    assert book.penalty("a") == 0
    assert book.offences == {Offence.PROTOCOL_VIOLATION: 4}


def test_every_ban_lasts_twice_as_long_up_to_the_longest() -> None:
    clock = Clock()
    book = limits(clock, penalty_limit=10.0, ban_seconds=60.0, ban_max_seconds=200.0)
    lasted = []
    for _ in range(4):
        book.charge("a", Offence.PROTOCOL_VIOLATION)
        lasted.append(book.banned()["a"])
        clock.now += 1000
    assert lasted == [60.0, 120.0, 200.0, 200.0]


def test_offences_during_a_ban_do_not_ban_again() -> None:
    clock, banned = Clock(), []
    book = limits(clock, banned, penalty_limit=10.0)
    for _ in range(9):
        book.charge("a", Offence.PROTOCOL_VIOLATION)
    assert banned == ["a"]


def test_memory_of_peers_is_bounded_and_keeps_the_banned() -> None:
    clock = Clock()
    book = limits(clock, penalty_limit=10.0)
    book.charge("bad", Offence.PROTOCOL_VIOLATION)
    for number in range(MAX_TRACKED_PEERS + 10):
        book.allows_request(str(number))
    assert len(book._peers) == MAX_TRACKED_PEERS
    assert book.is_banned("bad")
