"""Testnets of real peer processes from a manifest, judged by what `tdml-chain -o json` says."""
