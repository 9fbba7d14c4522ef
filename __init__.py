"""dgemma: DiffusionGemma on whatever machine you own.

    model = dgemma.load()                       # the small model that ships with the package, on the best backend here
    print(model.generate("12..\\n..1.\\n.1..\\n..2.").text)

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Functions with the names of packages: these are loaded by now, and so no later import of theirs takes the names.
from .convert import convert
from .core.version import __version__
from .tools.export import export

if TYPE_CHECKING:
    from .canvas.candidate import Filled
    from .canvas.edit import Edited
    from .canvas.holes import Hole
    from .canvas.questions import Answer, Question
    from .canvas.read import Reading
    from .core.config import GenerationConfig, ModelConfig, SamplerConfig
    from .core.errors import DgemmaError
    from .core.events import Commit, Done, Draft, Event, Generation, Prefill, Stats
    from .runtime import DiffusionGemma, load
    from .show.record import record
    from .show.recording import Recording, replay
    from .show.watch import watch
    from .tools.compare import Comparison, compare

_HOMES = {
    "canvas.edit": ("Edited",),
    "canvas.candidate": ("Filled",),
    "canvas.holes": ("Hole",),
    "canvas.questions": ("Answer", "Question"),
    "canvas.read": ("Reading",),
    "tools.compare": ("Comparison", "compare"),
    "core.config": ("GenerationConfig", "ModelConfig", "SamplerConfig"),
    "core.errors": ("DgemmaError",),
    "core.events": ("Commit", "Done", "Draft", "Event", "Generation", "Prefill", "Stats"),
    "runtime": ("DiffusionGemma", "load"),
    "show.record": ("record",),
    "show.recording": ("Recording", "replay"),
    "show.watch": ("watch",),
}

__all__ = [
    "Answer", "Commit", "Comparison", "DgemmaError", "DiffusionGemma", "Done", "Draft", "Edited", "Event", "Filled",
    "Generation", "GenerationConfig", "Hole", "ModelConfig", "Prefill", "Question", "Reading", "Recording",
    "SamplerConfig", "Stats", "__version__", "compare", "convert", "export", "load", "record", "replay", "watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
