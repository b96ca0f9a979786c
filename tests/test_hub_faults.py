"""Push through faults: nothing lost, no half-made commit, every failure a sentence. The real client on loopback."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from hub_server import Hub
from hub_worker import Client, fixture_client, fixture_hub, fixture_run, push, tree  # noqa: F401

from ddpm_ext.errors import HubError
from ddpm_ext.hub.messages import Operation, hub_errors
from ddpm_ext.hub.retry import RetryPolicy, retried

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def is_whole(hub: Hub, run: Path) -> bool:
    """Whether the Hub holds the run's weights in exactly one commit."""
    local = (run / "pipeline" / WEIGHTS).read_bytes()
    return len(hub.history("alice/digits")) == 2 and hub.head("alice/digits").files[WEIGHTS] == local


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/whoami-v2"),
        ("POST", "/api/repos/create"),
        ("GET", "/api/models/alice/digits"),
        ("POST", "/api/validate-yaml"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", r"\?sign=1"),
        ("POST", "/lfs-verify"),
        ("POST", "/commit/"),
        ("GET", "/refs"),
        ("POST", "/tag/"),
    ],
)
def test_one_503_on_each_endpoint_is_survived(hub: Hub, client: Client, run: Path, method: str, path: str) -> None:
    fault = hub.fail(method, path, status=503)
    done = client(push, str(run), "alice/digits", tags=["v1.0"])
    assert fault.met == 1
    assert done.get("error") is None
    assert is_whole(hub, run)


def test_retry_after_is_honoured_and_bounded(hub: Hub, client: Client, run: Path) -> None:
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "7"})
    hub.fail("POST", "/repos/create", status=429, headers={"ratelimit": '"api";r=0;t=9'})
    done = client(push, str(run), "alice/digits")
    assert [wait for wait in done["waits"] if wait >= 7] == [9.0, 7.0]
    assert is_whole(hub, run)

    (run / "eval.json").write_text("{}")
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "3600"})
    done = client(push, str(run), "alice/digits")
    assert "limits the number of requests" in done["error"] and "Run again in 3600 s" in done["error"]
    assert max(done["waits"], default=0) < 3600
    assert is_whole(hub, run)


@pytest.mark.parametrize("kind", ["drop", "reset"])
def test_a_cut_upload_is_sent_again(hub: Hub, client: Client, run: Path, kind: Any) -> None:
    fault = hub.fail("PUT", r"\?sign=1", kind, times=2)
    assert client(push, str(run), "alice/digits").get("error") is None
    assert fault.met == 2
    assert is_whole(hub, run)


def test_an_interrupted_push_run_again_sends_only_what_is_missing(hub: Hub, client: Client, run: Path) -> None:
    before = tree(run)
    png = hashlib.sha256((run / "training.png").read_bytes()).hexdigest()
    weights = hashlib.sha256((run / "pipeline" / WEIGHTS).read_bytes()).hexdigest()
    fault = hub.fail("PUT", weights, "drop", times=1000)
    done = client(push, str(run), "alice/digits")
    assert "could not be reached, or cut the connection" in done["error"] and "are as they were" in done["error"]
    assert len(hub.history("alice/digits")) == 1  # no half-made commit
    assert tree(run) == before
    assert set(hub.requests("PUT", png)) == {200}

    hub.faults.remove(fault)
    hub.log.clear()
    assert client(push, str(run), "alice/digits").get("error") is None
    assert hub.requests("PUT", "") == hub.requests("PUT", weights) == [200]
    assert is_whole(hub, run)


@pytest.mark.parametrize("options", [{}, {"create_pr": True}, {"revision": "next"}])
def test_a_lost_answer_to_a_commit_makes_no_second_one(
    hub: Hub, client: Client, run: Path, options: dict[str, Any]
) -> None:
    fault = hub.fail("POST", "/commit/", "lost")
    done = client(push, str(run), "alice/digits", **options)
    assert fault.met == 1 and done.get("error") is None
    refs = hub.repos["alice/digits"].refs
    ref = {"create_pr": "refs/pr/1", "revision": "refs/heads/next"}.get("".join(options), "refs/heads/main")
    assert refs[ref] == done["commit"]
    assert len(hub.repos["alice/digits"].commits) == 2
    assert "refs/pr/2" not in refs


def push_to_the_silent(folder: str) -> dict[str, Any]:
    """A push that waits half a second for each answer."""
    return push(folder, "alice/digits", retry=RetryPolicy(timeout=0.5, tries=3))


@pytest.mark.parametrize(("method", "path"), [("POST", "/commit/"), ("POST", "/repos/create"), ("PUT", r"\?sign=1")])
def test_a_server_that_never_answers_ends_the_push(hub: Hub, client: Client, run: Path, method: str, path: str) -> None:
    once = hub.fail(method, path, "silence")
    assert client(push_to_the_silent, str(run)).get("error") is None and once.met == 1
    assert is_whole(hub, run)
    (run / "eval.json").write_text("[6]")
    (run / "training.png").write_bytes(b"another picture, which is large enough for the storage" * 9)
    hub.fail(method, path, "silence", times=1000)
    done = client(push_to_the_silent, str(run))
    assert "could not be reached, or cut the connection" in done["error"] and "are as they were" in done["error"]
    assert is_whole(hub, run)


def meddle(folder: str) -> dict[str, Any]:
    """A push during which someone else commits, after ours was compared and before it is committed."""
    from huggingface_hub import HfApi

    real = HfApi.create_commit

    def late(self: HfApi, *args: Any, **options: Any) -> Any:
        HfApi.create_commit = real
        HfApi(token="tok-alice").upload_file(
            path_or_fileobj=b"theirs", path_in_repo="eval.json", repo_id="alice/digits", commit_message="theirs"
        )
        return real(self, *args, **options)

    HfApi.create_commit = late
    return push(folder, "alice/digits")


def test_a_push_of_someone_else_in_between_is_not_overwritten(hub: Hub, client: Client, run: Path) -> None:
    done = client(meddle, str(run))
    assert "changed by someone else" in done["error"] and "nothing of theirs was overwritten" in done["error"]
    assert hub.history("alice/digits") == ["theirs", "initial commit"]
    assert hub.head("alice/digits").files["eval.json"] == b"theirs"
    assert client(push, str(run), "alice/digits").get("error") is None  # said again, it is meant


def test_a_blob_that_the_hub_holds_wrongly_is_told(hub: Hub, client: Client, run: Path) -> None:
    real = hub.commit

    def corrupting(*args: Any, **options: Any) -> str:
        args[3].update({WEIGHTS: b"bits"} if WEIGHTS in args[3] else {})
        return real(*args, **options)

    hub.commit = corrupting  # type: ignore[method-assign]
    try:
        done = client(push, str(run), "alice/digits")
    finally:
        del hub.commit
    assert f"other bytes than were sent, in {WEIGHTS}" in done["error"]


COMMAND = "ddpm-ext push --model"


@pytest.mark.parametrize(
    ("token", "repo_id", "sentence", "mend"),
    [
        (None, "alice/digits", "needs a token, and there is none", "hf auth login"),
        ("tok-typo", "alice/digits", "does not accept this token", "hf auth login"),
        ("tok-alice-read", "alice/digits", "may read only", "settings/tokens"),
        ("tok-alice", "bob/digits", "may not write to bob/digits", "alice/digits"),
        ("tok-alice", "alice/forbidden", "this name is reserved", "96 letters"),
        ("tok-alice", "alice/a--b", "does not take 'alice/a--b'", "96 letters"),
        ("tok-alice", "a/b/c", "does not take 'a/b/c'", "96 letters"),
    ],
)
def test_each_refusal_is_a_sentence_with_the_command_that_mends_it(
    hub: Hub, client: Client, run: Path, token: str | None, repo_id: str, sentence: str, mend: str
) -> None:
    before = tree(run)
    hub.create("bob/digits")
    done = client(push, str(run), repo_id, token=token)
    assert sentence in done["error"] and mend in done["error"]
    assert f"{COMMAND} {run} --hub_model_id {repo_id}" in done["error"]
    assert "are as they were" in done["error"]
    assert tree(run) == before
    assert len(hub.head("bob/digits").files) == 1
    assert not [wait for wait in done["waits"] if wait]  # trying again would not help


@pytest.mark.parametrize(
    ("path", "status", "message", "sentence"),
    [
        ("/commit/", 413, "Payload too large", "a quota or a limit on size is reached"),
        ("/objects/batch", 403, "Private storage limit reached", "a quota or a limit on size is reached"),
        ("/repos/create", 402, "Payment required", "a quota or a limit on size is reached"),
        ("/preupload/", 503, "", "The Hub is in trouble"),
        ("/commit/", 500, "", "The Hub is in trouble"),
    ],
)
def test_quota_and_a_hub_that_is_down_are_told(
    hub: Hub, client: Client, run: Path, path: str, status: int, message: str, sentence: str
) -> None:
    hub.fail("POST", path, status=status, headers={"X-Error-Message": message}, times=1000)
    done = client(push, str(run), "alice/digits")
    assert sentence in done["error"] and COMMAND in done["error"] and "are as they were" in done["error"]
    assert "alice/digits" not in hub.repos or len(hub.history("alice/digits")) == 1
    assert sum(done["waits"]) < 400


def push_to_nobody(folder: str) -> dict[str, Any]:
    """A push to a port where no server listens."""
    from huggingface_hub import constants, hf_api

    former, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:9"
    real = hf_api.constants.ENDPOINT
    try:
        assert real == "http://127.0.0.1:9"
        return push(folder, "alice/digits")
    finally:
        constants.ENDPOINT = former


def test_no_server_at_all_is_told(client: Client, run: Path) -> None:
    done = client(push_to_nobody, str(run))
    assert "http://127.0.0.1:9 could not be reached" in done["error"] and COMMAND in done["error"]
    assert done["waits"] == [1, 2, 4, 8, 16]


def test_a_card_that_the_hub_does_not_accept_stops_before_any_upload(hub: Hub, client: Client, run: Path) -> None:
    (run / "README.md").write_text("---\nlicense: apache\n---\n")
    done = client(push, str(run), "alice/digits")
    assert "does not accept the card" in done["error"] and '"license" must be one of' in done["error"]
    assert not hub.requests("PUT", "") and not hub.requests("POST", "/repos/create") and hub.repos == {}


def test_waits_double_up_to_the_longest_and_end_with_the_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("ddpm_ext.hub.retry.time.sleep", slept.append)

    def fails() -> None:
        raise TimeoutError("slow")

    with pytest.raises(TimeoutError):
        retried(fails, RetryPolicy(tries=6, first_wait=1, longest_wait=5))
    assert slept == [1, 2, 4, 5, 5]
    slept.clear()
    with pytest.raises(TimeoutError):
        retried(fails, RetryPolicy(tries=6, first_wait=1, total=2))
    assert slept == [1]  # a second more would end too late


def test_an_error_of_ours_is_neither_retried_nor_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise KeyError("a bug")

    operation = Operation("alice/digits", "push", "again")
    with pytest.raises(KeyError), hub_errors(operation):
        retried(fails, RetryPolicy(first_wait=0))
    assert calls == [1]
    with pytest.raises(HubError, match="already said"), hub_errors(operation):
        raise HubError("already said")


def test_a_push_offline_is_told(tmp_path: Path, tiny_unet: Any) -> None:
    """In this process the Hub is offline, as conftest.py has it."""
    from ddpm_ext.hub.upload import push_to_hub

    DDPMPipeline(tiny_unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(HubError, match=r"^HF_HUB_OFFLINE forbids to ask the Hub\. The local files are as they were"):
        push_to_hub(tmp_path, "alice/digits", token="tok-alice")
