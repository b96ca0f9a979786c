"""A Hub on 127.0.0.1 for the real clients: repositories in memory, plain LFS, tokens, and faults on demand.

Two servers share one state, as at the Hub: the API, and the storage behind signed URLs, which refuses an Authorization
header so that a leaked token shows. Standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repositories import Commit, Repo, Repositories, is_large, told_of

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "other"}
Kind = Literal["status", "drop", "reset", "lost", "half", "flip", "silence"]


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    status: answered with it, and with `headers`. drop: half the request is read, then the connection is closed (FIN).
    reset: the same with RST. lost: done, but not answered. half: the answer's body ends in its middle. flip: one bit of
    the answer's body is wrong. silence: nothing is answered for seconds.
    """

    method: str
    path: str  # regular expression, searched in the path
    kind: Kind = "status"
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    met: int = 0


class Hub(Repositories):
    """The state and the two servers."""

    def __init__(self) -> None:
        super().__init__()
        self.lfs: dict[str, bytes] = {}  # SHA-256 -> content
        self.users = {
            "tok-alice": {"name": "alice", "role": "write"},
            "tok-alice-read": {"name": "alice", "role": "read"},
            "tok-bob": {"name": "bob", "role": "write"},
        }
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []  # method, path, status (0: no answer)
        self.leaks: list[str] = []  # tokens that reached the storage
        self.xet_store: str | None = None  # folder of hf_xet's local store
        self.xet_hashes: dict[str, str] = {}  # SHA-256 -> Xet's name of the content
        self.servers = [_Server(self, is_storage) for is_storage in (False, True)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def reset(self) -> None:
        """Forget all repositories, faults and requests."""
        with self.lock:
            self.repos.clear(), self.lfs.clear(), self.faults.clear(), self.log.clear(), self.leaks.clear()

    def fail(self, method: str, path: str, kind: Kind = "status", **options: Any) -> Fault:
        self.faults.append(Fault(method, path, kind, **options))
        return self.faults[-1]

    def requests(self, method: str, path: str) -> list[int]:
        """Answers given to the requests that match."""
        return [status for m, p, status in self.log if m == method and re.search(path, p)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, is_storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.is_storage = hub, is_storage

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Cut connections are part of the tests."""


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, body or {"error": message}
        self.headers = {"X-Error-Code": code} if code else {}
        self.headers |= {"X-Error-Message": message} if message else {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    fault: Fault | None

    def log_message(self, format: str, *args: Any) -> None:
        """Kept in Hub.log instead."""

    def do(self) -> None:  # noqa: RET503
        self.url = urlsplit(self.path)
        self.where, self.query = self.url.path, parse_qs(self.url.query)
        self.hub = self.server.hub
        self.fault = self._fault()
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault is not None and self.fault.kind in ("drop", "reset"):
            self.rfile.read(length // 2)
            return self._cut()
        self.body = self._body(length)
        if self.fault is not None and self.fault.kind == "silence":
            time.sleep(3)
            return self._cut()
        if self.fault is not None and self.fault.kind == "status":
            return self._send(self.fault.status, b'{"error": "on purpose"}', self.fault.headers)
        try:
            route = self._storage if self.server.is_storage else self._api
            status, content, headers = route()
        except Refused as refused:
            status, content, headers = refused.status, refused.body, refused.headers
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = None if isinstance(content, bytes) else "application/json"
        self._send(status, data, headers | ({"Content-Type": kind} if kind else {}))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def _body(self, length: int) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if (
                    fault.method == self.command
                    and re.search(fault.path, unquote(self.path))
                    and fault.times > fault.met
                ):
                    fault.met += 1
                    return fault
        return None

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:  # noqa: RET503
        kind = self.fault.kind if self.fault is not None else None
        if kind == "lost":
            return self._cut()
        self.hub.log.append((self.command, unquote(self.path), status))
        if kind == "flip" and self.command == "GET":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if kind == "half" else data)
        if kind == "half":
            self._cut()

    def _cut(self) -> None:
        self.hub.log.append((self.command, unquote(self.path), 0))
        self.wfile.flush()
        if self.fault is not None and self.fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR) if self.fault and self.fault.kind != "reset" else None
        self.connection.close()

    # storage: signed URLs, no token

    def _storage(self) -> tuple[int, Any, dict[str, str]]:
        if "Authorization" in self.headers:
            self.hub.leaks.append(self.headers["Authorization"])
            raise Refused(400, message="Only one auth mechanism allowed")
        oid = self.where.split("/")[-1]
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refused(400, message="content does not match its oid")
            self.hub.lfs[oid] = self.body
            return 200, b"", {"ETag": f'"{oid}"'}
        return self._ranged(self.hub.lfs[oid])

    def _ranged(self, data: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes, dict[str, str]]:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, data, headers or {}
        start, end = int(asked[1]), int(asked[2] or len(data) - 1)
        span = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        return 206, data[start : end + 1], (headers or {}) | span

    # the API

    def _api(self) -> tuple[int, Any, dict[str, str]]:
        routes = (
            (r"/api/whoami-v2", self._whoami),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            (r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/xet-(?:write|read)-token/([^/]+)", self._xet_token),
            (r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            (r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/(?:branch|tag)/([^/]+)", self._mark),
            (r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/refs", self._refs),
            (r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/(?:datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/(?:datasets/|spaces/)?([^/]+/[^/]+)/lfs-verify", self._verify),
            (r"/(?:datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        )
        for pattern, route in routes:
            if found := re.fullmatch(pattern, self.where):
                with self.hub.lock:
                    return route(*(unquote(part) for part in found.groups() if part is not None))
        raise Refused(404, message=f"no such route: {self.command} {self.where}")

    def _user(self) -> dict[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        user, repo = self._user(), self.hub.repos.get(repo_id)
        owner = user is not None and user["name"] == repo_id.split("/")[0]
        if repo is None or (repo.private and not owner):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and (user is None or not owner or user["role"] != "write"):
            raise Refused(403, message="Forbidden: you must have write access to it")
        return repo

    def _at(self, repo: Repo, revision: str) -> Commit:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            oid = repo.refs.get(name, name)
            if oid in repo.commits:
                return repo.commits[oid]
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _whoami(self) -> tuple[int, Any, dict[str, str]]:
        user = self._user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        access = {"displayName": "test", "role": user["role"]}
        return 200, {"name": user["name"], "type": "user", "orgs": [], "auth": {"accessToken": access}}, {}

    def _create(self) -> tuple[int, Any, dict[str, str]]:
        asked, user = json.loads(self.body), self._user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        repo_id = f"{asked.get('organization') or user['name']}/{asked['name']}"
        kind = f"{asked['type']}s/" if asked.get("type", "model") != "model" else ""
        url = f"{self.hub.url}/{kind}{repo_id}"
        if "forbidden" in asked["name"]:
            raise Refused(400, message="this name is reserved")
        if user["role"] != "write" or repo_id.split("/")[0] != user["name"]:
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        if repo_id in self.hub.repos:
            raise Refused(409, message="You already created this model repo", url=url)
        self.hub.create(repo_id, asked.get("visibility") == "private")
        return 200, {"url": url}, {}

    def _validate(self) -> tuple[int, Any, dict[str, str]]:
        front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        license = re.search(r"^license: (.+)$", front[1], re.MULTILINE) if front else None
        errors = [] if front else [{"message": "the card has no front matter"}]
        if license and license[1] not in LICENSES:
            errors.append({"message": f'"license" must be one of {sorted(LICENSES)}'})
        if errors and self.headers.get("Accept") == "text/plain":  # as ModelCard.validate asks
            return 400, "\n".join(error["message"] for error in errors).encode(), {}
        return 400 if errors else 200, {"errors": errors, "warnings": []}, {}

    def _preupload(self, repo_id: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        files = self._at(self._repo(repo_id, "create_pr" not in self.query), revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            large = is_large(asked["path"], asked["size"])
            told = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if asked["path"] in files:
                told["oid"] = told_of(asked["path"], files[asked["path"]])["checksum"]
            answers.append(told)
        return 200, {"files": answers}, {}

    def _batch(self, repo_id: str) -> tuple[int, Any, dict[str, str]]:
        self._repo(repo_id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            told = dict(asked)
            if asked["oid"] not in self.hub.lfs:
                links = {"upload": f"{self.hub.storage_url}/{asked['oid']}?sign=1"}
                links |= {"verify": f"{self.hub.url}/{repo_id}/lfs-verify"}
                told["actions"] = {name: {"href": link} for name, link in links.items()}
            objects.append(told)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _verify(self, repo_id: str) -> tuple[int, Any, dict[str, str]]:
        asked = json.loads(self.body)
        if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, message="the object is not there")
        return 200, {}, {}

    def _commit(self, repo_id: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        pull_request = "create_pr" in self.query
        repo = self._repo(repo_id, write=not pull_request)
        add: dict[str, bytes] = {}
        delete, header = set(), {}
        for line in self.body.splitlines():
            key, value = (part := json.loads(line))["key"], part["value"]
            if key == "header":
                header = value
            elif key == "file":
                add[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs and self.hub.xet_store is None:
                    raise Refused(400, message=f"LFS object {value['oid']} was never uploaded")
                pointer = b"xet %s %d" % (value["oid"].encode(), value["size"])
                add[value["path"]] = self.hub.lfs.get(value["oid"], pointer)
            else:
                delete.add(value["path"])
        parent = header.get("parentCommit")
        if not pull_request and parent is not None and parent != self._at(repo, revision).oid:
            raise Refused(412, message=f"{revision} has moved: it is not at {parent}")
        number = sum(name.startswith("refs/pr/") for name in repo.refs) + 1
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        ref = f"refs/pr/{number}" if pull_request else ref
        kind = self.where.split("/")[2].replace("models", "") + "/"
        oid = self.hub.commit(repo_id, ref, header["summary"], add, delete)
        answer = {"commitUrl": f"{self.hub.url}/{kind.lstrip('/')}{repo_id}/commit/{oid}", "commitOid": oid}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        return 200, answer, {}

    def _xet_token(self, repo_id: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        if self.hub.xet_store is None:
            raise Refused(404, message="no Xet here")
        url, token, end = f"local://{self.hub.xet_store}", "xet", 4102444800
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(end)}
        return 200, {"casUrl": url, "accessToken": token, "exp": end}, headers

    def _info(self, repo_id: str, revision: str = "main") -> tuple[int, Any, dict[str, str]]:
        repo = self._repo(repo_id)
        commit, siblings = self._at(repo, revision), []
        for name, content in sorted(commit.files.items()):
            entry = told_of(name, content)
            more = {"size": entry["size"], "blobId": entry["oid"], **({"lfs": entry["lfs"]} if "lfs" in entry else {})}
            siblings.append({"rfilename": name, **(more if "blobs" in self.query else {})})
        return 200, {"id": repo_id, "sha": commit.oid, "siblings": siblings, "private": repo.private, "tags": []}, {}

    def _tree(self, repo_id: str, revision: str, folder: str = "") -> tuple[int, Any, dict[str, str]]:
        prefix, entries = f"{folder}/" if folder else "", {}
        whole = self.query.get("recursive", ["false"])[0].lower() == "true"
        for name, content in sorted(self._at(self._repo(repo_id), revision).files.items()):
            child, *deeper = name.removeprefix(prefix).split("/")
            if name.startswith(prefix) and (whole or not deeper):
                entries[name] = {"type": "file", "path": name, **told_of(name, content)}
            elif name.startswith(prefix):
                entries[prefix + child] = {"type": "directory", "path": prefix + child, "oid": "0" * 40, "size": 0}
        if prefix and not entries:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        return 200, list(entries.values()), {}

    def _mark(self, repo_id: str, name: str) -> tuple[int, Any, dict[str, str]]:
        repo, asked = self._repo(repo_id, write=True), json.loads(self.body or b"{}")
        if "/tag/" in self.where:
            ref, oid = f"refs/tags/{asked['tag']}", self._at(repo, name).oid
        else:
            ref, oid = f"refs/heads/{name}", self._at(repo, asked.get("startingPoint", "main")).oid
        if ref in repo.refs:
            raise Refused(409, message=f"{ref} exists")
        repo.refs[ref] = oid
        return 200, {}, {}

    def _refs(self, repo_id: str) -> tuple[int, Any, dict[str, str]]:
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        refs = self._repo(repo_id).refs.items()
        found = {
            kind: [{"name": r.removeprefix(p), "ref": r, "targetCommit": oid} for r, oid in refs if r.startswith(p)]
            for kind, p in kinds.items()
        }
        return 200, {**found, "converts": []}, {}

    def _resolve(self, repo_id: str, revision: str, name: str) -> tuple[int, Any, dict[str, str]]:
        commit = self._at(self._repo(repo_id), revision)
        headers = {"X-Repo-Commit": commit.oid}
        if name not in commit.files:
            refused = Refused(404, "EntryNotFound", "Entry not found")
            refused.headers |= headers
            raise refused
        content, entry = commit.files[name], told_of(name, commit.files[name])
        if "lfs" not in entry:
            headers |= {"ETag": f'"{entry["oid"]}"'}
            return self._ranged(content, headers) if self.command == "GET" else (200, content, headers)
        if entry["checksum"] in self.hub.xet_hashes:
            link = f'<{self.hub.url}/api/models/{repo_id}/xet-read-token/{revision}>; rel="xet-auth"'
            headers |= {"X-Xet-Hash": self.hub.xet_hashes[entry["checksum"]], "Link": link}
        self.hub.lfs.setdefault(entry["checksum"], content)
        headers |= {"X-Linked-Etag": f'"{entry["checksum"]}"', "X-Linked-Size": str(entry["size"])}
        return 302, b"", headers | {"Location": f"{self.hub.storage_url}/{entry['checksum']}?sign=1"}
