"""A server that answers what W&B's client of release 0.31 asks while it sends a run: GraphQL and the stream of files,
on loopback, in memory. `down` makes every answer an error, as in an outage."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class FakeWandb(ThreadingHTTPServer):
    """history: of each run, the records that arrived. exits: of each run that was closed, its exit code."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.down = False
        self.refused = 0
        self._lines: dict[str, dict[str, list[str]]] = {}
        self.configs: dict[str, str] = {}
        self.exits: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of the test's business."""

    def history(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines.get(run, {}).get("wandb-history.jsonl", [])]

    def names(self, run: str) -> list[str]:
        return sorted(self._lines.get(run, {}))

    def stream(self, run: str, said: dict[str, Any]) -> None:
        """A part of each file: its lines from `offset` on."""
        for name, part in (said.get("files") or {}).items():
            kept = self._lines.setdefault(run, {}).setdefault(name, [])
            kept[part["offset"] :] = part["content"]
        if said.get("complete"):
            self.exits[run] = int(said.get("exitcode") or 0)

    def graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            run = str(given.get("name") or given.get("id"))
            if given.get("config"):
                self.configs[run] = given["config"]
            project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "r", "name": run, "displayName": given.get("displayName"), "config": "{}"}
            bucket |= {"description": "", "sweepName": None, "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in given.get("files", [])]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        versions = {"cliVersionInfo": {"max_cli_version": "9.0"}, "latestLocalVersionInfo": None, "features": []}
        if "viewer" in query:
            viewer = {
                "id": "u",
                "entity": "me",
                "username": "me",
                "email": "me@localhost",
                "admin": False,
                "flags": "{}",
            }
            none: dict[str, Any] = {"edges": []}
            return {"viewer": {**viewer, "teams": none, "apiKeys": none}, "serverInfo": versions}
        if "serverInfo" in query:
            return {"serverInfo": versions}
        if "model(" in query:  # is there such a run already?
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": None, "run": None}}
        return {}


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeWandb

    def log_message(self, *words: Any) -> None:
        pass

    def _read(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, value: dict[str, Any]) -> None:
        code, body = 200, json.dumps(value).encode()
        if self.server.down:
            self.server.refused += 1
            code, body = 503, b"{}"
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._read()
        self._answer({})

    def do_POST(self) -> None:
        said = json.loads(self._read() or b"{}")
        if self.server.down:
            return self._answer({})
        if self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], said)
            return self._answer({})
        self._answer({"data": self.server.graphql(said.get("query", ""), said.get("variables") or {})})
