"""The costs of a model as a table: what every node computes, holds and moves."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lean_fx.measure.pictures import short
from lean_fx.measure.tables import markdown_table, rich_table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class NodeCost:
    """What one node of a graph costs.

    Attributes:
        name: the qualified name of the layer; for a function or a method, the name of the node.
        kind: the type of the layer, or the name of the function or method.
        macs: multiply-adds.
        parameters: elements of the parameters that no node before it has read.
        weight_bytes: bytes of these parameters, and of the buffers that no node before it has read.
        read_bytes: bytes of the activations and weights that it reads.
        written_bytes: bytes of its result.
    """

    name: str
    kind: str
    macs: int
    parameters: int
    weight_bytes: int
    read_bytes: int
    written_bytes: int

    @property
    def moved_bytes(self) -> int:
        """Read and written."""
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class Costs:
    """The costs of a model, node by node.

    Attributes:
        model: the name of its type.
        nodes: in the order in which they run.
        without_formula: names of the nodes that may do more than their MACs say: they call
            operators that have no formula, or hold weights and have code of their own, whose
            element-wise products are not counted.
    """

    model: str
    nodes: tuple[NodeCost, ...]
    without_formula: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return sum(node.macs for node in self.nodes)

    @property
    def parameters(self) -> int:
        """Elements of the parameters that are read, a shared one once."""
        return sum(node.parameters for node in self.nodes)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters and buffers that are read, a shared one once."""
        return sum(node.weight_bytes for node in self.nodes)

    @property
    def moved_bytes(self) -> int:
        """Bytes of activations and weights that are read, and of results that are written."""
        return sum(node.moved_bytes for node in self.nodes)

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text, its head first; nodes that cost nothing are left out."""
        total = NodeCost(
            "total",
            "",
            self.macs,
            self.parameters,
            self.weight_bytes,
            sum(node.read_bytes for node in self.nodes),
            sum(node.written_bytes for node in self.nodes),
        )
        head = ("", "kind", "parameters", "weights, kB", "MACs, million", "read, kB", "written, kB")
        shown = [node for node in self.nodes if node.macs or node.moved_bytes]
        return [head, *(_row(node) for node in (*shown, total))]

    def footnotes(self) -> list[str]:
        """What the figures rest on, in sentences."""
        notes = ["Read: activations and weights."]
        if self.without_formula:
            names = ", ".join(self.without_formula)
            notes.append(f"May do more multiply-adds than could be counted: {names}.")
        return notes

    def __str__(self) -> str:
        return self.to_markdown()

    def table(self) -> Table:
        """The table for a terminal.

        Raises:
            MissingDependencyError: rich is not installed.
        """
        return rich_table(self.rows(), self.footnotes(), title=self.model)

    def to_markdown(self) -> str:
        """The table and its footnotes in Markdown."""
        notes = "\n".join(f"- {note}" for note in self.footnotes())
        return f"{markdown_table(self.rows())}\n\n{notes}\n"

    def to_json(self) -> str:
        """Every figure as JSON, those in total first."""
        names = ("macs", "parameters", "weight_bytes", "moved_bytes")
        totals = {name: getattr(self, name) for name in names}
        return json.dumps(totals | dataclasses.asdict(self), indent=1) + "\n"


def _row(node: NodeCost) -> tuple[str, ...]:
    return (
        node.name,
        node.kind,
        f"{node.parameters:,}",
        short(node.weight_bytes / 1e3),
        short(node.macs / 1e6),
        short(node.read_bytes / 1e3),
        short(node.written_bytes / 1e3),
    )
