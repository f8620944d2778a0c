"""The folder-to-package map and one build_ext that calls CMake; metadata is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "engine/__init__.py").read_text()).group(1)
ROOMS = sorted(p.parent.name for p in (ROOT / "kernels").glob("*/__init__.py"))


class CMakeBuild(build_ext):
    """Configure and build `_C` and, where nvcc is found, `_cuda`, in one CMake run."""

    def build_extensions(self):
        # setuptools calls build_extension once per module, one CMake run serves them all
        import pybind11

        outputs = [Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions]
        for output in outputs:  # a stale _cuda must not be packaged by a build without nvcc
            output.unlink(missing_ok=True)
            output.parent.mkdir(parents=True, exist_ok=True)
        # beside the source, so that editable installs, whose build_temp is new each time, compile
        # only what changed; one folder for each Python, since _C is tied to its minor version
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # the build tools live in an isolated environment that is new each time, so every path to
        # them is handed over again instead of being remembered in CMakeCache.txt
        ninja = shutil.which("ninja")
        if ninja is None:
            raise RuntimeError("tilewright: no ninja on PATH; install it with `pip install ninja`")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTILEWRIGHT_OUT={outputs[0].parent}",
            f"-DTILEWRIGHT_CUDA={os.environ.get('TILEWRIGHT_CUDA', 'AUTO')}",
            f"-DTILEWRIGHT_VERSION={VERSION}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(build)]):
            if subprocess.run(command).returncode:
                sys.exit(f"tilewright: `{' '.join(command[:3])} ...` failed; the reason is above")
        # _cuda may be absent; what follows packages the modules that are there
        built = zip(self.extensions, outputs, strict=True)
        self.extensions = [extension for extension, output in built if output.exists()]

    def copy_extensions_to_source(self):
        # unlinked and not overwritten: a running process may have the old module mapped; and an
        # old _cuda must not outlive a build without nvcc
        for ext in self.distribution.ext_modules:
            (ROOT / "engine" / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()


setup(
    version=VERSION,
    package_dir={
        "tilewright": "engine",
        "tilewright.bench": "bench",
        **{f"tilewright.ops.{room}": f"kernels/{room}" for room in ROOMS},
    },
    packages=[
        "tilewright",
        "tilewright.bench",
        *(f"tilewright.{p}" for p in find_packages("engine")),
        *(f"tilewright.bench.{p}" for p in find_packages("bench")),
        *(f"tilewright.ops.{room}" for room in ROOMS),
    ],
    ext_modules=[
        Extension("tilewright._C", sources=[]),
        Extension("tilewright._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
