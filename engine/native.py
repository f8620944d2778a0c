"""The compiled modules, loaded at the first native call; a failure to load is kept as a reason.

_C      the CPU kernels, compiled once per level; always part of a complete install
_cuda   the CUDA kernels for Hopper; present only if nvcc was there when tilewright was built
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

from tilewright import settings

HOW_TO_BUILD = "`pip install -c constraints.txt .` in the source folder"


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module tilewright.<name>, or None and the reason."""
    wanted = name + sysconfig.get_config_var("EXT_SUFFIX")
    folder = Path(__file__).parent
    there = sorted(p.name for p in folder.glob(f"{name}.*"))
    if wanted not in there:
        found = f"found only {', '.join(there)}" if there else f"no {name} of any kind is there"
        return None, f"tilewright.{name} is not built: need {wanted} in {folder}, {found}"
    try:
        return importlib.import_module(f"tilewright.{name}"), ""
    except ImportError as error:
        return None, f"tilewright.{name} does not load: {error}"


@cache
def _cpu() -> tuple[ModuleType | None, str]:
    module, reason = _load("_C")
    if module is None:
        return None, f"{reason}. Build it with {HOW_TO_BUILD}; it needs a C++17 compiler"
    version = sys.modules["tilewright"].__dict__.get("__version__", module.version)
    if module.version != version:
        return None, (
            f"tilewright._C was built from version {module.version}, this is {version}. "
            f"Build it again with {HOW_TO_BUILD}"
        )
    return module, ""


@cache
def _cuda(device: int) -> tuple[ModuleType | None, str]:
    module, reason = _load("_cuda")
    if module is None:
        return None, f"{reason}. Build it with {HOW_TO_BUILD}; it needs nvcc 12.3 or newer"
    why_not = module.why_not(device)
    if why_not is not None:
        return None, f"tilewright._cuda cannot run: {why_not}"
    return module, ""


def why_not_native() -> str | None:
    """None if `_C` is built and loads here, else the reason."""
    return _cpu()[1] or None


def why_not_cuda(device: int = 0) -> str | None:
    """None if `_cuda` is built, loads, and can use CUDA device `device`, else the reason."""
    return _cuda(device)[1] or None


@cache
def native() -> ModuleType:
    """The module `tilewright._C`, at the level that TILEWRIGHT_ISA asks for.

    RuntimeError: it is missing or does not load. ValueError: TILEWRIGHT_ISA names no level, or one
    above what this machine has.
    """
    module, reason = _cpu()
    if module is None:
        raise RuntimeError(reason)
    level = settings.forced_isa()
    if level is not None:
        built, best = module.isa_levels(), module.best_isa()
        usable = built[: built.index(best) + 1]
        if level not in usable:
            raise ValueError(
                f"TILEWRIGHT_ISA is {level!r}, need one of {', '.join(usable)}: "
                f"the levels of this build up to {best}, the best of this machine"
            )
        module.set_isa(level)
    return module


def native_cuda(device: int = 0) -> ModuleType:
    """The module `tilewright._cuda`. RuntimeError: CUDA device `device` cannot run it, and why."""
    module, reason = _cuda(device)
    if module is None:
        raise RuntimeError(reason)
    return module
