"""Everything that touches the network or starts things: the peer and its services."""
