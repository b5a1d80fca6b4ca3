"""Swarms in several shapes against a plain loop over the uncut model; the full size is `bench.equivalence`."""

import pytest

from bench.equivalence import BOUND, CASES, Case, measure, troubles
from bench.support.in_memory import Trouble
from trainer.messages import Message, Partial, Reduced, Summed, Tied
from trainer.transport import Faults

TIED = (Case("gpt2", tied=True), Case("qwen2", tied=True))


def name_of(case: object) -> str:
    if not isinstance(case, Case):
        return ""
    return " ".join((case.family, *(name for name in ("tied", "dropout") if getattr(case, name))))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_swarm_trains_the_model_of_one_plain_process(case: Case) -> None:
    (result,) = measure(case, 3, [(2, 2)])
    assert result.distance <= BOUND
    assert result.repeats


@pytest.mark.parametrize("case", TIED, ids=name_of)
@pytest.mark.parametrize("shape", [(2, 1), (4, 2)])
def test_a_tied_tensor_far_apart(case: Case, shape: tuple[int, int]) -> None:
    (result,) = measure(case, 2, [shape])
    assert result.distance <= BOUND


@pytest.mark.parametrize("case", TIED, ids=name_of)
@pytest.mark.parametrize("kind", [Partial, Tied, Summed, Reduced], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("peer", ["s0r0", "s1r1"])
def test_a_death_in_the_reduction_changes_nothing(case: Case, kind: type[Message], peer: str) -> None:
    (result,) = measure(case, 3, [(2, 2)], "killed", Trouble(lambda: Faults().crash(peer, after=2, of=kind)))
    assert result.distance <= BOUND


@pytest.mark.parametrize("name", ["commit", "pause", "joiner"])
def test_whatever_happens_on_the_way_the_model_is_the_same(name: str) -> None:
    (result,) = measure(Case("llama"), 4, [(2, 2)], name, troubles(4)[name])
    assert result.is_equal
