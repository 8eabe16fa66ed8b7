import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

OUTSIDE = ("192.0.2.1", 80)  # TEST-NET-1 (RFC 5737): an address that nobody has


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_connect_to_outside_is_refused(family: int, method: str, refused_connections: list[str]) -> None:
    target = OUTSIDE if family == socket.AF_INET else ("2001:db8::1", 80)
    with (
        socket.socket(family) as sock,
        pytest.raises(RuntimeError, match=r"tests use no network: connect .*:80 refused"),
    ):
        getattr(sock, method)(target)
    assert len(refused_connections) == 1
    refused_connections.clear()


def test_create_connection_datagram_and_lookup_are_refused(refused_connections: list[str]) -> None:
    with pytest.raises(RuntimeError, match="tests use no network"):
        socket.create_connection(OUTSIDE, timeout=1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, pytest.raises(RuntimeError, match="sendto"):
        sock.sendto(b"", OUTSIDE)
    for look_up in (socket.gethostbyname, lambda name: socket.getaddrinfo(name, 80)):
        with pytest.raises(RuntimeError, match=r"example\.org refused"):
            look_up("example.org")
    assert len(refused_connections) == 4
    refused_connections.clear()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_works(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"hello"))
        thread.start()
        with socket.create_connection((host, port), timeout=10) as sock:
            assert sock.recv(5) == b"hello"
        thread.join()


def test_unix_sockets_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a path of a socket is at most 107 bytes long
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        client.connect("socket")


def test_http_of_another_process_fails_at_once() -> None:
    code = "import urllib.request; urllib.request.urlopen('http://192.0.2.1', timeout=60)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.returncode != 0
    assert "Connection refused" in result.stderr
