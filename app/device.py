"""What `--device` and `--dtype` mean."""

import torch


def pick_device(name: str) -> torch.device:
    """The device of that name; 'auto' is CUDA, then MPS, then the CPU.

    Raises:
        ValueError: this machine does not have it.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if not present[name]:
        there = ", ".join(kind for kind, is_there in present.items() if is_there)
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no such device here; there is {there}")
    return torch.device(name)


def pick_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
