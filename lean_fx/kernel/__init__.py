"""The kernel of a LEAN node for ONNX Runtime, compiled when lean_fx is installed."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from lean_fx.errors import MissingDependencyError


def onnx_kernel() -> str:
    """The path of the library that has ONNX Runtime compute LEAN nodes in one pass.

    A file that :func:`~lean_fx.export_onnx` wrote holds what its LEAN nodes compute as a function
    of standard operators. A session that has registered the library takes its kernel in place of
    the function; the file stays the same. It computes in 32 bits what is stored in 16, and gives
    what the function gives up to rounding.

    The library is built when lean_fx is installed, if a compiler of C++17 is there that knows the
    vectors of GCC and Clang; ONNX Runtime 1.17 or later loads it.

    Raises:
        MissingDependencyError: it was not built.

    Example::

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(lean_fx.onnx_kernel())
        session = onnxruntime.InferenceSession("net.onnx", options)
    """
    for suffix in EXTENSION_SUFFIXES:
        library = Path(__file__).with_name(f"_onnx{suffix}")
        if library.exists():
            return str(library)
    raise MissingDependencyError(
        "onnx_kernel: lean_fx was installed without a compiler of C++, so its kernel is not built; "
        "install g++ or clang, then lean_fx again"
    )
