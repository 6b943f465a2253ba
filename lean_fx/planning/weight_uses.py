"""Watch a model run for the weights that it applies itself, in place of calling their layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lean_fx.graph.parts import StandIn
from lean_fx.layers.kinds import LAYER_OF_CALL, channel_axis, groups_of, input_channels


@dataclass(frozen=True)
class Use:
    """One use of a layer's weight outside of the layer's forward.

    Attributes:
        within: the modules around the layer that run, by name; the model itself is ``""``.
        input: what the weight is applied to as the layer would; None if it is not.
    """

    within: tuple[str, ...]
    input: Tensor | None


class Watch(TorchFunctionMode):
    """Knows which modules of a model run.

    Args:
        model: gets hooks, so give a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._running: list[str] = []
        for name, module in model.named_modules():
            if not isinstance(module, StandIn):  # that never runs
                module.register_forward_pre_hook(self._enter(name), prepend=True)
                module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self._running.append(name)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()


class WeightUses(Watch):
    """See what the weights of a model's linear layers and convolutions are used for.

    Args:
        model: gets hooks, so give a copy.

    Attributes:
        uses: of the weight of each layer, by the layer's name; those within its own forward, and
            what is only asked of the weight (its shape, its dtype), are left out.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.proj = nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return F.linear(x, self.proj.weight) + self.proj(x)
        >>> net = Net()
        >>> with WeightUses(net) as watch:
        ...     out = net(torch.rand(3, 8))
        >>> [(use.within, use.input.shape) for use in watch.uses["proj"]]
        [(('',), torch.Size([3, 8]))]
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.uses: dict[str, list[Use]] = {}
        self._layers: dict[int, tuple[str, nn.Module]] = {}
        for name, module in model.named_modules():
            if name and type(module) in LAYER_OF_CALL.values():
                self._layers[id(module.weight)] = (name, module)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ("__get__", "size", "dim"):
            for tensor in _tensors((*args, *kwargs.values())):
                name, layer = self._layers.get(id(tensor), ("", None))
                if layer is not None and name not in self._running:
                    within = tuple(each for each in self._running if _is_within(name, each))
                    use = Use(within, _applied_to(layer, func, args, kwargs))
                    self.uses.setdefault(name, []).append(use)
        return func(*args, **kwargs)


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(tuple(value))


def _is_within(name: str, holder: str) -> bool:
    return not holder or name.startswith(f"{holder}.")


def _applied_to(
    layer: nn.Module, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The input of a call that applies the weight of a layer as the layer would, or None."""
    value = args[0] if args else kwargs.get("input")
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    if LAYER_OF_CALL.get(func) is not type(layer) or not isinstance(value, Tensor):
        return None
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    axis = channel_axis(layer, value.shape)
    same = groups == groups_of(layer) and value.shape[axis] == input_channels(layer)
    return value if weight is layer.weight and value is not weight and same else None
