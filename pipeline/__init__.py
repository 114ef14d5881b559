"""From image files to device tensors: manifest → plan → DALI graph → loader.

For a training loop of your own, with any network (docs/library.md): from pipeline import TrainLoader, ValidationLoader
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.library import RandomResized, TrainLoader, ValidationLoader

__all__ = ["RandomResized", "TrainLoader", "ValidationLoader"]


def __getattr__(name: str) -> Any:
    """The loaders, when they are asked for: what needs no DALI and no torch starts without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline import library

    return getattr(library, name)
