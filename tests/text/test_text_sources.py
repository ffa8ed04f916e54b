"""Sources: files found, columns chosen, bad content named, and a Hub whose network fails at times."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROOT
from helpers.hub_server import LoopbackHub
from hub.hub_files import is_transient
from text import json_records, row_readers
from text.row_readers import BadData, TextFile
from text.text_sources import SourceSpec, find_files, load_table, open_source
from utils import UserError

TEXTS = [f"Document number {number} of some." for number in range(50)]


def write_jsonl(path: Path, texts=TEXTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def write_parquet(path: Path, texts=TEXTS, group=10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), path, row_group_size=group)
    return path


def values(source, start=(0, 0, 0)):
    return [value for value, _, _ in source.documents(list(range(len(source.files))), start)]


def names(path: Path, **options) -> list[str]:
    return [file.name for file in find_files(SourceSpec(str(path), **options)).files]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json"])
def test_every_format_can_be_read_from_every_row(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path)
    elif name.endswith(".json"):
        path.write_text(json.dumps([{"text": text, "more": ['"]}, {"']} for text in TEXTS], indent=2))
    else:
        write_jsonl(path)
    source = open_source(SourceSpec(str(path)))
    rows = list(source.documents([0], (0, 0, 0)))
    assert [value for value, _, _ in rows] == TEXTS
    for number, (_, place, after) in enumerate(rows):
        assert place == f"{name}:{number + 1}"
        assert values(source, after) == TEXTS[number + 1 :]


def test_an_array_of_json_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "BUFFER_BYTES", 64)
    path = tmp_path / "openhermes.json"
    records = [{"text": text + ' é "quoted" \\ ' + "long " * (number % 40)} for number, text in enumerate(TEXTS)]
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1))
    assert values(open_source(SourceSpec(str(path)))) == [record["text"] for record in records]
    path.write_text(path.read_text()[:-300])
    with pytest.raises(BadData, match=r"openhermes.json: line \d+ \(byte \d+\): the file ends inside its array"):
        raise values(open_source(SourceSpec(str(path))))[-1]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_long_texts_are_the_same_text(tmp_path, monkeypatch, name, ascii_only):
    for module in (json_records, row_readers):
        monkeypatch.setattr(module, "LONG_TEXT", 100)
        monkeypatch.setattr(module, "BUFFER_BYTES", 64)
    texts = ["short", 'é "x" \\u00e9 \n 🙂 \\\\ ' * 30, "plain"]
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, texts)
    else:
        lines = [json.dumps({"text": text, "other": [1, "]"]}, ensure_ascii=ascii_only) + "\n" for text in texts]
        path.write_text("".join(lines), encoding="utf-8")
    found = values(open_source(SourceSpec(str(path))))
    assert found == [texts[0], texts[1].encode(), texts[2]]


def test_a_subset_names_a_folder(tmp_path):
    write_jsonl(tmp_path / "data" / "A" / "x.jsonl")
    write_jsonl(tmp_path / "B" / "y.jsonl")
    assert names(tmp_path, subset="A") == ["x.jsonl"]
    assert names(tmp_path, subset="B") == ["y.jsonl"]
    assert names(tmp_path) == ["B/y.jsonl", "data/A/x.jsonl"]
    assert find_files(SourceSpec(str(tmp_path), subset="B")).size == (tmp_path / "B" / "y.jsonl").stat().st_size


def test_split_comes_from_names_and_manifests_are_no_data(tmp_path):
    for name in ("train-0.parquet", "valid.parquet", "part/test-1.parquet"):
        write_parquet(tmp_path / name)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    assert names(tmp_path) == ["train-0.parquet"]
    assert names(tmp_path, split="validation") == ["valid.parquet"]
    assert names(tmp_path, split="test") == ["part/test-1.parquet"]
    with pytest.raises(UserError, match=r"--dataset_split other: .* has test, train, validation"):
        names(tmp_path, split="other")


def test_a_mirrors_readme_names_its_configurations(tmp_path):
    write_parquet(tmp_path / "sample" / "10BT" / "000.parquet")
    write_parquet(tmp_path / "data" / "all" / "001.parquet")
    configs = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n"
    configs += "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n"
    (tmp_path / "README.md").write_text(f"---\n{configs}---\n")
    assert names(tmp_path) == ["data/all/001.parquet"]
    assert names(tmp_path, subset="sample-10BT") == ["sample/10BT/000.parquet"]


def test_columns(tmp_path):
    path = tmp_path / "a.parquet"
    turns = [[{"from": "human", "value": "hi"}]]
    pq.write_table(pa.table({"conversations": turns, "score": [1]}), path)
    source = open_source(SourceSpec(str(path)))
    assert (source.column, source.chat) == ("conversations", True)
    assert values(source) == turns
    for field, problem in (("text", "no column text"), ("score", "column score holds int64, not text")):
        with pytest.raises(UserError, match=f"{problem}; its columns are: conversations, score"):
            open_source(SourceSpec(str(path), text_field=field, chat=False))


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_source(SourceSpec(str(tmp_path / "nothing")))
    with pytest.raises(UserError, match="no data files"):
        open_source(SourceSpec(str(tmp_path)))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="empty dataset"):
        open_source(SourceSpec(str(tmp_path)))


def bad_values(path: Path) -> list:
    source = find_files(SourceSpec(str(path)))
    return values(source)


def test_bad_lines_are_named_and_the_rest_is_read(tmp_path):
    lines = [b'{"text": "one"}', b"{broken", b'{"text": "caf\xe9"}', b"[1]", b"", b'{"text": "five"}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    one, broken, encoding, array, five = bad_values(path)
    assert (one, five) == ("one", "five")
    assert str(broken).startswith("a.jsonl: line 2 (byte 16): not JSON")
    assert str(encoding).startswith("a.jsonl: line 3 (byte 24): invalid UTF-8")
    assert "line 4" in str(array) and "not a JSON object but list" in str(array)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_gzip_is_read_up_to_the_damage(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(json_records, "ZIP_STEP", 1000)
    path = write_jsonl(tmp_path / "a.jsonl.gz", [text + os.urandom(200).hex() for text in TEXTS])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[-8] ^= 255  # the checksum
    path.write_bytes(data)
    *good, bad = bad_values(path)
    assert 5 < len(good) <= 50 and all(isinstance(value, str) for value in good)
    assert isinstance(bad, BadData) and str(bad).startswith(f"a.jsonl.gz: line {len(good) + 1} (byte ")


def test_joined_gzip_files_are_one(tmp_path):
    first, second = write_jsonl(tmp_path / "1.jsonl.gz", TEXTS[:20]), write_jsonl(tmp_path / "2.jsonl.gz", TEXTS[20:])
    path = tmp_path / "in" / "both.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(first.read_bytes() + second.read_bytes())
    assert values(open_source(SourceSpec(str(path)))) == TEXTS


def test_a_broken_parquet_footer_and_page(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [text + os.urandom(50).hex() for text in TEXTS])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    (bad,) = bad_values(path)
    assert isinstance(bad, BadData) and str(bad).startswith("a.parquet: row 1: ")
    group = pq.read_metadata(pa.BufferReader(whole)).row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    path.write_bytes(whole[:start] + bytes(200) + whole[start + 200 :])
    found = bad_values(path)
    assert sum(isinstance(value, str) for value in found) == 40  # only the damaged row group is lost
    assert [str(value)[:17] for value in found if not isinstance(value, str)] == ["a.parquet: row 11"]


def test_invalid_utf8_in_parquet_is_one_bad_row(tmp_path):
    storage = pa.array([b"fine", b"caf\xe9", None], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, storage.buffers())
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    fine, bad, null = bad_values(tmp_path)
    assert (fine, null) == ("fine", None)
    assert str(bad).startswith("a.parquet: row 2: invalid UTF-8")


def test_a_table_holds_the_same_rows(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "in" / "a.parquet")
    (tmp_path / "in" / "b.jsonl").write_text('{"text": null}\n{"text": 3}\n{oops\n{"text": "end"}\n')
    source = open_source(SourceSpec(str(tmp_path / "in")))
    table = load_table(source)
    assert [table[i] for i in range(50)] == [(text, f"a.parquet:{i + 1}") for i, text in enumerate(TEXTS)]
    null, number, broken, end = (table[i][0] for i in range(50, 54))
    assert (null, end) == (None, "end")
    assert "int, not text" in str(number) and "line 3" in str(broken)
    (tmp_path / "in" / "b.jsonl").write_text('{"text": null}\n{"text": 3}\n{oops\n{"text": "END"}\n')
    assert load_table(open_source(SourceSpec(str(tmp_path / "in"))))[53][0] == "END"


def test_local_files_only_names_what_is_missing(tmp_path):
    code = (
        "from text.text_sources import *\n"
        "try: open_source(SourceSpec('org/text', subset='CC', local_files_only=True))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = client(code, {"HF_HOME": str(tmp_path)})
    assert done.startswith("UserError --local_files_only: dataset org/text, subset CC, split train, revision main")


def client(code: str, env: dict[str, str]) -> str:
    """Run code in a process of its own (the Hub's address is read at import); returns what it printed."""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    client.log = process.stderr  # type: ignore[attr-defined]
    return process.stdout


READ = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from text.text_sources import *
spec = SourceSpec("org/text", subset="CC", network_patience=PATIENCE)
try:
    source = open_source(spec)
    order = list(range(len(source.files)))
    print(source.commit, [f.name for f in source.files])
    for value, name, after in source.documents(order, (0, 0, 0)):
        print(value)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def hub(tmp_path):
    repository = tmp_path / "repository"
    write_parquet(repository / "data" / "CC" / "train-00000-of-00002.parquet", TEXTS[:30])
    write_jsonl(repository / "data" / "CC" / "train-00001-of-00002.jsonl.gz", TEXTS[30:])
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: CC\n  data_files:\n  - split: train\n    path: data/CC/*\n---\n"
    )
    with LoopbackHub() as hub:
        hub.add("datasets", "org/text", repository)
        yield hub


def read_through(hub, tmp_path, patience=60) -> str:
    return client(READ.replace("PATIENCE", str(patience)), hub.environment(tmp_path / "home"))


FAULTS = {
    "429": [("CC/train", "status", {"status": 429, "retry_after": 1})],
    "500": [("CC/train", "status", {"status": 500, "count": 2})],
    "cut": [("00000-of", "cut", {}), ("00001-of", "cut", {})],
    "truncate": [("00001-of", "truncate", {})],
    "stall": [("00000-of", "stall", {"seconds": 4.0})],
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_streaming_rides_out_faults(hub, tmp_path, fault):
    for match, kind, options in FAULTS.get(fault, []):
        hub.fail(match, kind, **options)
    found = read_through(hub, tmp_path).splitlines()
    assert found[1:] == TEXTS
    log = client.log  # type: ignore[attr-defined]
    assert ("trying again" in log and "network is back" in log) == (fault != "none")


@pytest.mark.slow
def test_a_long_outage_is_a_lost_stream(hub, tmp_path):
    hub.fail("CC/train", "status", status=503, count=1000)
    found = read_through(hub, tmp_path, patience=2).splitlines()
    assert found[-1].startswith("DataStreamLost reading org/text/data/CC/train-00000")
    assert "--network_patience 2 s" in found[-1]


@pytest.mark.slow
def test_gated_access_says_how_to_get_a_token(hub, tmp_path):
    hub.gated.add("org/text")
    (line,) = read_through(hub, tmp_path).splitlines()
    assert line.startswith("UserError org/text is gated") and "hf auth login" in line


@pytest.mark.slow
def test_a_missing_repository_and_subset_are_a_users_mistake(hub, tmp_path):
    hub.repositories["datasets", "org/other"] = tmp_path
    (tmp_path / "x.txt").write_text("no data")
    code = READ.replace("PATIENCE", "5")
    env = hub.environment(tmp_path / "home")
    assert client(code.replace("org/text", "org/none"), env).startswith("UserError Dataset 'org/none' doesn't exist")
    assert client(code.replace('"CC"', '"DD"'), env).startswith("UserError org/text, --dataset_subset DD: ")


def test_what_counts_as_transient():
    from huggingface_hub.utils import httpx

    assert is_transient(ConnectionResetError()) and is_transient(TimeoutError())
    assert is_transient(httpx.ReadTimeout("slow")) and is_transient(httpx.RemoteProtocolError("cut"))
    assert not is_transient(FileNotFoundError("x")) and not is_transient(ValueError("x"))
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = httpx.ConnectError("refused")
    assert is_transient(wrapped)


def test_text_files_know_their_format():
    assert TextFile("a.JSONL.GZ", lambda: None).format == "jsonl"
    with pytest.raises(UserError, match="not a format"):
        _ = TextFile("a.csv", lambda: None).format
