"""Data folders behind a URL: shards are fetched whole into a cache on this machine when their turn comes.

Files in the cache are named by their content, so that data sets share them. Processes of one machine fetch each file
once; it is there when its size and SHA-256 are those of the manifest. What was not used for longest makes room.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from filelock import FileLock

ATTEMPTS = 6
DELAY = 1.0  # seconds before the second attempt, twice as long before each further one
_SILENCE = 60.0  # seconds without a byte that end an attempt
_NO_USE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # of this machine; another attempt changes nothing
_ASK_AGAIN = (408, 425, 429)  # HTTP answers below 500 that pass

T = TypeVar("T")


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def default_cache() -> Path:
    """Where shards are kept unless the user says it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "visplice" / "shards"


def shown(text: str) -> str:
    """Text without what lets others in: user and password, and everything behind a question mark, of its URLs."""
    text = re.sub(r"(\w://)[^/\s'\"]*@", r"\1", text)
    return re.sub(r"(\w://[^\s'\"?]*)\?[^\s'\"]*", r"\1", text)


class RemoteFolder:
    """The files below a URL, through fsspec."""

    def __init__(self, url: str, *, cache: str | Path | None = None, cache_gb: float = 50.0) -> None:
        """Names the URL.

        Args:
            url: of the folder; any kind that fsspec has an implementation for.
            cache: folder for fetched files; `default_cache()` without it.
            cache_gb: bytes that the cache takes, in units of 10^9.
        """
        self._url = url
        self.url = shown(url)
        self._cache = Path(cache).expanduser() if cache else default_cache()
        self.limit = int(cache_gb * 1e9)

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: there is none.
            OSError: it could not be fetched.
        """
        return self._attempt(name, lambda files, path: files.cat_file(path))

    def fetch(self, name: str, *, size: int, sha256: str) -> Path:
        """A file in the cache, fetched if it is not there.

        Raises:
            OSError: it could not be fetched, or is another one than stated.
        """
        file = self._cache / f"{sha256}.tar"
        if self._is_there(file, size):
            return file
        self._cache.mkdir(parents=True, exist_ok=True)
        with FileLock(self._cache / f".{sha256}.lock"):
            if self._is_there(file, size):  # another process was faster
                return file
            partial = file.with_name(file.name + ".partial")
            try:
                self._make_room(size)
                self._attempt(name, lambda files, path: _fetch(files, path, partial, size, sha256))
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)
        return file

    def _is_there(self, file: Path, size: int) -> bool:
        try:
            if file.stat().st_size != size:
                return False
            os.utime(file)  # marks it as used
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size: int) -> None:
        """Removes what was not used for longest; who has such a file open can read on."""
        with FileLock(self._cache / ".room.lock"):
            files = []
            for file in self._cache.glob("*.tar"):
                with suppress(FileNotFoundError):
                    facts = file.stat()
                    files.append((facts.st_mtime_ns, facts.st_size, file))
            room = self.limit - sum(taken for _, taken, _ in files)
            for _, taken, file in sorted(files):
                if room >= size:
                    return
                file.unlink(missing_ok=True)
                room += taken

    def _attempt(self, name: str, work: Callable[[Any, str], T]) -> T:
        """Does something with fsspec's file system and the path of a file, again and again if need be."""
        where = shown(_join(self._url, name))
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return work(*_file_system(_join(self._url, name)))
            except FileNotFoundError:
                raise FileNotFoundError(f"{where}: there is no such file") from None
            except ImportError as error:  # the kind of URL needs a package that is not installed
                raise ValueError(f"{where}: {error}") from None
            except Exception as error:  # implementations raise what their libraries raise
                reason, status = _reason(error), getattr(error, "status", 500)
                if getattr(error, "errno", None) in _NO_USE:
                    raise OSError(f"{self._cache}: {reason}, while fetching {where}") from None
                if 400 <= status < 500 and status not in _ASK_AGAIN:
                    raise OSError(f"{where}: {reason}") from None
            if attempt < ATTEMPTS:
                time.sleep(DELAY * 2 ** (attempt - 1))
        raise OSError(f"{where}: not fetched in {ATTEMPTS} attempts, the last one failed by: {reason}") from None


def _join(url: str, name: str) -> str:
    """The URL of a file below a URL, which keeps its query."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        name = quote(name)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    if urlsplit(url).scheme not in ("http", "https"):
        return fsspec.core.url_to_fs(url)
    import aiohttp

    # aiohttp's own limit is on the whole file, and five minutes are short for a shard of some gigabytes.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
    return fsspec.core.url_to_fs(url, client_kwargs={"timeout": timeout, "trust_env": True})


def _fetch(files: Any, path: str, partial: Path, size: int, sha256: str) -> None:
    files.get_file(path, str(partial))
    with open(partial, "rb+") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found = stream.tell()
        if found != size:
            raise ValueError(f"{found:,} bytes came, the manifest states {size:,}")
        if digest != sha256:
            raise ValueError(f"SHA-256 {digest[:12]}... came, the manifest states {sha256[:12]}...")
        os.fsync(stream.fileno())


def _reason(error: Exception) -> str:
    status = getattr(error, "status", None)
    if status:
        return f"HTTP status {status} {getattr(error, 'message', '')}".strip()
    return shown(str(error) or type(error).__name__)


class Prefetcher:
    """Fetches shards before they are read, in a thread; what fails here fails again, aloud, where it is read."""

    def __init__(self, sources: Iterable[Any]) -> None:
        self._sources = list(sources)
        self._wanted: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._asked: set[tuple[int, int]] = set()
        self._thread: threading.Thread | None = None

    def want(self, shards: list[tuple[int, int]]) -> None:
        """Takes set and shard of everything that is read now or next."""
        for item in shards:
            if item not in self._asked:
                self._wanted.put(item)
        self._asked = set(shards)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            source, shard = self._wanted.get()
            with suppress(Exception):
                self._sources[source].prefetch(shard)
