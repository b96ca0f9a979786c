"""From training to a stranger's machine and back, over plain LFS by the scripts, and over Xet's local store."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from hub_worker import environment, make_run, weights

from ddpm_ext.hub.checksums import sha256

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow  # processes of their own, each of which imports Diffusers
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(name="own_hub")
def fixture_own_hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()
    assert hub.leaks == []


def python(env: dict[str, str], *words: str) -> str:
    done = subprocess.run([sys.executable, *words], env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


STRANGER = """
import json, sys
sys.modules["ddpm_ext"] = None  # not installed there
import torch
from diffusers import DDPMPipeline
pipe = DDPMPipeline.from_pretrained("alice/digits")
pipe.set_progress_bar_config(disable=True)
images = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images
pipe.unet.save_pretrained(sys.argv[1])
print(json.dumps([list(images.shape), float(images.std())]))
"""


def test_train_evaluate_card_push_pull_sample_and_push_again(own_hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "digits"
    home = environment(own_hub, str(tmp_path / "home"), HF_TOKEN="tok-alice", OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    train = f"--preset digits --output_dir {run} --max_train_steps 30 --lr_warmup_steps 5 --eval_batch_size 4"
    train += " --ddpm_num_inference_steps 5 --checkpointing_steps 30"
    publish = ("--push_to_hub", "--hub_model_id", "trained")
    python(home, "scripts/train.py", *train.split(), *publish, "--hub_every", "10")
    history = own_hub.history("alice/trained")
    assert history[0] == "The finished run" and "initial commit" == history[-1] and len(history) > 2
    assert "training.png" in own_hub.head("alice/trained").files
    judge = f"--model {run}/pipeline --metrics bpd,fid --extractor pixels --num_samples 20 --num_inference_steps 5"
    bits = "--max_bpd_images 8 --num_timesteps_sampled 8"
    python(home, "scripts/evaluate.py", *judge.split(), *bits.split(), *publish)
    assert b"type: bits_per_dim" in own_hub.head("alice/trained").files["README.md"]
    push = ("scripts/push_to_hub.py", "--model", str(run), "--hub_model_id", "alice/digits", "--license", "apache-2.0")
    assert f"{own_hub.url}/alice/digits/commit/" in python(home, *push, "--variant", "fp16", "--tags", "v1.0")
    head = own_hub.head("alice/digits")
    assert len(own_hub.history("alice/digits")) == 2
    assert not [name for name in head.files if "checkpoint" in name or name.endswith((".bin", ".pt", ".jsonl"))]
    card = head.files["README.md"].decode()
    figures = json.loads(head.files["eval.json"])["figures"]
    assert {"bpd", "fid"} == {figure["metric"] for figure in figures}
    for figure in figures:
        assert f"value: {float(format(figure['value'], '.7g'))}" in card
    assert f"samples/{sorted(path.name for path in (run / 'samples').glob('*.png'))[-1]}" in card

    stranger = environment(own_hub, str(tmp_path / "fresh"), OMP_NUM_THREADS="1")
    shape, spread = json.loads(python(stranger, "-c", STRANGER, str(tmp_path / "pulled" / "unet")).splitlines()[-1])
    assert shape == [2, 8, 8, 1] and spread > 0.01
    assert weights(str(tmp_path / "pulled")) == weights(str(run / "pipeline"))  # bit by bit

    assert "nothing has changed" in python(home, *push, "--variant", "fp16", "--tags", "v1.0")
    assert own_hub.head("alice/digits").oid == head.oid


def test_a_training_whose_upload_failed_says_so_and_the_same_command_uploads_it(own_hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "digits"
    home = environment(own_hub, str(tmp_path / "home"), HF_TOKEN="tok-alice", OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    train = f"scripts/train.py --preset digits --output_dir {run} --max_train_steps 2 --lr_warmup_steps 0"
    train += " --eval_batch_size 2 --ddpm_num_inference_steps 2 --push_to_hub --hub_model_id trained"
    fault = own_hub.fail("POST", "/commit/", status=413, times=1000)
    failed = subprocess.run([sys.executable, *train.split()], env=home, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1 and "a quota or a limit on size is reached" in failed.stderr
    assert f"ddpm-ext push --model {run} --hub_model_id alice/trained\n" in failed.stderr
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert own_hub.history("alice/trained") == ["initial commit"]
    own_hub.faults.remove(fault)
    assert "nothing to do" in python(home, *train.split())
    assert own_hub.history("alice/trained") == ["The finished run", "initial commit"]


def words_of(data: bytes) -> str:
    """Xet writes a hash as four 64-bit numbers, each in hexadecimal."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def names_in_shards(store: Path) -> dict[str, str]:
    """SHA-256 -> Xet hash, from the shards of a local store (huggingface.co/docs/xet/shard).

    A header of 48 bytes, then per file: its hash, flags and number of entries; entries of 48 bytes, as many more where
    flag 31 says so, and one with the SHA-256 where flag 30 does; a hash of ones ends the list.
    """
    found = {}
    for shard in store.rglob("shards/*.mdb"):
        data, at = shard.read_bytes(), 48
        while data[at : at + 32] != b"\xff" * 32:
            flags, entries = struct.unpack_from("<II", data, at + 32)
            name, at = words_of(data[at : at + 32]), at + 48 * (1 + entries * (2 if flags >> 31 else 1))
            if flags >> 30 & 1:
                found[words_of(data[at : at + 32])] = name
                at += 48
    return found


PUSH_BY_XET = """
import json, sys
import hub_worker
print(json.dumps(hub_worker.push(sys.argv[1], "alice/digits", variant="fp16")))
"""
PULL_BY_XET = """
import sys
from ddpm_ext import DDPMExtPipeline
DDPMExtPipeline.from_pretrained("alice/digits").save_pretrained(sys.argv[1])
"""


def test_push_and_pull_over_xet(own_hub: Hub, tmp_path: Path) -> None:
    if version("hf-xet") != "1.8.0":
        pytest.skip("the local store of hf-xet is no public interface: known to work in 1.8.0")
    run, store = tmp_path / "digits", tmp_path / "store"
    make_run(str(run))
    store.mkdir()
    own_hub.xet_store = str(store)
    home = environment(own_hub, str(tmp_path / "home"), HF_HUB_DISABLE_XET="0", OMP_NUM_THREADS="1")
    own_hub.fail("GET", "xet-write-token", status=503)
    own_hub.fail("POST", "/commit/", "lost")
    done: dict[str, Any] = json.loads(python(home, "-c", PUSH_BY_XET, str(run)).splitlines()[-1])
    assert done.get("error") is None
    assert len(own_hub.history("alice/digits")) == 2  # one commit, though its answer was lost
    assert own_hub.requests("GET", "xet-write-token") == [503, 200]
    assert not own_hub.requests("POST", "objects/batch") and not own_hub.lfs
    assert own_hub.head("alice/digits").files[WEIGHTS].split()[1].decode() == sha256(run / "pipeline" / WEIGHTS)
    again = json.loads(python(home, "-c", PUSH_BY_XET, str(run)).splitlines()[-1])
    assert (again["changed"], again["commit"]) == (False, own_hub.head("alice/digits").oid)

    own_hub.xet_hashes = names_in_shards(store)
    fresh = environment(own_hub, str(tmp_path / "fresh"), HF_HUB_DISABLE_XET="0", OMP_NUM_THREADS="1")
    python(fresh, "-c", PULL_BY_XET, str(tmp_path / "pulled"))
    assert 200 in own_hub.requests("GET", "xet-read-token")
    assert weights(str(tmp_path / "pulled")) == weights(str(run / "pipeline"))
