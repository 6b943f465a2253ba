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
from lean_fx.export.quantization import accuracy_of


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


def test_accuracy_is_that_of_a_label_for_each_row_of_scores(tmp_path):
    path = tmp_path / "net.onnx"
    lean_fx.export_onnx(nn.Identity(), path, torch.rand(2, 3))
    for labels in (torch.tensor([[0], [1], [2]]), torch.eye(3), torch.tensor([0]), 0):
        shape = str(list(torch.as_tensor(labels).shape))
        with pytest.raises(ArgumentError) as caught:
            accuracy_of(path, [(torch.eye(3), labels)])
        assert str(caught.value) == (
            f"evaluation: scores [3, 3] and labels {shape} do not fit; give a model whose first "
            "output is [N, classes] and labels [N]"
        )
    with pytest.raises(ArgumentError, match="evaluation: scores .2, 3, 4. and labels .2, 3. do no"):
        lean_fx.export_onnx(
            nn.Identity(),
            tmp_path / "words.onnx",
            torch.rand(2, 3, 4),
            quantize="dynamic",
            evaluation=[(torch.rand(2, 3, 4), torch.zeros(2, 3))],
        )
    with pytest.raises(ArgumentError, match="evaluation: net.onnx cannot run on .3, 4. .* give b"):
        accuracy_of(path, [(torch.rand(3, 4), [0, 1, 2])])
    assert accuracy_of(path, [(torch.eye(3).requires_grad_(), [0, 1, 2])]) == 1.0


class Stream(torch.utils.data.IterableDataset):
    """Samples of no known number."""

    def __iter__(self):
        return iter(torch.rand(4, 3))


def test_calibration_by_a_loader_of_no_known_length(tmp_path):
    exported = lean_fx.export_onnx(
        nn.Linear(3, 3),
        tmp_path / "net.onnx",
        torch.rand(2, 3),
        quantize="static",
        calibration=torch.utils.data.DataLoader(Stream(), batch_size=2),
    )
    assert exported.int8_path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quantize": "static", "calibration": torch.rand(2, 3)},
            "calibration=Tensor object gives no batches; give them in a list or a loader",
        ),
        (
            {"quantize": "dynamic", "evaluation": 5},
            "evaluation=int object gives no batches; give them in a list or a loader",
        ),
        ({"quantize": "int4"}, "quantize='int4' is not known; use dynamic or static"),
        ({"quantize": "static"}, "quantize='static' needs calibration; give batches"),
        (
            {"quantize": "dynamic", "calibration": []},
            "calibration is for quantize='static'; give that, or leave calibration out",
        ),
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


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "quantize='static' has no calibration data; give bat"),
        ([torch.rand(0, 3)], "calibration: a batch has no rows; give one or more"),
        (
            [torch.rand(2, 3)] * 2 + [5],
            "calibration: a batch is a int object; give tensors, or tuples",
        ),
    ],
)
def test_no_calibration_batches(calibration, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        lean_fx.export_onnx(
            nn.Linear(3, 3),
            tmp_path / "a.onnx",
            torch.rand(2, 3),
            quantize="static",
            calibration=calibration,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]  # earlier results are kept
