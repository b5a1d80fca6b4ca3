"""The thresholds of a new network, as comparisons take them."""

from chain.params import Params
from chain.verdicts import limits_for, wide_limits
from tdml_p2p.swarm.contradictions import tolerances

FP32 = tolerances(limits_for(Params()))
WIDE = tolerances(wide_limits(Params()))
