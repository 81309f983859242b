"""A loopback Hub: the protocol that ``huggingface_hub`` speaks, on 127.0.0.1, with faults on demand.

The real client talks to it over HTTP; no function of the client is replaced. It knows model repositories with
branches, tags, commits, private and gated access, tokens that may write or only read, and the three ways in which
large files travel: LFS in one piece (``basic``), LFS in parts (``multipart``) and ``xet``, whose storage is a local
directory that ``hf_xet`` itself writes (``local://``). It lacks discussions, search, quotas, scanners and the
vocabulary of huggingface.co's metadata rules, and runs no Space and no job: what passes here has not been tested on
huggingface.co.

    hub = LoopbackHub().start()
    hub.fail("commit", "lost")      # the next commit lands, but its answer never arrives
    HfApi(endpoint=hub.url).create_commit(...)
    hub.log("user/name")            # what is really there
"""

import asyncio
import base64
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
import uvicorn
import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from uvicorn.protocols.http.h11_impl import H11Protocol

WRITER, READER, STRANGER = "hf_writerTOKENwriterTOKEN", "hf_readerTOKENreaderTOKEN", "hf_strangerTOKENstranger"
KINDS = {None: "", "model": "", "dataset": "datasets/", "space": "spaces/"}  # of repositories, in their addresses
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".onnx")
LFS_SIZE = 10 * 2**20  # bytes; larger text files travel as LFS too
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
FOR_EVER = 10**9


@dataclass(frozen=True)
class Blob:
    """One file of a commit: its bytes, or the sha256 and size of an object in the large file storage."""

    content: bytes | None
    sha256: str
    size: int

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def is_lfs(self) -> bool:
        return self.content is None

    @property
    def oid(self) -> str:
        """The id that git gives to the file, or to the pointer that stands for it."""
        data = self.pointer if self.content is None else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @classmethod
    def of(cls, content: bytes) -> "Blob":
        return cls(content, hashlib.sha256(content).hexdigest(), len(content))


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    user: str
    files: dict[str, Blob]


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    allowed: set[str] = field(default_factory=set)  # user names with access to a gated repository
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add_commit(self, branch: str, title: str, user: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        seed = json.dumps(
            [self.id, parent, title, user, len(self.commits), sorted((p, b.oid) for p, b in files.items())]
        )
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, user, dict(files))
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit

    def resolve(self, revision: str) -> Commit | None:
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        # As on the Hub, a branch hides a tag of the same name.
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(sha)


@dataclass(frozen=True)
class User:
    name: str
    role: str  # "write" or "read"
    orgs: tuple[str, ...] = ()


@dataclass
class Fault:
    """What goes wrong at one step.

    ``status``: answered with ``status`` and nothing done. ``cut``: the connection drops, nothing done. ``lost``: done,
    but the connection drops before the answer. ``lost-502``: done, but a gateway answers 502. ``late``: the connection
    drops at once and the work is done ``delay`` seconds later. ``stale``: somebody else commits first. ``mangle``:
    done with one byte of a regular file changed on the server's disk. ``corrupt``: one byte of the answer's body is
    changed, its size is not. ``half``: half of the body, then the connection drops. ``dead-store``: the xet storage
    cannot be reached.
    """

    step: str
    kind: str
    status: int = 503
    times: int = 1
    skip: int = 0
    delay: float = 0.3
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An error answer of the Hub."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any):
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Request-Id": "loopback"}
        if code:
            headers["X-Error-Code"] = code
        self.response = JSONResponse({"error": message, **extra}, status, headers)


Handler = Callable[..., Awaitable[Response]]
ROUTES: list[tuple[str, re.Pattern[str], str]] = []  # method, pattern of the raw path, name of the step


def route(method: str, pattern: str, step: str) -> Callable[[Handler], Handler]:
    """Register ``LoopbackHub._<step>`` for a method and path; ``REPO`` and ``REV`` stand for their patterns.

    A repository that is no model has its kind in its name here, ``spaces/user/name``.
    """
    pattern = pattern.replace("/api/models/REPO", r"/api/(?:models/|(?=datasets/|spaces/))REPO")
    pattern = pattern.replace("REPO", r"(?P<repo>(?:(?:datasets|spaces)/)?[^/]+/[^/]+)").replace(
        "REV", r"(?P<rev>[^/]+)"
    )

    def register(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(pattern), step))
        HANDLERS[step] = handler
        return handler

    return register


HANDLERS: dict[str, Handler] = {}


class LoopbackHub:
    """A Hub in a thread; see the module's docstring.

    Args:
        mode: How large files travel: ``basic``, ``multipart`` or ``xet``. May be changed at any time.
        part_size: Bytes of each part in ``multipart``.
    """

    def __init__(self, mode: str = "basic", part_size: int = 64 * 1024):
        self.mode, self.part_size = mode, part_size
        self.folder = Path(tempfile.mkdtemp(prefix="loopback-hub-"))
        self._transports: dict[Any, asyncio.Transport] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.reset()

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> "LoopbackHub":
        """Listen on a free port and return when requests are answered."""
        transports = self._transports

        class Protocol(H11Protocol):
            """Lets a fault drop the connection that a request came on."""

            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                transports[self.client] = transport

            def connection_lost(self, exc: Exception | None) -> None:
                transports.pop(self.client, None)
                super().connection_lost(exc)

        listener = socket.socket()
        # Otherwise the body of every answer waits 40 ms for the client to acknowledge its headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # Another origin, as the Hub's storage is: the client must not follow with its HEAD, nor send its token there.
        self.cdn_url = f"http://localhost:{port}"
        config = uvicorn.Config(
            self._serve, http=Protocol, ws="none", lifespan="off", log_level="critical", interface="asgi3"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def reset(self) -> None:
        """Forget every repository, object, fault and request."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "objects").mkdir(parents=True)
        (self.folder / "cas").mkdir()
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int | None]] = []  # step, path, status (None: the answer never left)
        self.jobs: list[dict[str, Any]] = []  # what was asked for; none is run
        self.bugs: list[str] = []  # tracebacks of this server itself; a test that leaves one fails
        self.seen_tokens: set[str] = set()
        self.users = {
            WRITER: User("user", "write", ("team",)),
            READER: User("user", "read", ("team",)),
            STRANGER: User("stranger", "write"),
        }

    # -- what a test looks at ------------------------------------------------------------------------------------

    def fail(self, step: str, kind: str, **details: Any) -> Fault:
        """Arrange for a fault; the first that fits a request is used up first."""
        assert step in HANDLERS, f"no step {step!r}; there are {', '.join(sorted(HANDLERS))}"
        fault = Fault(step, kind, **details)
        self.faults.append(fault)
        return fault

    def steps(self) -> list[str]:
        """The steps asked for so far, in order."""
        return [step for step, _, _ in self.requests]

    def create(self, repo_id: str, private: bool = False, gated: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        repo.add_commit("main", "initial commit", "user", {".gitattributes": Blob.of(GIT_ATTRIBUTES)})
        return repo

    def put(self, repo_id: str, files: dict[str, bytes], title: str = "by hand", branch: str = "main") -> str:
        """Commit small files as the server's administrator."""
        repo = self.repos.get(repo_id) or self.create(repo_id)
        head = repo.commits[repo.branches[branch]]
        added = {path: Blob.of(content) for path, content in files.items()}
        return repo.add_commit(branch, title, "user", {**head.files, **added}).id

    def log(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Commits from the newest to the first."""
        repo, found = self.repos[repo_id], []
        commit = repo.resolve(revision)
        while commit:
            found.append(commit)
            commit = repo.commits.get(commit.parent or "")
        return found

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a revision with its content as the server would send it, ``.gitattributes`` left out."""
        commit = self.repos[repo_id].resolve(revision)
        assert commit, f"no revision {revision!r} of {repo_id}"
        return {p: self.content(blob) for p, blob in commit.files.items() if p != ".gitattributes"}

    def content(self, blob: Blob) -> bytes:
        return blob.content if blob.content is not None else self._object(blob).read_bytes()

    # -- one request ---------------------------------------------------------------------------------------------

    async def _serve(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        raw = scope["raw_path"].decode("ascii")
        method = "GET" if request.method == "HEAD" else request.method
        found = ((pattern.fullmatch(raw), step) for route_method, pattern, step in ROUTES if route_method == method)
        match, step = next(((match, step) for match, step in found if match), (None, ""))
        if match is None:
            await Refusal(404, f"the loopback Hub does not know {method} {raw}").response(scope, receive, send)
            return
        fault = self._take(step)
        kind = fault.kind if fault else ""
        args = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        record = len(self.requests)
        self.requests.append((step, raw, None))
        await request.body()
        if kind == "late":
            self._transports[request.client].abort()
            task = asyncio.ensure_future(self._later(fault.delay, step, request, args))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        if kind == "cut":
            self._transports[request.client].abort()
            return
        if kind == "status":
            message = "injected fault"
            response: Response = JSONResponse(
                {"error": message}, fault.status, {**fault.headers, "X-Error-Message": message}
            )
        else:
            response = await self._answer(step, request, args, kind)
        if kind == "lost":
            self._transports[request.client].abort()
            return
        if kind == "lost-502":
            response = JSONResponse({"error": "bad gateway"}, 502)
        if kind == "corrupt" and response.body:
            body = bytes(response.body)
            response.body = body[:-1] + bytes([body[-1] ^ 0x40])
        self.requests[record] = (step, raw, response.status_code)
        if kind == "half":
            await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
            await send(
                {
                    "type": "http.response.body",
                    "body": bytes(response.body)[: len(response.body) // 2],
                    "more_body": True,
                }
            )
            self._transports[request.client].abort()
            return
        if request.method == "HEAD":
            response.body = b""  # the Content-Length of the GET stays
        await response(scope, receive, send)

    def _take(self, step: str) -> Fault | None:
        for fault in self.faults:
            if fault.step == step and fault.times > 0:
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    async def _later(self, delay: float, step: str, request: Request, args: dict[str, str]) -> None:
        await asyncio.sleep(delay)
        await self._answer(step, request, args, "")

    async def _answer(self, step: str, request: Request, args: dict[str, str], kind: str) -> Response:
        try:
            return await HANDLERS[step](self, request, kind, **args)
        except Refusal as refusal:
            return refusal.response
        except Exception:
            self.bugs.append(traceback.format_exc())
            raise

    # -- who may do what -----------------------------------------------------------------------------------------

    def _user(self, request: Request) -> User | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        self.seen_tokens.add(token)
        if token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def _readable(self, request: Request, repo_id: str, content: bool = False) -> Repo:
        user, repo = self._user(request), self.repos.get(repo_id)
        owner = repo_id.split("/")[-2]
        mine = user is not None and owner in (user.name, *user.orgs)
        if repo is None or (repo.private and not mine):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if content and repo.gated and not mine and (user is None or user.name not in repo.allowed):
            raise Refusal(403 if user else 401, f"Access to model {repo_id} is restricted", "GatedRepo")
        return repo

    def _may_write(self, request: Request, owner: str) -> User:
        user = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user.role != "write" or owner not in (user.name, *user.orgs):
            raise Refusal(403, f"You don't have the rights to write under the namespace {owner!r}")
        return user

    def _writable(self, request: Request, repo_id: str) -> tuple[Repo, User]:
        repo = self._readable(request, repo_id)
        return repo, self._may_write(request, repo_id.split("/")[-2])

    @staticmethod
    def _at(repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # -- repositories --------------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2", "whoami")
    async def _whoami(self, request: Request, kind: str) -> Response:
        user = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"name": org, "roleInOrg": "write"} for org in user.orgs]
        access = {"accessToken": {"role": user.role, "displayName": "loopback"}}
        return JSONResponse({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": access})

    @route("POST", "/api/jobs/(?P<namespace>[^/]+)", "run_job")
    async def _run_job(self, request: Request, kind: str, namespace: str) -> Response:
        """Note a job that is asked for; none is run."""
        owner = self._may_write(request, namespace)
        self.jobs.append(await request.json())
        told = {"id": f"job{len(self.jobs)}", "status": {"stage": "SCHEDULING"}}
        told["owner"] = {"id": owner.name, "name": owner.name, "type": "user"}
        return JSONResponse({**self.jobs[-1], **told, "secrets": list(self.jobs[-1].get("secrets", {}))})

    @route("POST", "/api/repos/create", "create_repo")
    async def _create_repo(self, request: Request, kind: str) -> Response:
        wanted = await request.json()
        user = self._user(request)
        owner = wanted.get("organization") or (user.name if user else "")
        self._may_write(request, owner)
        repo_id = f"{KINDS[wanted.get('type')]}{owner}/{wanted['name']}"
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            raise Refusal(409, "You already created this repo", url=url)
        if wanted.get("type") == "space" and not wanted.get("sdk"):
            raise Refusal(400, '"sdk" is required')
        self.create(repo_id, private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        return JSONResponse({"url": url, "id": f"{owner}/{wanted['name']}"})

    @route("DELETE", "/api/repos/delete", "delete_repo")
    async def _delete_repo(self, request: Request, kind: str) -> Response:
        wanted = await request.json()
        user = self._user(request)
        owner = wanted.get("organization") or (user.name if user else "")
        self._may_write(request, owner)
        if self.repos.pop(f"{KINDS[wanted.get('type')]}{owner}/{wanted['name']}", None) is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return Response(status_code=200)

    @route("GET", "/api/models/REPO(?:/revision/REV)?", "repo_info")
    async def _repo_info(self, request: Request, kind: str, repo: str, rev: str = "main") -> Response:
        found = self._readable(request, repo)
        commit, name = self._at(found, rev), "/".join(found.id.split("/")[-2:])
        metadata = front_matter(commit.files.get("README.md"))
        config = commit.files.get("config.json")
        code = config is not None and b'"auto_map"' in (config.content or b"")
        siblings = []
        for path, blob in sorted(commit.files.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if request.query_params.get("blobs"):
                sibling |= {"size": blob.size, "blobId": blob.oid}
                if blob.is_lfs:
                    sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
            siblings.append(sibling)
        return JSONResponse(
            {
                "_id": found.id, "id": name, "modelId": name, "sha": commit.id, "private": found.private,
                "gated": "manual" if found.gated else False, "disabled": False, "downloads": 0, "likes": 0,
                "tags": [*metadata.get("tags", []), *(["custom_code"] if code else [])],
                "library_name": metadata.get("library_name"), "pipeline_tag": metadata.get("pipeline_tag"),
                "cardData": metadata, "siblings": siblings,
            }
        )  # fmt: skip

    @route("GET", "/api/models/REPO/auth-check/write", "auth_check")
    async def _auth_check(self, request: Request, kind: str, repo: str) -> Response:
        self._writable(request, repo)
        return Response(status_code=200)

    @route("GET", "/api/models/REPO/refs", "refs")
    async def _refs(self, request: Request, kind: str, repo: str) -> Response:
        found = self._readable(request, repo)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in found.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": s} for n, s in found.tags.items()]
        return JSONResponse({"branches": branches, "tags": tags, "converts": []})

    @route("GET", "/api/models/REPO/commits/REV", "commits")
    async def _commits(self, request: Request, kind: str, repo: str, rev: str) -> Response:
        self._at(self._readable(request, repo), rev)
        date = "2026-01-01T00:00:00.000Z"
        return JSONResponse(
            [
                {"id": c.id, "title": c.title, "message": "", "date": date, "authors": [{"user": c.user}]}
                for c in self.log(repo, rev)
            ]
        )

    @route("POST", "/api/models/REPO/branch/REV", "create_branch")
    async def _create_branch(self, request: Request, kind: str, repo: str, rev: str) -> Response:
        found, _ = self._writable(request, repo)
        body = await request.body()
        start = (json.loads(body) if body else {}).get("startingPoint", "main")
        if rev in found.branches:
            raise Refusal(409, f"Reference {rev} already exists")
        found.branches[rev] = self._at(found, start).id
        return Response(status_code=200)

    @route("POST", "/api/models/REPO/tag/REV", "tag")
    async def _tag(self, request: Request, kind: str, repo: str, rev: str) -> Response:
        found, _ = self._writable(request, repo)
        name = (await request.json())["tag"]
        if name in found.tags:
            raise Refusal(409, f"Tag {name} already exists")
        found.tags[name] = self._at(found, rev).id
        return Response(status_code=200)

    @route("DELETE", "/api/models/REPO/tag/REV", "delete_tag")
    async def _delete_tag(self, request: Request, kind: str, repo: str, rev: str) -> Response:
        found, _ = self._writable(request, repo)
        if found.tags.pop(rev, None) is None:
            raise Refusal(404, f"No tag {rev}", "RevisionNotFound")
        return Response(status_code=200)

    # -- commits -------------------------------------------------------------------------------------------------

    @route("POST", "/api/validate-yaml", "validate_yaml")
    async def _validate_yaml(self, request: Request, kind: str) -> Response:
        errors, warnings = metadata_problems((await request.json())["content"])
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return JSONResponse(answer, 400 if errors else 200)

    @route("POST", "/api/models/REPO/preupload/REV", "preupload")
    async def _preupload(self, request: Request, kind: str, repo: str, rev: str) -> Response:
        found, _ = self._writable(request, repo)
        present = self._at(found, rev).files
        answers = []
        for file in (await request.json())["files"]:
            binary = b"\0" in base64.b64decode(file["sample"])
            large = file["path"].endswith(LFS_SUFFIXES) or binary or file["size"] > LFS_SIZE
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if blob := present.get(file["path"]):
                answer["oid"] = blob.sha256 if blob.is_lfs else blob.oid
            answers.append(answer)
        return JSONResponse({"files": answers})

    @route("POST", "/api/models/REPO/commit/REV", "commit")
    async def _commit(self, request: Request, kind: str, repo: str, rev: str) -> Response:
        found, user = self._writable(request, repo)
        if rev not in found.branches:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        if kind == "stale":
            head = found.commits[found.branches[rev]]
            found.add_commit(rev, "somebody else", "colleague", {**head.files, "NOTES.md": Blob.of(b"first!\n")})
        head = found.commits[found.branches[rev]]
        files, title = dict(head.files), ""
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, head.id):
                        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    content = base64.b64decode(value["content"])
                    if kind == "mangle":
                        content, kind = content[:-1] + bytes([content[-1] ^ 0x01]), ""
                    files[value["path"]] = Blob.of(content)
                case "lfsFile":
                    blob = Blob(None, value["oid"], value.get("size", 0))
                    if not self._stored(blob):
                        raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                    files[value["path"]] = blob
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                case "deletedFolder":
                    prefix = value["path"].rstrip("/") + "/"
                    files = {p: b for p, b in files.items() if not p.startswith(prefix)}
        commit = found.add_commit(rev, title, user.name, files)
        return JSONResponse(
            {"success": True, "commitOid": commit.id, "commitUrl": f"{self.url}/{repo}/commit/{commit.id}"}
        )

    @route("GET", "/api/models/REPO/tree/REV(?:/(?P<path>.+))?", "tree")
    async def _tree(self, request: Request, kind: str, repo: str, rev: str, path: str = "") -> Response:
        files = self._at(self._readable(request, repo), rev).files
        recursive = request.query_params.get("recursive", "").lower() == "true"
        prefix = path.strip("/") + "/" if path.strip("/") else ""
        entries, folders = [], set()
        for name, blob in sorted(files.items()):
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            folders |= {prefix + "/".join(parts[:n]) for n in range(1, len(parts) if recursive else min(2, len(parts)))}
            if recursive or len(parts) == 1:
                entries.append(self._entry(name, blob))
        return JSONResponse(
            [*({"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)), *entries]
        )

    @route("POST", "/api/models/REPO/paths-info/REV", "paths_info")
    async def _paths_info(self, request: Request, kind: str, repo: str, rev: str) -> Response:
        files = self._at(self._readable(request, repo), rev).files
        paths = parse_qs((await request.body()).decode()).get("paths", [])
        return JSONResponse([self._entry(path, files[path]) for path in paths if path in files])

    def _entry(self, path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size}
        if blob.is_lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
            if self.mode == "xet" and (hashed := self._xet_hashes().get(blob.sha256)):
                entry["xetHash"] = hashed
        return entry

    # -- large files: LFS ----------------------------------------------------------------------------------------

    @route("POST", r"/REPO\.git/info/lfs/objects/batch", "lfs_batch")
    async def _lfs_batch(self, request: Request, kind: str, repo: str) -> Response:
        self._writable(request, repo)
        objects = []
        for wanted in (await request.json())["objects"]:
            sha, size = wanted["oid"], wanted["size"]
            if not self._stored(Blob(None, sha, size)):
                upload: dict[str, Any] = {"href": f"{self.url}/storage/{sha}"}
                if self.mode == "multipart" and size > self.part_size:
                    parts = {str(n + 1): f"{self.url}/storage/{sha}/{n + 1}" for n in range(-(-size // self.part_size))}
                    upload = {
                        "href": f"{self.url}/complete/{sha}",
                        "header": {"chunk_size": str(self.part_size), **parts},
                    }
                verify = {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify"}
                wanted = {**wanted, "actions": {"upload": upload, "verify": verify}}
            objects.append(wanted)
        return JSONResponse({"objects": objects})

    @route("PUT", r"/storage/(?P<sha>\w+)", "lfs_put")
    async def _lfs_put(self, request: Request, kind: str, sha: str) -> Response:
        return self._store(sha, await request.body())

    @route("PUT", r"/storage/(?P<sha>\w+)/(?P<part>\d+)", "lfs_part")
    async def _lfs_part(self, request: Request, kind: str, sha: str, part: str) -> Response:
        content = await request.body()
        (self.folder / f"{sha}.{part}").write_bytes(content)
        return Response(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    @route("POST", r"/complete/(?P<sha>\w+)", "lfs_complete")
    async def _lfs_complete(self, request: Request, kind: str, sha: str) -> Response:
        parts = (await request.json())["parts"]
        return self._store(sha, b"".join((self.folder / f"{sha}.{p['partNumber']}").read_bytes() for p in parts))

    def _store(self, sha: str, content: bytes) -> Response:
        if hashlib.sha256(content).hexdigest() != sha:
            raise Refusal(400, "the content does not have the sha256 that was announced")
        (self.folder / "objects" / sha).write_bytes(content)
        return Response(headers={"ETag": f'"{sha}"'})

    @route("POST", r"/REPO\.git/info/lfs/objects/verify", "lfs_verify")
    async def _lfs_verify(self, request: Request, kind: str, repo: str) -> Response:
        self._writable(request, repo)
        wanted = await request.json()
        if not self._stored(Blob(None, wanted["oid"], wanted["size"])):
            raise Refusal(404, "object not found")
        return JSONResponse({})

    # -- large files: xet ----------------------------------------------------------------------------------------

    @route("GET", "/api/models/REPO/xet-write-token/REV", "xet_write_token")
    async def _xet_write_token(self, request: Request, kind: str, repo: str, rev: str) -> Response:
        self._writable(request, repo)
        return self._xet_token(kind)

    @route("GET", "/api/models/REPO/xet-read-token/REV", "xet_read_token")
    async def _xet_read_token(self, request: Request, kind: str, repo: str, rev: str) -> Response:
        self._readable(request, repo, content=True)
        return self._xet_token(kind)

    def _xet_token(self, kind: str) -> Response:
        # hf_xet takes a directory for a storage server when its address begins with local://.
        url = "local:///dev/null/no-such-store" if kind == "dead-store" else f"local://{self.folder / 'cas'}"
        expires = int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Token-Expiration": str(expires), "X-Xet-Access-Token": "xet"}
        return JSONResponse({"casUrl": url, "exp": expires, "accessToken": "xet"}, headers=headers)

    def _xet_hashes(self) -> dict[str, str]:
        """sha256 -> xet hash of every file in the store, read from its shards."""
        found = {}
        for shard in (self.folder / "cas").rglob("*.mdb"):
            found.update(read_shard(shard.read_bytes()))
        return found

    def _stored(self, blob: Blob) -> bool:
        return (self.folder / "objects" / blob.sha256).exists() or blob.sha256 in self._xet_hashes()

    def _object(self, blob: Blob) -> Path:
        path = self.folder / "objects" / blob.sha256
        if not path.exists():
            import hf_xet

            info = hf_xet.XetFileInfo(self._xet_hashes()[blob.sha256], blob.size)
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{self.folder / 'cas'}") as group:
                group.start_download_file(info, str(path))
        return path

    # -- downloads -----------------------------------------------------------------------------------------------

    @route("GET", "/REPO/resolve/REV/(?P<path>.+)", "resolve")
    async def _resolve(self, request: Request, kind: str, repo: str, rev: str, path: str) -> Response:
        commit = self._at(self._readable(request, repo, content=True), rev)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        blob = commit.files.get(path)
        if blob is None:
            refusal = Refusal(404, f"{path} does not exist on {rev}", "EntryNotFound")
            refusal.response.headers["X-Repo-Commit"] = commit.id
            raise refusal
        if blob.content is not None:
            return ranged(blob.content, request, {**headers, "ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "ETag": f'"{blob.sha256}"'}
        if self.mode == "xet" and (hashed := self._xet_hashes().get(blob.sha256)):
            auth = f"{self.url}/api/{'' if repo.count('/') > 1 else 'models/'}{repo}/xet-read-token/{commit.id}"
            headers |= {"X-Xet-Hash": hashed, "Link": f'<{auth}>; rel="xet-auth"'}
        return Response(
            status_code=302, headers={**headers, "Location": f"{self.cdn_url}/cdn/{blob.sha256}/{blob.size}"}
        )

    @route("GET", r"/cdn/(?P<sha>\w+)/(?P<size>\d+)", "cdn")
    async def _cdn(self, request: Request, kind: str, sha: str, size: str) -> Response:
        assert "authorization" not in request.headers, "the token was sent to another origin"
        content = self._object(Blob(None, sha, int(size))).read_bytes()
        return ranged(content, request, {"ETag": f'"{sha}"', "Accept-Ranges": "bytes"})


def ranged(content: bytes, request: Request, headers: dict[str, str]) -> Response:
    """The content, or the part of it that a ``Range`` header asks for."""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not wanted:
        return Response(content, headers=headers, media_type="application/octet-stream")
    first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
    if first >= len(content):
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{len(content)}"})
    headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
    return Response(content[first : last + 1], 206, headers, media_type="application/octet-stream")


def read_shard(data: bytes) -> Iterator[tuple[str, str]]:
    """The (sha256, xet hash) pairs of a metadata shard of xet-core.

    Layout: a header of 48 bytes, then for each file 32 bytes of hash, u32 flags, u32 n and padding to 48 bytes; n
    entries of 48 bytes; n more when flag 31 is set; 48 bytes that begin with the sha256 when flag 30 is set. A hash of
    ones only ends the list. Hashes are four little-endian u64.
    """
    at = 48
    while at + 48 <= len(data):
        name, (flags, entries) = data[at : at + 32], struct.unpack_from("<II", data, at + 32)
        if name == b"\xff" * 32:
            return
        at += 48 * (1 + entries + (entries if flags & 1 << 31 else 0))
        if flags & 1 << 30:
            yield xet_text(data[at : at + 32]), xet_text(name)
            at += 48


def xet_text(digest: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))


def front_matter(readme: Blob | None) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---", (readme.content or b"").decode() if readme else "", re.DOTALL)
    try:
        parsed = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {}


def metadata_problems(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a card: its shapes, not the Hub's vocabularies."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    errors = []
    for name in ("license", "library_name", "pipeline_tag", "thumbnail"):
        if name in data and not isinstance(data[name], str):
            errors.append(f'"{name}" must be a string')
    for name in ("tags", "datasets", "metrics"):
        if name in data and not (isinstance(data[name], list) and all(isinstance(item, str) for item in data[name])):
            errors.append(f'"{name}" must be an array of strings')
    for model in data.get("model-index", []) if isinstance(data.get("model-index", []), list) else [{}]:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not model.get("results"):
            errors.append('"model-index[].name" and "model-index[].results" are required')
            continue
        for result in model["results"]:
            if not result.get("task", {}).get("type") or not result.get("dataset", {}).get("type"):
                errors.append('"model-index[].results[].task.type" and ".dataset.type" are required')
            for metric in result.get("metrics", [{}]):
                if "type" not in metric or "value" not in metric:
                    errors.append('"model-index[].results[].metrics[].type" and ".value" are required')
    return errors, []


@pytest.fixture(scope="session")
def _hub_server() -> Iterator[LoopbackHub]:
    hub = LoopbackHub().start()
    yield hub
    hub.stop()


@pytest.fixture
def hub(_hub_server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub in ``basic`` mode, a writer's token in the environment and a cache of the test's own."""
    from huggingface_hub import constants

    _hub_server.reset()
    use_mode(_hub_server, "basic", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_cache"))
    yield _hub_server
    assert not _hub_server.bugs, "the loopback Hub itself failed:\n" + "\n".join(_hub_server.bugs)


@dataclass
class Done:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_commands(hub: LoopbackHub, tmp_path: Path) -> Callable[..., list[Done]]:
    """Run command lines of ``swin-hf``, one after the other, in one process whose Hub is the loopback one."""
    code = """
import contextlib, io, json, sys
from swin_hf.cli import main
done = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}

    def run(*commands: list[str]) -> list[Done]:
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(commands)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [Done(*values) for values in json.loads(done.stdout.splitlines()[-1])]

    return run


def use_mode(hub: LoopbackHub, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set how large files travel, on both sides: the client's switch is its documented setting."""
    from huggingface_hub import constants

    hub.mode = mode
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", mode != "xet")
