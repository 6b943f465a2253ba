"""What long work shows: a bar where there is a terminal, and a log of the passes."""

import io
import logging
import sys

import torch
from torch import nn

import lean_fx
from lean_fx.measure.progress import counted_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def net():
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))


def test_a_terminal_shows_how_much_is_done(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with counted_bar("counting", 3) as show:
        show(3)
    assert "counting" in sys.stderr.getvalue()
    assert "3/3" in sys.stderr.getvalue()


def test_without_rich_or_a_terminal_nothing_is_shown(monkeypatch, capfd):
    with counted_bar("counting", 1) as show:
        show(1)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with counted_bar("counting", 1) as show:
        show(1)
    assert sys.stderr.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_timing_sites_and_comparing_have_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    lean_fx.plan(net(), torch.rand(4, 8), keep="measured")
    assert "timing sites" in sys.stderr.getvalue()
    assert "1/1" in sys.stderr.getvalue()
    lean_fx.compare({"net": net()}, torch.rand(4, 8), batches=(1, 2), rounds=3)
    assert "compare" in sys.stderr.getvalue()
    assert "7/7" in sys.stderr.getvalue()


def test_each_pass_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="lean_fx.passes.base"):
        lean_fx.leanify(net(), torch.rand(4, 8))
    lines = [each.message for each in caplog.records if each.name == "lean_fx.passes.base"]
    names = [line.partition(":")[0] for line in lines]
    assert {"PropagateShapes", "MeasureScale", "InferSign", "FindConsumers"} < {*names}
    (inferred, *_) = (line for line in lines if line.startswith("InferSign"))
    assert inferred.startswith("InferSign: left the graph as it was, 5 nodes, ")
    assert lines[-1].startswith("InsertReductions: changed the graph, 6 nodes, ")
