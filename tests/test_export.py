import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lean_fx
from graphs import CHANGED, Residual
from lean_fx.errors import ArgumentError, ExportError, MissingDependencyError, WriteError
from lean_fx.registry import reductions


def run(path, inputs):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]


def check(model, path, shape):
    """The file gives what the model gives in eval mode, at several batches."""
    model.eval()
    onnx.checker.check_model(str(path), full_check=True)
    for batch in (1, 2, 5):
        inputs = torch.randn(batch, *shape[1:])
        expected = model(inputs)
        expected = expected[0] if isinstance(expected, tuple) else expected
        np.testing.assert_allclose(run(path, inputs), expected.detach().numpy(), 1e-4, 1e-5)


@pytest.mark.parametrize("model", CHANGED)
def test_same_numbers_in_onnxruntime(model, tmp_path):
    make, shape = CHANGED[model]
    lean = lean_fx.leanify(make())
    lean_fx.export_onnx(lean, tmp_path / "lean.onnx", torch.rand(shape))
    check(lean, tmp_path / "lean.onnx", shape)


@pytest.mark.parametrize("reduction", reductions())
def test_every_reduction_exports(reduction, tmp_path):
    lean = lean_fx.leanify(Residual(), reduction=reduction)
    lean_fx.export_onnx(lean, tmp_path / "lean.onnx", torch.rand(1, 3, 8, 8))
    check(lean, tmp_path / "lean.onnx", (1, 3, 8, 8))


def test_zero_positions_are_zero_in_the_file_too(tmp_path):
    module = nn.Sequential(lean_fx.LeanReduction(8, 4))
    lean_fx.export_onnx(module, tmp_path / "lean.onnx", torch.rand(2, 8, 3))
    inputs = torch.randn(2, 8, 3)
    inputs[1, :, 2] = 0
    assert run(tmp_path / "lean.onnx", inputs)[1, :, 2].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(
        run(tmp_path / "lean.onnx", inputs), module(inputs).detach().numpy(), 1e-5, 1e-6
    )


def test_modes_are_restored(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[2].eval()
    lean_fx.export_onnx(model, tmp_path / "net.onnx", torch.rand(2, 4))
    assert [module.training for module in model.modules()] == [True, True, True, False]
    check(model, tmp_path / "net.onnx", (2, 4))


def test_the_exporter_says_nothing(tmp_path, capfd):
    lean_fx.export_onnx(nn.Linear(4, 4), tmp_path / "net.onnx", torch.rand(2, 4))
    assert capfd.readouterr() == ("", "")


class Unexportable(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


def test_a_failure_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    with pytest.raises(
        ExportError, match="^export_onnx: Unexportable cannot be exported"
    ) as caught:
        lean_fx.export_onnx(Unexportable(), path, torch.rand(2, 4))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(
        WriteError, match="cannot be written .No such file or directory.; give a path"
    ):
        lean_fx.export_onnx(nn.Linear(4, 4), tmp_path / "no" / "net.onnx", torch.rand(2, 4))
    with pytest.raises(WriteError, match="is a folder; give the name of a file"):
        lean_fx.export_onnx(nn.Linear(4, 4), tmp_path, torch.rand(2, 4))


def test_inputs_that_are_no_batch(tmp_path):
    for inputs in (torch.tensor(3.0), ("x",)):
        with pytest.raises(ArgumentError, match="^example_inputs: "):
            lean_fx.export_onnx(nn.Linear(4, 4), tmp_path / "net.onnx", inputs)


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError) as caught:
        lean_fx.export_onnx(nn.Linear(4, 4), tmp_path / "net.onnx", torch.rand(2, 4))
    assert str(caught.value) == "onnx is not installed and export needs it; run: pip install onnx"
