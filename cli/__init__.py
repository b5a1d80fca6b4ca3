"""The commands tdml-peer and tdml-chain: parse, call, render."""
