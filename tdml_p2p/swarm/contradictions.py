"""Whether an opened trace contradicts a re-execution: other inputs than were signed for, or other results. Pure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from chain.transactions import Trace
from chain.verdicts import Limits
from tdml_p2p.swarm.inputs import is_of
from tdml_p2p.swarm.material import Buffer

if TYPE_CHECKING:
    from tdml_p2p.swarm.reexecution import Execution
    from trainer.compare import Spread, Thresholds
    from trainer.stage import CellResult

RESULTS = ("y", "gx", "gw")


def has_other_inputs(execution: "Execution", opened: Trace) -> bool:
    """Whether the trace names other inputs than their senders signed."""
    return not is_of(execution.inputs, opened)


def disputed_results(execution: "Execution", opened: Trace) -> dict[str, bytes]:
    """Return the claimed addresses of the results that are not, bit for bit, those of the re-execution."""
    from tdml_p2p.swarm.reexecution import results_of

    claimed = (opened.y, opened.gx, opened.gw)
    pairs = zip(RESULTS, results_of(execution), claimed, strict=True)
    return {name: theirs for name, own, theirs in pairs if own != theirs}


def tolerances(limits: Limits, spread: "Spread | None" = None) -> "Thresholds":
    """Return a network's limits as whole tensors are compared with, where the judge's own results differ so much."""
    from trainer.compare import STEADY, Thresholds

    return Thresholds(*limits.tau, fraud_factor=limits.fraud_factor, spread=spread or STEADY)


def claimed_result(execution: "Execution", claimed: Mapping[str, Buffer]) -> "CellResult | None":
    """Return the claimed results, those that are not in `claimed` being the own ones; None for no such tensors."""
    from trainer.stage import CellResult
    from trainer.tensors import vector_of

    theirs = {name: getattr(execution.result, name) for name in RESULTS}
    for name, data in claimed.items():
        try:
            theirs[name] = vector_of(data, theirs[name].numel()).reshape(theirs[name].shape)
        except ValueError:
            return None
    return CellResult(**theirs, boundaries=())


def has_false_results(
    execution: "Execution", claimed: Mapping[str, Buffer], limits: Limits, spread: "Spread | None" = None
) -> bool:
    """Whether one of the claimed tensors is fraud, or no tensor of its kind at all."""
    from trainer.compare import compare

    theirs = claimed_result(execution, claimed)
    return theirs is None or compare(theirs, execution.result, tolerances(limits, spread)).is_fraud
