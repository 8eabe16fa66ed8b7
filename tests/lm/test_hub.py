"""Hub names, against a server on this machine that speaks as much of the hub's protocol as a download needs.

Each call runs in a process of its own: huggingface_hub reads its environment when it is imported.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

from visplice.lm.hub import resolve
from visplice.lm.storage import open_store

WEIGHTS = save({"weight": torch.arange(50_000).float()})
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": b"\x0a\x0b",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"never",
    "consolidated.safetensors": b"never",
    "adapter_model.safetensors": b"never",
    "modeling_llama.py": b"raise SystemExit",
    "README.md": b"# never",
    "onnx/config.json": b"{}",
    "onnx/model.safetensors": b"never",
    "original/consolidated.00.pth": b"never",
}
FETCHED = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]
TOKEN = "hf_thisIsTheTokenThatNobodyMaySee"

DRIVER = """
import json, sys, time
time.sleep = lambda seconds: None  # the library waits between attempts
from visplice.lm.hub import resolve
{prepare}
for arguments in json.loads(sys.argv[1]):
    try:
        print("ok", resolve(arguments.pop("source"), **arguments))
    except ValueError as error:
        print("error", error)
"""


class Hub:
    """A repository `lab/llama` with the files given, by revision; what it answers can be spoiled by the test."""

    def __init__(self):
        self.revisions = {"main": FILES}
        self.status = {}  # of a path: (status, X-Error-Code)
        self.cut = {}  # of a file: after which share of the body its next answers end
        self.requests = []
        self.tokens = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                hub.answer(self)

            do_GET = do_HEAD

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fetched(self):
        """Files whose content was asked for since the last call."""
        paths = [path.partition("/resolve/")[2].partition("/")[2] for verb, path in self.requests if verb == "GET"]
        self.requests.clear()
        return sorted(path for path in paths if path)

    @staticmethod
    def commit(files):
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path))
        if "Authorization" in request.headers:
            self.tokens.add(request.headers["Authorization"])
        for start, (status, code) in self.status.items():
            if path.startswith(start):
                return self.send(request, status, b"{}", {"X-Error-Code": code} if code else {})
        match = re.fullmatch(r"/api/models/lab/llama/(?:revision|tree)/([^/]+)|/lab/llama/resolve/([^/]+)/(.+)", path)
        if match is None:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        asked = match[1] or match[2]
        files = self.revisions.get(asked) or next((f for f in self.revisions.values() if self.commit(f) == asked), None)
        if files is None:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        commit = self.commit(files)
        if "/tree/" in path:
            oids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
            tree = [{"type": "file", "oid": oids[name], "size": len(files[name]), "path": name} for name in files]
            return self.send(request, 200, json.dumps(tree).encode())
        if match[1]:
            return self.send(request, 200, json.dumps({"id": "lab/llama", "sha": commit, "siblings": []}).encode())
        name = match[3]
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        self.send(request, 200, files[name], {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, name)

    def send(self, request, status, body, headers=None, name=""):
        headers = dict(headers or {})
        span = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if span and status == 200:
            headers["Content-Range"] = f"bytes {span[1]}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[int(span[1]) :]
        request.send_response(status)
        for field, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(field, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        share = self.cut[name].pop(0) if self.cut.get(name) else 1
        request.wfile.write(body[: int(share * len(body))])


@pytest.fixture
def hub():
    server = Hub()
    yield server
    if server.thread.is_alive():
        server.stop()


@pytest.fixture
def ask(hub, tmp_path):
    """Calls `resolve` in a fresh process; each call is answered by `ok FOLDER` or `error MESSAGE`."""

    def run(*calls, prepare="", offline=False, token=None):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
        }
        if token:
            environment["HF_TOKEN"] = token
        calls = [call if isinstance(call, dict) else {"source": call} for call in calls]
        result = subprocess.run(
            [sys.executable, "-c", DRIVER.format(prepare=prepare), json.dumps(calls)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        assert TOKEN not in result.stdout + result.stderr
        answers = result.stdout.splitlines()
        assert len(answers) == len(calls), result.stdout  # one line each
        return answers if len(answers) > 1 else answers[0]

    return run


def folder_of(answer):
    assert answer.startswith("ok "), answer
    return Path(answer[3:])


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_folder_is_taken_as_it_is_without_the_hub(tmp_path, monkeypatch):
    (tmp_path / "lab" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("lab/llama") == Path("lab/llama")  # a folder goes before the hub's name
    assert resolve(tmp_path / "lab") == tmp_path / "lab"
    assert resolve("~/lab/llama") == tmp_path / "lab" / "llama"
    code = "import sys; from visplice.lm.hub import resolve; resolve('lab'); sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "source",
    ["nowhere", "./lab/llama", "/lab/llama", "~/lab/llama", "../llama", "a/b/c", "lab/", "/llama", "lab/lla ma",
     "lab/..", "lab/a--b", "lab\\llama", "lab/llama@", "https://hub/lab/llama", Path("lab/llama")],
)  # fmt: skip
def test_string_that_is_neither_is_refused_with_both_readings(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(source))}: no such folder, and not a name .*owner/name$"):
        resolve(source)


def test_empty_name_is_not_taken_for_the_folder_that_we_are_in():
    with pytest.raises(ValueError, match="no model is named; expected a folder, or owner/name on the hub"):
        resolve("")


def test_file_and_contradicting_revisions_are_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors: a file; expected the folder it lies in"):
        resolve(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a folder has no revisions, but 'v2' was asked for"):
        resolve(tmp_path, revision="v2")
    with pytest.raises(ValueError, match=r"lab/llama@v1: names revision 'v1', but 'v2' was asked for as well"):
        resolve("lab/llama@v1", revision="v2")


def test_name_is_fetched_once_and_only_what_is_read(hub, ask):
    folder = folder_of(ask("lab/llama"))
    assert names_in(folder) == FETCHED and hub.fetched() == FETCHED
    for name in FETCHED:
        assert (folder / name).read_bytes() == FILES[name]
    assert torch.equal(open_store(folder).get("weight"), torch.arange(50_000).float())
    assert folder_of(ask("lab/llama")) == folder and hub.fetched() == []
    hub.stop()
    assert folder_of(ask("lab/llama")) == folder  # the machine is off the network
    assert folder_of(ask("lab/llama", offline=True)) == folder


def test_revision_is_a_branch_or_a_commit(hub, ask):
    other = FILES | {"config.json": b'{"model_type": "llama", "second": true}'}
    hub.revisions["v2"] = other
    calls = ["lab/llama", "lab/llama@v2", {"source": "lab/llama", "revision": "v2"}, f"lab/llama@{hub.commit(FILES)}"]
    first, second, third, fourth = map(folder_of, ask(*calls))
    assert second == third != first == fourth
    assert (second / "config.json").read_bytes() == other["config.json"]
    assert (second / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("read", "not_read"),
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"], []),
        (["weights.safetensors"], []),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"], []),
        (["pytorch_model.bin"], ["training_args.bin"]),
        (["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"], ["checklist.chk"]),
        (["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"], ["original/x.py"]),
    ],
    ids=["shards", "other name", "bin shards", "bin", "meta", "original"],
)  # fmt: skip
def test_weights_are_fetched_whatever_their_layout(hub, ask, read, not_read):
    hub.revisions["main"] = dict.fromkeys(["config.json", *read, *not_read], b"{}")
    folder = folder_of(ask("lab/llama"))
    assert names_in(folder) == sorted(["config.json", *read])
    hub.stop()
    assert folder_of(ask("lab/llama", offline=True)) == folder


def test_repository_without_weights_is_refused_unless_none_are_wanted(hub, ask):
    hub.revisions["main"] = {"config.json": b"{}", "model-q4.gguf": b"never"}
    assert ask("lab/llama").startswith("error lab/llama: holds no weights that can be read; expected model.safetensors")
    hub.revisions["main"] = FILES
    hub.fetched()
    folder = folder_of(ask({"source": "lab/llama", "files": ["tokenizer*"], "weights": False}))
    assert names_in(folder) == hub.fetched() == ["tokenizer.json", "tokenizer.model"]


def test_interrupted_download_is_resumed_within_the_call(hub, ask):
    hub.cut["model.safetensors"] = [0.5]
    folder = folder_of(ask("lab/llama"))
    assert hub.fetched().count("model.safetensors") == 2
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_interrupted_download_leaves_nothing_that_would_be_taken_for_whole(hub, ask, tmp_path):
    hub.cut["model.safetensors"] = [0.5] + [0] * 50
    failed = ask("lab/llama")
    assert re.fullmatch(rf"error lab/llama: fetching from {hub.url} failed \(.*closed.*\); try again", failed)
    held = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size > 10_000]
    assert held == []
    assert re.fullmatch(
        r"error lab/llama: no such folder, and only in part in the cache \S+; HF_HUB_OFFLINE is set, .*",
        ask("lab/llama", offline=True),
    )
    hub.cut.clear()
    folder = folder_of(ask("lab/llama"))
    assert names_in(folder) == FETCHED and (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_missing_repository_and_revision_are_told_apart(hub, ask):
    none, revision = ask("lab/nowhere", "lab/llama@v9")
    assert none == f"error lab/nowhere: no such folder, and no such repository on {hub.url}"
    assert revision == f"error lab/llama: no revision 'v9' on {hub.url}"


def test_repository_that_may_not_be_read_says_how_to_log_in_and_never_the_token(hub, ask):
    hub.status["/api/models/lab/private"] = (401, None)
    hub.status["/lab/llama/resolve"] = (403, "GatedRepo")
    private, gated = ask("lab/private", "lab/llama", token=TOKEN)
    assert private == (
        f"error lab/private: no such folder, and {hub.url} does not show it (401): there is none of this name, or it "
        "is private; `hf auth login` or set HF_TOKEN to one that may read it"
    )
    assert (
        gated == f"error lab/llama: gated; ask for access on {hub.url}/lab/llama, then `hf auth login` or set HF_TOKEN"
    )
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_server_that_fails_or_is_out_of_reach_is_told_from_offline(hub, ask):
    hub.status["/api/models/lab/llama"] = (500, None)
    assert re.fullmatch(rf"error lab/llama: .*{hub.url} .*500.*; try again", ask("lab/llama"))
    hub.stop()
    assert re.fullmatch(
        rf"error lab/llama: no such folder, and fetching it from {hub.url} failed \(.*refused.*\), nor is it "
        r"whole in the cache \S+home/hub; try again",
        ask("lab/llama"),
    )
    assert re.fullmatch(
        r"error lab/llama: no such folder, and not in the cache \S+home/hub; HF_HUB_OFFLINE is set, unset it .*",
        ask("lab/llama", offline=True),
    )


FULL = """
import pathlib
_open = pathlib.Path.open
def _full(self, *arguments, **named):
    # The system's own answer to a write when no room is left.
    return _open(pathlib.Path("/dev/full") if self.suffix == ".incomplete" else self, *arguments, **named)
pathlib.Path.open = _full
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_told(hub, ask):
    assert re.fullmatch(
        r"error lab/llama: the disk is full under \S+home/hub; make room, or let HF_HOME name a larger place",
        ask("lab/llama", prepare=FULL),
    )
    assert names_in(folder_of(ask("lab/llama"))) == FETCHED
