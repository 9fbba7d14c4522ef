"""DiffusionGemma as ONNX: the same graph, written out.

`dgemma.export` is both this package and the function in it: the package can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporter import Report, export

__all__ = ["Report", "export"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import exporter

        return getattr(exporter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(ModuleType):
    """The package, which importing any of its files binds to `dgemma.export`: the function all the same."""

    def __call__(self, *args: Any, **options: Any) -> Report:
        from .exporter import export

        return export(*args, **options)


sys.modules[__name__].__class__ = _Callable
