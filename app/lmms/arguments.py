"""The arguments of the model under lmms-eval: `--model_args pretrained=DIR,dtype=bfloat16`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from visplice.app.device import pick_device, pick_dtype

DTYPES = ("float32", "bfloat16", "float16")
LOSSES = ("mean", "sum")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """What `--model_args` may say; `--batch_size` and `--device` stand for those of the same name."""

    pretrained: str  # an extension folder, a LLaVA folder, or 'embedded'
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: str = "float32"  # of the backbones
    batch_size: int = 1  # questions at a time
    seed: int = 0  # of tasks that draw answers
    loss: str = "mean"  # of a choice: over its tokens, as lmms-eval's LLaVA has it, or their sum
    vision_tower: str | None = None  # of a LLaVA in its original layout
    model_base: str | None = None  # the same

    def __post_init__(self) -> None:
        for name, value, known in (("dtype", self.dtype, DTYPES), ("loss", self.loss, LOSSES)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it is one of {', '.join(known)}")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size!r}; it is a whole number, at least 1")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}; it is a whole number")

    def torch_device(self, process: int | None = None) -> torch.device:
        """The device; of several processes on CUDA each has the one of its own number.

        Raises:
            ValueError: there is no such device.
        """
        kind, colon, number = self.device.partition(":")
        if kind not in DEVICES or (colon and not (kind == "cuda" and number.isdecimal())):
            raise ValueError(
                f"device is {self.device!r}; it is one of {', '.join(DEVICES)}, or cuda:0, cuda:1 and so on"
            )
        device = pick_device(kind)
        if device.type != "cuda" or (process is None and not colon):
            return device
        index = int(number) if process is None else process
        if index >= torch.cuda.device_count():
            raise ValueError(f"device cuda:{index} was asked for, but there are {torch.cuda.device_count()}")
        return torch.device("cuda", index)

    @property
    def torch_dtype(self) -> torch.dtype:
        return pick_dtype(self.dtype)


def read_arguments(text: str, command_line: Mapping[str, Any]) -> ModelArguments:
    """Arguments from the text of `--model_args` and from lmms-eval's own options of the same name.

    lmms-eval gives `--batch_size` always, typed or not, so what `--model_args` says goes before it.

    Raises:
        ValueError: an argument is unknown, lacks its value, is given twice, or cannot be what it says.
    """
    known = [field.name for field in fields(ModelArguments)]
    given: dict[str, Any] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, equals, value = item.partition("=")
        if not equals or not value:
            raise ValueError(f"--model_args holds {item!r}; it is name=value, and a comma between two of them")
        if name not in known:
            raise ValueError(f"--model_args holds {name!r}, which visplice does not know; it knows {', '.join(known)}")
        if name in given:
            raise ValueError(f"--model_args holds {name!r} twice")
        given[name] = value
    if "pretrained" not in given:
        raise ValueError("--model_args lacks pretrained=DIR: an extension folder, a LLaVA folder, or embedded")
    for name in ("batch_size", "device"):
        if command_line.get(name) is not None:
            given.setdefault(name, command_line[name])
    for name in ("batch_size", "seed"):
        if name in given:
            given[name] = _whole(given[name])
    return ModelArguments(**given)


def _whole(value: Any) -> Any:
    """The number that the text spells; the text itself where it spells none, for the message."""
    try:
        return int(value)
    except ValueError:
        return value
