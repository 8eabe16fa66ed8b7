"""Lets torchvision be imported beside a torch that its compiled operators do not fit.

torchvision's wheel from the package index is built for one build of torch; beside another (a CPU build, say) its
library does not load, and `import torchvision` dies registering shapes for operators that are not there. timm,
open_clip and Lightning import it, and nothing here calls those operators, so declaring their signatures is enough.
"""

import torch

_library: torch.library.Library | None = None  # kept alive: the declarations vanish with it


def declare_missing_operators() -> None:
    """Declares `torchvision::nms` and `torchvision::qnms` unless torchvision's own library has them."""
    global _library
    if _library is not None or hasattr(torch.ops.torchvision, "nms") or _has_compiled_operators():
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _has_compiled_operators() -> bool:
    # Only a real import tells; a failed one is taken back, so that the next starts afresh.
    import sys

    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError):
        for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        return False
    return True
