"""Example inputs, in any form in which a user calls a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lean_fx.errors import ArgumentError
from lean_fx.model_checks import first_without_values


class Keywords(dict[str, Any]):
    """The inputs that forward takes by its ``**kwargs``, or by name behind ``*args``.

    They are the last of the inputs.
    """


pytree.register_pytree_node(
    Keywords,
    lambda given: (list(given.values()), list(given)),
    lambda values, names: Keywords(zip(names, values, strict=True)),
)


def as_inputs(example_inputs: Any, model: nn.Module | None = None) -> tuple[Any, ...]:
    """Example inputs as a tuple, in the order of the parameters of a model's forward.

    Those that forward takes by name only are behind the others (:func:`call`), and those of its
    ``**kwargs``, or behind its ``*args``, are the last, as :class:`Keywords`. Tensors made in
    inference mode are copied, since a model could not write to them.

    Args:
        example_inputs: a tensor, a PackedSequence, a tuple or list of the positional inputs, or a
            mapping for which the user would call ``model(**example_inputs)``.
        model: has the names; without it a mapping is refused.

    Raises:
        ArgumentError: they are none of these, or packed sequences without a step; or the model has
            no parameter of a name, or another parameter without a default.

    Example:
        >>> [each.shape for each in as_inputs(Tensor(2, 3))]
        [torch.Size([2, 3])]
        >>> as_inputs({"input": 2.0}, nn.Linear(1, 1))
        (2.0,)
    """
    if isinstance(example_inputs, Tensor | PackedSequence):
        inputs: tuple[Any, ...] = (example_inputs,)
    elif isinstance(example_inputs, tuple | list):
        inputs = tuple(example_inputs)
    elif isinstance(example_inputs, Mapping) and isinstance(model, nn.Module):
        inputs = _by_position(example_inputs, model)
    else:
        raise ArgumentError(
            f"example_inputs={type(example_inputs).__name__} object is neither a tensor nor a "
            "tuple; give one tensor, a tuple of the positional inputs, or a mapping of their names"
        )
    if any(isinstance(each, PackedSequence) and not len(each.batch_sizes) for each in inputs):
        raise ArgumentError("example_inputs: packed sequences without a step; give one or more")
    own: tuple[Any, ...] = pytree.tree_map_only(
        Tensor, lambda x: x.clone() if x.is_inference() else x, inputs
    )
    return own


def parameters_of(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that take example inputs, in order: those taken by name only are the last.

    If forward has ``*args``, nothing can come behind it, and these are left out.

    Example:
        >>> [each.name for each in parameters_of(lambda x, *, scale=1.0: x)]
        ['x', 'scale']
    """
    every = inspect.signature(forward).parameters.values()
    kinds = [each.kind for each in every]
    found = [each for each in every if each.kind < each.VAR_POSITIONAL]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        found += [each for each in every if each.kind is each.KEYWORD_ONLY]
    return found


def check_inputs_have_values(inputs: tuple[Any, ...], model: nn.Module) -> None:
    """Check that inputs have values if the model has.

    Raises:
        ArgumentError: one is on the meta device; names it.
    """
    state = [*model.parameters(), *model.buffers()]
    if not state or first_without_values(model):
        return
    for name, given in named_inputs(model, inputs):
        if any(isinstance(each, Tensor) and each.is_meta for each in pytree.tree_leaves(given)):
            raise ArgumentError(
                f"example_inputs: {name!r} is on the meta device and has no values, and the model "
                f"has some on {state[0].device}; give the input there"
            )


def named_inputs(model: nn.Module, inputs: Sequence[Any]) -> list[tuple[str, Any]]:
    """Inputs as :func:`as_inputs` gives them, each with its name, or its place if it has none.

    Example:
        >>> named_inputs(nn.Linear(1, 1), (2.0, Keywords(scale=3.0)))
        [('input', 2.0), ('scale', 3.0)]
    """
    given, more = list(inputs), Keywords()
    if given and isinstance(given[-1], Keywords):
        more = given.pop()
    places = [each.name for each in parameters_of(model.forward)]
    places += [str(place) for place in range(len(places), len(given))]
    return [*zip(places, given, strict=False), *more.items()]


def described_inputs(model: nn.Module, inputs: Sequence[Any]) -> str:
    """The names of inputs, and the dtypes and shapes of tensors, for a message.

    Example:
        >>> described_inputs(nn.Linear(4, 1), (Tensor(2, 3),))
        'input float32[2, 3]'
    """

    def described(value: Any) -> str:
        if not isinstance(value, Tensor):
            return type(value).__name__
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"

    return ", ".join(f"{name} {described(value)}" for name, value in named_inputs(model, inputs))


def call(module: nn.Module, inputs: Sequence[Any]) -> Any:
    """Call a module on inputs as :func:`as_inputs` gives them."""
    args, kwargs = call_arguments(module, inputs)
    return module(*args, **kwargs)


def call_arguments(
    module: nn.Module, inputs: Sequence[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call on inputs as :func:`as_inputs` gives them."""
    more: dict[str, Any] = {}
    if inputs and isinstance(inputs[-1], Keywords):
        *inputs, more = inputs
    taking = parameters_of(module.forward)
    named = [each.name for each in taking if each.kind is each.KEYWORD_ONLY]
    first = len(taking) - len(named) if named else len(inputs)
    return tuple(inputs[:first]), {**dict(zip(named, inputs[first:], strict=False)), **more}


def copied_inputs(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Inputs with tensors of their own, for a run: a forward may write to them.

    Example:
        >>> x = Tensor([1.0])
        >>> copied_inputs([x])[0] is x, copied_inputs([x])[0] == x
        (False, tensor([True]))
    """
    return tuple(pytree.tree_map_only(Tensor, Tensor.clone, list(inputs)))


def _by_position(given: Mapping[Any, Any], model: nn.Module) -> tuple[Any, ...]:
    """Named inputs in the order of forward's parameters, with defaults for those between."""
    kind, known = type(model).__name__, inspect.signature(model.forward).parameters
    places = [each.name for each in parameters_of(model.forward)]
    takes_any = any(each.kind is each.VAR_KEYWORD for each in known.values())
    by_name = [each.name for each in known.values() if each.kind is each.KEYWORD_ONLY]
    more = Keywords((name, each) for name, each in given.items() if name not in places)
    unknown = [n for n in more if n not in by_name and not (takes_any and isinstance(n, str))]
    if unknown:
        raise ArgumentError(
            f"example_inputs: {unknown[0]!r} is not a parameter of the forward of "
            f"{kind}; it has {', '.join(places) or 'none'}; a mapping that is itself an input is "
            "given as (mapping,)"
        )
    last = max((places.index(name) for name in given if name in places), default=-1)
    needs = [name for name in (*places, *by_name) if known[name].default is inspect.Parameter.empty]
    needed = [name for name in needs if name not in given]
    if needed:
        raise ArgumentError(
            f"example_inputs: {needed[0]!r} has no default in the forward of {kind}; give it too; "
            "a mapping that is itself an input is given as (mapping,)"
        )
    found = [given.get(name, known[name].default) for name in places[: last + 1]]
    return (*found, more) if more else tuple(found)
