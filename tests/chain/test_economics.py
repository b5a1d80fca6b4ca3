"""The calculator of what cheating is worth: the design's figures, the ledger's bound, and a simulation."""

import random

import pytest

from chain.economics import Terms, detection, economics
from chain.ledger.tasks import forgotten_after, least_bond, step_rate
from chain.params import Params

PARAMS = Params()


def cheat(name: str, terms: Terms, params: Params = PARAMS) -> object:
    return next(one for one in economics(params, terms).cheats if one.name == name)


def test_the_figures_of_the_design() -> None:
    found = economics(PARAMS, Terms(price=1, in_flight=0, bond=1)).cheats[0]
    assert found.chance == pytest.approx(0.075)
    assert found.mean_cells == pytest.approx(13.33, abs=0.01)
    assert found.gain == pytest.approx(12.33, abs=0.01)
    assert found.cells_for_certainty == 178
    assert economics(PARAMS, Terms(colluding=0)).cheats[0].cells_for_certainty == 132


@pytest.mark.parametrize("rate", [500, 1000, 2500, 10_000])
@pytest.mark.parametrize("in_flight", [0, 32, 512])
def test_the_least_bond_makes_every_way_a_loss_or_worth_nothing(rate: int, in_flight: int) -> None:
    found = economics(PARAMS, Terms(audit_rate=rate, in_flight=in_flight))
    assert found.bond == found.least_bond == least_bond(PARAMS, 1000, rate, in_flight)
    assert found.is_sound
    assert not economics(PARAMS, Terms(audit_rate=rate, in_flight=in_flight, bond=1)).is_sound


def test_false_steps_are_drawn_no_more_rarely_than_the_floor_and_the_bond_outweighs_them() -> None:
    found = {one.name: one for one in economics(PARAMS, Terms(in_flight=0)).cheats}
    steps = found["leave out optimiser's steps"]
    assert (steps.chance, steps.cells_for_certainty) == (pytest.approx(0.05 * 0.75), 362)
    assert (steps.gain, steps.loss) == (pytest.approx(25_667, abs=1), 26_000)
    assert steps.chance < found["cheat and hope"].chance
    full = {one.name: one for one in economics(PARAMS, Terms(audit_rate=10_000)).cheats}
    assert full["leave out optimiser's steps"].chance == full["cheat and hope"].chance


@pytest.mark.parametrize(("rate", "steps"), [(500, 500), (1000, 500), (2000, 500), (4000, 1000), (10_000, 10_000)])
def test_the_rate_of_steps(rate: int, steps: int) -> None:
    assert step_rate(PARAMS, rate) == steps


def test_a_partner_that_reports_is_worth_its_share_and_ends_it_sooner() -> None:
    always, _, reported, *_ = economics(PARAMS, Terms()).cheats
    assert reported.loss == always.loss * (1 - 0.25 * 0.25)
    assert reported.mean_cells == 10.0 < always.mean_cells
    assert reported.profit < 0
    assert reported.gain < always.gain


def test_a_larger_colluding_share_than_the_network_reckons_with_pays() -> None:
    assert economics(PARAMS, Terms(in_flight=0, colluding=2500)).is_sound
    assert not economics(PARAMS, Terms(in_flight=0, colluding=6000)).is_sound


def test_what_looks_like_a_crash_pays_once_and_never_again() -> None:
    once, again = economics(PARAMS, Terms()).cheats[3:5]
    assert (once.is_once, once.gain, once.loss) == (True, pytest.approx(19_000), 1000)
    assert again.profit < 0


@pytest.mark.parametrize("rate", [500, 1000, 2500, 5000, 9999])
def test_being_good_until_an_occasion_is_forgotten_makes_no_way_to_cheat_pay(rate: int) -> None:
    """Cheat, withhold what is drawn, be good until it is forgotten, again: the charge stays, partner or no."""
    for colluding in (0, PARAMS.colluding_share):
        found = {one.name: one for one in economics(PARAMS, Terms(audit_rate=rate, colluding=colluding)).cheats}
        again = found["refuse to open again"]
        assert again.loss == least_bond(PARAMS, 1000, rate, 0) > again.gain
    erring = 1 / detection(rate, PARAMS.colluding_share)
    assert erring < forgotten_after(PARAMS, rate) * 0.055


def test_the_mean_is_that_of_cheats_who_are_drawn() -> None:
    dice, terms = random.Random(7), Terms(audit_rate=2000, colluding=2500)
    h = detection(terms.audit_rate, terms.colluding)
    counts = []
    for _ in range(4000):
        cells = 1
        while dice.random() >= h:
            cells += 1
        counts.append(cells)
    found = economics(PARAMS, terms).cheats[0]
    assert sum(counts) / len(counts) == pytest.approx(found.mean_cells, rel=0.05)
    assert sum(one > found.cells_for_certainty for one in counts) == 0


@pytest.mark.parametrize("wrong", [{"audit_rate": 0}, {"audit_rate": 10_001}, {"colluding": 10_000}, {"price": -1}])
def test_terms_without_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"audit rate|price"):
        economics(PARAMS, Terms(**wrong))
