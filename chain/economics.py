"""What cheating is worth: for given terms of a task, the expected profit of each way to cheat. Pure arithmetic.

Amounts are base units, chances are shares of 1. A cheated cell that is paid brings its price, as if leaving out the
work saved all of it. h = p·(1−f) is the chance that a cheated cell is audited by somebody who does not collude; the
number of cheated cells before the first of those is geometric with mean (1−h)/h. Cells claimed and not yet settled
are void after a conviction: they bring nothing, but `post task` demands a bond that outweighs them as well.
An optimiser's step that is left out is reckoned as a cell, of which it is a part only.
"""

import math
from dataclasses import dataclass

from chain.ledger.tasks import BASIS, forgotten_after, least_bond, step_rate
from chain.params import Params

CERTAINTY = 1e-6
"""Chance that a cheat is still undetected after `cells_for_certainty`."""


@dataclass(frozen=True)
class Terms:
    """A task's terms. Rates and shares are basis points, `price` and `bond` base units; no bond: the least allowed."""

    price: int = 1000
    audit_rate: int = 1000
    in_flight: int = 32
    colluding: int = 2500
    bond: int = 0


@dataclass(frozen=True)
class Cheat:
    """One way to cheat: cells until it is convicted, or evicted, and what it gains and loses by then."""

    name: str
    chance: float
    mean_cells: float
    cells_for_certainty: int
    gain: float
    loss: float
    note: str = ""
    is_once: bool = False
    """Whether it can be done once a worker and task only."""

    @property
    def profit(self) -> float:
        """Expected gain less loss, in base units."""
        return self.gain - self.loss


@dataclass(frozen=True)
class Economics:
    """What the terms mean: the bond in force, the least one, and every way to cheat."""

    terms: Terms
    bond: int
    least_bond: int
    cheats: tuple[Cheat, ...]

    @property
    def is_sound(self) -> bool:
        """Whether every way to cheat that can be repeated loses, or gains nothing."""
        return all(cheat.profit <= 0 for cheat in self.cheats if not cheat.is_once)


def economics(params: Params, terms: Terms) -> Economics:
    """Return what cheating is worth under these terms; raise `ValueError` for terms that make no sense."""
    if not 0 < terms.audit_rate <= BASIS or not 0 <= terms.colluding < BASIS:
        raise ValueError("the audit rate is above 0 and at most 1, the colluding share below 1")
    if terms.price < 0 or terms.in_flight < 0 or terms.bond < 0:
        raise ValueError("price, bond and cells in flight are not negative")
    least = least_bond(params, terms.price, terms.audit_rate, terms.in_flight)
    bond = terms.bond or least
    known = (
        _always(terms, bond),
        _false_steps(params, terms, bond),
        _own_auditor(params, terms, bond),
        _withholding_once(params, terms),
        _withholding(params, terms, bond),
        _newcomer(params, terms),
    )
    return Economics(terms, bond, least, known)


def detection(audit_rate: int, colluding: int) -> float:
    """Return h, the chance that a cheated cell is found, from basis points."""
    return audit_rate * (BASIS - colluding) / BASIS**2


def _cells(chance: float) -> tuple[float, int]:
    """Return mean cheated cells until detection, the detected one included, and how many leave `CERTAINTY`."""
    return 1 / chance, 1 if chance >= 1 else math.ceil(math.log(CERTAINTY) / math.log1p(-chance))


def _always(terms: Terms, bond: int) -> Cheat:
    h = detection(terms.audit_rate, terms.colluding)
    note = "every cell, or any share of them: what counts is cheated cells"
    return Cheat("cheat and hope", h, *_cells(h), _paid(terms.price, h), bond, note)


def _false_steps(params: Params, terms: Terms, bond: int) -> Cheat:
    """Compute every cell and make up the state that follows."""
    h = detection(step_rate(params, terms.audit_rate), terms.colluding)
    note = "where its whole stage agrees; states that differ are all audited"
    return Cheat("leave out optimiser's steps", h, *_cells(h), _paid(terms.price, h), bond, note)


def _rarest(params: Params, terms: Terms) -> float:
    """Return the chance that a false cell, or a false step where that is less, is drawn at all."""
    return min(detection(rate, 0) for rate in (terms.audit_rate, step_rate(params, terms.audit_rate)))


def _paid(price: int, chance: float) -> float:
    """Return the pay of the cheated cells before the first that is found."""
    return price * (1 - chance) / chance


def _own_auditor(params: Params, terms: Terms, bond: int) -> Cheat:
    """Cheat until the first audit; where a partner is the auditor, it reports for its share of the bond."""
    p = detection(terms.audit_rate, 0)
    back = bond * params.reporter_share / BASIS * terms.colluding / BASIS
    note = "a partner that reports ends the cheating sooner than one that is silent"
    return Cheat("be denounced by a partner", p, *_cells(p), _paid(terms.price, p), bond - back, note)


def _withholding_once(params: Params, terms: Terms) -> Cheat:
    """Cheat, and do not open the first cell that is drawn, as if after a crash."""
    p = _rarest(params, terms)
    note = "once a worker and task: it cannot be told from a crash; every cell is audited for a while after it"
    return Cheat("refuse to open once", p, *_cells(p), _paid(terms.price, p), terms.price, note, is_once=True)


def _withholding(params: Params, terms: Terms, bond: int) -> Cheat:
    """Do it again: each further occasion costs what makes it a loss, and the limit's costs the seat.

    To be good until an occasion is forgotten saves the seat, never the charge.
    """
    p = _rarest(params, terms)
    fine = least_bond(params, terms.price, terms.audit_rate, 0)
    span = forgotten_after(params, terms.audit_rate)
    note = (
        f"each time after the first; the seat is lost with the {params.withheld_limit}., one in {span} cells forgotten"
    )
    return Cheat("refuse to open again", p, *_cells(p), _paid(terms.price, p), min(fine, bond), note)


def _newcomer(params: Params, terms: Terms) -> Cheat:
    """Cheat from the first cell: all pay is withheld until it makes the bond, and is lost with it."""
    h = detection(max(params.newcomer_rate, terms.audit_rate), terms.colluding)
    pay = _paid(terms.price, h)
    return Cheat("cheat from the first cell", h, *_cells(h), pay, pay, "its pay is its bond: nothing won, nothing lost")
