"""The compiled modules, or objects that explain on use why they are missing.

Importing the package must work without it (to print help, read a plan, or run the doctor), so a failure is kept until the first call.
"""

from __future__ import annotations

import importlib

from . import env
from .errors import NativeError

_BUILD = "build it with `pip install .` (or `pip install -e .`) in the source folder, then run `mxq doctor`"
_BUILD_CUDA = ("compute on the CPU, or build it: `pip install '.[cuda-build]'` in the source folder brings a compiler where there is no CUDA toolkit, "
               "`pip install --force-reinstall --no-deps .` then builds with it")


class Missing:
    """Stands in for the native module: every attribute is a function that raises NativeError with the cause."""

    def __init__(self, cause: BaseException, module: str = "_cpu", fix: str = _BUILD):
        self._cause, self._module, self._fix = cause, module, fix

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args, **kwargs):
            missing = isinstance(self._cause, ModuleNotFoundError)
            rule = f"the compiled extension mxq_ext.{self._module} was not built" if missing else f"the extension does not load ({self._cause})"
            raise NativeError(f"native function {name}", rule, self._fix) from self._cause

        return refuse


def _load(module: str = "_cpu", fix: str = _BUILD):
    try:
        return importlib.import_module(f"{__package__}.{module}")
    except ImportError as error:
        return Missing(error, module, fix)


def set_target(name: str) -> None:
    """Makes ``name`` the instruction set of all kernels from now on. Raises NativeError with the usable ones."""
    try:
        cpu.set_target(name)
    except ValueError as error:
        raise NativeError(f"CPU target {name!r}", f"this CPU and build can use {error}",
                          "set MXQ_CPU_TARGET to one of them, or unset it") from None


cpu = _load()
cuda = _load("_cuda", _BUILD_CUDA)


class _Refusing(Missing):
    """The module is fine, but ``MXQ_CPU_TARGET`` names a target that is not usable."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args, **kwargs):
            raise self._cause

        return refuse


if not isinstance(cpu, Missing) and env.get("MXQ_CPU_TARGET"):
    try:
        set_target(env.get("MXQ_CPU_TARGET"))
    except NativeError as error:
        cpu = _Refusing(error)
