"""A small server that speaks what huggingface_hub needs of the hub's protocol.

    with HubServer() as server:
        server.add("user/model", {"model.safetensors": b"...", "README.md": b"..."})

Repositories have commits; large files go by the LFS protocol. It counts the requests.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from solov2_jax import pretrained
from solov2_jax.weights import hub
from solov2_jax.weights.hub_client import hub_library


class Repository:
    """Commits (id -> files) of a repository, and its branches and tags."""

    def __init__(self):
        self.commits, self.refs, self.gated = {}, {}, False

    def commit(self, files, ref="main"):
        before = self.commits.get(self.refs.get(ref, ""), {})
        after = {**before, **files}
        text = repr(sorted((n, hashlib.sha256(d).hexdigest()) for n, d in after.items()))
        number = hashlib.sha1(f"{len(self.commits)}{text}".encode()).hexdigest()
        self.commits[number], self.refs[ref] = after, number
        return number


class HubServer:
    """The server, in a thread, at `url`; `lfs` are the stored large files by sha256.

    Attributes:
      wrong_sum: files whose announced sha256 is not theirs.
      cut: bytes after which a download ends, as often as `cuts` says.
      requests: "METHOD PATH" of each request.
    """

    def __init__(self):
        self.repositories, self.lfs, self.requests = {}, {}, []
        self.token, self.wrong_sum, self.cut, self.cuts, self.status = "", set(), 0, 0, 0

        class Handler(HubHandler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name, files, ref="main"):
        return self.repositories.setdefault(name, Repository()).commit(files, ref)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", head=False, **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def error(self, status, code):
        self.answer(status, {"error": code}, head=self.command == "HEAD", X_Error_Code=code)

    def route(self):
        self.path = urllib.parse.unquote(self.path)
        self.hub.requests.append(f"{self.command} {self.path}")
        size = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(size)
        if self.hub.status:
            return self.error(self.hub.status, "Broken")
        for method, pattern, name in ROUTES:
            if method == self.command and (m := re.fullmatch(pattern, self.path.split("?")[0])):
                return getattr(self, name)(**m.groupdict())
        return self.error(404, "NotFound")

    do_GET = do_HEAD = do_POST = do_PUT = route

    def authorised(self):
        return self.headers.get("Authorization", "") == f"Bearer {self.hub.token}"

    def found(self, repo, revision):
        """Returns (commit, files), or answers the error."""
        repository = self.hub.repositories.get(repo)
        if repository is None:
            self.error(401, "RepoNotFound")
        elif repository.gated and not self.authorised():
            self.error(403 if "Authorization" in self.headers else 401, "GatedRepo")
        elif (commit := repository.refs.get(revision, revision)) not in repository.commits:
            self.error(404, "RevisionNotFound")
        else:
            return commit, repository.commits[commit]
        return None

    def model(self, repo, revision="main"):
        if found := self.found(repo, revision or "main"):
            commit, files = found
            siblings = [{"rfilename": name} for name in files]
            about = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}
            self.answer(200, {**about, "private": False, "downloads": 0})

    def resolve(self, repo, revision, file):
        found = self.found(repo, revision)
        if not found:
            return
        commit, files = found
        if file not in files:
            self.answer(404, b"", head=True, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        data = files[file]
        digest = hashlib.sha256(b"other" if file in self.hub.wrong_sum else data).hexdigest()
        start = int((self.headers.get("Range", "") or "bytes=0-")[6:].partition("-")[0])
        part = data[start:]
        headers = {
            "ETag": f'"{digest}"',
            "X_Repo_Commit": commit,
            "Accept_Ranges": "bytes",
            "Content_Length": len(part),
        }
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and self.hub.cuts and len(part) > self.hub.cut:
            self.hub.cuts -= 1
            part, self.close_connection = part[: self.hub.cut], True
        self.answer(206 if start else 200, part, head=self.command == "HEAD", **headers)

    # Writing: everything needs the token.

    def create(self):
        if not self.authorised():
            return self.error(401, "Unauthorized")
        wanted = json.loads(self.body)
        repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else ""
        if repo in self.hub.repositories:
            return self.answer(409, {"url": f"{self.hub.url}/{repo}", "error": "exists"})
        self.hub.add(repo, {".gitattributes": b""})
        return self.answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate(self):
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        if not self.authorised():
            return self.error(403, "Forbidden")
        files = json.loads(self.body)["files"]
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith("tensors") else "regular",
                "shouldIgnore": False,
            }
            for f in files
        ]
        return self.answer(200, {"files": modes})

    def batch(self, repo):
        objects = [
            {
                **each,
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}},
            }
            for each in json.loads(self.body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.lfs[oid] = self.body
        self.answer(200)

    def commit(self, repo, revision):
        if not self.authorised():
            return self.error(403, "Forbidden")
        files = {}
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        number = self.hub.repositories[repo].commit(files, revision)
        url = f"{self.hub.url}/{repo}/commit/{number}"
        return self.answer(200, {"success": True, "commitOid": number, "commitUrl": url})


@pytest.fixture(name="server")
def hub_server(tmp_path, monkeypatch):
    """The server, which the library takes for the hub, and an empty cache."""
    constants = hub_library().constants
    for name in ("fetch_weights", "fetch_folder"):  # each asks anew
        monkeypatch.setattr(hub, name, getattr(hub, name).__wrapped__)
    monkeypatch.setattr(pretrained, "fetch_folder", hub.fetch_folder)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = (
    ("GET", rf"/api/models/{_REPO}", "model"),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", "model"),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+|refs/pr/\d+)/(?P<file>.+)", "resolve"),
    ("HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+|refs/pr/\d+)/(?P<file>.+)", "resolve"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/(?P<oid>.+)", "upload"),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
)
