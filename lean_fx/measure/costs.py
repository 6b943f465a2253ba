"""Count the parameters, the multiply-adds (MACs) and the bytes moved of a model, node by node."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from lean_fx.capture.capturing import capture
from lean_fx.capture.example_inputs import as_inputs
from lean_fx.capture.tracing import is_leaf
from lean_fx.cloning import clone
from lean_fx.errors import ArgumentError, one_line
from lean_fx.graph.calls import is_altered
from lean_fx.layers.kinds import KINDS, LayerKind
from lean_fx.layers.known_layers import is_quantized_layer
from lean_fx.layers.transformers import UNFUSED
from lean_fx.measure.costs_table import Costs, NodeCost
from lean_fx.measure.counter import Counter, counting, has_mac_count
from lean_fx.measure.traffic import (
    bytes_in_memory,
    moved_tensors,
    read_bytes,
    storage_of,
    strided_tensors,
)
from lean_fx.model_checks import check_shapes
from lean_fx.passes.propagate_shapes import check_count
from lean_fx.reduction.registry import is_reduction

_Model = TypeVar("_Model", bound=nn.Module)

#: Modules that hold parameters and multiply by them element by element, or only look them up.
_WITHOUT_SUMS = (
    nn.modules.batchnorm._NormBase,
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.Embedding, nn.EmbeddingBag),
)


def count_parameters(model: nn.Module) -> int:
    """Count the elements of all parameters, trained or frozen; a shared one counts once.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> int:
    """Count the multiply-adds of one forward pass, in eval mode and without gradients.

    It counts the operators that run (:mod:`lean_fx.measure.counter`), so any model that runs can
    be counted. :func:`costs_of` gives the same total node by node.

    The pass runs on a copy on the CPU (or on the meta device, if the model or an input is there):
    the model, its mode and its statistics stay as they are.

    Args:
        model: any module that ``copy.deepcopy`` can copy.
        example_inputs: the input, or the tuple of positional inputs. The count is of the whole
            batch: give a batch of 1 for the MACs of one sample.

    Returns:
        The multiply-adds of the pass, a whole number.

    Raises:
        ArgumentError: the model fails on these inputs, or has lazy layers without a shape.
        CaptureError: it cannot be copied.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 5, 5))
        5400
        >>> 8 * 3 * 3 * 3 * 5 * 5
        5400
    """
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    check_shapes(model)
    replica, inputs = _to_count(clone(model).eval(), _cloned(given))
    try:
        with counting() as counter:
            counter.watch_reductions(replica)
            replica(*inputs)
    except Exception as error:
        raise _failure("count_macs", type(model).__name__, inputs, error) from error
    return counter.macs


def costs_of(model: nn.Module, example_inputs: Any) -> Costs:
    """Count what every node of a model computes, holds and moves in one forward pass.

    The model is captured as torch.fx sees it in eval mode, and that copy runs once on the CPU, or
    on the meta device, where no numbers are computed, if the model or an input is there.

    - Multiply-adds are those of the operators inside a node (:mod:`lean_fx.measure.counter`);
      a reduction counts by its own formula. ``without_formula`` names the nodes that may do more.
    - Bytes moved: every activation that a node reads, its parameters and buffers, and its result,
      each once and whole. Temporaries within a node are not seen. A view moves nothing (reshape,
      transpose, chunk, dropout in eval mode; whether a reshape copies is seen when it runs). An
      embedding reads the rows that it asks for; ``table[index]``, index_select and gather count
      the whole table. What is computed in place is read and written. This is the traffic of
      layers that run one by one, with nothing fused or kept in a cache.
    - Parameters and their bytes count where they are first read; those that are never read do not
      count.

    Args:
        model: a module that torch.fx can trace; it stays as it is.
        example_inputs: the input, the tuple of positional inputs, or a mapping of their names. The
            costs are those of the whole batch: give a batch of 1 for those of one sample.

    Returns:
        The costs of each node and in total: ``print(costs.to_markdown())``.

    Raises:
        ArgumentError: the model is not a module, or fails on these inputs.
        CaptureError: it cannot be copied or traced.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
        >>> costs = costs_of(model, torch.zeros(1, 3, 5, 5))
        >>> costs.macs, costs.parameters, costs.moved_bytes
        (5400, 224, 3596)
        >>> [(node.name, node.kind, node.moved_bytes) for node in costs.nodes]
        [('0', 'Conv2d', 1996), ('1', 'ReLU', 1600), ('2', 'Flatten', 0)]
    """
    with torch.inference_mode(False):
        inputs = _cloned(as_inputs(example_inputs, model))
        known = isinstance(model, nn.Module) and type(model) not in UNFUSED
        leaf = known and is_leaf(model)
        root = _calling(model, len(inputs)) if leaf else model
        captured = capture(root, inputs, purpose="evaluation")
        return costs_of_graph(captured, inputs, type(model).__name__)


def _calling(layer: nn.Module, inputs: int) -> GraphModule:
    """A graph that calls one layer, which the tracer would otherwise trace into."""
    graph = Graph()
    placeholders = tuple(graph.placeholder(f"input_{number}") for number in range(inputs))
    graph.output(graph.call_module("layer", placeholders))
    return GraphModule({"layer": layer}, graph)


def _cloned(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    cloned: tuple[Any, ...] = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), inputs)
    return cloned


def _to_count(model: _Model, inputs: tuple[Any, ...]) -> tuple[_Model, tuple[Any, ...]]:
    """Prepare a copy of a model and its inputs for counting.

    Both go to the meta device if a part of them is there already, else to the CPU. The parameters
    get no gradients: FlopCounterMode hooks the gradients of modules' inputs, and fails on views of
    parameters, which require one but get none while gradients are off.
    """
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    tensors += [*model.parameters(), *model.buffers()]
    device = "meta" if any(x.is_meta for x in tensors) else "cpu"
    moved = pytree.tree_map_only(Tensor, lambda x: x.to(device), inputs)
    return model.requires_grad_(False).to(device), moved


def _failure(task: str, name: str, inputs: tuple[Any, ...], error: Exception) -> ArgumentError:
    shapes = ", ".join(str(list(x.shape)) for x in inputs if isinstance(x, Tensor))
    return ArgumentError(
        f"{task}: {name} fails on inputs of shape {shapes} ({one_line(error)}); give inputs that "
        "its forward takes"
    )


def costs_of_graph(captured: GraphModule, inputs: tuple[Any, ...], name: str) -> Costs:
    """The costs of a captured model, one entry for each of its calls; see :func:`costs_of`.

    Args:
        captured: a copy that is used for nothing else: no parameter of it asks for a gradient then.
        inputs: its positional inputs.
        name: of the model, for the table and for errors.
    """
    check_count(captured, inputs)
    captured, inputs = _to_count(captured, inputs)
    try:
        with torch.random.fork_rng(devices=[]), counting() as counter:
            counter.watch_reductions(captured)
            run = _Run(captured, counter)
            run.run(*inputs)
    except Exception as error:
        raise _failure("costs_of", name, inputs, error) from error
    return Costs(name, tuple(run.costs), tuple(run.without_formula))


class _Run(Interpreter):
    """Runs a graph and records the cost of every call."""

    def __init__(self, graph_module: GraphModule, counter: Counter) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False  # it would grow the message by many lines
        self.costs: list[NodeCost] = []
        self.without_formula: list[str] = []
        self._counter = counter
        self._unread: dict[int, list[Tensor]] = {}
        for each in (*graph_module.parameters(), *graph_module.buffers()):
            self._unread.setdefault(storage_of(each), []).append(each)

    def run_node(self, n: Node) -> Any:
        """Run a node, and record its cost if it calls something."""
        if n.op not in ("call_module", "call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        called = self.fetch_attr(str(n.target)) if n.op == "call_module" else n.target
        given = strided_tensors((args, kwargs))
        versions = [each._version for each in given]
        before, foreign = self._counter.macs, len(self._counter.foreign)
        output = super().run_node(n)

        macs = self._counter.macs - before
        if called is torch.linalg.vecdot:
            macs = _vecdot_macs(*args, **kwargs, output=output)
        kind = _registered_kind(called)
        if kind is not None:
            macs = kind.macs(called, given[0].numel(), strided_tensors(output)[0].numel())
        elif len(self._counter.foreign) > foreign or _may_do_more(called):
            self.without_formula.append(_name(n))
        changed = [
            each for each, version in zip(given, versions, strict=True) if each._version != version
        ]
        read, written = moved_tensors(called, given, changed, output)
        weights = self._first_read(read)
        self.costs.append(
            NodeCost(
                name=_name(n),
                kind=_kind(called),
                macs=macs,
                parameters=sum(x.numel() for x in weights if isinstance(x, nn.Parameter)),
                weight_bytes=sum(x.nbytes for x in weights),
                read_bytes=read_bytes(called, read),
                written_bytes=sum(map(bytes_in_memory, written)),
            )
        )
        return output

    def _first_read(self, read: list[Tensor]) -> list[Tensor]:
        """The parameters and buffers that no node has read before."""
        return [each for x in read for each in self._unread.pop(storage_of(x), ())]


def _vecdot_macs(x: Tensor, y: Tensor, dim: int = -1, *, output: Tensor) -> int:
    """``torch.linalg.vecdot`` runs as an element-wise product and a sum, which are not counted."""
    shape: torch.Size = torch.broadcast_shapes(x.shape, y.shape)  # type: ignore[no-untyped-call]
    return output.numel() * shape[dim]


def _registered_kind(called: Any) -> LayerKind | None:
    """The kind of a layer whose class a user has registered, with the user's own count."""
    kind = KINDS.get(type(called))
    own = kind is not None and kind.registered and "reduction" not in called._modules
    return kind if own else None


def _may_do_more(called: Any) -> bool:
    """Whether a module with weights may multiply element by element in its own code.

    Torch's own layers multiply by operators that are counted.
    """
    if not isinstance(called, nn.Module) or isinstance(called, _WITHOUT_SUMS):
        return False
    if has_mac_count(called):
        return False
    reduction = called if is_reduction(called) else called._modules.get("reduction")
    if is_reduction(reduction):
        return not has_mac_count(reduction)
    if type(called).__module__.startswith("torch.nn.modules.") and not is_altered(called):
        return False
    return is_quantized_layer(called) or any(True for _ in called.parameters())


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _kind(called: Any) -> str:
    if isinstance(called, nn.Module):
        return type(called).__name__
    return str(getattr(called, "__name__", called))
