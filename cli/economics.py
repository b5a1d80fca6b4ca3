"""`tdml-chain params --economics`: what each way to cheat is worth under a task's terms."""

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from tdml_p2p.errors import USAGE, UserError

_COUNT = Number(gte=0)
_SHARE = Number(gte=0, lte=1)


@Parameter(name="*")
@dataclass(frozen=True)
class Economics:
    """A task's terms, as `train` posts them unless told otherwise."""

    shown: Annotated[
        bool, Parameter(name="--economics", negative="", help="What each way to cheat is worth, not the parameters.")
    ] = False
    price: Annotated[int, Parameter(help="Base units a cell.", validator=_COUNT)] = 1000
    audit_rate: Annotated[float, Parameter(help="Share of cells that are audited.", validator=_SHARE)] = 0.1
    cells_in_flight: Annotated[
        int, Parameter(help="Cells of a worker that may be claimed and not settled.", validator=_COUNT)
    ] = 32
    colluding: Annotated[float, Parameter(help="Share of the stake that colludes.", validator=_SHARE)] = 0.25
    bond: Annotated[int, Parameter(help="A worker's bond; the least allowed when 0.", validator=_COUNT)] = 0


def worth(answer: dict[str, Any], asked: Economics) -> dict[str, Any]:
    """Return gain, loss and profit of each cheat on a network with these parameters; raise `UserError`."""
    from msgspec.structs import replace

    from chain.economics import Terms, economics
    from chain.params import Params

    names = ("newcomer_rate", "floor_rate", "step_share", "colluding_share", "reporter_share", "withheld_limit")
    params = replace(Params(), **{name: int(answer[name]) for name in names})
    terms = Terms(asked.price, _basis(asked.audit_rate), asked.cells_in_flight, _basis(asked.colluding), asked.bond)
    try:
        found = economics(params, terms)
    except ValueError as error:
        raise UserError(f"These terms make no sense: {error}.", "see --help", USAGE) from None
    rows = [
        {
            "cheat": one.name,
            "chance": round(one.chance, 4),
            "mean_cells": round(one.mean_cells, 1),
            "cells_for_certainty": one.cells_for_certainty,
            "gain": round(one.gain),
            "loss": round(one.loss),
            "profit": round(one.profit),
            "note": one.note,
        }
        for one in found.cheats
    ]
    return {"bond": found.bond, "least_bond": found.least_bond, "is_sound": found.is_sound, "cheats": rows}


def _basis(share: float) -> int:
    return round(share * 10_000)
