"""Run the kernel's tests on builds with the address and undefined-behaviour sanitizers.

    python tests/sanitize.py

One build for each length of vectors takes the place of the installed library until its tests have
ended; what the machine lacks is left out. It needs g++ on Linux.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import lean_fx

KERNEL = Path(lean_fx.__file__).parent / "kernel"
FLAGS = ["-std=gnu++17", "-O1", "-g", "-fPIC", "-shared", "-fsanitize=address,undefined"]
FLAGS += ["-fno-sanitize-recover=undefined"]


def main() -> int:
    """Build, run the tests, put the installed library back."""
    library = Path(lean_fx.onnx_kernel())
    with tempfile.TemporaryDirectory() as folder:
        kept = shutil.copy(library, folder)
        try:
            codes = [tested(library, bits) for bits in (512, 256, 128)]
            return int(any(codes))
        finally:
            shutil.copy(kept, library)


def tested(library: Path, bits: int) -> int:
    """What pytest exits with, where vectors have no more bits than these."""
    print(f"vectors of up to {bits} bits", flush=True)
    command = ["g++", *FLAGS, f"-DLEAN_BITS={bits}", "-o", library, *KERNEL.glob("*.cpp")]
    subprocess.run(command, check=True)
    found = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    names = ("test_onnx_kernel.py", "test_compiled_walk.py")
    tests = [sys.executable, "-m", "pytest", *map(Path(__file__).with_name, names)]
    return subprocess.run(tests, env={**os.environ, **env}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
