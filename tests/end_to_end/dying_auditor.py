"""`tdml-peer` that dies as by kill -9 when it is about to reveal the first audit that it has committed to."""

import os
import signal

from chain.state import Audit, Duty
from cli.peer import main
from tdml_p2p.swarm.auditor import Auditor


async def die(_self: Auditor, _duty: Duty, _audit: Audit) -> None:
    """End this process: whatever it has computed and not revealed is lost."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Auditor._reveal = die  # type: ignore[method-assign]
    main()
