import pytest
import trio

from trainer.messages import Commit, Finish
from trainer.transport import Faults, InMemoryHub, Lost, PeerLost, Received

pytestmark = pytest.mark.trio


async def test_messages_arrive_in_order_with_their_sender() -> None:
    hub = InMemoryHub()
    a, b = hub.join("a"), hub.join("b")
    await a.send("b", Commit(0, 1))
    await a.send("b", Finish())
    assert [await b.receive(), await b.receive()] == [Received("a", Commit(0, 1)), Received("a", Finish())]


async def test_a_scripted_crash_is_told_to_all_and_runs_the_hook() -> None:
    crashed = []
    hub = InMemoryHub(Faults().crash("a", after=2, of=Commit))
    a, b, c = hub.join("a", lambda: crashed.append("a")), hub.join("b"), hub.join("c")
    await a.send("b", Commit(0, 1))
    await a.send("b", Finish())
    await a.send("b", Commit(0, 2))
    assert crashed == ["a"]
    assert [(await b.receive()).message for _ in range(4)] == [
        Commit(0, 1),
        Finish(),
        Commit(0, 2),
        Lost("a"),
    ]
    assert await c.receive() == Received("a", Lost("a"))
    with pytest.raises(PeerLost):
        await b.send("a", Finish())


async def test_a_crash_before_sending_loses_the_message() -> None:
    hub = InMemoryHub(Faults().crash("a", after=1, before=True))
    a, b = hub.join("a"), hub.join("b")
    with pytest.raises(PeerLost):
        await a.send("b", Finish())
    assert await b.receive() == Received("a", Lost("a"))


async def test_a_cut_link_refuses_both_ways_until_mended() -> None:
    hub = InMemoryHub()
    a, b = hub.join("a"), hub.join("b")
    hub.cut("a", "b")
    assert (await a.receive()).message == Lost("b")
    for sender, to in ((a, "b"), (b, "a")):
        with pytest.raises(PeerLost):
            await sender.send(to, Finish())
    hub.faults.mend("a", "b")
    await a.send("b", Finish())


async def test_a_delay_is_virtual_time(autojump_clock: trio.testing.MockClock) -> None:
    hub = InMemoryHub(Faults().delay("a", "b", 30.0))
    a, b = hub.join("a"), hub.join("b")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send, "b", Finish())
        await b.receive()
    assert trio.current_time() == pytest.approx(30.0)
