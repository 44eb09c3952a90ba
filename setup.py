"""Builds the extension by calling CMake; CMakeLists.txt is the only description of the build.

ODN_FAST_BUILD_EXTENSION=0 skips it: the package then runs on its PyTorch references.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# cmake and ninja may come from this interpreter's environment without its scripts being on the PATH.
SEARCH_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def why_not_built() -> str:
    """The reason why the extension cannot be built here, "" if it can. A failing compiler is no such reason."""
    if os.environ.get("ODN_FAST_BUILD_EXTENSION") == "0":
        return "ODN_FAST_BUILD_EXTENSION=0"
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=SEARCH_PATH) is None]
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++")):
        missing.append("a C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python.h, such as Debian's python3-dev")
    missing += [f"the Python package {name}" for name in ("torch", "pybind11") if find_spec(name) is None]
    return f"missing: {', '.join(missing)}" if missing else ""


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        arguments = [f"-DPython_EXECUTABLE={sys.executable}", f"-DODN_FAST_OUTPUT={output}"]
        arguments += os.environ.get("CMAKE_ARGS", "").split()
        cmake = shutil.which("cmake", path=SEARCH_PATH)
        environment = {**os.environ, "PATH": SEARCH_PATH}
        subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *arguments], check=True, env=environment)
        subprocess.run([cmake, "--build", build], check=True, env=environment)


reason = why_not_built()
if reason:
    print(f"odn_fast: the C++ extension is NOT built ({reason}); CPU ops will be slower", file=sys.stderr)

setup(
    packages=[*find_packages(include=["odn_fast*"]), "odn_fast.kernels"],
    package_dir={"odn_fast.kernels": "kernels"},
    package_data={"odn_fast.kernels": ["tuned/*.json"]},
    ext_modules=[] if reason else [Extension("odn_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
