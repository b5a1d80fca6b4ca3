"""Hypothesis strategies of valid consensus objects, derived from the constraints that their types declare."""

import importlib
import pkgutil
from functools import cache
from typing import Any

from hypothesis import strategies as st
from msgspec import inspect

import chain
from chain.codec import Record

FEW = 3
"""Most entries of a generated tuple, and bytes beyond the least of a byte string."""


def record_types() -> list[type[Record]]:
    """Return every consensus object of `chain`, by name."""
    for module in pkgutil.walk_packages(chain.__path__, "chain."):
        importlib.import_module(module.name)
    found: list[type[Record]] = []
    waiting: list[type[Record]] = [Record]
    while waiting:
        below = [kind for kind in waiting.pop().__subclasses__() if _is_public(kind)]
        found += below
        waiting += below
    return sorted(set(found), key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")


def _is_public(kind: type[Record]) -> bool:
    """Whether `kind` is part of the protocol; private ones only read what this peer wrote itself."""
    return kind.__module__.startswith("chain.") and not kind.__name__.startswith("_")


@cache
def valid(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy of values that satisfy every constraint of `kind`."""
    return st.deferred(lambda: _of(inspect.type_info(kind)))


def _of(info: Any) -> st.SearchStrategy[Any]:
    match info:
        case inspect.IntType():
            return _integers(info)
        case inspect.BytesType():
            least = info.min_length or 0
            most = least + FEW if info.max_length is None else min(info.max_length, least + FEW)
            return st.binary(min_size=least, max_size=most)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.EnumType():
            return st.sampled_from(list(info.cls))
        case inspect.UnionType():
            return st.one_of([_of(one) for one in info.types])
        case inspect.TupleType():
            return st.tuples(*[_of(one) for one in info.item_types])
        case inspect.VarTupleType():
            least = info.min_length or 0
            return st.lists(_of(info.item_type), min_size=least, max_size=least + FEW).map(tuple)
        case inspect.StructType():
            fields = {field.name: _of(field.type) for field in info.fields}
            return st.builds(info.cls, **fields)
        case _:
            raise NotImplementedError(f"consensus objects have no {info}")


def _integers(info: inspect.IntType) -> st.SearchStrategy[int]:
    least = info.ge if info.ge is not None else -1 if info.gt is None else info.gt + 1
    most = info.le if info.le is not None else 2**63 - 1 if info.lt is None else info.lt - 1
    edges = [edge for edge in (0, 23, 127, 128, 255, 256, 65_535, 65_536, 2**32) if least <= edge <= most]
    return st.one_of(st.integers(int(least), int(most)), st.sampled_from([int(least), int(most), *edges]))
