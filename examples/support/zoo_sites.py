"""How many calls of a model could be reduced: counted by running it, independently of the pass.

Every operator that the model runs is looked at below the modules, functions and traces that the
pass sees: a convolution, a recurrent layer, or a matrix product with a weight is a call site,
whether a module, a function or a formula of ``forward`` calls for it. A weight is a parameter, or
what was computed only from parameters and buffers (weight standardisation, say).

Run on a reduced model, the same count tells which sites still read all their channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lean_fx.graph.parts import StandIn
from lean_fx.reduction.registry import is_reduction

# What gives the same channels again, elsewhere in memory; views share the memory and need no list.
_COPIES = {"clone", "_to_copy", "_unsafe_view", "constant_pad_nd", "native_dropout", "roll"}
_COPIES |= {"cat", "index", "index_select"}
# The places of the two factors among the operands of a matrix product.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}


@dataclass(frozen=True)
class CallSite:
    """One call that multiplies channels with weights.

    Attributes:
        kind: ``"conv"``, ``"depthwise"``, ``"linear"``, ``"attention"`` (within
            nn.MultiheadAttention) or ``"recurrent"`` (one layer and direction of it).
        layer: the name of the module that holds the weight, or the first parameter that it is
            computed from.
        in_channels: the channels, or features, that it reads.
        groups: of a convolution; else 1.
        reads_reduction: whether its input comes from a reduction.
        weight: the name of the weight, or of the first parameter that it is computed from.
    """

    kind: str
    layer: str
    in_channels: int
    groups: int = 1
    reads_reduction: bool = False
    weight: str = ""


def find_call_sites(model: nn.Module, inputs: tuple[Any, ...]) -> list[CallSite]:
    """Run a model once and list its call sites, in the order in which they run.

    Args:
        model: any module, reduced or not; it runs as it is, without gradients. What a reduction
            itself computes is not a call site.
        inputs: its positional inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 20, 1), nn.Flatten(), nn.Linear(80, 2))
        >>> for site in find_call_sites(net, (torch.rand(1, 3, 2, 2),)):
        ...     print(site.kind, site.layer, site.in_channels)
        conv 0 3
        linear 2 80
    """
    watch = _Watch(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that hides four products
    try:
        with torch.no_grad(), watch.following(model), watch:
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return watch.sites


def worth_reducing(site: CallSite, min_channels: int = 16) -> bool:
    """Whether a site counts: not depthwise, and with channels enough.

    Example:
        >>> worth_reducing(CallSite("conv", "0", 3)), worth_reducing(CallSite("conv", "1", 16))
        (False, True)
    """
    return site.kind != "depthwise" and site.in_channels >= min_channels


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator, and knows of each tensor whether it is a weight or reduced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sites: list[CallSite] = []
        self._running: list[tuple[str, nn.Module]] = []
        self._names: dict[int, str] = {}
        self._read: set[int] = set()  # by the recurrent layer that runs
        self._kinds: dict[int, str] = {}  # of a storage: "weight", "constant" or "reduced"
        self._alive: list[Tensor] = []  # so that no address is used twice
        for name, tensor in model.named_parameters():
            self._names.setdefault(_address(tensor), name)
            self._set(tensor, "weight")
        for buffer in model.buffers():
            self._set(buffer, "constant")

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Keep the stack of the modules that run."""
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if isinstance(module, StandIn):  # that never runs
                    continue
                for handle in (
                    module.register_forward_pre_hook(self._enter(name)),
                    module.register_forward_hook(self._leave),
                ):
                    hooks.callback(handle.remove)
            yield

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self._running.append((name, module))
            self._read.clear()

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        if is_reduction(module):
            for tensor in _tensors(output):
                self._set(tensor, "reduced")

    def _set(self, tensor: Tensor, kind: str | None) -> None:
        address = _address(tensor)
        if kind is None:
            self._kinds.pop(address, None)
        elif address:
            self._kinds[address] = kind
            self._alive.append(tensor)

    def _kind(self, tensor: Tensor) -> str | None:
        return self._kinds.get(_address(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(is_reduction(module) for _, module in self._running):
            return result
        name = func.overloadpacket.__name__
        self._record(name, args)
        given = _tensors((args, kwargs))
        kinds = {self._kind(tensor) for tensor in given if tensor.numel() > 1}
        kind = None
        if kinds <= {"weight", "constant"}:
            kind = "weight" if "weight" in kinds else "constant"
        elif kinds == {"reduced"} and name in _COPIES:
            kind = "reduced"
        for tensor in _tensors(result):
            shared = any(_address(tensor) == _address(each) for each in given)
            if not shared or name.endswith("_"):  # a view is what it views
                self._set(tensor, kind)
                names = (self._names.get(_address(each)) for each in given)
                if kind == "weight" and (first := next(filter(None, names), None)):
                    self._names.setdefault(_address(tensor), first)
        return result

    def _record(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "convolution":
            read, weight, transposed, groups = args[0], args[1], args[6], args[8]
            channels = weight.shape[0] if transposed else weight.shape[1] * groups
            depthwise = groups > 1 and groups == channels
            self._add("depthwise" if depthwise else "conv", read, weight, channels, groups)
        elif name == "linear":
            self._add("linear", args[0], args[1], args[1].shape[-1])
        elif name in ("mkldnn_rnn_layer", "_cudnn_rnn"):
            self._add("recurrent", args[0], args[1], args[0].shape[-1])
        elif name in _PRODUCTS:
            left, right = args[_PRODUCTS[name] :][:2]
            for read, weight in ((left, right), (right, left)):
                if self._kind(weight) == "weight":
                    self._add("linear", read, weight, left.shape[-1])
                    return

    def _add(self, kind: str, read: Tensor, weight: Tensor, channels: int, groups: int = 1) -> None:
        running, module = self._running[-1] if self._running else ("", None)
        if kind == "linear" and isinstance(module, nn.MultiheadAttention):
            kind = "attention"
        name = self._names.get(_address(weight)) or f"{running}."
        if kind == "linear" and isinstance(module, nn.RNNBase):
            if "weight_ih" not in name or _address(weight) in self._read:
                return  # the steps of a layer are one site, and its state is not an input
            self._read.add(_address(weight))
            kind = "recurrent"
        layer = name.rpartition(".")[0]
        reduced = self._kind(read) == "reduced"
        self.sites.append(CallSite(kind, layer, int(channels), int(groups), reduced, name))


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
