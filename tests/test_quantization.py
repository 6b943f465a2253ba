"""INT8 twins."""

import logging
import threading
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.errors import ArgumentError, DataError
from lean_fx.export.int8_accuracy import accuracy_of
from lean_fx.export.quantization import _quiet
from support.models import PaperNet


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


@pytest.mark.parametrize("mode", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
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


def exported(model, folder, **options):
    data = [images for images, _ in batches(model)]
    found = lean_fx.export_onnx(
        model, folder / "net.onnx", data[0], quantize="static", calibration=data, **options
    )
    return found, data[0].numpy()


def run(path, array, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(path, options).run(None, {"input": array})[0]


def test_a_portable_twin_gives_the_same_whatever_the_processor_multiplies_by(tmp_path):
    made, images = exported(lean(), tmp_path)
    # Without optimisation its integers are multiplied as floats, exactly.
    exact = run(made.int8_path, images, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    np.testing.assert_allclose(run(made.int8_path, images), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("target", "greatest"), [("portable", 64), ("vnni", 127)])
def test_the_target_decides_the_range_of_the_weights(target, greatest, tmp_path):
    # What saturates where it may is far off, and says so.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lean_fx.LeanWarning)
        made, _ = exported(lean(), tmp_path, int8_target=target)
    twin = onnx.load(made.int8_path)
    weights = [
        onnx.numpy_helper.to_array(each)
        for each in twin.graph.initializer
        if each.data_type == onnx.TensorProto.INT8 and len(each.dims) > 1
    ]
    assert len(weights) == 4
    assert {int(np.abs(each.astype(int)).max()) for each in weights} == {greatest}
    assert made.int8_target == target
    told = {entry.key: entry.value for entry in twin.metadata_props}
    assert told["lean_fx.int8"] == f"static, {target}"
    assert lean_fx.plan_of(made.int8_path) == lean_fx.plan_of(made.path)


def test_a_dynamic_twin_is_portable_and_compared_on_what_is_given(tmp_path):
    model = lean()
    data = list(batches(model))
    made = lean_fx.export_onnx(
        model, tmp_path / "net.onnx", data[0][0], quantize="dynamic", evaluation=data
    )
    outputs = [
        np.concatenate([run(path, images.numpy()) for images, _ in data])
        for path in (made.path, made.int8_path)
    ]
    apart = np.abs(outputs[0] - outputs[1]).mean() / np.abs(outputs[0]).mean()
    assert made.int8_difference == pytest.approx(apart, rel=1e-4)
    assert made.int8_target == "portable"
    told = {entry.key: entry.value for entry in onnx.load(made.int8_path).metadata_props}
    assert told["lean_fx.int8"] == "dynamic"


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_twin_that_is_far_off_is_told(mode, tmp_path):
    cancelling = nn.Linear(2, 1, bias=False)
    nn.init.constant_(cancelling.weight[:, :1], 1.0)
    nn.init.constant_(cancelling.weight[:, 1:], -1.0)
    first = torch.rand(64, 1)
    inputs = torch.cat([first, first + 1e-3 * torch.rand(64, 1)], 1)
    with pytest.warns(lean_fx.LeanWarning) as caught:
        made = lean_fx.export_onnx(
            cancelling,
            tmp_path / "net.onnx",
            inputs,
            quantize=mode,
            calibration=[inputs] if mode == "static" else None,
            tolerance=None,
        )
    assert made.int8_difference > 0.1
    assert str(caught[0].message) == (
        f"export_onnx: the INT8 twin differs from net.onnx by {made.int8_difference:.2g} of the "
        "mean output on this machine, bound 0.1; calibrate with more data, or use the float file"
    )


def test_accuracy(tmp_path):
    path = tmp_path / "net.onnx"
    lean_fx.export_onnx(nn.Identity(), path, torch.rand(2, 3))
    scores = torch.eye(3)
    assert accuracy_of(path, [(scores, torch.tensor([0, 1, 2])), (scores[:1], [1])]) == 0.75
    with pytest.raises(DataError, match="evaluation: has no samples; give one batch or more"):
        accuracy_of(path, [])
    with pytest.raises(
        ArgumentError, match="evaluation: a batch is not a pair; give batches .inpu"
    ):
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
    with pytest.raises(
        ArgumentError, match="evaluation: net.onnx cannot run on float32 .3, 4. .* give b"
    ):
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
            {"quantize": "static", "calibration": [], "int8_target": "avx2"},
            "int8_target='avx2' is not known; use portable or vnni",
        ),
        (
            {"quantize": "dynamic", "int8_target": "vnni"},
            "int8_target='vnni' is for quantize='static'; give that, or leave int8_target out",
        ),
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


@pytest.mark.parametrize("labels", [["cat", "dog"], None])
def test_labels_that_are_no_numbers(labels, tmp_path):
    with pytest.raises(ArgumentError, match="^evaluation: labels are no numbers"):
        lean_fx.export_onnx(
            nn.Linear(3, 3),
            tmp_path / "net.onnx",
            torch.rand(2, 3),
            quantize="dynamic",
            evaluation=[(torch.rand(2, 3), labels)],
        )


def test_threads_that_quantise_leave_the_level_of_logging():
    before, inside = logging.root.manager.disable, threading.Event()

    def other():
        inside.wait(10)
        with _quiet():
            pass

    thread = threading.Thread(target=other)
    thread.start()
    with _quiet():
        inside.set()
        thread.join(0.2)
        assert thread.is_alive()  # it waits
    thread.join()
    assert logging.root.manager.disable == before


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([torch.rand(2, 4)], r"calibration: a.onnx cannot run on float32 \[2, 4\]"),
        ([torch.rand(2, 3).double()], r"calibration: a.onnx cannot run on float64 \[2, 3\]"),
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
