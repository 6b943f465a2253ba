"""The options of :func:`~lean_fx.export_onnx`, checked."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from lean_fx.checks import check_choice, check_int, check_path, check_positive
from lean_fx.errors import ArgumentError, ExportError
from lean_fx.export.batches import gives_batches
from lean_fx.export.quantization import Int8Target, Quantize
from lean_fx.layers.known_layers import quantized_by_torch
from lean_fx.model_checks import check_shapes, check_values

Batch = Literal["dynamic", "static"]
Functions = Literal["keep", "inline"]


def check_model(model: Any) -> None:
    """Check that a model is a module of floating-point layers with shapes and values.

    Raises:
        ArgumentError: it is not a module, is on the meta device, or has lazy layers.
        ExportError: it has layers of torch.ao.quantization.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"export_onnx: model={type(model).__name__} object is not a module")
    check_shapes(model, "export_onnx")
    check_values(model, "export_onnx")
    for name, module in model.named_modules():
        if quantized_by_torch(module):
            kind = type(module)
            raise ExportError(
                f"export_onnx: layer {name!r} ({kind.__module__}.{kind.__qualname__}) is of "
                "torch.ao.quantization, which has no ONNX form; export the float model, with "
                "quantize='dynamic' or 'static' for an INT8 file"
            )


def check_options(path: Any, batch: Any, functions: Any, opset: Any, tolerance: Any) -> None:
    """Check the options that concern the file itself.

    Raises:
        ArgumentError: one is out of its range.
    """
    check_path("export_onnx", path)
    check_choice("export_onnx: batch", batch, get_args(Batch))
    check_choice("export_onnx: functions", functions, get_args(Functions))
    if opset is not None:
        check_int("export_onnx: opset", opset, 18)
    if tolerance is not None:
        check_positive("export_onnx: tolerance", tolerance, "give 1e-3, or None for no check")


def check_int8_options(quantize: Any, calibration: Any, evaluation: Any, int8_target: Any) -> None:
    """Check the options that concern an INT8 twin.

    Raises:
        ArgumentError: one is out of its range, or they do not fit together.
    """
    if quantize is not None:
        check_choice("export_onnx: quantize", quantize, get_args(Quantize))
    elif calibration is not None or evaluation is not None:
        raise ArgumentError(
            "export_onnx: calibration and evaluation are for quantize; give that too, or neither"
        )
    if quantize == "static" and calibration is None:
        raise ArgumentError("export_onnx: quantize='static' needs calibration; give batches")
    if quantize == "dynamic" and calibration is not None:
        raise ArgumentError(
            "export_onnx: calibration is for quantize='static'; give that, or leave calibration out"
        )
    for name, batches in (("calibration", calibration), ("evaluation", evaluation)):
        if batches is not None and not gives_batches(batches):
            raise ArgumentError(
                f"export_onnx: {name}={type(batches).__name__} object gives no batches; give them "
                "in a list or a loader"
            )
    check_choice("export_onnx: int8_target", int8_target, get_args(Int8Target))
    if int8_target != "portable" and quantize != "static":
        raise ArgumentError(
            f"export_onnx: int8_target={int8_target!r} is for quantize='static'; give that, or "
            "leave int8_target out"
        )
