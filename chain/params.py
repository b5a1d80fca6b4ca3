"""Parameters of a network, named by its genesis and changed by votes within `chain.bounds`.

Windows are block counts, amounts base units.
"""

from typing import Annotated

from msgspec import Meta

from chain.codec import Record, Uint

Count = Annotated[int, Meta(ge=1, le=2**31)]


class Params(Record, frozen=True):
    """All parameters, with the defaults of a new network."""

    block_interval_ms: Count = 1000
    heartbeat_ms: Count = 5000
    epoch_blocks: Count = 20
    min_fee_per_byte: Uint = 0
    min_stake: Count = 1000
    churn_share: Annotated[int, Meta(ge=1, le=3333)] = 2500
    """Basis points of the validators' power that may come and go in one epoch: under a third, so that the
    sets before and after always share a quorum's honest member."""
    unbonding_blocks: Count = 200_000
    """How long leaving stake can still be slashed; the trusting period of light clients is two thirds of it."""
    jail_window: Count = 100
    jail_missed: Count = 80
    jail_blocks: Count = 60
    faucet_grant: Uint = 0
    formation_blocks: Count = 3
    draw_delay: Annotated[int, Meta(ge=2, le=100)] = 2
    claim_window: Count = 20
    commit_window: Count = 15
    open_window: Count = 12
    reveal_window: Count = 10
    vote_window: Count = 20
    lease_blocks: Count = 120
    absence_blocks: Count = 60
    redraws: Uint = 2
    reaudit_rate: Uint = 500
    """Basis points of passed audits whose cell another auditor executes again."""
    newcomer_cells: Uint = 50
    newcomer_rate: Uint = 5000
    floor_rate: Uint = 500
    step_share: Annotated[int, Meta(ge=0, le=10_000)] = 2500
    """Basis points of the cells' audit rate at which optimiser's steps are drawn, for each of which all gradients of a
    worker travel; never under `floor_rate`, in full where the rate is, and where two claims differ."""
    withheld_limit: Count = 3
    """Occasions of withheld data or small deviations that cost the seat; see `tasks.FORGETTING`."""
    tau: tuple[Uint, Uint, Uint] = (2500, 27_000, 35_000)
    """Thresholds of y, gx and gw in units of 1e-9 (relative L2)."""
    fraud_factor: Count = 100
    wide_tau: tuple[Uint, Uint, Uint] = (5_000_000, 50_000_000, 50_000_000)
    """The same between kernel classes, for tasks whose results are exact inside one only."""
    wide_factor: Count = 4
    reporter_share: Annotated[int, Meta(ge=0, lt=5000)] = 2500
    """Basis points of a slashed bond that go to the auditor; the rest is burnt."""
    colluding_share: Annotated[int, Meta(ge=0, lt=10_000)] = 2500
    """Share f of colluding auditors, in basis points, that a task's bond must withstand."""
    max_block_transactions: Count = 2048
    max_block_bytes: Count = 900_000
    history_blocks: Count = 200
    """Blocks for which ended audits and claims stay in the state; the database keeps them for good."""
    max_drawn_cells: Count = 2048
    """Cells whose audit is decided in one block; claims beyond wait for the next one."""
    free_tasks: bool = False
    """Whether a task may offer a price of nothing, as private networks may want."""
