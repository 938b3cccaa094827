"""The gateways that can be measured: how each is started on core 0, what it has cost so far, how it is stopped."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-bench-5f0c7a1e9b3d48f2a6c4e8d1"
"""What clients send as their API key. LiteLLM starts with none but a long one; Understudy takes any by default."""
GATEWAYS = ("direct", "understudy", "litellm", "vllm-router", "nginx")


def pin(core: int) -> Callable[[], None]:
    """For a child: run on `core` only (where there is more than one)."""
    cores = sorted(os.sched_getaffinity(0))
    mine = {cores[min(core, len(cores) - 1)]}
    return lambda: os.sched_setaffinity(0, mine)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tree(pid: int) -> list[int]:
    """`pid` and all processes below it."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used, its own threads only. 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """Resident KB."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    return 0


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process we started and all below it, by their ids."""
    below = tree(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    for pid in [pid for pid in below if pid != process.pid] + [process.pid] * (process.poll() is None):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


class NotInstalled(Exception):
    """A gateway that cannot be measured here, and why."""


@dataclass(slots=True)
class Target:
    """A running gateway. `worker` is the process that carries requests, where it can be told from the others."""

    name: str
    version: str
    port: int
    model: str
    process: subprocess.Popen[Any] | None = None
    worker: int | None = None

    def costs(self) -> dict[int, float]:
        return {pid: cpu(pid) for pid in tree(self.process.pid)} if self.process is not None else {}

    def role(self, pid: int) -> str:
        if self.process is None:
            return "none"
        if pid == self.worker:
            return "worker"
        return "supervisor" if pid == self.process.pid else "others"


def launch(
    command: list[str], folder: Path, name: str, ready: str, seconds: float, env: dict[str, str] | None = None
) -> subprocess.Popen[Any]:
    """Start a gateway on core 0 and wait until `ready` answers. Raises `NotInstalled` with the end of its log."""
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        try:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                preexec_fn=pin(0),
                env=os.environ | (env or {}),
            )
        except OSError as error:
            raise NotInstalled(f"{command[0]}: {error.strerror}") from None
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(ready, timeout=5):
                return process
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    stop(process)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise NotInstalled(f"did not start: {lines[-1][:200] if lines else 'it said nothing'}")


def start(name: str, upstream: int, folder: Path, options: argparse.Namespace) -> Target:
    """Start one gateway before the upstream. Raises `NotInstalled`."""
    starters: dict[str, Callable[[int, Path, argparse.Namespace], Target]] = {
        "direct": lambda upstream, *_: Target("direct", "", upstream, "base"),
        "understudy": start_understudy,
        "litellm": start_litellm,
        "vllm-router": start_vllm_router,
        "nginx": start_nginx,
    }
    return starters[name](upstream, folder, options)


def start_understudy(upstream: int, folder: Path, options: argparse.Namespace) -> Target:
    port = free_port()
    otel = f"otel: {{endpoint: 'http://127.0.0.1:{upstream}'}}\n" if options.otel else ""
    config = folder / "understudy.yaml"
    config.write_text(
        f"listen: {{port: {port}, workers: 1}}\n"
        f"state: sqlite:///{folder / 'understudy.db'}\n{otel}"
        "routes:\n"
        "  assistant:\n"
        f"    upstreams: [http://127.0.0.1:{upstream}]\n"
        "    arms: {champion: {model: good}, challenger: {model: better}}\n"
        "    policy: {kind: thompson}\n"
    )
    command = [sys.executable, "-m", "understudy", "serve", "--config", str(config)]
    environment = {"PYTHONPATH": str(ROOT)}
    process = launch(command, folder, "understudy", f"http://127.0.0.1:{port}/readyz", 60, environment)
    worker = _worker_of(process.pid, port)
    return Target(
        "understudy", installed("understudy") + (" + otel" * options.otel), port, "assistant", process, worker
    )


def _worker_of(supervisor: int, port: int) -> int | None:
    """Which child carries requests: the one whose CPU time grows when requests are made."""
    before = {pid: cpu(pid) for pid in tree(supervisor)}
    for _ in range(150):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            page.read()
    grown = {pid: cpu(pid) - before.get(pid, 0.0) for pid in tree(supervisor) if pid != supervisor}
    return max(grown, key=lambda pid: grown[pid]) if grown else None


def start_litellm(upstream: int, folder: Path, options: argparse.Namespace) -> Target:
    python = options.litellm_python
    asked = "import importlib.metadata as m, litellm.proxy.proxy_cli; print(m.version('litellm'))"
    try:
        found = subprocess.run(
            [python, "-c", asked], capture_output=True, text=True, timeout=120, check=False, cwd=folder
        )
    except OSError as error:
        raise NotInstalled(f"{python}: {error.strerror}") from None
    if found.returncode != 0:
        raise NotInstalled((found.stderr.strip().splitlines() or ["?"])[-1])
    port = free_port()
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n  - model_name: assistant\n    litellm_params:\n      model: hosted_vllm/base\n"
        f"      api_base: http://127.0.0.1:{upstream}/v1\n      api_key: none\n"
        "litellm_settings: {telemetry: false}\n"
        f"general_settings: {{master_key: {KEY}}}\n"
    )
    code = "from litellm.proxy.proxy_cli import run_server; run_server()"
    command = [python, "-c", code, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    environment = {"LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    process = launch(command, folder, "litellm", f"http://127.0.0.1:{port}/health/liveliness", 90, environment)
    return Target("litellm", found.stdout.strip().splitlines()[-1], port, "assistant", process)


def start_vllm_router(upstream: int, folder: Path, _: argparse.Namespace) -> Target:
    program = shutil.which("vllm-router")
    if program is None:
        raise NotInstalled("no `vllm-router` on the PATH")
    port = free_port()
    command = [program, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{upstream}"]
    process = launch(command, folder, "vllm-router", f"http://127.0.0.1:{port}/health", 60)
    return Target("vllm-router", installed("vllm-router"), port, "base", process)


def start_nginx(upstream: int, folder: Path, _: argparse.Namespace) -> Target:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise NotInstalled("no `nginx` on the PATH")
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr error;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;\n"
        f"  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n"
        f"  keepalive_requests 1000000;\n"
        f"  upstream u {{ server 127.0.0.1:{upstream}; keepalive 64; }}\n"
        f"  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://u; proxy_http_version 1.1;\n"
        "    proxy_set_header Connection ''; proxy_buffering off; } } }\n"
    )
    process = launch([program, "-c", str(config), "-p", str(folder)], folder, "nginx", f"http://127.0.0.1:{port}/", 15)
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stderr
    return Target("nginx", said.strip().rpartition("/")[2], port, "base", process)


def installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of a source tree"
