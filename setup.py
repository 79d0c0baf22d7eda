"""Builds the native module vatt_engine._C with CMake; everything else about the package stands in pyproject.toml.

torch is not needed here, so build isolation works. VATT_CUDA=OFF builds without CUDA even where nvcc is found, and
CUDAARCHS="80;90a" (CMake's own variable) chooses other architectures. VATT_NATIVE=OFF installs the package without the
module, where `python setup.py build_ext --inplace` makes it; the Makefile has both done at the same time.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def usable_cpus() -> int:
    """CPUs this process is pinned to; `vatt_engine.cpus` knows of cgroups too, but is not installed yet."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # kept, so that a second build is quick
        options = {
            # Given every time: an isolated build leaves paths behind in the cache that no longer exist.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "VATT_CUDA": os.environ.get("VATT_CUDA", "ON"),
            "VATT_VERSION": self.distribution.get_version(),
        }
        definitions = [f"-D{name}={value}" for name, value in options.items() if value is not None]
        generator = ["-G", "Ninja"] if options["CMAKE_MAKE_PROGRAM"] else []
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *generator, *definitions], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", str(usable_cpus())], check=True)


setup(
    # kernels/ is reached through the link vatt_engine/kernels and has no __init__.py: a top-level package named
    # `kernels` would shadow another project's. It is listed by hand because find_packages looks for __init__.py.
    packages=[*find_packages(include=["vatt_engine", "vatt_engine.*"]), "vatt_engine.kernels"],
    package_data={"vatt_engine.kernels": ["*.md", "*.json"]},
    ext_modules=[] if os.environ.get("VATT_NATIVE") == "OFF" else [Extension("vatt_engine._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
