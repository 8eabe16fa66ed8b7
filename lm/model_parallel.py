"""Meta's `consolidated.NN.pth`: each file is what one process of a model-parallel run held.

How tensors were cut follows fairscale's parallel layers, and `models/checkpoint.py` of meta-llama/llama-models for what
LLaMA 4 added.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visplice.lm.tensor_files import TensorStore, TorchFile, listing, open_file

META_FILE = re.compile(r"consolidated(?:\.\d\d)?\.pth")

_IGNORED = re.compile(
    r"rope\.freqs$"  # computed again from the config
    r"|\.expert_activation_DE$|\.global_gate_stats_3E$"  # statistics of the training
    r"|^vision_embeddings\.|^vision_projection\."  # LLaMA 4's own eyes, no part of the decoder
)
# By name inside a layer; what is not here, each file holds whole.
_CUTS = {
    "tok_embeddings.weight": "table",  # LLaMA 1 and 2 by column, later ones by row
    "output.weight": "rows",
    "attention.wq.weight": "rows",
    "attention.wk.weight": "heads",
    "attention.wv.weight": "heads",
    "attention.wo.weight": "columns",
    "attention.wqkv.weight": "fused heads",
    "feed_forward.w1.weight": "rows",
    "feed_forward.w2.weight": "columns",
    "feed_forward.w3.weight": "rows",
    "feed_forward.mlp.fc1_weight": "fused halves",
    "feed_forward.mlp.fc2_weight": "columns",
    "feed_forward.w_in_shared_FD.weight": "rows",
    "feed_forward.w_swiglu_FD.weight": "rows",
    "feed_forward.w_out_shared_DF.weight": "columns",
    "feed_forward.experts.moe_w_in_eD_F": "expert columns",
    "feed_forward.experts.moe_w_swiglu_eD_F": "expert columns",
    "feed_forward.experts.moe_w_out_eF_D": "expert rows",
}


class ModelParallelStore(TensorStore):
    """Every file holds its slice of every tensor, norms and router whole; a tensor is joined when it is asked for.

    Names are Meta's, without those that the decoder does not need. Fused tensors stay fused, in the order of a model
    that was never cut: queries, keys, values; w1, w3. Experts are [E, D, F] and [E, F, D].

    Raises:
        ValueError: the files disagree, or their widths do not add up to the model's, so that some are missing.
    """

    def __init__(self, paths: list[Path]) -> None:
        super().__init__(paths[0].parent)
        if scales := sorted(path.name for path in self.path.glob("*_scales_*.pt")):
            raise ValueError(f"{self.path}: quantised weights ({listing(scales)}); expected those in bfloat16")
        self._files: list[TorchFile] = []
        for path in paths:
            file = open_file(path)
            assert isinstance(file, TorchFile)
            self._files.append(file)
        self._names = self._names_in(self._files[0])
        for file in self._files[1:]:
            self._refuse_other_model(file)
        self._params = self._read_params()
        self._refuse_missing_files()

    @staticmethod
    def _names_in(file: TorchFile) -> list[str]:
        return [name for name in file.names() if not _IGNORED.search(name)]

    def _refuse_other_model(self, file: TorchFile) -> None:
        first = self._files[0]
        if odd := sorted(set(self._names_in(file)) ^ set(self._names)):
            raise ValueError(
                f"{file.path}: {listing(odd)} only here or only in {first.path.name}; expected parts of one model"
            )
        for name in self._names:
            ours, theirs = ((list(f.shape(name)), f.dtype(name)) for f in (file, first))
            if ours != theirs:
                raise ValueError(
                    f"{file.path}: {name} is {ours[0]} {ours[1]}, in {first.path.name} {theirs[0]} {theirs[1]}; "
                    "expected parts of one model"
                )

    def _read_params(self) -> dict[str, Any]:
        path = self.path / "params.json"
        try:
            params = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        if not isinstance(params, dict):
            raise ValueError(f"{path}: not a JSON object but {type(params).__name__}")
        return params

    def _refuse_missing_files(self) -> None:
        """The numbers in the names do not tell how many files there should be, but the widths do."""
        output = next((name for name in self._names if name.endswith(".attention.wo.weight")), None)
        if output is None or "norm.weight" not in self._names:
            return
        (width,) = self._files[0].shape("norm.weight")
        if self._params.get("head_dim") and self._params.get("n_heads"):
            width = self._params["n_heads"] * self._params["head_dim"]
        found = self.shape(output)[1]
        if found != width:
            raise ValueError(
                f"{self.path}: {len(self._files)} files make {output} {found} wide, expected {width}; "
                + ("files are missing" if found < width else "not all of them are of this model")
            )

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._join(name, [file.meta(name) for file in self._slices(name)]).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._slices(name)[0].dtype(name)

    def get(self, name: str, *, whole: bool = False) -> Tensor:
        return self._join(name, [file.get(name) for file in self._slices(name)])

    def file_of(self, name: str) -> Path:
        return self._slices(name)[0].path

    def _slices(self, name: str) -> list[TorchFile]:
        if name not in self._names:
            raise self.absent(name)
        return self._files

    def _join(self, name: str, parts: list[Tensor]) -> Tensor:
        """The whole tensor; only its shape where the parts are on the meta device."""
        within = re.sub(r"^layers\.\d+\.", "", name)
        layer = name.removesuffix(within)
        cut = _CUTS.get(within, "whole")
        if cut == "whole":
            return self._alike(name, parts)
        if cut in ("expert rows", "expert columns"):
            experts = self._files[0].shape(f"{layer}feed_forward.router_DE")[1]
            parts = [part.reshape(experts, -1, part.shape[-1]) for part in parts]
            return torch.cat(parts, dim=1 if cut == "expert rows" else 2) if len(parts) > 1 else parts[0]
        if len(parts) == 1:
            return parts[0]
        if cut == "table":
            cut = "rows" if parts[0].shape[1] == self._files[0].shape("norm.weight")[0] else "columns"
        if cut == "heads":
            return torch.cat(self._distinct(name, parts))
        if cut == "fused heads":
            queries = self._files[0].shape(f"{layer}attention.wo.weight")[1]
            pairs = (parts[0].shape[0] - queries) // 2
            q, k, v = zip(*(part.split((queries, pairs, pairs)) for part in parts), strict=True)
            return torch.cat([*q, *self._distinct(name, list(k)), *self._distinct(name, list(v))])
        if cut == "fused halves":
            return torch.cat([half for halves in zip(*(p.chunk(2) for p in parts), strict=True) for half in halves])
        return torch.cat(parts, dim=0 if cut == "rows" else 1)

    def _distinct(self, name: str, parts: list[Tensor]) -> list[Tensor]:
        """Where there are more files than key-value heads, neighbours hold copies of one head."""
        copies = max(1, len(parts) // (self._params.get("n_kv_heads") or len(parts)))
        return [self._alike(name, parts[start : start + copies]) for start in range(0, len(parts), copies)]

    def _alike(self, name: str, parts: list[Tensor]) -> Tensor:
        for part in parts[1:]:
            if not part.is_meta and not torch.equal(part, parts[0]):
                raise ValueError(
                    f"{self.path}: {name} differs between files that all hold it; expected parts of one model"
                )
        return parts[0]
