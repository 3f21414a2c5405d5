"""`python -m sempre.workers.gpu.compiler_main`: compiles kernels into Triton's cache folder, in many processes.

The first line on stdin is the compute capability (90 for 9.0), each further one describes a variant, which is compiled
while waiting for the next ones; end of input ends it. No GPU is touched. Triton holds the interpreter's lock for most
of a compilation, so threads would not do; the processes are forks of this one, which has imported what they need and
runs no other thread.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pkgutil import walk_packages

# not used here: what kernel modules and compilations would otherwise import in each process
import torch  # noqa: F401
import triton.compiler.code_generator  # noqa: F401
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime import driver
from triton.runtime.cache import triton_key

from sempre import kernels
from sempre.ipc.liveness import die_with_parent_thread


class TargetOnly(CudaDriver):  # type: ignore[misc]
    """Stands in for a GPU of a known kind; nothing can run on it."""

    launcher_cls = CudaLauncher

    def __init__(self, target: GPUTarget) -> None:
        """Skips the parent's, which needs a GPU."""
        self._target = target

    @property
    def utils(self) -> CudaUtils:
        return CudaUtils()

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(description: str, launcher: bool) -> None:
    from sempre.kernels.gpu_jit import compile_described

    compile_described(description, launcher=launcher)


def main() -> int:
    """The first error exits with a traceback and code 1."""
    parser = argparse.ArgumentParser(prog="python -m sempre.workers.gpu.compiler_main")
    parser.add_argument("--processes", required=True, type=int)
    parser.add_argument("--launchers", action="store_true", help="build the C modules that launch the kernels, too")
    options = parser.parse_args()
    # a digest of the compiler, which every process needs and keeps
    triton_key()
    # each as it arrives
    lines = iter(sys.stdin.readline, "")
    architecture = next(lines, None)
    if architecture is None:
        return 0
    # before any module with kernels is imported: some code depends on the target
    driver.set_active(TargetOnly(GPUTarget("cuda", int(architecture), 32)))
    for module in walk_packages(kernels.__path__, "sempre.kernels."):
        if module.name.rpartition(".")[2].startswith("gpu"):
            import_module(module.name)
    gc.freeze()
    pool = ProcessPoolExecutor(
        options.processes, get_context("fork"), initializer=die_with_parent_thread, initargs=(os.getpid(),)
    )
    # the first one creates the forks, before there is anything to compile
    pool.submit(os.getpid)
    for done in [pool.submit(_compile, line, options.launchers) for line in lines]:
        done.result()
    pool.shutdown(wait=False)
    return 0


if __name__ == "__main__":
    code = main()
    # the idle forks end with this process; tearing down torch would only take time
    os._exit(code)
