"""A stand-in for W&B's server on loopback, which the real client talks to: it keeps what is sent and checks nothing.

It shows what the client sends. It proves nothing about the real server's own checks or its pages.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY = "me"
KEY = "0123456789abcdef" * 2 + "01234567"


class WandbServer:
    """Answers the client's requests from what it was sent; use it as a context.

    Attributes:
        runs: run id -> what was said of the run (display name, group, config as JSON, ...).
        streams: run id -> parts of its file stream.
        files: path -> uploaded bytes.
        artifacts: id -> what was said of the artifact.
        alerts, views: as they came.
        offers: arguments that a sweep's agent is given, one run each.
        unknown: operations that nothing here answers.
    """

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.streams: dict[str, list[dict[str, Any]]] = {}
        self.files: dict[str, bytes] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.alerts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.sweep: dict[str, Any] = {}
        self.offers: list[dict[str, Any]] = []
        self.offered: list[str] = []
        self.unknown: list[str] = []

    def __enter__(self) -> WandbServer:
        owner = self

        class Handler(_Handler):
            state = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ENTITY": ENTITY}

    def history(self, run: str) -> list[dict[str, Any]]:
        """Logged rows of a run, in order."""
        return [json.loads(line) for line in self._lines(run, "wandb-history.jsonl")]

    def config(self, run: str) -> dict[str, Any]:
        """Config of a run, without W&B's own entries."""
        return {k: v["value"] for k, v in json.loads(self.runs[run]["config"]).items() if k != "_wandb"}

    def everything(self) -> str:
        """All that has arrived, as one text: to look for what must not be there."""
        kept = [self.runs, self.streams, self.artifacts, self.alerts, self.sweep, self.views]
        return json.dumps(kept) + "".join(data.decode("utf-8", "replace") for data in self.files.values())

    def _lines(self, run: str, file: str) -> list[str]:
        parts = self.streams.get(run, [])
        return [line for part in parts for line in (part.get("files") or {}).get(file, {}).get("content") or []]

    def answer(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
        """Answer one operation of the GraphQL interface."""
        method: Callable[[dict[str, Any]], dict[str, Any]] | None = getattr(self, f"_on_{operation}", None)
        if method is None:
            self.unknown.append(operation)
            return {}
        return method(values)

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": "", "admin": False, "flags": "{}"}
        return {"viewer": {**viewer, "teams": {"edges": []}}}

    def _on_GetDefaultEntity(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": ENTITY}}

    def _on_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _on_UpsertBucket(self, values: dict[str, Any]) -> dict[str, Any]:
        name = values.get("name") or values.get("id") or "?"
        new = name not in self.runs
        run = self.runs.setdefault(name, {})
        run.update({key: value for key, value in values.items() if value is not None})
        project = {"id": "p", "name": run.get("project") or "p", "entity": {"id": "e", "name": ENTITY}}
        bucket = {
            "id": _code(f"Run:{name}"), "name": name, "displayName": run.get("displayName") or name, "description": "",
            "config": run.get("config"), "sweepName": None, "project": project, "historyLineCount": 0,
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _on_RunResumeStatus(self, values: dict[str, Any]) -> dict[str, Any]:
        name = values.get("name") or "?"
        model: dict[str, Any] = {"id": "p", "name": values.get("project"), "entity": {"id": "e", "name": ENTITY}}
        if name not in self.runs:
            return {"model": {**model, "bucket": None}}
        run, rows = self.runs[name], self._lines(name, "wandb-history.jsonl")
        summaries = self._lines(name, "wandb-summary.json")
        bucket = {
            "id": _code(f"Run:{name}"), "name": name, "displayName": run.get("displayName"),
            "summaryMetrics": summaries[-1] if summaries else "{}", "logLineCount": 0, "eventsLineCount": 0,
            "historyLineCount": len(rows), "historyTail": json.dumps(rows[-1:]), "eventsTail": "[]",
            "config": run.get("config") or "{}", "tags": run.get("tags") or [], "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        return {"model": {**model, "bucket": bucket}}

    def _on_CreateRunFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        names = values.get("files") or []
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/run/{values.get('run')}/{name}"} for name in names]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _on_RunStoppedStatus(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def _on_CreateArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        given, name = values.get("input") or values, _code(f"A:{uuid.uuid4().hex}")
        self.artifacts[name] = dict(given)
        sequence = {"id": f"s-{given.get('artifactCollectionName')}", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": sequence}}}

    def _on_CreateArtifactManifest(self, values: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/storage/manifest/{values.get('artifactID')}"
        file = {"id": "f", "name": "m", "displayName": "m", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": uuid.uuid4().hex, "file": file}}}

    def _on_UpdateArtifactManifest(self, values: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/storage/manifest/{values.get('artifactManifestID')}"
        file = {"id": "f", "name": "m", "displayName": "m", "uploadUrl": url, "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _on_CreateArtifactFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        given = values.get("artifactFiles") or (values.get("input") or {}).get("artifactFiles") or []
        nodes = [
            {
                "id": "f", "name": file["name"], "displayName": file["name"], "uploadHeaders": [],
                "uploadUrl": f"{self.url}/storage/artifact/{file['artifactID']}/{file['name']}",
                "storagePath": f"x/{file['name']}", "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in given
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _on_CommitArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[values["artifactID"]]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": values["artifactID"], "digest": "d"}}}

    def _on_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _on_NotifyScriptableRunAlert(self, values: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append(values)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _on_UpsertSweep(self, values: dict[str, Any]) -> dict[str, Any]:
        self.sweep = yaml.safe_load(values["config"])
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": ENTITY}}
        sweep = {"id": "s1", "name": "sweep1", "project": project}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def _on_Sweep(self, _: dict[str, Any]) -> dict[str, Any]:
        sweep = {
            "id": "s1", "name": "sweep1", "method": self.sweep.get("method"), "state": "RUNNING", "description": None,
            "config": yaml.safe_dump(self.sweep), "createdAt": "2026-01-01T00:00:00", "heartbeatAt": None,
            "updatedAt": None, "earlyStopJobRunning": False, "controller": None, "scheduler": None,
            "runs": {"edges": []},
        }  # fmt: skip
        return {"project": {"sweep": sweep}}

    _on_SweepWithRuns = _on_Sweep

    def _on_CreateAgent(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "agent1"}}}

    def _on_Heartbeat(self, values: dict[str, Any]) -> dict[str, Any]:
        states = json.loads(values.get("runState") or "{}")
        if any(states.values()):  # a run is being worked on
            commands = []
        elif self.offers:
            name = f"sweeprun{len(self.offered) + 1}"
            self.offered.append(name)
            arguments = {key: {"value": value} for key, value in self.offers.pop(0).items()}
            program = self.sweep.get("program")
            commands = [{"type": "run", "run_id": name, "program": program, "args": arguments, "logs": []}]
        else:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": json.dumps(commands)}}

    def _on_UpsertView2(self, values: dict[str, Any]) -> dict[str, Any]:
        self.views.append(values)
        view = {"id": _code(f"View:{len(self.views)}"), "name": values.get("name"), "type": values.get("type")}
        return {"upsertView": {"view": {**view, "displayName": values.get("displayName")}, "inserted": True}}


class _Handler(BaseHTTPRequestHandler):
    state: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        data = self.state.files.get(self.path)
        self._reply(data if data is not None else b"{}")

    def do_PUT(self) -> None:
        self.state.files[self.path] = self._body()
        self._reply(b"{}")

    def do_POST(self) -> None:
        body = self._body()
        stream = re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if self.path == "/graphql":
            request = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            data = self.state.answer(found.group(1) if found else "?", request.get("variables") or {})
            self._reply(json.dumps({"data": data}).encode())
        elif stream:
            self.state.streams.setdefault(stream.group(1), []).append(json.loads(body))
            self._reply(b'{"exitcode": null, "limits": {}}')
        else:  # telemetry
            self._reply(b"{}")

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data

    def _reply(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _code(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
