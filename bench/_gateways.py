"""The gateways that can be measured: how each is started on core 0 and what it has cost so far."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _processes import NotInstalled, cpu, free_port, launch, memory, stop, tree
from _understudy import ROUTE, Started, Variant, begin, finish, version

KEY = "sk-bench-5f0c7a1e9b3d48f2a6c4e8d1"
"""What clients send as their API key. LiteLLM starts with none but a long one; Understudy takes any by default."""
GATEWAYS = ("direct", "understudy", "litellm", "vllm-router", "nginx")


@dataclass(slots=True)
class Target:
    """A running gateway. `workers` are the processes that carry requests, where they can be told from the others."""

    name: str
    version: str
    port: int
    model: str
    process: subprocess.Popen[Any] | None = None
    workers: list[int] = field(default_factory=list)
    routes: int = 1
    settle: Callable[[], None] = lambda: None
    """Waits until it has done all that requests gave it to do."""

    def costs(self) -> dict[int, float]:
        return {pid: cpu(pid) for pid in tree(self.process.pid)} if self.process is not None else {}

    def role(self, pid: int) -> str:
        return "worker" if pid in self.workers else "others"

    @property
    def memory_mb(self) -> float:
        """Resident, of all its processes."""
        return sum(map(memory, tree(self.process.pid))) / 1024 if self.process is not None else 0.0

    @property
    def worker_mb(self) -> float:
        return max(map(memory, self.workers), default=0) / 1024


def start(name: str, upstream: int, folder: Path, options: argparse.Namespace) -> Target:
    """Start one gateway before the upstream. Raises `NotInstalled`."""
    starters: dict[str, Callable[[int, Path, argparse.Namespace], Target]] = {
        "direct": lambda upstream, *_: Target("direct", "", upstream, "base"),
        "understudy": lambda upstream, folder, _: target_of(begin(Variant(), upstream, folder)),
        "litellm": start_litellm,
        "vllm-router": start_vllm_router,
        "nginx": start_nginx,
    }
    return starters[name](upstream, folder, options)


def target_of(started: Started) -> Target:
    """Wait until it is ready. Raises `NotInstalled`."""
    finish(started)
    variant = started.variant
    return Target(
        variant.name,
        version(),
        started.port,
        ROUTE,
        started.process,
        started.workers,
        variant.routes,
        started.settler(),
    )


def start_together(variants: list[Variant], upstream: int, folder: Path, stack: contextlib.ExitStack) -> list[Target]:
    """Understudy in several variants, side by side; `stack` stops them."""
    begun = []
    for variant in variants:
        started = begin(variant, upstream, folder)
        stack.callback(stop, started.process)
        begun.append(started)
    return [target_of(started) for started in begun]


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


def start_vllm_router(upstream: int, folder: Path, options: argparse.Namespace) -> Target:
    program = shutil.which(options.vllm_router)
    if program is None:
        raise NotInstalled(f"no `{options.vllm_router}` on the PATH")
    port = free_port()
    command = [program, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{upstream}"]
    command += ["--policy", options.vllm_router_policy] if options.vllm_router_policy else []
    process = launch(command, folder, "vllm-router", f"http://127.0.0.1:{port}/health", 60)
    version = " ".join(filter(None, (router_version(program), options.vllm_router_policy)))
    return Target("vllm-router", version, port, "base", process)


def router_version(program: str) -> str:
    """It does not say its version; its Python environment does."""
    python = Path(program).resolve().with_name("python")
    asked = "import importlib.metadata as m; print(m.version('vllm-router'))"
    try:
        return subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return "of unknown version"


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
