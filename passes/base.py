"""What a pass is, and how passes are chained.

An **analysis** learns about a graph and writes what it learns into the facts of its nodes
(:mod:`lean_fx.graph.facts`); it leaves the graph as it is. A **transformation** rewrites the graph
and reads such facts; it never writes them. After every pass the graph lints and runs: a rewrite
that inserts and one that rebuilds are one pass if only both together make a graph that runs.

Four laws hold for every pass, and one test checks them all:

1. a graph in which nothing matches comes back unchanged, textually;
2. ``modified`` is true exactly when the graph's text or its modules changed;
3. a second run changes nothing;
4. the numbers that the module computes are what the pass says they should be.
"""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Iterable

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from lean_fx.errors import LeanError, PassError

_LOGGER = logging.getLogger(__name__)


class Pass(abc.ABC):
    """One step over a graph. Call it; write :meth:`run`.

    Unlike torch's ``PassBase``, ``ensures`` is checked on the result.
    """

    @property
    def name(self) -> str:
        """The name of the pass, for messages."""
        return type(self).__name__

    @abc.abstractmethod
    def run(self, graph_module: GraphModule) -> bool:
        """Analyse or rewrite ``graph_module`` in place; return whether it was modified."""

    def requires(self, graph_module: GraphModule) -> None:  # noqa: B027 (optional)
        """Raise a LeanError unless the pass may run on ``graph_module``."""

    def ensures(self, graph_module: GraphModule) -> None:  # noqa: B027 (optional)
        """Raise a LeanError unless the result is what the pass promises."""

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Run the pass between its two checks.

        Raises:
            LeanError: of the check that fails.
        """
        self.requires(graph_module)
        modified = self.run(graph_module)
        if modified:
            graph_module.graph.lint()
            graph_module.recompile()
        self.ensures(graph_module)
        return PassResult(graph_module, modified)


class Pipeline(Pass):
    """Passes in a row, as one pass; at DEBUG ``lean_fx.passes.base`` logs what each did.

    Args:
        passes: at least one.

    Raises:
        PassError: a pass fails with anything but a LeanError; the message names it and those
            that had run before it.
    """

    def __init__(self, passes: Iterable[Pass]) -> None:
        self.passes = tuple(passes)

    def run(self, graph_module: GraphModule) -> bool:
        """Run all; modified if any of them modified."""
        modified = False
        for index, each in enumerate(self.passes):
            start = time.perf_counter()
            try:
                changed = each(graph_module).modified
                modified |= changed
            except LeanError:
                raise
            except Exception as error:
                before = ", ".join(done.name for done in self.passes[:index]) or "none"
                raise PassError(
                    f"{each.name} failed ({type(error).__name__}: {error}); passes before it: "
                    f"{before}"
                ) from error
            _LOGGER.debug(
                "%s: %s, %d nodes, %.1f ms",
                each.name,
                "changed the graph" if changed else "left the graph as it was",
                len(graph_module.graph.nodes),
                1e3 * (time.perf_counter() - start),
            )
        return modified
