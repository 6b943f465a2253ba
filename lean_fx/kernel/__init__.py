"""The kernel of LEAN nodes for ONNX Runtime, compiled when lean_fx is installed."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from lean_fx.errors import ArgumentError, MissingDependencyError


def onnx_kernel() -> str:
    """The path of the library that has ONNX Runtime compute LEAN nodes in one pass.

    A file that :func:`~lean_fx.export_onnx` wrote holds what its LEAN nodes (``LEAN``,
    ``LEANSimplex`` and ``LEANGated``) compute as functions of standard operators. A session that
    has registered the library takes its kernels in place of the functions; the file stays the same.
    They compute in 32 bits what is stored in 16, and give what the functions give up to rounding.

    The library is built when lean_fx is installed, if there is a C++17 compiler with GCC's vector
    extensions, such as g++ or clang. ONNX Runtime 1.17 or later loads it.

    Raises:
        MissingDependencyError: it was not built.

    Example::

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(lean_fx.onnx_kernel())
        session = onnxruntime.InferenceSession("net.onnx", options)
    """
    library = library_path()
    if library is not None:
        return str(library)
    raise MissingDependencyError(
        "onnx_kernel: lean_fx was installed without a compiler of C++, so its kernel is not built; "
        "install g++ or clang, then lean_fx again"
    )


def uses_kernel(wanted: bool | None) -> bool:
    """Whether the kernel computes LEAN nodes.

    Args:
        wanted: True or False; None is True where the kernel is built.

    Raises:
        ArgumentError: ``wanted`` is something else.
        MissingDependencyError: it is wanted, and was not built.

    Example:
        >>> uses_kernel(False)
        False
    """
    if wanted not in (True, False, None):
        raise ArgumentError(f"kernel={wanted!r} is not True, False or None")
    if wanted:
        onnx_kernel()
    return library_path() is not None if wanted is None else wanted


def what_computes(kernel: bool) -> str:
    """What computes LEAN nodes, in words that go beside a figure.

    Example:
        >>> what_computes(True), what_computes(False)
        ("lean_fx's kernel", 'the function in the file')
    """
    return "lean_fx's kernel" if kernel else "the function in the file"


def library_path() -> Path | None:
    """The path of the compiled library; None if it was not built."""
    paths = (Path(__file__).with_name(f"_onnx{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)
