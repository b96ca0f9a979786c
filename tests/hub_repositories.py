"""What the Hub of hub_server.py holds: repositories in memory, with commits, branches and tags."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any

LARGE = (".safetensors", ".png", ".bin", ".parquet")  # what .gitattributes sends to LFS
ATTRIBUTES = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % suffix.encode() for suffix in LARGE)


@dataclass
class Commit:
    oid: str
    parent: str | None
    summary: str
    files: dict[str, bytes]  # name -> content; for Xet a line with its SHA-256 and size


@dataclass
class Repo:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1 -> commit
    commits: dict[str, Commit] = field(default_factory=dict)


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str, size: int) -> bool:
    return name.endswith(LARGE) or size > 10_000_000


def told_of(name: str, content: bytes) -> dict[str, Any]:
    """What the Hub tells of a file."""
    told: dict[str, Any] = {"oid": git_sha1(content), "size": len(content)}
    told["checksum"] = told["oid"]
    if xet := re.fullmatch(rb"xet ([0-9a-f]{64}) (\d+)", content):
        told |= {"checksum": xet[1].decode(), "size": int(xet[2])}
    elif is_large(name, len(content)):
        told["checksum"] = hashlib.sha256(content).hexdigest()
    if told["checksum"] != told["oid"]:
        told["lfs"] = {
            "oid": told["checksum"],
            "sha256": told["checksum"],
            "size": told["size"],
            "pointerSize": 1,
        }
    return told


class Repositories:
    """All repositories; kinds (models, data sets, Spaces) share one space of names here."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}

    def create(self, repo_id: str, private: bool = False) -> Repo:
        with self.lock:
            repo = self.repos[repo_id] = Repo(private)
            self.commit(repo_id, "refs/heads/main", "initial commit", {".gitattributes": ATTRIBUTES})
            return repo

    def commit(self, repo_id: str, ref: str, summary: str, add: dict[str, bytes], delete: Any = ()) -> str:
        with self.lock:
            repo = self.repos[repo_id]
            parent = repo.refs.get(ref) or repo.refs.get("refs/heads/main")
            files = {n: c for n, c in (repo.commits[parent].files if parent else {}).items() if n not in delete}
            files |= add
            text = json.dumps([parent, summary, len(repo.commits), sorted((n, git_sha1(c)) for n, c in files.items())])
            oid = hashlib.sha1(text.encode()).hexdigest()
            repo.commits[oid], repo.refs[ref] = Commit(oid, parent, summary, files), oid
            return oid

    def head(self, repo_id: str, ref: str = "refs/heads/main") -> Commit:
        repo = self.repos[repo_id]
        return repo.commits[repo.refs[ref]]

    def history(self, repo_id: str, ref: str = "refs/heads/main") -> list[str]:
        """Summaries, the newest first."""
        commits, oid, found = self.repos[repo_id].commits, self.repos[repo_id].refs[ref], []
        while commit := commits.get(oid or ""):
            found.append(commit.summary)
            oid = commit.parent
        return found
