"""Models whose weights are too many for one ONNX file, with a limit lowered for the tests."""

import numpy as np
import pytest
import torch

import lean_fx
from graphs import Residual
from lean_fx.errors import ExportError
from lean_fx.export.parity import greatest_difference
from lean_fx.export.quantization import quantize_onnx
from lean_fx.measure.layout import blocked_layout
from lean_fx.onnx_files import onnx_bytes, weight_files
from test_export import run


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    """Set the bytes above which weights are beside the file."""
    program = torch.onnx._internal.exporter._onnx_program

    def set_limit(size):
        monkeypatch.setattr(program, "_LARGE_MODEL_THRESHOLD", size)

    set_limit(1000)
    return set_limit


@pytest.mark.parametrize("functions", ["keep", "inline"])
def test_weights_that_are_too_many_stand_beside_the_file(functions, tmp_path):
    inputs, path = torch.rand(2, 3, 16, 16), tmp_path / "net.onnx"
    for seed in (0, 1):  # the second takes the place of the first
        torch.manual_seed(seed)
        lean = lean_fx.leanify(Residual(), inputs, channels=4)
        lean_fx.export_onnx(lean, path, inputs, functions=functions)
        assert {file.name for file in tmp_path.iterdir()} == {"net.onnx", "net.onnx.data"}
        assert greatest_difference(lean.eval(), path, (inputs,)) < 1e-4
    assert lean_fx.plan_of(path) == lean.meta["lean_fx.plan"]
    assert np.isfinite(run(quantize_onnx(path, "dynamic"), inputs)).all()
    reorders, off_path = blocked_layout(path)
    assert reorders > 0
    assert off_path == ()


def test_a_failed_export_leaves_both_files(tmp_path, monkeypatch):
    inputs, path = torch.rand(2, 3, 16, 16), tmp_path / "net.onnx"
    lean_fx.export_onnx(Residual(), path, inputs)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr("lean_fx.export.parity.greatest_difference", lambda *_: 1.0)
    with pytest.raises(ExportError, match="differs from Residual"):
        lean_fx.export_onnx(Residual(), path, inputs)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_compare_keeps_and_counts_both_files(tmp_path):
    inputs = torch.rand(2, 3, 16, 16)
    comparison = lean_fx.compare(
        {"baseline": Residual()}, inputs, batches=(1,), rounds=2, folder=tmp_path
    )
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(sizes) == {"baseline.onnx", "baseline.onnx.data"}
    assert comparison.models[0].onnx_bytes == sum(sizes.values())


def test_weights_of_an_older_file_are_not_counted(tmp_path, limit):
    inputs, path = torch.rand(2, 3, 16, 16), tmp_path / "net.onnx"
    beside = tmp_path / "net.onnx.data"
    lean_fx.export_onnx(Residual(), path, inputs)
    assert weight_files(path) == (beside,)
    assert onnx_bytes(path) == path.stat().st_size + beside.stat().st_size
    limit(10**9)
    lean_fx.export_onnx(Residual(), path, inputs)
    assert beside.exists()
    assert weight_files(path) == ()
    assert onnx_bytes(path) == path.stat().st_size
    quantize_onnx(path, "dynamic")
    assert not (tmp_path / "net.int8.onnx.data").exists()
