"""The kinds of layers whose input can be reduced: what they read, how to rebuild them, their cost.

Each type has one kind. A subclass has the kind of its base; since its forward may do more,
:mod:`lean_fx.layers.rebuild` tests it before rebuilding. :func:`register_layer` adds a kind for a
type of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lean_fx.checks import check_int, one_of
from lean_fx.errors import ArgumentError, one_line_with_type
from lean_fx.layers.known_layers import KNOWN


@dataclass(frozen=True)
class LayerKind:
    """What lean_fx knows about a type of layer. The functions take a layer of the type first.

    Attributes:
        layer_type: the type.
        in_channels: returns the number of input channels.
        macs: called with a layer and the numbers of elements that it reads and writes; returns its
            multiply-adds.
        weights: the names of the parameters that multiply the input.
        channel_dim: returns the axis of the channels in the input and the output; counted from
            the end, since the batch axis may be missing.
        groups: returns the number of groups, each of which reads its own channels.
        out_channels: returns the number of output channels; None if the output is not one tensor.
        rebuild: called with a layer and a number; returns a new layer with that many input
            channels. If None, a rebuilt layer is a copy with part of the weights.
        width: the attribute that holds ``in_channels``; it is set in such a copy.
        calls: the functions that apply a weight as the layer does.
        recurrent: whether it is an RNN, which may read packed sequences, or an RNN cell.
        registered: whether :func:`register_layer` added it.
    """

    layer_type: type[nn.Module]
    in_channels: Callable[[Any], int]
    macs: Callable[[Any, int, int], int]
    weights: tuple[str, ...] = ("weight",)
    channel_dim: Callable[[Any], int] = lambda layer: -1
    groups: Callable[[Any], int] = lambda layer: 1
    out_channels: Callable[[Any], int] | None = None
    rebuild: Callable[[Any, int], nn.Module] | None = None
    width: str = ""
    calls: tuple[Callable[..., Any], ...] = ()
    recurrent: bool = False
    registered: bool = False


def _macs_of_written(layer: Any, read: int, written: int) -> int:
    """Each element written takes one multiply-add per weight of its output channel."""
    return written * first_weight(layer)[0].numel()


def _macs_of_read(layer: Any, read: int, written: int) -> int:
    """In a transposed convolution, each element read multiplies all weights of its channel."""
    return read * first_weight(layer)[0].numel()


def _macs_of_steps(layer: Any, read: int, written: int) -> int:
    """In a recurrent layer, each step multiplies every element of its matrices once."""
    matrices = sum(each.numel() for each in layer.parameters() if each.dim() == 2)
    return read // input_channels(layer) * int(matrices)


def _kind_of_torch(layer_type: type[nn.Module], width: str, out: str, **others: Any) -> LayerKind:
    """A kind whose layers hold their channels in the attributes ``width`` and ``out``."""
    given = {"macs": _macs_of_written, "in_channels": attrgetter(width), "width": width, **others}
    return LayerKind(layer_type, out_channels=attrgetter(out) if out else None, **given)


_CONV: dict[str, Any] = {
    "width": "in_channels",
    "out": "out_channels",
    "groups": lambda layer: layer.groups,
    "channel_dim": lambda layer: -1 - len(layer.kernel_size),
}
_TRANSPOSED: dict[str, Any] = {**_CONV, "macs": _macs_of_read}
_RECURRENT: dict[str, Any] = {"width": "input_size", "macs": _macs_of_steps, "recurrent": True}
_STACK = {**_RECURRENT, "out": "", "weights": ("weight_ih_l0", "weight_ih_l0_reverse")}
_CELL = {**_RECURRENT, "out": "hidden_size", "weights": ("weight_ih",)}

_OF_TORCH = (
    _kind_of_torch(nn.Conv1d, calls=(F.conv1d,), **_CONV),
    _kind_of_torch(nn.Conv2d, calls=(F.conv2d,), **_CONV),
    _kind_of_torch(nn.Conv3d, calls=(F.conv3d,), **_CONV),
    _kind_of_torch(nn.ConvTranspose1d, **_TRANSPOSED),
    _kind_of_torch(nn.ConvTranspose2d, **_TRANSPOSED),
    _kind_of_torch(nn.ConvTranspose3d, **_TRANSPOSED),
    _kind_of_torch(nn.Linear, "in_features", "out_features", calls=(F.linear,)),
    _kind_of_torch(nn.RNN, **_STACK),
    _kind_of_torch(nn.LSTM, **_STACK),
    _kind_of_torch(nn.GRU, **_STACK),
    _kind_of_torch(nn.RNNCell, **_CELL),
    _kind_of_torch(nn.LSTMCell, **{**_CELL, "out": ""}),
    _kind_of_torch(nn.GRUCell, **_CELL),
)

#: The kinds by their exact types.
KINDS: dict[type[nn.Module], LayerKind] = {kind.layer_type: kind for kind in _OF_TORCH}

#: For each function that applies a weight as a layer does, the type of that layer.
LAYER_OF_CALL: dict[Any, type[nn.Module]] = {
    call: kind.layer_type for kind in _OF_TORCH for call in kind.calls
}


def register_layer(
    layer_type: type[nn.Module],
    *,
    like: type[nn.Module] | None = None,
    in_channels: Callable[[Any], int] | None = None,
    rebuild: Callable[[Any, int], nn.Module] | None = None,
    weights: Sequence[str] = ("weight",),
    channel_dim: int = -1,
    out_channels: Callable[[Any], int] | None = None,
    macs: Callable[[Any, int, int], int] | None = None,
) -> None:
    """Let lean_fx reduce the input of layers of your own type, as it does for torch's.

    Such layers become leaves of the graph; their input must be the first argument. There are two
    ways:

    - ``like=nn.Conv2d`` says that the type behaves as that type does, whatever its forward looks
      like. It may be a subclass, or have the same attributes and weights. A rebuilt layer is a copy
      with part of the weights. A subclass that is not registered is tested instead
      (:mod:`lean_fx.layers.subclasses`), and left alone if in doubt.
    - ``in_channels`` and ``rebuild`` describe any other layer that is linear in its input. In a
      rebuilt layer lean_fx scales the ``weights`` to the reduced input; all other parameters and
      buffers keep the old values if their shapes agree.

    Register the type before you apply a plan that names such layers.

    Args:
        layer_type: the exact type; its subclasses are not registered with it.
        like: a conv, linear or recurrent type of torch.nn; then leave out what follows.
        in_channels: called with a layer; returns the number of its input channels.
        rebuild: called with a layer and a number; returns a new layer of the same type, with that
            many input channels, newly drawn weights, and the other settings of the old one.
        weights: the names of the parameters that multiply the input.
        channel_dim: the axis of the channels in the input and in the output.
        out_channels: called with a layer; returns the number of channels of its output. Without
            it, a linear layer behind a flatten of this output is left alone.
        macs: called with a layer and the numbers of elements that it reads and writes; returns its
            multiply-adds. The default counts one for each weight and each position read.

    Raises:
        ArgumentError: the type is not a module class or is registered, or an argument is missing
            or wrong.

    Example:
        >>> import lean_fx, torch
        >>> class Turned(nn.Module):
        ...     def __init__(self, n_in, n_out):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.randn(n_in, n_out))
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> register_layer(
        ...     Turned,
        ...     in_channels=lambda layer: layer.weight.shape[0],
        ...     rebuild=lambda layer, n: Turned(n, layer.weight.shape[1]),
        ... )
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), Turned(64, 2))
        >>> lean_fx.leanify(model).get_submodule("2").weight.shape
        torch.Size([8, 2])
        >>> unregister_layer(Turned)
    """
    name = getattr(layer_type, "__name__", repr(layer_type))
    subject = f"register_layer: {name}"
    if not isinstance(layer_type, type) or not issubclass(layer_type, nn.Module):
        raise ArgumentError(f"{subject} is not a module class; give the class of the layers")
    if layer_type in KINDS:
        raise ArgumentError(f"{subject} is registered already; call unregister_layer({name}) first")
    given: dict[str, Any] = {"in_channels": in_channels, "rebuild": rebuild}
    given |= {"out_channels": out_channels, "macs": macs}
    if like is not None:
        kind = next((kind for kind in _OF_TORCH if kind.layer_type is like), None)
        if kind is None:
            known = one_of([kind.layer_type.__name__ for kind in _OF_TORCH])
            raise ArgumentError(f"{subject}: like={like!r} is not torch.nn's {known}")
        if any(given.values()) or (weights, channel_dim) != (("weight",), -1):
            raise ArgumentError(f"{subject}: like={like.__name__} says the rest; leave that out")
    else:
        kind = _described_kind(subject, layer_type, given, weights, channel_dim)
    checked = {
        key: _checked(f"{subject}: {key}", getattr(kind, key), least)
        for key, least in _LEAST.items()
        if getattr(kind, key)
    }
    KINDS[layer_type] = replace(kind, layer_type=layer_type, registered=True, **checked)


def _described_kind(
    subject: str,
    layer_type: type[nn.Module],
    given: dict[str, Any],
    weights: Sequence[str],
    channel_dim: int,
) -> LayerKind:
    """The kind of a layer that is like none of torch's; ``given`` holds the user's functions."""
    for key, value in given.items():
        if not callable(value) and (value is not None or key in ("in_channels", "rebuild")):
            raise ArgumentError(
                f"{subject}: {key}={value!r} cannot be called; give a function of the layer, "
                "or like= a type of torch.nn"
            )
    if isinstance(weights, str) or not weights:
        raise ArgumentError(f"{subject}: weights={weights!r} is not a sequence of names")
    dim = check_int(f"{subject}: channel_dim", channel_dim)
    return LayerKind(
        layer_type,
        weights=tuple(weights),
        channel_dim=lambda layer: dim,
        **{"macs": _macs_of_positions} | {key: x for key, x in given.items() if x},
    )


_LEAST = {"in_channels": 1, "groups": 1, "out_channels": 1, "macs": 0, "channel_dim": None}


def _checked(subject: str, function: Callable[..., Any], least: int | None) -> Any:
    """A function of a layer, with its result checked."""

    def checked(*args: Any) -> int:
        try:
            value = function(*args)
        except Exception as error:  # the user's own code
            raise ArgumentError(
                f"{subject} fails ({one_line_with_type(error)}); correct it"
            ) from error
        return check_int(subject, value, least)

    return checked


def unregister_layer(layer_type: type[nn.Module]) -> None:
    """Undo :func:`register_layer`. Types that were never registered, and torch's, are ignored."""
    if layer_type in KINDS and KINDS[layer_type].registered:
        del KINDS[layer_type]


def _macs_of_positions(layer: Any, read: int, written: int) -> int:
    """Each position read takes one multiply-add per weight."""
    weights = sum(weight.numel() for weight in input_weights(layer).values())
    return read // input_channels(layer) * weights


def kind_of(layer: nn.Module | None) -> LayerKind | None:
    """The kind of a layer's type, or of the nearest base that has one; None if none has.

    It registers the types of :mod:`lean_fx.layers.known_layers` when it first meets them.

    Example:
        >>> class Mine(nn.Linear):
        ...     pass
        >>> kind_of(Mine(4, 2)).layer_type.__name__, kind_of(nn.ReLU())
        ('Linear', None)
    """
    if layer is not None and type(layer) not in KINDS:
        known = KNOWN.get(f"{type(layer).__module__}.{type(layer).__qualname__}")
        if known:
            register_layer(type(layer), **known)
    return next((KINDS[base] for base in type(layer).__mro__ if base in KINDS), None)


def has_own_kind(layer: nn.Module | None) -> bool:
    """Whether there is a kind for the very type of a layer, not only for a base of it.

    Example:
        >>> class Mine(nn.Linear):
        ...     pass
        >>> has_own_kind(nn.Linear(4, 2)), has_own_kind(Mine(4, 2)), has_own_kind(nn.ReLU())
        (True, False, False)
    """
    return kind_of(layer) is not None and type(layer) in KINDS


def base_type(layer: nn.Module) -> type[nn.Module]:
    """The type of a layer, below its parametrizations if it has any.

    Example:
        >>> base_type(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))).__name__
        'Linear'
    """
    return type(layer).__mro__[1] if parametrize.is_parametrized(layer) else type(layer)


def known_kind_of(layer: nn.Module) -> LayerKind:
    """The kind of a layer that is known to have one."""
    kind = kind_of(layer)
    assert kind is not None, type(layer)
    return kind


def input_channels(layer: nn.Module) -> int:
    """The input channels of a conv, or the input features of a linear or recurrent layer.

    Example:
        >>> input_channels(nn.Conv2d(3, 50, 3)), input_channels(nn.Linear(20, 10))
        (3, 20)
        >>> input_channels(nn.GRU(40, 64))
        40
    """
    return known_kind_of(layer).in_channels(layer)


def groups_of(layer: nn.Module) -> int:
    """The groups of a conv; 1 for any other layer.

    Example:
        >>> groups_of(nn.Conv2d(8, 8, 3, groups=4)), groups_of(nn.Linear(8, 8))
        (4, 1)
    """
    return known_kind_of(layer).groups(layer)


def channel_axis(layer: nn.Module, shape: tuple[int, ...] | None = None) -> int:
    """The axis of the channels that a layer reads: -1, or counted from the front if possible.

    Args:
        layer: of a kind.
        shape: of its input; None if that is not known. Then a convolution reads a batch.

    Example:
        >>> channel_axis(nn.Conv2d(3, 50, 3), (3, 9, 9)), channel_axis(nn.Conv2d(3, 50, 3))
        (0, 1)
        >>> channel_axis(nn.Linear(20, 10), (5, 20))
        -1
    """
    dim = known_kind_of(layer).channel_dim(layer)
    if dim >= -1:
        return dim
    if shape is not None:
        return len(shape) + dim
    return 1 if hasattr(layer, "kernel_size") else dim


def input_weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that multiply the input, by name; of a stack of layers, the first one's.

    Example:
        >>> [*input_weights(nn.Linear(20, 10))], [*input_weights(nn.LSTM(8, 8, 2))]
        (['weight'], ['weight_ih_l0'])
    """
    kind = kind_of(layer)
    names = set(kind.weights if kind else ())
    if "weight" in names:  # torch's norms rename it, by parametrization or by hooks
        names |= {f"parametrizations.weight.original{end}" for end in ("", "1")}
        names |= {"weight_orig", "weight_v"}
    return {name: value for name, value in layer.named_parameters() if name in names}


def first_weight(layer: nn.Module) -> Tensor:
    """The first of the parameters that multiply the input."""
    return next(iter(input_weights(layer).values()))
