"""`vortex fetch tokenizers`, the only thing that downloads, against an endpoint on this machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
COMMIT = "0" * 40
OPEN = "from vortex_core.checkpoint.tokenizer import find_tokenizers; print(find_tokenizers(None))"


@pytest.fixture
def endpoint(tiny_dir: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub with two tokenizers; its address and what is asked of it."""
    files = {
        "/openai/clip-vit-large-patch14/resolve/main/tokenizer.json": tiny_dir / "tokenizer" / "tokenizer.json",
        "/google-t5/t5-base/resolve/main/tokenizer.json": tiny_dir / "tokenizer_2" / "tokenizer.json",
    }
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            asked.append(f"{self.command} {self.path}")
            data = files[self.path].read_bytes() if self.path in files else b""
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def python(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**cleared, "HF_HOME": str(home), **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_what_is_fetched_is_found_without_a_network(tmp_path: Path, endpoint: tuple[str, list[str]]) -> None:
    address, asked = endpoint
    before = python("-c", OPEN, home=tmp_path, HF_HUB_OFFLINE="1")
    assert "does not hold the tokenizer of CLIP and T5. Run `vortex fetch tokenizers`" in before.stderr
    fetched = python("-m", "vortex_core", "fetch", "tokenizers", home=tmp_path, HF_ENDPOINT=address)
    assert fetched.returncode == 0, fetched.stderr
    paths = [Path(line) for line in fetched.stdout.split()]
    assert len(paths) == 2
    assert all(path.is_file() and path.is_relative_to(tmp_path) for path in paths)
    assert {line.partition(" ")[2] for line in asked if "/resolve/" in line} == {
        "/openai/clip-vit-large-patch14/resolve/main/tokenizer.json",
        "/google-t5/t5-base/resolve/main/tokenizer.json",
    }
    count = len(asked)
    after = python("-c", OPEN, home=tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT=address)
    assert after.returncode == 0, after.stderr
    assert len(asked) == count


def test_no_network_is_one_sentence(tmp_path: Path) -> None:
    failed = python("-m", "vortex_core", "fetch", "tokenizers", home=tmp_path, HF_HUB_OFFLINE="1")
    assert failed.returncode == 1
    assert "error: The tokenizers could not be downloaded" in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr
