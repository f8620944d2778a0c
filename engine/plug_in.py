"""Registers our quantizer with transformers whichever of the two packages is imported first.

Without it a model that was saved quantized would load with a warning and random weights.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

LOADING = "transformers.modeling_utils"  # no model loads without it, and it has all that we need


def register_when_imported() -> None:
    """Now if transformers can load models already, else as soon as it can."""
    if LOADING in sys.modules:
        import tilewright.quantizer  # noqa: F401
    elif not any(isinstance(finder, _AfterLoading) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterLoading())


class _AfterLoading(importlib.abc.MetaPathFinder):
    """Finds nothing itself; the import of that module is followed by our quantizer's."""

    def find_spec(self, name, path=None, target=None):
        if name != LOADING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_both(module):
            execute(module)
            import tilewright.quantizer  # noqa: F401

        spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec
