"""A real ComfyUI for tests: finds the trees, starts one on a loopback port with this pack in it, and talks to it."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
API = ROOT / "workflows" / "api"
PACK = "ComfyUI-Vortex"  # a hyphen, as in the wild: no Python name
START_SECONDS, RUN_SECONDS = 300, 300


def trees() -> list[Path]:
    """ComfyUI trees: those $COMFYUI_PATH lists, else ~/comfy/ComfyUI and whatever ~/comfy/ComfyUI-* is beside it."""
    listed = os.environ.get("COMFYUI_PATH")
    if listed:
        found = [Path(part).expanduser() for part in listed.split(os.pathsep) if part]
    else:
        found = sorted(Path("~/comfy").expanduser().glob("ComfyUI*"))
    return [tree for tree in found if (tree / "comfy").is_dir()]


def python(tree: Path) -> str:
    """The interpreter that has the tree's packages: its own environment, where it has one."""
    own = [tree / name / "bin" / "python" for name in (".venv", "venv")]
    return str(next((path for path in own if path.exists()), sys.executable))


def figures(tree: Path, folder: Path, script: str) -> Any:
    """What a script of this folder has written to `folder`/figures.json, run by the tree's Python."""
    ran = subprocess.run(
        [python(tree), str(Path(__file__).with_name(script)), str(folder), str(tree)],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tree, timeout=900, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads((folder / "figures.json").read_text())


class NodeError(Exception):
    """A prompt that the host refused, or that failed in a node."""


class Host:
    """One running ComfyUI. `base` holds its models, outputs and custom nodes; nothing is written to the tree."""

    def __init__(self, tree: Path, base: Path, *options: str) -> None:
        self.tree, self.base = tree, base
        (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = base / "host.log"
        command = [python(tree), "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(base)]
        command += ["--disable-api-nodes", *options]
        if "--database-url" in (tree / "comfy" / "cli_args.py").read_text():
            command += ["--database-url", "sqlite:///:memory:"]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(command, cwd=tree, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{tree.name} did not start:\n{self.log()[-4000:]}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)

    def bytes_read(self) -> int:
        """What the process has read from files so far, cached by the system or not."""
        counters = Path(f"/proc/{self.process.pid}/io").read_text()
        return int(counters.split("rchar:")[1].split()[0])

    def stop(self) -> None:
        """End the process this started."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def log(self) -> str:
        """What the host printed so far."""
        return self.log_path.read_text(errors="replace")

    def loads(self) -> int:
        """How often a model was loaded."""
        return self.log().count("Loading ")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if "json" in answer.headers["Content-Type"] else body

    def post(self, path: str, data: Any = None) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(data or {}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise NodeError(error.read().decode()) from error
        return json.loads(body) if body else None

    def queue(self, workflow: dict[str, Any]) -> str:
        """Queue an API workflow; its id. Raises `NodeError` where the host refuses it."""
        return self.post("/prompt", {"prompt": workflow, "client_id": "vortex-tests"})["prompt_id"]

    def wait(self, prompt: str) -> dict[str, Any]:
        """The history entry of a prompt, once it is done, whether it worked or not."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt}").get(prompt)
            if entry and entry.get("status"):
                return entry
            time.sleep(0.05)
        raise TimeoutError(f"{prompt} is not done after {RUN_SECONDS} s:\n{self.log()[-4000:]}")

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Queue and wait; the history entry. Raises `NodeError` in the node's own words."""
        entry = self.wait(self.queue(workflow))
        for event, message in entry["status"]["messages"]:
            if event == "execution_error":
                raise NodeError(f"{message['node_type']}: {message['exception_message']}")
        return entry

    def pictures(self, entry: dict[str, Any]) -> list[np.ndarray]:
        """What Save Image and Preview Image wrote, `[H, W, 3]` in 0..1, in the order of node ids."""
        found = []
        for _, output in sorted(entry["outputs"].items(), key=lambda item: int(item[0])):
            for image in output.get("images", []):
                body = self.get("/view?" + urllib.parse.urlencode(image))
                found.append(np.asarray(Image.open(io.BytesIO(body)).convert("RGB"), dtype=np.float32) / 255)
        return found

    def cached(self, entry: dict[str, Any]) -> set[str]:
        """Ids of the nodes that did not run, because their outputs were kept."""
        return {
            node for event, message in entry["status"]["messages"] if event == "execution_cached"
            for node in message["nodes"]
        }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
