"""A stand-in for the Hugging Face Hub: a real HTTP server on this machine that serves folders as repositories.

`root/ORG/NAME/…` is the dataset or the model `ORG/NAME`. A process started with `HF_ENDPOINT` set to the server's
endpoint loads, streams and opens them with the real `datasets` and `huggingface_hub`. A repository's commit is a hash
of the files it holds at the moment of the request. As on the Hub, a reported commit stays readable when they change.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

DATA_SUFFIXES = (".parquet", ".json.gz")
DATE = "2024-01-01T00:00:00.000Z"
ROW_GROUP_SIZES = (5, 2, 9, 1, 4)
REPO = r"/(?P<repo>[^/]+/[^/]+)"
RESOLVE = re.compile("(?:/datasets)?" + REPO + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
API = re.compile(
    "/api/(?:datasets|models)" + REPO + r"(?:/(?P<call>revision|tree|paths-info)/(?P<rev>[^/]+)(?:/(?P<path>.+))?)?"
)


class HubError(Exception):
    """What the Hub answers as 404 with this code."""


class Commit(NamedTuple):
    """A state of a repository: the files' bytes, and the Hub's description of every folder and file, by path."""

    sha: str
    files: dict[str, bytes]
    entries: dict[str, dict[str, Any]]


class FakeHub(ThreadingHTTPServer):
    """The server; `requests` lists the method and the path, without its query, of every request so far."""

    request_queue_size = 64

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str]] = []
        self._commits: dict[tuple[str, str], Commit] = {}

    def files_read(self) -> set[str]:
        """Return the data files of which any bytes were fetched, by their paths in their repositories."""
        found = (RESOLVE.fullmatch(path) for method, path in list(self.requests) if method == "GET")
        return {match["path"] for match in found if match and match["path"].endswith(DATA_SUFFIXES)}

    def commit(self, repo: str, revision: str = "main") -> Commit:
        """Return what `revision` of `repo` names now."""
        folder = self.root / repo
        if not folder.is_dir():
            raise HubError("RepoNotFound")
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        sha = object_id(files)
        self._commits.setdefault((repo, sha), Commit(sha, files, describe(files)))
        if revision != "main" and (repo, revision) not in self._commits:
            raise HubError("RevisionNotFound")
        return self._commits[repo, sha if revision == "main" else revision]


class Handler(BaseHTTPRequestHandler):
    """Answers what the two libraries ask of the Hub."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeHub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.requests.append((self.command, unquote(url.path)))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        match = RESOLVE.fullmatch(url.path) or API.fullmatch(url.path)
        if match is None:
            return self._send(404, b"{}")
        named = {key: unquote(value or "") for key, value in match.groupdict().items()}
        try:
            commit = self.server.commit(named["repo"], named["rev"] or "main")
            if match.re is RESOLVE:
                return self._send_file(commit, named["path"])
            return self._send_json(commit, parse_qs(url.query) | parse_qs(body), named)
        except HubError as error:
            return self._send(404, b"{}", {"X-Error-Code": str(error)})

    do_HEAD = do_POST = do_GET

    def _send_json(self, commit: Commit, asked: dict[str, list[str]], named: dict[str, str]) -> None:
        recursive, expand = (asked.get(flag, [""])[0].lower() == "true" for flag in ("recursive", "expand"))
        more = {"lastCommit": {"id": commit.sha, "title": "Upload", "date": DATE}} if expand else {}
        entries = {path: entry | more for path, entry in commit.entries.items()}
        path = named["path"]
        if named["call"] == "paths-info":
            answer: Any = [entries[p] for p in asked.get("paths", []) if p in entries]
        elif named["call"] == "tree":
            if path and path not in entries:
                raise HubError("EntryNotFound")
            below = (p for p in entries if PurePosixPath(path) in PurePosixPath(p).parents[: None if recursive else 1])
            answer = [entries[p] for p in ([path] if path in commit.files else below)]
        else:
            siblings = [{"rfilename": p} for p in commit.files]
            answer = {"id": named["repo"], "sha": commit.sha, "lastModified": DATE, "siblings": siblings}
        self._send(200, json.dumps(answer).encode())

    def _send_file(self, commit: Commit, path: str) -> None:
        if path not in commit.files:
            raise HubError("EntryNotFound")
        data, entry = commit.files[path], commit.entries[path]
        headers = {"ETag": f'"{entry.get("lfs", entry)["oid"]}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._send(200, data, headers)
        start, end = int(asked[1]), min(len(data), int(asked[2] or len(data)) + 1)
        if start >= end:
            return self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        return self._send(206, data[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep the tests' output to the tests."""


def object_id(content: bytes | dict[str, bytes]) -> str:
    """Return the forty hexadecimal digits that stand for a file's or a folder's content."""
    return hashlib.sha1(repr(content).encode()).hexdigest()


def describe(files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Return the Hub's description of every folder and file, by path."""
    found: dict[str, dict[str, Any]] = {}
    for path, data in files.items():
        for folder in map(str, reversed(PurePosixPath(path).parents[:-1])):
            below = {p: d for p, d in files.items() if p.startswith(f"{folder}/")}
            found[folder] = {"type": "directory", "path": folder, "oid": object_id(below), "size": 0}
        found[path] = {"type": "file", "path": path, "oid": object_id(data), "size": len(data)}
        if path.endswith(DATA_SUFFIXES):
            found[path]["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


@contextlib.contextmanager
def fake_hub(root: Path) -> Iterator[FakeHub]:
    """Serve the datasets under `root` until the block ends."""
    with FakeHub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def make_hub_repos(root: Path, texts: list[str]) -> None:
    """Write three datasets of the Hub in small; the `train` split of each is `texts` in order, in uneven files."""
    rows = [{"text": text, "id": f"<urn:{i}>", "url": f"https://a.example/{i}"} for i, text in enumerate(texts)]
    pages = [{"text": row["text"], "timestamp": "2019-04-25T12:57:54Z", "url": row["url"]} for row in rows]
    third = -(-len(rows) // 3)
    splits = {"test": rows[:3], "train": rows, "validation": rows[:2]}
    configs = ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    for config, split in itertools.product(configs, splits):
        write_rows(root / f"Salesforce/wikitext/{config}/{split}-00000-of-00001.parquet", splits[split])
    write_card(root / "Salesforce/wikitext", {c: {s: f"{c}/{s}-*" for s in splits} for c in configs})
    write_rows(root / "allenai/c4/en/c4-train.00000-of-00002.json.gz", pages[:third])
    write_rows(root / "allenai/c4/en/c4-train.00001-of-00002.json.gz", pages[third:])
    write_rows(root / "allenai/c4/en/c4-validation.00000-of-00001.json.gz", pages[:2])
    features = [{"name": name, "dtype": "string"} for name in ("text", "timestamp", "url")]
    info = [{"config_name": "en", "features": features}]
    globs = {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"}
    write_card(root / "allenai/c4", {"en": globs}, dataset_info=info)
    write_rows(root / "HuggingFaceFW/fineweb/data/CC-MAIN-2013-20/000_00000.parquet", rows[:3])
    for i, part in enumerate((rows[:third], rows[third : third + 3], rows[third + 3 :])):
        write_rows(root / f"HuggingFaceFW/fineweb/sample/10BT/{i:03}_00000.parquet", part)
    fineweb = {"default": {"train": "data/*/*"}, "sample-10BT": {"train": "sample/10BT/*"}}
    write_card(root / "HuggingFaceFW/fineweb", fineweb)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write compressed JSON lines, or a Parquet file whose row groups differ in size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))
        return
    table = pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in ("text", "id", "url")]))
    with pq.ParquetWriter(path, table.schema) as writer:
        for size in itertools.cycle(ROW_GROUP_SIZES):
            writer.write_table(table.slice(0, size))
            table = table.slice(size)
            if not table.num_rows:
                break


def write_card(folder: Path, configs: dict[str, dict[str, str]], **more: Any) -> None:
    """Write the README that says which files are which configuration's splits."""
    files = {name: [{"split": s, "path": glob} for s, glob in splits.items()] for name, splits in configs.items()}
    found = [{"config_name": name, "data_files": data_files} for name, data_files in files.items()]
    head = yaml.safe_dump({**more, "configs": found}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{head}---\n\n# {folder.name}\n", encoding="utf-8")
