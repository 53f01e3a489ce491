"""The modules behind a model that is a function: a lambda, a partial, a method, or an object that can be called."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn


def modules_behind(model: Any) -> list[nn.Module]:
    """The modules that a callable can be seen to use, without their submodules; of a module, itself.

    Seen are: what a function closes over, its defaults and the globals that it names, the parts of a partial, the
    object of a method, the attributes of an object that can be called or one of whose methods is, and the items of
    lists, tuples, sets and dicts among these. Of any other object that a function uses, the attributes it names.
    """
    found: list[nn.Module] = []
    seen: dict[int, Any] = {}  # by id, and kept, as another object could get the id of one that is gone

    def look_at(value: Any, names: Collection[str] = ()) -> None:
        if id(value) in seen:
            return
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, (list, tuple, set, dict)):
            for item in list(value.values() if isinstance(value, dict) else value):
                look_at(item, names)
        elif isinstance(value, functools.partial):
            for item in (value.func, *value.args, *value.keywords.values()):
                look_at(item)
        elif isinstance(value, MethodType):
            look_at(value.__self__, [value.__name__])
            if not isinstance(value.__self__, nn.Module):
                look_at(value.__func__)
        elif isinstance(value, FunctionType):
            used = _names_in(value.__code__)
            for item in _reached(value, used):
                look_at(item, used)
        elif not (isinstance(value, (type, ModuleType)) or _is_of_torch(type(value))):
            attributes = getattr(value, "__dict__", {})
            # A method may use whatever its object has.
            runs = callable(value) or any(isinstance(getattr(type(value), name, None), FunctionType) for name in names)
            for name in list(attributes):
                if runs or name in names:
                    look_at(attributes[name])
            if callable(value):
                look_at(type(value).__call__)

    look_at(model)
    return found


def _names_in(code: CodeType) -> list[str]:
    """Names of globals and attributes in a function's code and in that of the functions within it."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return list(itertools.chain(code.co_names, *inner))


def _reached(function: FunctionType, names: list[str]) -> Iterator[Any]:
    """What a function closes over, has as defaults and names of its globals."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            continue  # a variable that has no value yet
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if not _is_of_torch(function):
        yield from (function.__globals__[name] for name in names if name in function.__globals__)


def _is_of_torch(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == "torch"


def depends_on_parameters(output: Tensor) -> bool:
    """Whether a backward pass from this tensor reaches a parameter, as it does unless all of them are frozen."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if isinstance(getattr(node, "variable", None), nn.Parameter):
                return True
            nodes += [following for following, _ in node.next_functions]
    return False
