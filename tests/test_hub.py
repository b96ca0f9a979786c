"""Push: what one commit holds, and what a second one changes. The real client against a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from hub_worker import Client, fixture_client, fixture_hub, fixture_run, make_run, push, tree  # noqa: F401

from ddpm_ext.errors import HubError
from ddpm_ext.hub.checksums import git_sha1
from ddpm_ext.hub.files import collect, minimal_card, shown_images

PUSHED = {
    ".gitattributes",
    "README.md",
    "config.json",
    "eval.json",
    "model_index.json",
    "samples/step-00001000.png",
    "scheduler/scheduler_config.json",
    "training.png",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


def test_a_push_is_one_commit_of_the_portable_pipeline_and_nothing_else(hub: Hub, client: Client, run: Path) -> None:
    before = tree(run)
    done = client(push, str(run), "alice/digits", commit_message="First")
    assert done.get("error") is None
    assert hub.history("alice/digits") == ["First", "initial commit"]
    head = hub.head("alice/digits")
    assert set(head.files) == PUSHED
    assert (done["repo_id"], done["commit"], done["changed"]) == ("alice/digits", head.oid, True)
    assert done["url"] == f"{hub.url}/alice/digits/commit/{head.oid}"
    assert b"filter=lfs" in head.files[".gitattributes"]
    index = json.loads(head.files["model_index.json"])
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert head.files["config.json"] == before["config.json"]  # the run's own, not the network's
    assert tree(run) == before
    assert not hub.repos["alice/digits"].private


def test_unchanged_files_make_no_commit_and_changed_ones_alone_are_sent(hub: Hub, client: Client, run: Path) -> None:
    first = client(push, str(run), "alice/digits")
    hub.log.clear()
    again = client(push, str(run), "alice/digits")
    assert (again["changed"], again["commit"]) == (False, first["commit"])
    assert len(hub.history("alice/digits")) == 2
    assert not hub.requests("PUT", "") and not hub.requests("POST", "/commit/")

    (run / "eval.json").write_text('{"metrics": {"fid": 3.17}}')
    hub.log.clear()
    client(push, str(run), "alice/digits", commit_message="Scores")
    assert hub.history("alice/digits")[0] == "Scores"
    assert hub.head("alice/digits").files["eval.json"] == (run / "eval.json").read_bytes()
    assert not hub.requests("PUT", "")


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(hub: Hub, client: Client, run: Path) -> None:
    client(push, str(run), "alice/digits", variant="fp16")
    hub.commit("alice/digits", "refs/heads/main", "notes", {"NOTES.md": b"mine", "unet/pytorch_model.bin": b"old"})
    client(make_run, str(run), seed=1)
    client(push, str(run), "alice/digits")
    assert set(hub.head("alice/digits").files) == PUSHED | {"NOTES.md"}


def test_the_fp16_variant_is_of_half_precision(hub: Hub, client: Client, run: Path) -> None:
    client(push, str(run), "alice/digits", variant="fp16")
    files = hub.head("alice/digits").files
    assert set(files) == PUSHED | {"unet/diffusion_pytorch_model.fp16.safetensors"}
    full, half = (files[f"unet/diffusion_pytorch_model{v}.safetensors"] for v in ("", ".fp16"))
    header = json.loads(half[8 : 8 + int.from_bytes(half[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F16"}
    assert len(half) < 0.6 * len(full)
    assert client(push, str(run), "alice/digits", variant="fp16")["changed"] is False


def test_a_variant_that_only_has_the_name_is_refused(client: Client, run: Path) -> None:
    unet = run / "pipeline" / "unet"
    full = (unet / "diffusion_pytorch_model.safetensors").read_bytes()
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes(full)
    assert "not of that precision" in client(push, str(run), "alice/digits", variant="fp16")["error"]


def push_pipeline(folder: str, how: str) -> dict[str, Any]:
    from ddpm_ext import DDPMExtPipeline

    pipe = DDPMExtPipeline.from_pretrained(f"{folder}/pipeline")
    if how == "method":
        return pipe.push_to_hub("digits", token="tok-alice", private=True, tags=["v1.0"])._asdict()
    pipe.save_pretrained(Path(folder) / "digits", push_to_hub=True, token="tok-alice")
    return {}


@pytest.mark.parametrize("how", ["method", "save_pretrained"])
def test_a_pipeline_in_memory_gets_a_card_and_its_owners_name(hub: Hub, client: Client, run: Path, how: str) -> None:
    done = client(push_pipeline, str(run), how)
    assert set(hub.head("alice/digits").files) == {n for n in PUSHED if "/" in n and "samples" not in n} | {
        ".gitattributes",
        "README.md",
        "model_index.json",
    }
    assert b'from_pretrained("alice/digits")' in hub.head("alice/digits").files["README.md"]
    if how == "method":
        assert hub.repos["alice/digits"].private
        assert hub.repos["alice/digits"].refs["refs/tags/v1.0"] == done["commit"]


def test_a_card_on_the_hub_is_not_replaced_by_the_minimal_one(hub: Hub, client: Client, run: Path) -> None:
    hub.create("alice/digits", True)
    hub.commit("alice/digits", "refs/heads/main", "by hand", {"README.md": b"---\nlicense: mit\n---\nby hand"})
    client(push_pipeline, str(run), "method")
    assert hub.head("alice/digits").files["README.md"].endswith(b"by hand")


RENDERED = b"---\nlicense: mit\n---\n<!-- Rendered by ddpm_ext from config.json and eval.json; old -->"


def test_a_card_that_was_edited_by_hand_on_the_hub_outlives_rendered_ones(hub: Hub, client: Client, run: Path) -> None:
    (run / "README.md").write_bytes(RENDERED)
    client(push, str(run), "alice/digits")
    (run / "README.md").write_bytes(RENDERED + b"new")
    client(push, str(run), "alice/digits")
    assert hub.head("alice/digits").files["README.md"].endswith(b"new")  # rendered over rendered
    hub.commit("alice/digits", "refs/heads/main", "by hand", {"README.md": b"---\nlicense: mit\n---\nmine"})
    (run / "README.md").write_bytes(RENDERED + b"newer")
    (run / "eval.json").write_text("[2]")
    assert client(push, str(run), "alice/digits")["changed"] is True
    head = hub.head("alice/digits").files
    assert head["README.md"].endswith(b"mine") and head["eval.json"] == b"[2]"


def test_half_weights_stay_while_the_full_ones_do(hub: Hub, client: Client, run: Path) -> None:
    client(push, str(run), "alice/digits", variant="fp16")
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert client(push, str(run), "alice/digits")["changed"] is False
    (run / "eval.json").write_text("[3]")
    client(push, str(run), "alice/digits")
    assert half in hub.head("alice/digits").files
    client(make_run, str(run), seed=1)
    client(push, str(run), "alice/digits")
    assert half not in hub.head("alice/digits").files


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("unet/diffusion_pytorch_model.safetensors", None, "holds a network's config.json and no weights"),
        ("unet/diffusion_pytorch_model.safetensors", 1000, "is broken"),
        ("model_index.json", 20, "is broken"),
        ("scheduler/scheduler_config.json", 20, "is broken"),
    ],
)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_broken_pipeline_is_not_pushed(
    hub: Hub, client: Client, run: Path, name: str, content: int | None, sentence: str, variant: str | None
) -> None:
    (run / "pipeline" / "unet" / "old.bin").unlink()
    path = run / "pipeline" / name
    path.write_bytes(path.read_bytes()[:content]) if content else path.unlink()
    assert sentence in client(push, str(run), "alice/digits", variant=variant)["error"]
    assert hub.repos == {}


def test_the_minimal_card_knows_steps_and_classes(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"num_train_timesteps": 100}')
    (tmp_path / "u.json").write_text('{"num_class_embeds": 10}')
    files = {"scheduler/scheduler_config.json": tmp_path / "s.json"}
    card = minimal_card("alice/digits", files)
    assert "from diffusers import DDPMPipeline" in card and "(num_inference_steps=100).images[0]" in card
    card = minimal_card("alice/digits", {**files, "unet/config.json": tmp_path / "u.json"})
    assert "from ddpm_ext import DDPMExtPipeline" in card and "num_inference_steps=100, class_labels=0" in card


def test_a_private_push_to_a_public_repository_is_refused(hub: Hub, client: Client, run: Path) -> None:
    client(push, str(run), "alice/digits")
    (run / "eval.json").write_text("[4]")
    done = client(push, str(run), "alice/digits", private=True)
    assert "exists and is public" in done["error"] and len(hub.history("alice/digits")) == 2


def test_a_tag_that_the_hub_refuses_is_told_as_that(hub: Hub, client: Client, run: Path) -> None:
    hub.fail("POST", "/tag/", status=400, headers={"X-Error-Message": "Invalid tag name"}, times=1000)
    done = client(push, str(run), "alice/digits", tags=["a b"])
    head = hub.head("alice/digits").oid
    assert f"The files are at alice/digits, commit {head[:10]}" in done["error"] and "Invalid tag name" in done["error"]
    assert "96 letters" not in done["error"]


def test_the_same_pull_request_is_not_opened_twice(hub: Hub, client: Client, run: Path) -> None:
    client(push, str(run), "alice/digits")
    (run / "eval.json").write_text("[5]")
    first, again = (client(push, str(run), "alice/digits", create_pr=True) for _ in range(2))
    assert again == {**first, "changed": False, "url": again["url"], "waits": again["waits"]}
    assert "refs/pr/2" not in hub.repos["alice/digits"].refs


def test_branches_tags_and_pull_requests(hub: Hub, client: Client, run: Path) -> None:
    client(push, str(run), "alice/digits")
    (run / "eval.json").write_text("{}")
    done = client(push, str(run), "alice/digits", revision="step-500", tags=["v0.1"])
    refs = hub.repos["alice/digits"].refs
    assert refs["refs/heads/step-500"] == refs["refs/tags/v0.1"] == done["commit"] != refs["refs/heads/main"]
    again = client(push, str(run), "alice/digits", revision="step-500", tags=["v0.1"])
    assert again["changed"] is False
    (run / "eval.json").write_text("[]")
    moved = client(push, str(run), "alice/digits", tags=["v0.1"])
    assert "already stands on commit" in moved["error"] and refs["refs/tags/v0.1"] == done["commit"]

    (run / "eval.json").write_text("[1]")
    before = refs["refs/heads/main"]
    request = client(push, str(run), "alice/digits", create_pr=True)
    assert request["pull_request"] == f"{hub.url}/alice/digits/discussions/1"
    assert refs["refs/heads/main"] == before
    assert hub.head("alice/digits", "refs/pr/1").files["eval.json"] == b"[1]"
    assert "leave one of them out" in client(push, str(run), "alice/digits", create_pr=True, revision="b")["error"]


def test_parent_commit_guards_what_someone_else_pushed(hub: Hub, client: Client, run: Path) -> None:
    first = client(push, str(run), "alice/digits")
    theirs = hub.commit("alice/digits", "refs/heads/main", "theirs", {"eval.json": b"theirs"})
    done = client(push, str(run), "alice/digits", parent_commit=first["commit"])
    assert "changed by someone else" in done["error"]
    assert hub.head("alice/digits").oid == theirs


def test_no_token_in_any_file(hub: Hub, client: Client, run: Path) -> None:
    (run / "config.json").write_text(json.dumps({"hub_token": "tok-alice"}))
    done = client(push, str(run), "alice/digits")
    assert "looks like a token" in done["error"] and "config.json" in done["error"]
    (run / "config.json").write_text(json.dumps({"command": "--hub_token hf_" + "a1" * 17}))
    assert "looks like a token" in client(push, str(run), "alice/digits")["error"]
    assert hub.repos == {}


def test_what_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"no saved pipeline and no finished run"):
        collect(tmp_path, tmp_path / "staging")
    with pytest.raises(HubError, match=r"none is not there\. Give a run folder"):
        collect(tmp_path / "none", tmp_path / "staging")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": [null, null]}')
    with pytest.raises(HubError, match=r"model_index.json is a file\. Give a run folder"):
        collect(tmp_path / "model_index.json", tmp_path / "staging")
    with pytest.raises(HubError, match="names no pipeline with parts"):
        collect(tmp_path, tmp_path / "staging")


def test_a_card_cannot_take_images_from_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "run" / "README.md").write_text("![](../secret.png)")
    assert shown_images(tmp_path / "run") == {}


def test_checksums_are_gits_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"what is up, doc?")
    # Pro Git, "Git Internals - Git Objects", prints this one.
    assert git_sha1(tmp_path / "a") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    assert hashlib.sha1(b"blob 16\0what is up, doc?").hexdigest() == git_sha1(tmp_path / "a")


def background(folder: str, times: int) -> dict[str, Any]:
    import threading
    import time

    from ddpm_ext.hub import upload as hub

    gate, real, pushed, blocked = threading.Event(), hub.push_to_hub, [], []

    def slow(folder: str, repo_id: str, **options: Any) -> Any:
        gate.wait(10)
        pushed.append(options["commit_message"])
        return real(folder, repo_id, **options)

    hub.push_to_hub = slow
    try:
        push = hub.BackgroundPush("alice/digits", token="tok-alice")
        for i in range(times):
            start = time.perf_counter()
            (Path(folder) / "eval.json").unlink()  # as a run writes: a new file over the old name
            (Path(folder) / "eval.json").write_text(json.dumps(i))
            push.push(folder, commit_message=f"update {i}")
            blocked.append(time.perf_counter() - start)
        (Path(folder) / "eval.json").unlink()
        gate.set()
        done = push.wait()
    finally:
        hub.push_to_hub = real
    return {"pushed": pushed, "blocked": max(blocked), "commit": done.commit if done else None}


def test_a_push_in_the_background_blocks_nothing_and_the_newest_wins(hub: Hub, client: Client, run: Path) -> None:
    parent = set(run.parent.iterdir())
    done = client(background, str(run), 5)
    assert done["blocked"] < 1.0
    assert done["pushed"] in (["update 0", "update 4"], ["update 4"])  # the first may not have begun
    assert hub.head("alice/digits").oid == done["commit"]
    assert hub.head("alice/digits").files["eval.json"] == b"4"  # as it was when push was called
    assert set(run.parent.iterdir()) == parent


def failing_background(folder: str) -> str:
    from ddpm_ext.errors import HubError
    from ddpm_ext.hub.upload import BackgroundPush

    push = BackgroundPush("bob/digits", token="tok-alice")
    push.push(folder)
    try:
        push.wait()
    except HubError as error:
        return str(error)
    return "no error"


def test_a_failed_push_in_the_background_is_told_at_the_end(hub: Hub, client: Client, run: Path) -> None:
    told = client(failing_background, str(run))
    assert "may not write to bob/digits" in told
    assert told.endswith(f"ddpm-ext push --model {run} --hub_model_id bob/digits")  # not the snapshot


def train_and_publish(folder: str, pushes: int) -> dict[str, Any]:
    from ddpm_ext.publishing.publisher import Publisher

    (Path(folder) / "README.md").unlink()
    publisher = Publisher(folder, "digits", token="tok-alice", license="mit")
    for i in range(pushes):
        (Path(folder) / "config.json").unlink()
        (Path(folder) / "config.json").write_text(json.dumps({"config": {"ddpm_num_steps": 100 + i}}))
        publisher.push(i)
    done = publisher.finish()
    return {"commit": done.commit if done else None, "repo_id": publisher.repo_id}


def test_a_training_publishes_its_card_each_time_and_awaits_the_last(hub: Hub, client: Client, run: Path) -> None:
    done = client(train_and_publish, str(run), 3)
    assert done == {"commit": hub.head("alice/digits").oid, "repo_id": "alice/digits"}
    files = hub.head("alice/digits").files
    assert set(files) == PUSHED
    assert b"| Diffusion steps T | 102 |" in files["README.md"] and b"license: mit" in files["README.md"]
    assert b'from_pretrained("alice/digits")' in files["README.md"]
    assert (run / "README.md").read_bytes() == files["README.md"]
    summaries = hub.history("alice/digits")
    assert summaries[-1] == "initial commit" and len(summaries) >= 2
    assert set(summaries[:-1]) <= {"Update 0", "Update 1", "Update 2", "The finished run"}


def refused_publisher(folder: str, repo_id: str, token: str | None) -> str:
    from ddpm_ext.errors import HubError
    from ddpm_ext.publishing.publisher import Publisher

    try:
        Publisher(folder, repo_id, token=token)
    except HubError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("repo_id", "token", "sentence"),
    [
        ("digits", None, "needs a token, and there is none"),
        ("digits", "tok-alice-read", "may read only"),
        ("bob/digits", "tok-alice", "may not write to bob/digits"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_the_training(
    hub: Hub, client: Client, run: Path, repo_id: str, token: str | None, sentence: str
) -> None:
    hub.create("bob/digits")
    assert sentence in client(refused_publisher, str(run), repo_id, token)


def publish_run(folder: str, repo_id: str, **options: Any) -> str:
    from ddpm_ext.errors import HubError
    from ddpm_ext.publishing.publisher import publish

    try:
        publish(folder, repo_id, token="tok-alice", **options)
    except HubError as error:
        return str(error)
    return ""


def test_a_refused_publication_leaves_the_card_and_names_every_option(hub: Hub, client: Client, run: Path) -> None:
    (run / "README.md").unlink()
    hub.create("bob/digits")
    options: dict[str, Any] = {"private": True, "revision": "dev", "variant": "fp16", "tags": ["v1", "v2"]}
    told = client(publish_run, str(run), "bob/digits", license="mit", **options)
    assert not (run / "README.md").exists() and "are as they were" in told
    words = shlex.split(told.rsplit("ddpm-ext push ", 1)[1])
    assert words[:4] == ["--model", str(run), "--hub_model_id", "bob/digits"]
    pairs = {"--revision dev", "--variant fp16", "--license mit", "--tags v1", "--hub_private_repo"}
    assert all(pair in " ".join(words) for pair in pairs) and "v2" in words and "tok-alice" not in told


def test_the_licence_of_the_last_card_is_kept(hub: Hub, client: Client, run: Path) -> None:
    (run / "README.md").unlink()
    for options in ({"license": "mit"}, {}):
        assert client(publish_run, str(run), "alice/digits", **options) == ""
        assert b"license: mit" in hub.head("alice/digits").files["README.md"]


def publish_and_pull_card(folder: str, repo_id: str, **options: Any) -> str:
    from huggingface_hub import ModelCard

    told = publish_run(folder, repo_id, **options)
    return told or str(ModelCard.load(repo_id, token="tok-alice").data.get("license"))


def start_publisher(folder: str, repo_id: str, base: str, origin: dict[str, Any]) -> str:
    """What `Publisher` says at the start of a training, or the licence that its card will have."""
    from ddpm_ext.errors import HubError
    from ddpm_ext.publishing.publisher import Publisher
    from ddpm_ext.publishing.training_record import base_model

    try:
        began = base_model({"init_from": {"source": base, "base_model": base, **origin}})
        return str(Publisher(folder, repo_id, token="tok-alice", base=began).license)
    except HubError as error:
        return str(error)


def test_a_training_that_pushes_asks_for_the_licence_of_its_base_before_anything_is_made(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    hub.create("bob/base")
    hub.commit("bob/base", "refs/heads/main", "card", {"README.md": b"---\ntags: [ddpm]\n---\n"})
    told = client(start_publisher, str(tmp_path / "new"), "alice/tuned", "bob/base", {})
    assert "fine-tuned from bob/base, whose card names no licence" in told and "alice/tuned" not in hub.repos
    hub.commit("bob/base", "refs/heads/main", "card", {"README.md": b"---\nlicense: mit\n---\n"})
    told = client(start_publisher, str(tmp_path / "new"), "alice/tuned", "bob/base", {})
    assert "license='mit'" in told and "alice/tuned" in hub.repos


def test_the_licence_and_the_base_come_through_a_chain_of_fine_tunes(
    hub: Hub, client: Client, run: Path, tmp_path: Path
) -> None:
    """bob/base, of a licence of its own -> a run that was never pushed -> this run."""
    hub.create("bob/base")
    card = b"---\nlicense: other\nlicense_name: fair-ai\nlicense_link: LICENSE.md\n---\n"
    hub.commit("bob/base", "refs/heads/main", "card", {"README.md": card})
    (run / "README.md").unlink()
    before = [{"source": "bob/base", "base_model": "bob/base"}]
    start = {"source": str(tmp_path / "gone"), "base_model": None, "new": [], "before": before}
    (run / "config.json").write_text(json.dumps({"config": {}, "init_from": start}))
    assert client(publish_and_pull_card, str(run), "alice/tuned") == "other"
    pushed = hub.head("alice/tuned").files["README.md"].decode()
    assert "license_name: fair-ai\n" in pushed and "base_model: bob/base\n" in pushed
    assert f"license_link: {hub.url}/bob/base/blob/main/LICENSE.md\n" in pushed
    assert "Fine-tuned from `gone`, which was made from bob/base." in pushed
    assert client(publish_and_pull_card, str(run), "alice/tuned") == "other"  # again, from the run's own card
    assert hub.head("alice/tuned").files["README.md"].decode() == pushed


def test_a_licence_in_the_folder_of_a_base_is_asked_for(client: Client, run: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    card = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n"
    (tmp_path / "base" / "README.md").write_text(card)
    (run / "README.md").unlink()
    start = {"source": str(tmp_path / "base"), "base_model": None}
    (run / "config.json").write_text(json.dumps({"config": {}, "init_from": start}))
    told = client(publish_run, str(run), "alice/tuned")
    assert "The licence own of the base model is the file LICENSE of its folder" in told and "--license_link" in told


@pytest.mark.parametrize("where", ["Hub", "folder", "run"])
def test_a_fine_tuned_model_keeps_the_licence_of_its_base(
    hub: Hub, client: Client, run: Path, tmp_path: Path, where: str
) -> None:
    card = b"---\nlicense: cc-by-4.0\n---\n"
    base = {"Hub": "bob/base", "folder": str(tmp_path / "base"), "run": str(tmp_path / "base" / "pipeline")}[where]
    hub.create("bob/base")
    hub.commit("bob/base", "refs/heads/main", "card", {"README.md": card})
    (tmp_path / "base" / "pipeline").mkdir(parents=True)
    (tmp_path / "base" / "README.md").write_bytes(card)
    (run / "README.md").unlink()
    start = {"source": base, "base_model": base if where == "Hub" else None, "new": []}
    (run / "config.json").write_text(json.dumps({"config": {}, "init_from": start}))
    assert client(publish_and_pull_card, str(run), "alice/tuned") == "cc-by-4.0"
    assert client(publish_and_pull_card, str(run), "alice/tuned", license="mit") == "mit"  # told otherwise
    assert (b"base_model: bob/base" in hub.head("alice/tuned").files["README.md"]) == (where == "Hub")


def test_a_licence_that_a_base_does_not_name_is_asked_for(hub: Hub, client: Client, run: Path) -> None:
    hub.create("bob/base")
    hub.commit("bob/base", "refs/heads/main", "card", {"README.md": b"---\ntags: [ddpm]\n---\n"})
    (run / "README.md").unlink()
    (run / "config.json").write_text(
        json.dumps({"config": {}, "init_from": {"source": "bob/base", "base_model": "bob/base"}})
    )
    assert "fine-tuned from bob/base, whose card names no licence" in client(publish_run, str(run), "alice/tuned")
    assert "alice/tuned" not in hub.repos and not (run / "README.md").exists()
    assert client(publish_and_pull_card, str(run), "alice/tuned", license="mit") == "mit"
