"""Both download scripts in real processes against a loopback Hub, interrupted, damaged and starved."""

import contextlib
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROOT
from helpers import runs
from helpers.hub_server import COMMIT, LoopbackHub

README = """---
configs:
- config_name: CC-MAIN-2014-49
  data_files:
  - split: train
    path: data/CC-MAIN-2014-49/*
- config_name: CC-MAIN-2024-10
  data_files:
  - split: train
    path: data/CC-MAIN-2024-10/*
---
"""
ROWS = 300


@pytest.fixture(scope="module")
def repository(tmp_path_factory, documents):
    """A FineWeb-Edu-like repository: two configurations of two parquet files each."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "README.md").write_text(README)
    for subset in ("CC-MAIN-2014-49", "CC-MAIN-2024-10"):
        (folder / "data" / subset).mkdir(parents=True)
        for part in range(2):
            texts = [f"{subset} {part} {i}: {documents[i % 40][:700]}" for i in range(ROWS // 2)]
            table = pa.table({"text": texts, "id": [f"{part}-{i}" for i in range(len(texts))]})
            pq.write_table(table, folder / "data" / subset / f"train-{part:05}-of-00002.parquet", row_group_size=40)
    return folder


@contextlib.contextmanager
def loopback(repository):
    with LoopbackHub() as server:
        server.add("datasets", "org/fineweb", repository)
        server.add("datasets", "org/gated", repository, gated=True)
        yield server


@pytest.fixture
def hub(repository):
    with loopback(repository) as server:
        yield server


def subset_flags(output, *more):
    return [
        "--dataset", "org/fineweb", "--output_dir", str(output), "--samples_per_file", "70", "--network_patience",
        "20", *more,
    ]  # fmt: skip


def texts_of(folder):
    shards = sorted(folder.glob("shard-*"))
    lines = [line for shard in shards for line in gzip.decompress(shard.read_bytes()).decode().splitlines()]
    return [json.loads(line)["text"] for line in lines]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


@pytest.fixture(scope="module")
def whole(repository, tmp_path_factory, run_script):
    """A download over a network without faults; nothing writes there."""
    folder = tmp_path_factory.mktemp("download")
    flags = subset_flags(folder / "whole")
    with loopback(repository) as server:
        done = run_script("download_fineweb_subset.py", *flags, env=server.environment(folder))
    assert done.returncode == 0, done.stderr
    return folder / "whole"


def test_subset_holds_every_row_in_order(whole, repository):
    wanted = [
        text
        for file in sorted((repository / "data" / "CC-MAIN-2014-49").iterdir())
        for text in pq.read_table(file)["text"].to_pylist()
    ]
    assert texts_of(whole) == wanted
    manifest = json.loads((whole / "manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [70, 70, 70, 70, 20]
    for shard in manifest["shards"]:
        content = (whole / shard["name"]).read_bytes()
        assert shard["bytes"] == len(content) and shard["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["commit"] == COMMIT and manifest["complete"]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(hub, whole, tmp_path):
    rng = random.Random(seed := random.SystemRandom().randrange(2**32))
    print(f"seed {seed}")
    output, env = tmp_path / "again", {**os.environ, **hub.environment(tmp_path)}
    command = [sys.executable, str(ROOT / "download_fineweb_subset.py"), *subset_flags(output)]
    for _ in range(6):
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.6 + 1.6 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, env=env, capture_output=True, timeout=60).returncode == 0
    assert contents(output) == contents(whole)


def test_it_goes_on_after_max_samples_without_reading_again(hub, whole, tmp_path, run_script, repository):
    output, env = tmp_path / "parts", hub.environment(tmp_path)
    first = run_script("download_fineweb_subset.py", *subset_flags(output, "--max_samples", "210"), env=env)
    assert first.returncode == 0 and len(contents(output)) == 3 and "rows/s" in first.stdout
    hub.requests.clear()
    second = run_script("download_fineweb_subset.py", *subset_flags(output), env=env)
    assert second.returncode == 0 and contents(output) == contents(whole)
    first_file = repository / "data" / "CC-MAIN-2014-49" / "train-00000-of-00002.parquet"
    ranges = [where for method, path, where in hub.requests if method == "GET" and path.endswith(first_file.name)]
    starts = [int(where.removeprefix("bytes=").split("-")[0]) for where in ranges if where]
    footer = int.from_bytes(first_file.read_bytes()[-8:-4], "little") + 8
    assert len(starts) == len(ranges) and min(starts) >= first_file.stat().st_size - max(footer, 64 * 1024)


@pytest.mark.parametrize(
    "fault",
    [
        dict(kind="status", status=429, retry_after=0.3, count=2),
        dict(kind="status", status=500, count=3),
        dict(kind="cut", count=2),
        dict(kind="truncate", count=1),
        dict(kind="stall", seconds=4.0, count=1),
    ],
    ids=["429", "500s", "cut", "truncated", "stalled"],
)
def test_faults_are_ridden_out(hub, whole, tmp_path, run_script, fault):
    hub.fail(".parquet", **fault)
    done = run_script("download_fineweb_subset.py", *subset_flags(tmp_path / "again"), env=hub.environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "again") == contents(whole)
    assert hub.faults[0].count == 0


def test_an_outage_longer_than_the_patience_is_one_line(hub, tmp_path, run_script):
    hub.fail(".parquet", kind="status", status=503, count=10**6)
    flags = subset_flags(tmp_path / "out")
    flags[flags.index("--network_patience") + 1] = "1"
    done = run_script("download_fineweb_subset.py", *flags, env=hub.environment(tmp_path))
    assert done.returncode == 1
    assert "run it again to go on" in done.stderr and "Traceback" not in done.stderr


def test_other_parameters_refuse_and_a_finished_download_says_so(hub, whole, tmp_path, run_script):
    env = hub.environment(tmp_path)
    other = run_script("download_fineweb_subset.py", *subset_flags(whole, "--compression", "none"), env=env)
    assert other.returncode == 2 and "--compression none" in other.stderr
    again = run_script("download_fineweb_subset.py", *subset_flags(whole), env=env)
    assert again.returncode == 0 and "is complete: 300 rows in 5 shards" in again.stdout


@pytest.mark.parametrize("script", ["download_fineweb_subset.py", "download_fineweb_all.py"])
def test_gated_without_a_token(hub, tmp_path, run_script, script):
    flags = ["--dataset", "org/gated", "--output_dir", str(tmp_path / "out")]
    done = run_script(script, *flags, env=hub.environment(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "hf auth login" in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_subset_trains(whole, tmp_path, tiny_teacher, run_script):
    sources = {"train": whole, "conversations": ""}
    argv = runs.flags(tiny_teacher, sources, tmp_path / "run", max_steps=2, local_files_only=True)
    done = run_script("train.py", *argv, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-1500:]


def mirror_flags(output, *more):
    return ["--dataset", "org/fineweb", "--output_dir", str(output), "--network_patience", "10", *more]


def test_mirror_dry_run_writes_nothing(hub, tmp_path, run_script, repository):
    done = run_script(
        "download_fineweb_all.py", *mirror_flags(tmp_path / "mirror", "--dry_run"), env=hub.environment(tmp_path)
    )
    assert done.returncode == 0 and "5 files" in done.stdout, done.stderr
    assert not (tmp_path / "mirror").exists()


def test_mirror_is_verified_repaired_and_trains(hub, tmp_path, run_script, repository, tiny_teacher):
    flags = mirror_flags(tmp_path / "mirror", "--only_parquet", "--subsets", "CC-MAIN-2014-49")
    env = hub.environment(tmp_path)
    done = run_script("download_fineweb_all.py", *flags, env=env)
    assert done.returncode == 0 and "all 2 files verified" in done.stdout, done.stderr
    files = sorted((tmp_path / "mirror" / "data" / "CC-MAIN-2014-49").iterdir())
    originals = [repository / "data" / "CC-MAIN-2014-49" / file.name for file in files]
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in originals]
    assert not (tmp_path / "mirror" / "data" / "CC-MAIN-2024-10").exists()
    content = bytearray(files[0].read_bytes())
    content[len(content) // 2] ^= 1
    files[0].write_bytes(content)
    files[1].unlink()
    again = run_script("download_fineweb_all.py", *flags, env=env)
    assert again.returncode == 0 and "is damaged: it is fetched again" in again.stdout, again.stderr
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in originals]
    sources = {"train": tmp_path / "mirror", "conversations": ""}
    changes = dict(max_steps=2, dataset_subset="CC-MAIN-2014-49", local_files_only=True)
    trained = run_script("train.py", *runs.flags(tiny_teacher, sources, tmp_path / "run", **changes))
    assert trained.returncode == 0, trained.stderr[-1500:]


def test_conversations_are_kept_as_they_are(tmp_path, sources, run_script):
    """OpenHermes has no text column; train.py reads the shards as it reads the data set itself."""
    folder = tmp_path / "OpenHermes"
    folder.mkdir()
    rows = [json.loads(line) for line in gzip.decompress(sources["conversations"].read_bytes()).splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    with LoopbackHub() as server:
        server.add("datasets", "org/OpenHermes", folder)
        flags = ["--dataset", "org/OpenHermes", "--output_dir", tmp_path / "out", "--network_patience", "5"]
        done = run_script("download_fineweb_subset.py", *flags, env=server.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    (shard,) = sorted((tmp_path / "out").glob("shard-*"))
    written = [json.loads(line) for line in gzip.decompress(shard.read_bytes()).splitlines()]
    assert written == [{"conversations": row["conversations"]} for row in rows]


def test_hf_home_is_created(hub, tmp_path, run_script):
    home = tmp_path / "new" / "home"
    flags = ["--dataset", "org/fineweb", "--output_dir", tmp_path / "out", "--hf_home", home, "--dry_run"]
    done = run_script("download_fineweb_all.py", *flags, env=hub.environment(tmp_path / "other"))
    assert done.returncode == 0 and home.is_dir(), done.stderr
