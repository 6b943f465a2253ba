"""INT8 twins."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.errors import ArgumentError, DataError
from lean_fx.experiment.models import PaperNet
from lean_fx.quantization import accuracy_of


def lean():
    images = torch.rand(2, 3, 16, 16)
    return lean_fx.leanify(PaperNet((16, 32, 48), image_size=16), images, channels=8).eval()


def batches(model, count=4):
    """Images, and the labels that the model itself gives them."""
    for _ in range(count):
        images = torch.rand(8, 3, 16, 16)
        yield images, model(images).argmax(1)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_the_twin_is_int8_and_close(mode, tmp_path):
    model = lean()
    data = list(batches(model))
    exported = lean_fx.export_onnx(
        model,
        tmp_path / "net.onnx",
        data[0][0],
        quantize=mode,
        calibration=[images for images, _ in data] if mode == "static" else None,
        evaluation=iter(data),
    )
    assert exported.path == tmp_path / "net.onnx"
    assert exported.int8_path == tmp_path / "net.int8.onnx"
    assert exported.accuracy == 1.0
    assert 0.5 <= exported.int8_accuracy <= 1.0
    twin = onnx.load(exported.int8_path)
    kinds = {node.op_type for node in twin.graph.node}
    assert ("ConvInteger" in kinds) == (mode == "dynamic")
    assert ("QuantizeLinear" in kinds) == (mode == "static")
    assert [node.op_type for node in twin.graph.node].count("LEAN") == 3
    outputs = [
        onnxruntime.InferenceSession(path).run(None, {"input": data[0][0].numpy()})[0]
        for path in (exported.path, exported.int8_path)
    ]
    assert 0 < np.abs(outputs[0] - outputs[1]).mean() < 0.1 * np.abs(outputs[0]).mean()


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_reductions_of_standard_operators_stay_in_floating_point_too(mode, tmp_path):
    model = lean()
    data = [images for images, _ in batches(model)]
    outputs = []
    for functions in ("keep", "inline"):
        exported = lean_fx.export_onnx(
            model,
            tmp_path / f"{functions}.onnx",
            data[0],
            functions=functions,
            quantize=mode,
            calibration=data if mode == "static" else None,
        )
        session = onnxruntime.InferenceSession(exported.int8_path)
        outputs.append(session.run(None, {"input": data[0].numpy()})[0])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)


def test_accuracy(tmp_path):
    path = tmp_path / "net.onnx"
    lean_fx.export_onnx(nn.Identity(), path, torch.rand(2, 3))
    scores = torch.eye(3)
    assert accuracy_of(path, [(scores, torch.tensor([0, 1, 2])), (scores[:1], [1])]) == 0.75
    with pytest.raises(DataError, match="evaluation: has no samples; give one batch or more"):
        accuracy_of(path, [])
    with pytest.raises(ArgumentError, match="evaluation: a batch is no pair; give batches .inpu"):
        accuracy_of(path, [scores])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize='int4' is not known; use dynamic or static"),
        ({"quantize": "static"}, "quantize='static' needs calibration; give batches"),
        (
            {"evaluation": []},
            "calibration and evaluation are for quantize; give that too, or neither",
        ),
    ],
)
def test_errors(options, message, tmp_path):
    with pytest.raises(ArgumentError) as caught:
        lean_fx.export_onnx(nn.Linear(3, 3), tmp_path / "net.onnx", torch.rand(2, 3), **options)
    assert str(caught.value) == f"export_onnx: {message}"
    assert not list(tmp_path.iterdir())


def test_no_calibration_batches(tmp_path):
    with pytest.raises(ArgumentError, match="quantize='static' has no calibration data; give bat"):
        lean_fx.export_onnx(
            nn.Linear(3, 3),
            tmp_path / "a.onnx",
            torch.rand(2, 3),
            quantize="static",
            calibration=[],
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]  # earlier results are kept
