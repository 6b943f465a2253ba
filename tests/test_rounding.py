"""Nets that amplify rounding: their files differ from them, and are right."""

import re

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import lean_fx
from lean_fx.errors import ExportError, LeanWarning
from lean_fx.export.lean_function import LeanFunction
from lean_fx.export.parity import first_difference, rounding_error
from lean_fx.export.program import exported_program
from lean_fx.export.replaying import in_float64, values_of


class Logistic(nn.Module):
    """The logistic map: what rounding has done grows by about 2 with every step."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x = self.linear(x).sigmoid()
        for _ in range(self.steps):
            x = 4 * x * (1 - x)
        return x


def deep_net(depth):
    """Reductions and batch norms with the statistics of random inputs, weights as they begin."""
    layers = []
    for _ in range(depth):
        reduction = lean_fx.LeanReduction(16, 4)
        layers += [reduction, nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.SiLU()]
    net = nn.Sequential(*layers).train()
    with torch.no_grad():
        for _ in range(30):
            net(torch.randn(64, 16))
    return net.eval()


def exported(net, inputs, path):
    program = exported_program(net, (inputs,), ({0: "batch"},), None)
    program.save(path)
    return program


@pytest.mark.parametrize(
    ("make", "width"), [(lambda: Logistic(24), 4), (lambda: deep_net(20), 16)], ids=["map", "lean"]
)
def test_a_net_that_amplifies_rounding_exports_with_a_warning(make, width, tmp_path):
    torch.manual_seed(0)
    net, inputs = make().eval(), torch.randn(2, width)
    path = tmp_path / "net.onnx"
    with pytest.warns(LeanWarning) as caught:
        lean_fx.export_onnx(net, path, inputs)
    (warning,) = caught
    assert re.fullmatch(
        r"export_onnx: at batch \d the file differs from (Logistic|Sequential) by [0-9.e+-]+ of "
        r"the greatest output, tolerance=0.001; every node does what was captured, and rounding "
        r"alone moves the outputs by [0-9.e+-]+, so the model is ill-conditioned; compare the "
        r"file's accuracy, not its numbers",
        str(warning.message),
    )
    assert warning.filename == __file__
    assert path.exists()


@pytest.mark.parametrize("depth", [1, 20])
def test_a_wrong_reduction_is_no_rounding(depth, tmp_path, monkeypatch):
    text = LeanFunction.text
    torch.manual_seed(0)
    net, inputs = deep_net(depth), torch.randn(2, 16)
    monkeypatch.setattr(
        LeanFunction, "text", lambda self, opset: text(self, opset).replace("Abs(G)", "Relu(G)")
    )
    with pytest.raises(ExportError, match=r"the first node that differs is 0 \(LEAN\); mend it"):
        lean_fx.export_onnx(net, tmp_path / "net.onnx", inputs)
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize("depth", [1, 20])
def test_a_slightly_wrong_weight_is_found_by_name(depth, tmp_path):
    torch.manual_seed(0)
    net, inputs = deep_net(depth), torch.randn(2, 16)
    path = tmp_path / "net.onnx"
    program = exported(net, inputs, path)
    assert first_difference(program, path, (inputs,), 1e-3) is None
    file = onnx.load(path)
    last = [node for node in file.graph.node if node.op_type in ("MatMul", "Gemm")][-1]
    (weight,) = (value for value in file.graph.initializer if value.name in last.input[1:2])
    changed = numpy_helper.to_array(weight) * np.float32(1.01)
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(file, path)
    found = first_difference(program, path, (inputs,), 1e-3)
    assert found == f"{last.name} ({last.op_type})"


def test_rounding_error_is_that_of_the_net(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(2, 4)
    errors = {}
    for steps in (0, 5, 24):
        net = Logistic(steps).eval()
        program = exported(net, inputs, tmp_path / "net.onnx")
        errors[steps] = rounding_error(program, (inputs,))
        assert errors[steps] == rounding_error(program, (inputs,))
    assert errors[0] < 1e-6
    # The slope of a step is at most 4, and a step rounds three times.
    assert errors[0] < errors[5] < 4**5 * 10 * torch.finfo(torch.float32).eps
    assert errors[24] > 0.1


def test_float64_is_that_of_the_module(tmp_path):
    torch.manual_seed(0)
    net, inputs = deep_net(3), torch.randn(2, 16)
    program = exported(net, inputs, tmp_path / "net.onnx")
    (found,) = in_float64(program, (inputs,))
    single = values_of(program, (inputs,))
    torch.testing.assert_close(found, net.double()(inputs.double()), rtol=1e-12, atol=0)
    assert {value.dtype for value in single.values() if value.is_floating_point()} == {
        torch.float32
    }


class Casts(nn.Module):
    """Asks for float32 by name, and holds the greatest number."""

    def forward(self, x):
        mask = torch.full((4, 4), torch.finfo(torch.float32).min, dtype=torch.float32).triu(1)
        scores = x.unsqueeze(-1) + torch.arange(4, dtype=torch.float32) + mask
        return scores.to(torch.float32).softmax(-1)


def test_a_graph_that_names_its_dtype(tmp_path):
    inputs = torch.randn(2, 4)
    program = exported(Casts().eval(), inputs, tmp_path / "net.onnx")
    (found,) = in_float64(program, (inputs,))
    assert found.dtype is torch.float64
    assert 0 < rounding_error(program, (inputs,)) < 1e-5


def test_state_is_no_rounding(tmp_path):
    """An ill-conditioned net that gives something else at each call is not excused."""

    class Drifts(Logistic):
        calls = 0

        def forward(self, x):
            Drifts.calls += 1
            return torch.cat([super().forward(x) * 1e-3, self.linear(x) * Drifts.calls])

    torch.manual_seed(0)
    with pytest.raises(ExportError, match="every node does what was captured, so the model acts"):
        lean_fx.export_onnx(Drifts(40), tmp_path / "net.onnx", torch.randn(2, 4))
