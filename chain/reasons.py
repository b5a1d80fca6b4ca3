"""Why the ledger refuses a block or a payload: one word each, shared by receipts, logs and tests."""

from enum import StrEnum


class Reason(StrEnum):
    """A named refusal."""

    WRONG_CHAIN = "wrong-chain"  # Signed for another network.
    BAD_SIGNATURE = "bad-signature"  # Not the sender's signature.
    WRONG_NONCE = "wrong-nonce"  # Not the sender's next nonce.
    OUTSIDE_WINDOW = "outside-window"  # Not valid at this height.
    LOW_FEE = "low-fee"  # Below the least fee for its size.
    NO_FUNDS = "no-funds"  # The balance does not cover it.
    TOO_LARGE = "too-large"  # More bytes than a transaction may have.
    WRONG_HEIGHT = "wrong-height"  # Not the block after the state's.
    WRONG_PROPOSER = "wrong-proposer"  # The proposer is not a validator.
    WRONG_REVEAL = "wrong-reveal"  # Does not open the proposer's hash onion.
    WRONG_SEED = "wrong-seed"  # Not the seed that follows from the reveal.
    WRONG_TIME = "wrong-time"  # Not later than the parent.
    TOO_MANY = "too-many"  # More transactions or bytes than a block may carry.
    MEMPOOL_FULL = "mempool-full"  # No room among the waiting transactions at this fee.
    ZERO_AMOUNT = "zero-amount"  # An amount of nothing.
    NO_STAKE = "no-stake"  # Less stake than that is bonded.
    LAST_VALIDATOR = "last-validator"  # The chain would have nobody to go on with.
    NOTHING_RELEASED = "nothing-released"  # No unbonding has ended.
    NOT_A_VALIDATOR = "not-a-validator"  # The sender is not registered.
    TOMBSTONED = "tombstoned"  # Signed two conflicting votes: out for good.
    NOT_JAILED = "not-jailed"  # There is nothing to return from.
    STILL_JAILED = "still-jailed"  # The jail time is not over.
    NO_FAUCET = "no-faucet"  # This network has none, or it is empty.
    ALREADY_GRANTED = "already-granted"  # One grant an account.
    TASK_EXISTS = "task-exists"  # The same task was posted before.
    TASK_TOO_LARGE = "task-too-large"  # More cells a step, or more seats, than a block could look after.
    BAD_REDUNDANCY = "bad-redundancy"  # An even number has no clear majority; seats must be as many.
    TASK_FULL = "task-full"  # As many have applied as a task may have.
    UNKNOWN_TASK = "unknown-task"  # No such task.
    TASK_CLOSED = "task-closed"  # The task has ended.
    NOT_THE_CLIENT = "not-the-client"  # Only who posted the task may.
    ESCROW_TOO_SMALL = "escrow-too-small"  # Does not cover every cell and its audit.
    PRICE_TOO_SMALL = "price-too-small"  # This network has no tasks without pay.
    BOND_TOO_SMALL = "bond-too-small"  # Cheating would pay at this bond, rate and price.
    RATE_TOO_SMALL = "rate-too-small"  # Fewer audits than the network's floor.
    ALREADY_APPLIED = "already-applied"  # The sender has a seat or an application.
    BARRED = "barred"  # Convicted before.
    BAD_KERNEL = "bad-kernel"  # Neither a kernel class nor nothing.
    OTHER_KERNEL = "other-kernel"  # Of another kernel class than the task, or there is none to differ from.
    NO_SEAT = "no-seat"  # The sender holds no seat of that stage.
    NOT_RUNNING = "not-running"  # The seats are not drawn yet.
    WRONG_GENERATION = "wrong-generation"  # A rollback has ended that generation.
    WRONG_STEP = "wrong-step"  # Settled already, or further ahead than the ring is deep.
    WRONG_STATE = "wrong-state"  # Nobody of the stage has claimed the state that the claim starts from.
    BAD_CELLS = "bad-cells"  # Cells out of order or out of range.
    CELL_CLAIMED = "cell-claimed"  # Somebody has claimed that cell of the step.
    UNKNOWN_AUDIT = "unknown-audit"  # No such audit.
    NOT_OWED = "not-owed"  # The sender owes nothing of that kind now.
    WRONG_COMMITMENT = "wrong-commitment"  # The reveal is not what was committed to.
    MISPLACED = "misplaced"  # Inputs shown, or a word on them, where no auditor can have been misled.
    EXACT_RESULTS = "exact-results"  # A tolerance where results are exact: an optimiser's step, a kernel class's task.
    FALSE_OPENING = "false-opening"  # The opening does not lead to the claim's root.
    BAD_EVIDENCE = "bad-evidence"  # The two votes do not conflict, or are not authentic.
    EVIDENCE_OLD = "evidence-old"  # Its stake may have left since: outside the evidence window.
    EVIDENCE_EARLY = "evidence-early"  # Votes of a height that is not under decision yet.
    CLOSED = "closed"  # Its key was rotated: the account acts, and is paid, under its successor.
    KEY_IN_USE = "key-in-use"  # The successor must be a key that was never used.
    BAD_PROOF = "bad-proof"  # The successor has not signed that it succeeds the sender.
    OBLIGED = "obliged"  # A client, worker or auditor finishes first.
    BAD_PARAMS = "bad-params"  # No network can run on them, or no vote can lead there.
    EVIDENCE_KNOWN = "evidence-known"  # That offence is punished already.


class Refused(ValueError):
    """A payload that the ledger refuses: it costs fee and nonce and changes nothing."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class InvalidBlock(ValueError):
    """A block that no honest proposer builds."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
