"""What W&B gets of a run: an offline folder read back, and a loopback server that records what the client sends."""

import gzip
import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from helpers.hub_uploads import body_of

CLIENT = {"max_cli_version": "99.0.0"}


def offline_records(folder):
    """Every record of an offline run directory: protocol buffers in LevelDB's log format after W&B's 7-byte header.

    Blocks of 32 KiB hold pieces with a header of checksum (4), length (2), type (1: whole, 2: first, 3: middle,
    4: last); a block's last 6 bytes or fewer are padding.
    """
    from wandb.proto import wandb_internal_pb2

    data = next(folder.rglob("run-*.wandb")).read_bytes()
    assert data[:4] == b":W&B"
    position, message = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if kind == 0:
            break
        message = (b"" if kind in (1, 2) else message) + data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record


def values_of(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class OfflineRun:
    """An offline run directory: history rows, config, (metric, x axis) pairs, summary, alerts, id, exit code."""

    def __init__(self, folder):
        self.history, self.config, self.metrics, self.summary = [], {}, set(), {}
        self.alerts, self.run_id, self.exit_code, self.project = [], "", None, ""
        self.folder = next(folder.rglob("run-*.wandb")).parent / "files"
        for record in offline_records(folder):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.history.append(values_of(record.history.item))
            elif kind == "run":
                self.config, self.run_id = values_of(record.run.config.update), record.run.run_id
                self.project = record.run.project
            elif kind == "metric":
                self.metrics.add((record.metric.name or record.metric.glob_name, record.metric.step_metric))
            elif kind == "summary":
                self.summary |= values_of(record.summary.update)
            elif kind == "alert":
                self.alerts.append(record.alert.title)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code


class LoopbackWandb:
    """As much of a W&B server as its client needs; what each run sent is in `runs` by id.

    A context manager. `environment()` points a client to it.
    """

    def __init__(self):
        self.runs, self.requests = {}, 0

    def __enter__(self):
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self):
                body = body_of(self)
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                reply = json.dumps(owner.reply(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            do_GET = do_POST = do_PUT = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self):
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    def reply(self, path, body):
        self.requests += 1
        if path.endswith("/graphql"):
            asked = json.loads(body)
            return {"data": self._graphql(asked["query"], asked.get("variables") or {})}
        if path.endswith("/file_stream"):
            self._stream(path.split("/")[-2], json.loads(body))
        return {}

    def _run(self, name):
        empty = {"history": [], "summary": {}, "exit_code": None, "config": {}, "alerts": [], "names": set()}
        return self.runs.setdefault(name, empty)

    def _stream(self, name, sent):
        run, files = self._run(name), sent.get("files") or {}
        for line in files.get("wandb-history.jsonl", {}).get("content", []):
            run["history"].append(json.loads(line))
        for line in files.get("wandb-summary.json", {}).get("content", []):
            run["summary"] |= json.loads(line)
        if sent.get("complete"):
            run["exit_code"] = sent["exitcode"]

    def _graphql(self, query, values):
        if "UpsertBucket" in query:
            run, project = self._run(values["name"]), values.get("project")
            run["project"] = project
            run["names"] |= {values["displayName"]} - {None}
            run["config"] |= json.loads(values.get("config") or "{}")
            owner = {"id": "p", "name": project, "entity": {"id": "e", "name": "local"}}
            known = {"id": "b", "name": values["name"], "displayName": values.get("displayName"), "project": owner}
            return {"upsertBucket": {"bucket": known | {"historyLineCount": len(run["history"])}, "inserted": True}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in values["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "notifyScriptableRunAlert" in query:
            self._run(values["runName"])["alerts"].append(values["title"])
            return {"notifyScriptableRunAlert": {"success": True}}
        if "viewer" in query:
            return {"viewer": {"id": "u", "entity": "local", "username": "local", "flags": "{}"}}
        if "RunResumeStatus" in query:
            return {"model": None}
        return {"serverInfo": {"cliVersionInfo": CLIENT, "features": []}}
