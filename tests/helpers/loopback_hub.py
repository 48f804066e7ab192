"""A loopback Hugging Face Hub that holds repositories in memory, and fails where a test asks for it."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


LFS = (".safetensors", ".bin", ".pt", ".parquet")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
REPO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?")


class Hub:
    """Repositories by (kind, name): `{"private": ..., "files": {path: content}}`; `requests` lists what was asked."""

    def __init__(self):
        self.repos, self.blobs, self.requests, self.faults = {}, {}, [], []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def fail(self, pattern, status, times=1):
        """Answer the next `times` requests that match `"METHOD /path"` with a status, or hang up (`"drop"`)."""
        self.faults.append([re.compile(pattern), status, times])

    def fault(self, request):
        for one in self.faults:
            if one[2] and one[0].search(request):
                one[2] -= 1
                return one[1]
        return None

    def files(self, name, kind="models"):
        return self.repos[kind, name]["files"]


@contextmanager
def serve():
    hub = Hub()
    threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


class Refusal(Exception):
    def __init__(self, status, message, code=None, name=""):
        super().__init__(message)
        self.status, self.message, self.code, self.name = status, message, code, name


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *args):
        pass

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault(request)
        if fault == "drop":
            # In the middle of the upload: some of it has arrived.
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 1000))
            self.close_connection = True
            self.connection.close()
            return
        body = self.read_body()
        try:
            if fault:
                raise Refusal(fault, "asked for by the test")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            found = re.fullmatch(r"hf_(\w+?)(:read)?", token)
            if token and not found:
                raise Refusal(401, "Invalid credentials in Authorization header")
            self.user, self.writes = (found[1], not found[2]) if found else (None, False)
            self.route(path, body)
        except Refusal as error:
            extra = {"X-Error-Code": error.code} if error.code else {}
            answer = {"error": error.message, "url": f"{self.hub.url}/{error.name}"}
            self.send(error.status, answer, {"X-Error-Message": error.message, **extra})

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status, answer=None, headers=(), raw=None):
        body = raw if raw is not None else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self, path, body):
        if found := re.fullmatch(r"/_lfs/(\w{64})", path):
            if hashlib.sha256(body).hexdigest() != found[1]:
                raise Refusal(400, "sha256 mismatch")
            self.hub.blobs[found[1]] = body
            self.send(200, {}, {"ETag": f'"{found[1]}"'})
        elif path == "/api/whoami-v2":
            if not self.user:
                raise Refusal(401, "Invalid username or password.")
            role = "write" if self.writes else "read"
            who = {"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": role}}}
            self.send(200, who)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.need_write(found[1])
            objects = [self.lfs_object(one) for one in json.loads(body)["objects"]]
            self.send(200, {"transfer": "basic", "objects": objects})
        elif found := FILE.fullmatch(path):
            self.download(found[1] or "models", found[2], found[4])
        elif found := REPO.fullmatch(path):
            self.repository(found[1], found[2], found[3] or "", body)
        else:
            raise Refusal(404, f"no route {path}")

    def need_write(self, name):
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        if name.split("/")[0] != self.user or not self.writes:
            raise Refusal(403, f"Forbidden: no write access to {name}")

    def create(self, ask):
        kind, name = f"{ask.get('type') or 'model'}s", f"{ask.get('organization') or self.user}/{ask['name']}"
        self.need_write(name)
        if (kind, name) in self.hub.repos:
            raise Refusal(409, "You already created this repo", name=name)
        private = bool(ask.get("private")) or ask.get("visibility") == "private"
        self.hub.repos[kind, name] = {"private": private, "files": {}, "commits": 0}
        self.send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def lfs_object(self, ask):
        href = {"upload": {"href": f"{self.hub.url}/_lfs/{ask['oid']}"}}
        return {**ask, **({} if ask["oid"] in self.hub.blobs else {"actions": href})}

    def visible(self, kind, name):
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo["private"] and name.split("/")[0] != self.user):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    @staticmethod
    def sha(repo):
        return f"{repo['commits']:040x}"

    def repository(self, kind, name, action, body):
        repo = self.visible(kind, name)
        if not action or action.startswith("revision"):
            siblings = [{"rfilename": path} for path in repo["files"]]
            info = {"id": name, "sha": self.sha(repo), "private": repo["private"], "siblings": siblings, "tags": []}
            self.send(200, info)
        elif action.startswith("tree"):
            self.send(200, [self.entry(path, content) for path, content in repo["files"].items()])
        elif action.startswith("paths-info"):
            asked = json.loads(body)["paths"] if body.startswith(b"{") else []
            self.send(200, [self.entry(path, repo["files"][path]) for path in asked if path in repo["files"]])
        elif action.startswith("preupload"):
            self.need_write(name)
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            for one in modes:
                if one["path"] in repo["files"]:
                    entry = self.entry(one["path"], repo["files"][one["path"]])
                    one["oid"] = entry.get("lfs", entry)["oid"]
            self.send(200, {"files": modes})
        elif action.startswith("commit"):
            self.need_write(name)
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo["files"][value["path"]] = self.hub.blobs[value["oid"]]
            repo["commits"] += 1
            url = f"{self.hub.url}/{name}/commit/{self.sha(repo)}"
            self.send(200, {"success": True, "commitOid": self.sha(repo), "commitUrl": url})
        else:
            raise Refusal(404, f"no route {action}")

    @staticmethod
    def entry(path, content):
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
        if path.endswith(LFS):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 134}
        return entry

    def download(self, kind, name, path):
        repo = self.visible(kind, name)
        content = repo["files"].get(path)
        if content is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        entry = self.entry(path, content)
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.sha(repo)}
        self.send(200, headers=headers, raw=content)
