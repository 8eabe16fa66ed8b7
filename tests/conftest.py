"""What holds for every test: no network, one thread, no display, and the same random numbers each time.

The refusal is an audit hook: it sees every connection that Python's sockets make, also those of libraries that hold
their own reference to `socket.socket`, and forked workers inherit it. Other processes (the command line under test,
pip, spawned workers) are reached through their environment, not through a sitecustomize module, which would hide the
machine's own: offline switches, and a proxy on a closed port of this machine, so that HTTP clients fail at once.
"""

import ipaddress
import os
import random
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

# One thread: sums come out alike on every machine, and the models here are too small to gain from a second.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PIP_NO_INDEX": "1",
    "GRADIO_ANALYTICS_ENABLED": "0",
    "MPLBACKEND": "Agg",
}
for _scheme in ("http", "https", "all"):
    os.environ[f"{_scheme}_proxy"] = os.environ[f"{_scheme}_proxy".upper()] = "http://127.0.0.1:9"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "localhost,127.0.0.1"

_LOCAL_NAMES = {"localhost", "localhost.localdomain", "", socket.gethostname()}
_refused: list[str] = []


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    if not event.startswith("socket."):
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        sock, target = args[0], args[1]
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or target is None:
            return
        host = target[0]
        address = _address(host)
        allowed = address.is_loopback if address else host in _LOCAL_NAMES
        where = f"{host}:{target[1]}"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0].decode() if isinstance(args[0], bytes) else args[0] or ""
        allowed = host in _LOCAL_NAMES or _address(host) is not None  # looking up an address asks nobody
        where = host
    else:
        return
    if not allowed:
        _refused.append(f"{event.removeprefix('socket.')} {where}")
        # Not an OSError: libraries take those for a network that is down, and go on.
        raise RuntimeError(f"tests use no network: {_refused[-1]} refused, only this machine can be reached")


sys.addaudithook(_refuse_network)


@pytest.fixture(autouse=True)
def refused_connections() -> Iterator[list[str]]:
    """The connections refused during the test; one that the code under test swallowed fails the test at its end."""
    _refused.clear()
    yield _refused
    if _refused:
        pytest.fail(f"tests use no network, but the code under test tried: {', '.join(_refused)}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch sees none"))
