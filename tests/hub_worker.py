"""A process whose Hugging Face libraries talk to the Hub of hub_server.py, and the fixtures that lend it to tests.

The libraries read HF_ENDPOINT and the like once, when they are imported, so the clients live in a process of their own:
one for all tests, since importing Diffusers takes seconds. A test hands it functions of its module.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hub_server import Hub

Client = Callable[..., Any]


def environment(hub: Hub, home: str, **more: str) -> dict[str, str]:
    """Of a process whose Hub is this one, with an empty cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": home,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)]),
        **more,
    }


def make_impatient() -> None:
    """Let the client's own waits and ours pass a hundred times faster; they are counted in `waits`."""
    import time

    from huggingface_hub.utils import _http

    from ddpm_ext.hub import retry

    def nap(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(seconds / 100)

    quick: Any = SimpleNamespace(sleep=nap, monotonic=time.monotonic)
    _http.time = quick
    retry.time = quick
    os.environ.pop("HF_TOKEN", None)


waits: list[float] = []


@lru_cache
def start() -> tuple[Hub, ProcessPoolExecutor, str]:
    hub, home = Hub(), tempfile.TemporaryDirectory(prefix="ddpm_ext_hub_")
    with mock.patch.dict(os.environ, environment(hub, home.name), clear=True):
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=make_impatient)
        pool.submit(os.getpid).result(timeout=400)
    atexit.register(home.cleanup)
    atexit.register(hub.close)
    atexit.register(pool.shutdown)
    return hub, pool, home.name


@pytest.fixture(name="hub")
def fixture_hub() -> Iterator[Hub]:
    """An empty Hub of three tokens: alice's, alice's for reading, bob's."""
    hub = start()[0]
    hub.reset()
    yield hub
    leaks, hub.leaks[:] = list(hub.leaks), []
    assert leaks == [], "a token was sent to the storage"


@pytest.fixture(name="client")
def fixture_client(hub: Hub) -> Client:
    """`client(function, *arguments)` calls it in the process whose Hub is the fixture's."""

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return start()[1].submit(function, *arguments, **options).result(timeout=400)

    return call


@pytest.fixture(name="run")
def fixture_run(client: Client, tmp_path: Path) -> Path:
    """A finished run with all that a run folder holds."""
    run = tmp_path / "digits"
    client(make_run, str(run))
    return run


def make_run(folder: str, seed: int = 0, widths: tuple[int, ...] = (8, 16)) -> None:
    from networks import tiny_unet
    from PIL import Image

    from ddpm_ext import DDPMExtPipeline, DDPMExtScheduler

    unet = tiny_unet(seed, block_out_channels=widths)
    run = Path(folder)
    DDPMExtPipeline(unet, DDPMExtScheduler(variance_type="fixed_large")).save_pretrained(str(run / "pipeline"))
    for name in ("samples/step-00000500.png", "samples/step-00001000.png", "training.png"):
        (run / name).parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16), seed).save(run / name)
    (run / "config.json").write_text(json.dumps({"config": {"unet": "digits"}, "seed": seed}))
    (run / "eval.json").write_text(json.dumps({"metrics": {}}))
    (run / "README.md").write_text("---\nlicense: apache-2.0\nlibrary_name: diffusers\n---\n![](training.png)\n")
    for name in ("checkpoints/step-00001000/optimizer.bin", "snapshots/a.safetensors", "pipeline/unet/old.bin"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"no business of the Hub")
    for name in ("log.jsonl", "status.json", ".lock"):
        (run / name).write_text("{}")


def push(folder: str, repo_id: str, token: str | None = "tok-alice", **options: Any) -> dict[str, Any]:
    """What `push_to_hub` returns, or its sentence under "error"; under "waits" the seconds that it waited."""
    from ddpm_ext.errors import HubError
    from ddpm_ext.hub.upload import push_to_hub

    waits.clear()
    try:
        return {**push_to_hub(folder, repo_id, token=token, **options)._asdict(), "waits": list(waits)}
    except HubError as error:
        return {"error": str(error), "waits": list(waits)}


def pull(repo_id: str, cache_dir: str, token: str | bool | None = None, **options: Any) -> dict[str, Any]:
    """The weights that `DDPMExtPipeline.from_pretrained` loads, or its sentence under "error"."""
    from ddpm_ext import DDPMExtPipeline
    from ddpm_ext.errors import HubError

    waits.clear()
    try:
        pipe = DDPMExtPipeline.from_pretrained(repo_id, cache_dir=cache_dir, token=token, **options)
    except HubError as error:
        return {"error": str(error), "waits": list(waits)}
    state = {name: weight.numpy().tobytes() for name, weight in pipe.unet.state_dict().items()}
    return {"unet": state, "scheduler": type(pipe.scheduler).__name__, "waits": list(waits)}


def weights(folder: str) -> dict[str, bytes]:
    """The tensors of a saved pipeline, bit by bit."""
    from safetensors.torch import load_file

    path = Path(folder) / "unet" / "diffusion_pytorch_model.safetensors"
    return {name: weight.numpy().tobytes() for name, weight in load_file(path).items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, to see that none has changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":  # a Hub to try the scripts by hand
    print(f"HF_ENDPOINT={Hub().url} HF_HUB_DISABLE_XET=1 HF_TOKEN=tok-alice", flush=True)
    sys.stdin.read()
