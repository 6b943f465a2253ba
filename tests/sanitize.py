"""Run the kernel's tests on a build with the address and undefined-behaviour sanitizers.

    python tests/sanitize.py

The build takes the place of the installed one until the tests have ended. It needs g++ on Linux.
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
            subprocess.run(["g++", *FLAGS, "-o", library, *KERNEL.glob("*.cpp")], check=True)
            found = [
                subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
                for name in ("libasan.so", "libubsan.so")
            ]
            env = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
            names = ("test_onnx_kernel.py", "test_compiled_walk.py")
            tests = [sys.executable, "-m", "pytest", *map(Path(__file__).with_name, names)]
            return subprocess.run(tests, env={**os.environ, **env}).returncode
        finally:
            shutil.copy(kept, library)


if __name__ == "__main__":
    raise SystemExit(main())
