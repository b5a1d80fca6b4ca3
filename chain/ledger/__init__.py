"""The ledger's rules: a block's transactions and hooks applied to a state, purely."""

from chain.ledger.execution import Event, Executed, Receipt, check_envelope, execute, is_owed
from chain.reasons import InvalidBlock, Reason, Refused

__all__ = ["Event", "Executed", "InvalidBlock", "Reason", "Receipt", "Refused", "check_envelope", "execute", "is_owed"]
