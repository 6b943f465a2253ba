"""Modules that let one graph behave differently in training and in evaluation."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import GraphModule


class ByMode(nn.Module):
    """Give one value in train mode and another in eval mode.

    Example:
        >>> by_mode = ByMode()
        >>> by_mode(0.5, 0.0), by_mode.eval()(0.5, 0.0)
        (0.5, 0.0)
    """

    def forward(self, training: Any, evaluation: Any) -> Any:
        """The value for the mode."""
        return training if self.training else evaluation


class InMode(nn.Module):
    """A part of a graph that runs in one mode only.

    Args:
        part: a graph that returns a tuple. The modules that it calls are among its inputs, so that
            they keep their names in the model.
        mode: True for train mode, False for eval mode.
    """

    def __init__(self, part: GraphModule, mode: bool) -> None:
        super().__init__()
        self.part = part
        self.mode = mode

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """Run the part in its mode; in the other mode return as many Nones."""
        if self.training == self.mode:
            outputs: tuple[Any, ...] = self.part(*inputs)
            return outputs
        (given,) = next(node for node in self.part.graph.nodes if node.op == "output").args
        return (None,) * len(given)

    def extra_repr(self) -> str:
        """The mode."""
        return "training" if self.mode else "evaluation"
