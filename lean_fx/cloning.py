"""Deep copies of models, where ``copy.deepcopy`` fails or loses something.

1. A weight that torch's own hooks compute before every call (weight norm, spectral norm and pruning
   of :mod:`torch.nn.utils`) is copied with its present value; deepcopy raises.
2. The gradient hooks of parameters are copied; deepcopy drops them.
3. Parameters and buffers that share memory in the model share it in the copy; deepcopy gives each
   its own.
4. A tensor that a forward has left in a list or dict, such as a cache, is copied without its
   gradient; deepcopy raises.
5. A function that a module holds and that closes over modules, as ``lambda x: self.gain * x`` does
   or what wraps ``block.forward``, closes over their copies; deepcopy keeps the function. So does a
   weak reference to a module.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from lean_fx.errors import CaptureError, one_line_with_type

#: The attributes that torch gives every module.
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_DEEPEST = 6  # closures within closures
_MANY = 1000  # a longer list is data
_REFERRING: Any = (nn.Module, weakref.ref, MethodType, FunctionType, list, dict)
#: The hooks of torch that compute a weight before every call.
COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)


def clone(model: nn.Module) -> nn.Module:
    """A deep copy of a model.

    Raises:
        CaptureError: it cannot be copied.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model.register_buffer("row", model.weight.detach()[0])
        >>> copied = clone(model)
        >>> copied.row.data_ptr() == copied.weight.data_ptr() != model.weight.data_ptr()
        True
    """
    name = type(model).__name__
    computed = (*_computed_by_hooks(model), *_cached(model))
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in computed}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a module's own __deepcopy__ raises
        held = _computed(model)
        if held:
            raise CaptureError(
                f"{name}: cannot be copied: {held} is computed from other tensors",
                "make it a parameter or a buffer, or compute it in forward",
            ) from error
        raise CaptureError(
            f"{name}: cannot be copied ({one_line_with_type(error, 200)})",
            "give a model that copy.deepcopy can copy",
        ) from error
    rebind_functions(copied, memo)
    old, new = _state(model), _state(copied)
    pairs = [(old[each], new[each]) for each in old if each in new]
    _share_memory(pairs)
    for before, after in pairs:
        for hook in (before._backward_hooks or {}).values():
            after.register_hook(hook)  # type: ignore[no-untyped-call]
    return copied


def rebind_functions(copied: nn.Module, memo: Mapping[int, Any]) -> None:
    """Make the functions that a copied model holds close over the copies (rule 5).

    Args:
        copied: what ``copy.deepcopy`` has made; changed in place.
        memo: that of the deepcopy.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model[0].forward = (lambda forward: lambda x: 2 * forward(x))(model[0].forward)
        >>> memo = {}
        >>> copied = copy.deepcopy(model, memo)
        >>> rebind_functions(copied, memo)
        >>> copied[0].forward.__closure__[0].cell_contents.__self__ is copied[0]
        True
    """
    for module in copied.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                vars(module)[name] = _rebound(value, memo, ())


def _rebound(value: Any, memo: Mapping[int, Any], above: tuple[int, ...]) -> Any:
    """A value that refers to copies; the value itself if it does not refer to what was copied.

    Args:
        value: the value. Lists and dicts are looked into, but not those within them.
        memo: that of the deepcopy.
        above: the ids of what holds the value.
    """
    if not isinstance(value, _REFERRING) or id(value) in above or len(above) > _DEEPEST:
        return value
    inner = partial(_rebound, memo=memo, above=(*above, id(value)))
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, weakref.ref):
        owner, held = inner(value()), value()
        return value if owner is held else weakref.ref(owner)
    if isinstance(value, MethodType):
        owner = inner(value.__self__)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, FunctionType) and value.__closure__:
        cells = tuple(_rebound_cell(cell, inner) for cell in value.__closure__)
        return value if cells == value.__closure__ else _with_cells(value, cells)
    if type(value) in (list, dict, OrderedDict) and 0 < len(value) < _MANY:
        items = enumerate(value) if isinstance(value, list) else value.items()
        flat = {key: each for key, each in items if not isinstance(each, list | dict)}
        changed = {key: new for key, each in flat.items() if (new := inner(each)) is not each}
        value = copy.copy(value) if changed else value  # that of a closure is the user's own
        for key, each in changed.items():
            value[key] = each
    return value


def _rebound_cell(cell: CellType, inner: Callable[[Any], Any]) -> CellType:
    try:
        before = cell.cell_contents
    except ValueError:  # it is empty
        return cell
    after = inner(before)
    return cell if after is before else CellType(after)


def _with_cells(function: FunctionType, cells: tuple[CellType, ...]) -> FunctionType:
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    made.__dict__.update(function.__dict__)
    return made


def memory_of(tensor: Tensor) -> tuple[int, int, int] | None:
    """The storage of a tensor, and the range of bytes that it occupies there.

    Returns:
        None if it has no plain storage, as sparse tensors and subclasses of Tensor.

    Example:
        >>> flat = torch.zeros(6)
        >>> memory_of(flat[2:4])[1:], memory_of(flat.view(2, 3)[:, 0])[1:]
        ((8, 16), (0, 16))
    """
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_quantized:
        return None
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    start, width = int(tensor.storage_offset()), tensor.element_size()
    return int(tensor.untyped_storage()._cdata), start * width, (start + int(length)) * width


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _computed_by_hooks(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if not isinstance(hook, COMPUTING):
                continue
            name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
            value = vars(module).get(name)
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


def _cached(model: nn.Module) -> Iterator[Tensor]:
    """Non-leaf tensors in lists and dicts of modules, which a forward has left there."""
    for module in model.modules():
        held = [value for name, value in vars(module).items() if name not in MODULE_ATTRIBUTES]
        for holder in (each for each in held if isinstance(each, dict | list)):
            try:
                leaves = pytree.tree_leaves(holder)
            except RecursionError:  # it holds itself
                continue
            yield from (x for x in leaves if isinstance(x, Tensor) and not x.is_leaf)


def _computed(model: nn.Module) -> str:
    """The name of an attribute that holds a non-leaf tensor; empty if there is none."""
    for path, module in model.named_modules():
        held = {**vars(module), **module._buffers}
        for name, value in held.items():
            if isinstance(value, Tensor) and not value.is_leaf:
                return repr(f"{path}.{name}".removeprefix("."))
    return ""


def _share_memory(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Let copies share memory if their originals do."""
    sharing: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for old, new in pairs:
        memory = memory_of(old)
        if memory is not None:
            sharing.setdefault(memory[0], []).append((old, new))
    for group in sharing.values():
        if len(group) > 1:
            storage = group[0][0].untyped_storage().clone()  # type: ignore[no-untyped-call]
            for old, new in group:
                place = (old.storage_offset(), old.shape, old.stride())
                new.data = new.detach().new_empty(0).set_(storage, *place)
