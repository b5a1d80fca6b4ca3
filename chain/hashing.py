"""Domain-separated BLAKE3 hashes: no digest of one kind of object can stand for another kind."""

from functools import lru_cache

from blake3 import blake3

ZERO = bytes(32)


@lru_cache(maxsize=256)
def _hasher(domain: str) -> blake3:
    return blake3(derive_key_context=f"tdml 1 {domain}")


def digest(domain: str, *parts: bytes) -> bytes:
    """Return the 32-byte BLAKE3 digest (derive-key mode) of the concatenated `parts` in `domain`.

    Variable-length parts must be unambiguous by themselves (fixed width or one canonical encoding).
    """
    hasher = _hasher(domain).copy()
    for part in parts:
        hasher.update(part)
    return hasher.digest()
