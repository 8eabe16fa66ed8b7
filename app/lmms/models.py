"""The classes that lmms-eval opens, one for each of its interfaces; what they do lies in `requests`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms

from visplice.app.lmms.arguments import ModelArguments, read_arguments
from visplice.app.lmms.requests import generate_until, loglikelihood
from visplice.lm.extension import load_extension


class VispliceSimple(lmms):
    """Contexts and pictures in, answers and losses out: the interface of all tasks, `--force_simple`."""

    is_simple = True

    def __init__(self, **arguments: Any) -> None:
        """Opens the model; `arguments` are the fields of `ModelArguments`.

        Raises:
            ValueError: the model cannot be opened, or the device is not there.
        """
        super().__init__()
        self.arguments = ModelArguments(**arguments)
        self.accelerator = Accelerator()
        several = self.accelerator.num_processes > 1
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = self.arguments.torch_device(self.accelerator.local_process_index if several else None)
        # Kept as an attribute of its own: lmms-eval's `clean` frees those that are modules.
        self.model = load_extension(
            self.arguments.pretrained,
            device=self._device,
            dtype=self.arguments.torch_dtype,
            vision_tower=self.arguments.vision_tower,
            model_base=self.arguments.model_base,
        ).eval()

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> VispliceSimple:
        """Opens what the command line says, or leaves with one line and status 2.

        lmms-eval itself would print a traceback and leave with status 0.
        """
        try:
            return cls(**vars(read_arguments(arg_string, additional_config or {})))
        except (ValueError, OSError) as error:
            print(f"visplice: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None

    @property
    def batch_size(self) -> int:
        return self.arguments.batch_size

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def chat_template(self) -> str:
        raise ValueError("visplice writes every prompt in the model's own template; leave --apply_chat_template out")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return generate_until(
            self.model,
            requests,
            self.task_dict,
            chat=not self.is_simple,
            batch_size=self.batch_size,
            seed=self.arguments.seed,
            progress=self.rank == 0,
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        found = loglikelihood(
            self.model,
            requests,
            self.task_dict,
            batch_size=self.batch_size,
            mean=self.arguments.loss == "mean",
            progress=self.rank == 0,
        )
        # A bare pair becomes its own spelling in lmms-eval 0.7, and the task dies of it; what is wrapped stays a pair.
        return [GenerationResult(text=pair) for pair in found]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError(
            f"{len(requests)} requests are conversations of several rounds (generate_until_multi_round), "
            "which visplice does not hold under lmms-eval; leave the task out"
        )


class VispliceChat(VispliceSimple):
    """Messages in, answers out: the interface that lmms-eval takes unless told otherwise."""

    is_simple = False
