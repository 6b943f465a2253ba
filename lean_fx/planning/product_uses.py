"""Watch a model run for products that its code makes with weights outside any layer.

It follows the rules of :mod:`lean_fx.graph.products`, for models without a graph.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from lean_fx.graph.calls import modules_by_name
from lean_fx.graph.products import SAME_AS_INPUT, operands, why_computed
from lean_fx.layers.kinds import kind_of
from lean_fx.planning.weight_uses import Watch
from lean_fx.skip_reason import LeftAlone, SkipReason


class ProductUses(Watch):
    """Finds the parameters outside layers by which a model multiplies values, and why they stay.

    Args:
        model: gets hooks, so give a copy. If it is a graph, its own calls do not count.

    Attributes:
        left_alone: the parameters, by name, each with its reason and its function.

    Example:
        >>> import torch
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Parameter(torch.rand(5, 8))
        ...     def forward(self, x):
        ...         return x @ self.table[:3].T, x @ x.T
        >>> net = Net()
        >>> with ProductUses(net) as watch:
        ...     out = net(torch.rand(2, 8))
        >>> for each in watch.left_alone.values():
        ...     print(each.layer, each.kind, each.reason)
        table matmul the weight is computed from it in forward, which no layer would do
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.left_alone: dict[str, LeftAlone] = {}
        self._source_parameters: Any = WeakTensorKeyDictionary()
        self._modules = modules_by_name(model)
        for buffer in model.buffers():
            self._source_parameters[buffer] = ()
        for name, parameter in model.named_parameters():
            self._source_parameters[parameter] = (name,)
        self._parameters = dict(model.named_parameters())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        method = getattr(Tensor, name, None) is func
        given = _tensors((args, kwargs))
        weights = [each for each in given if self._source_parameters.get(each)]
        if weights:
            self._check(name, operands(name if method else func, args, kwargs))
        sources = given[:1] if method and name in SAME_AS_INPUT else given
        if all(each in self._source_parameters for each in sources):
            found = (self._source_parameters[each] for each in sources)
            names = dict.fromkeys(name for parameters in found for name in parameters)
            for tensor in _tensors(result):
                self._source_parameters.setdefault(tensor, tuple(names))
        elif name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            self._source_parameters.pop(given[0], None)
        return result

    def _check(self, called: str, given: list[Any]) -> None:
        """Record a product of a weight with something else."""
        weights = [each for each in given if self._source_parameters.get(each)]
        if not 0 < len(weights) < len(given) or not self._running or self._is_known():
            return
        name, *more = self._source_parameters[weights[0]]
        owners = (self._modules[each.rpartition(".")[0]] for each in (name, *more))
        if any(map(kind_of, owners)):
            return  # a layer has a reason of its own
        weight, parameter = weights[0], self._parameters[name]
        direct = (weight.data_ptr(), weight.numel()) == (parameter.data_ptr(), parameter.numel())
        reason = why_computed(more)
        if direct:
            text = "it is of no layer, and the call is not traced"
            reason = SkipReason("unsupported_product", text)
        self.left_alone.setdefault(name, LeftAlone(name, called, reason))

    def _is_known(self) -> bool:
        """Whether what runs is a layer, another module of torch.nn, or a graph with its facts."""
        module = self._modules[self._running[-1]]
        known = type(module).__module__.startswith("torch.nn.")
        return known or isinstance(module, GraphModule) or kind_of(module) is not None


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
