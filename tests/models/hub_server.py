"""A stand-in of the Hugging Face Hub: the part of its HTTP API that uploads and downloads of models use."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"  # that uploads have to send


class HubServer(ThreadingHTTPServer):
    """Repositories in memory: the files of the last commit of each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = urlsplit(self.path).path
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            self.server.repositories.setdefault(name, {})
            return self.answer(200, {"url": f"{self.server.address}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        assert "/commit/" in path, path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                file = line["value"]
                self.server.repositories[name][file["path"]] = base64.b64decode(file["content"])
        sha = self.commit(name)
        return self.answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.split("/")[3:] if path.startswith("/api/models/") else path.split("/")[1:]
        name = "/".join(parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        sha = self.commit(name)
        if path.startswith("/api/models/"):
            if "tree" in parts:
                tree = [{"type": "file", "path": p, "size": len(c), "oid": self.digest(c)} for p, c in files.items()]
                return self.answer(200, tree)
            return self.answer(200, {"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]})
        file = "/".join(parts[4:])  # OWNER/NAME/resolve/REVISION/FILE
        if file not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        return self.answer(200, files[file], ETag=f'"{self.digest(files[file])}"', X_Repo_Commit=sha)

    do_HEAD = do_GET

    def commit(self, name: str) -> str:
        return self.digest(b"".join(self.server.repositories[name].values()))

    @staticmethod
    def digest(content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running stand-in."""
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
