"""Frozen features of pictures: opened by threads, encoded in batches, each once, and kept on disk where asked."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from visplice.lm.fingerprint import fingerprint
from visplice.lm.vision_llama import VisionLlama
from visplice.vision.image import ImageError, open_image

_MEMORY = 1 << 30  # bytes of features that are kept for a second look, as a control takes


class FeatureStore:
    """Features on disk, one file for each picture, under the hash of its bytes: a picture that changed is another one.

    What one encoder makes lies in a folder of its own, so several models can share the store; and so can processes.
    """

    def __init__(self, folder: Path, model: VisionLlama) -> None:
        encoder = model.encoder
        made_with = {
            "encoder": encoder.config.to_dict() | {"weights": None},
            "fingerprint": fingerprint(encoder.vit),
            "dtype": str(next(encoder.parameters()).dtype),
            "tokens": model.visual.count,
        }
        text = json.dumps(made_with, sort_keys=True, indent=2)
        self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "made_with.json").write_text(text + "\n")
        self._shape = (model.visual.count, encoder.dim)

    def _file(self, digest: str) -> Path:
        return self._folder / digest[:2] / f"{digest}.safetensors"

    def get(self, digest: str) -> Tensor | None:
        """Features `[N, d_vision]`, or None where there are none that are whole."""
        try:
            features = load(self._file(digest).read_bytes())["features"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        return features if features.shape == self._shape else None

    def put(self, digest: str, features: Tensor) -> None:
        """Writes a file beside its place and renames it."""
        file = self._file(digest)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(save({"features": features.to("cpu").contiguous()}))
            os.replace(partial, file)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


class Pictures:
    """Features of the pictures of one folder."""

    def __init__(
        self, model: VisionLlama, folder: Path, *, workers: int, batch: int, store: FeatureStore | None
    ) -> None:
        """`workers` threads open pictures, `batch` of which are encoded together."""
        self._model, self._folder, self._store = model, folder, store
        self._workers, self._batch = workers, batch
        self._kept: dict[str, Tensor] = {}
        self._bytes = 0
        self.num_encoded = 0

    def features(self, names: Sequence[str]) -> Generator[Tensor | ImageError]:
        """For each name in order the features `[N, d_vision]` of the picture, or what is wrong with it."""
        pool = ThreadPoolExecutor(self._workers)
        waiting: deque[tuple[str, Future[_Opened]]] = deque()
        ahead, upcoming = 2 * self._batch + self._workers, iter(names)
        try:
            while True:
                while len(waiting) < ahead and (name := next(upcoming, None)) is not None:
                    waiting.append((name, pool.submit(self._open, name)))
                if not waiting:
                    return
                taken = [waiting.popleft() for _ in range(min(self._batch, len(waiting)))]
                yield from self._encode([name for name, _ in taken], [future.result() for _, future in taken])
        finally:
            pool.shutdown(cancel_futures=True)

    def blank(self) -> Tensor:
        """Features of a picture of the mean colour, which shows nothing."""
        side = self._model.encoder.config.image_size
        with torch.inference_mode():
            return self._model.features(torch.zeros(1, 3, side, side, device=self._model.device))[0]

    def _open(self, name: str) -> _Opened:
        if name in self._kept:
            return _Opened(features=self._kept[name])
        try:
            data = (self._folder / name).read_bytes()
        except OSError as error:
            return _Opened(error=ImageError(f"cannot be read ({error.strerror})", "unreadable-file"))
        digest = None
        if self._store is not None:
            digest = hashlib.sha256(data).hexdigest()
            if (found := self._store.get(digest)) is not None:
                return _Opened(features=found)
        try:
            return _Opened(pixels=self._model.encoder.transform(open_image(data)), digest=digest)
        except ImageError as error:
            return _Opened(error=error)

    @torch.inference_mode()
    def _encode(self, names: Sequence[str], opened: Sequence[_Opened]) -> Generator[Tensor | ImageError]:
        new = [one for one in opened if one.pixels is not None]
        if new:
            pixels = torch.stack([one.pixels for one in new if one.pixels is not None])
            for one, features in zip(new, self._model.features(pixels.to(self._model.device)), strict=True):
                one.features = features.clone()  # not a view, which would keep the whole batch
                if self._store is not None and one.digest is not None:
                    self._store.put(one.digest, features)
            self.num_encoded += len(new)
        for name, one in zip(names, opened, strict=True):
            if one.error is not None:
                yield one.error
                continue
            assert one.features is not None
            size = one.features.numel() * one.features.element_size()
            if name not in self._kept and self._bytes + size <= _MEMORY:
                self._kept[name] = one.features.cpu()
                self._bytes += size
            yield one.features.to(self._model.device)


class _Opened:
    """A picture on its way: its pixels, its features, or what is wrong with it."""

    def __init__(
        self,
        *,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        digest: str | None = None,
        error: ImageError | None = None,
    ) -> None:
        self.pixels, self.features, self.digest, self.error = pixels, features, digest, error
