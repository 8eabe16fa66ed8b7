from importlib import import_module
from typing import TYPE_CHECKING, Any

if not __name__.startswith("visplice."):
    raise ImportError("import visplice.lm, not lm: the folders of the repository are subpackages of visplice")

if TYPE_CHECKING:
    from visplice.lm.decoder import Llama
    from visplice.lm.tokenizer import Tokenizer
    from visplice.lm.vision_llama import VisionLlama

__all__ = ["Llama", "Tokenizer", "VisionLlama"]

_MODULES = {"Llama": "decoder", "Tokenizer": "tokenizer", "VisionLlama": "vision_llama"}


def __getattr__(name: str) -> Any:
    """The three classes that others build on, imported when they are asked for: torch alone takes a second."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
