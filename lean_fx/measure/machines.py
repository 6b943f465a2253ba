"""Name the machine of a timing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from lean_fx.errors import require


def machine() -> str:
    """The machine and the versions of a timing, in one line.

    Example:
        >>> "onnxruntime" in machine()
        True
    """
    facts = _cpu_facts()
    model = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags", "").split()
    instructions = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    cores = os.cpu_count() or 1
    return ", ".join(
        part
        for part in (
            model,
            instructions,
            f"{cores} {'core' if cores == 1 else 'cores'}",
            f"torch {torch.__version__}",
            f"onnxruntime {require('onnxruntime', purpose='timing').__version__}",
        )
        if part
    )


def _cpu_facts() -> dict[str, str]:
    """Return the first processor's entries of /proc/cpuinfo; none where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in first.splitlines())
    }
