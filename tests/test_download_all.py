"""One command brings all that a run needs; the same flags then work in a network namespace without a route."""

import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from helpers import runs
from helpers.hub_server import LoopbackHub

ALONE = ["unshare", "--net", "--map-root-user"]
CANNOT = shutil.which("unshare") is None or subprocess.run([*ALONE, "true"], capture_output=True).returncode != 0
README = "---\nconfigs:\n- config_name: part\n  data_files:\n  - split: train\n    path: part/*\n---\n"


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_teacher, sources):
    """A teacher, and three data sets; the first has a configuration and a file that no run of it needs."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("train", "conversations", "heldout"):
        part = folder / name / ("part" if name == "train" else "")
        part.mkdir(parents=True)
        shutil.copy(sources[name], part / f"{name}.jsonl.gz")
    (folder / "train" / "README.md").write_text(README)
    (folder / "train" / "other").mkdir()
    shutil.copy(sources["heldout"], folder / "train" / "other" / "large.jsonl.gz")
    with LoopbackHub() as server:
        server.add("models", "org/teacher", tiny_teacher)
        for name in ("train", "conversations", "heldout"):
            server.add("datasets", f"org/{name}", folder / name)
        yield server


def command(output, **changes):
    names = {"train": "org/train", "conversations": "org/conversations"}
    chosen = dict(eval_dataset="org/heldout", eval_interval=2, eval_tokens=64, max_steps=2, network_patience=5)
    return runs.flags("org/teacher", names, output, dataset_subset="part", **{**chosen, **changes})


@pytest.mark.skipif(CANNOT, reason="no network namespaces here")
@pytest.mark.slow
def test_a_mirrored_run_needs_no_network(hub, tmp_path, run_script):
    home, flags = tmp_path / "home", command(tmp_path / "run")
    told = run_script("download_all.py", *flags, "--dry_run", env=hub.environment(home))
    assert told.returncode == 0 and "still to come" in told.stdout and not list(home.rglob("*.gz")), told.stderr
    done = run_script("download_all.py", *flags, env=hub.environment(home))
    assert done.returncode == 0 and "all is there" in done.stdout, done.stderr
    assert sorted({path.name for path in home.rglob("snapshots/*/**/*.gz")}) == [
        "conversations.jsonl.gz", "heldout.jsonl.gz", "train.jsonl.gz",
    ]  # fmt: skip
    again = run_script("download_all.py", *flags, "--dry_run", env=hub.environment(home))
    assert again.stdout.count(" 0 still to come") == 3
    alone = [*ALONE, sys.executable, str(ROOT / "train.py"), *flags, "--local_files_only"]
    env = {"PATH": "/usr/bin:/bin", "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    run = subprocess.run(alone, capture_output=True, text=True, env=env, timeout=200)
    assert run.returncode == 0, run.stdout[-1500:] + run.stderr[-1500:]
    assert [row["step"] for row in runs.metrics(tmp_path / "run") if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    next(home.rglob("snapshots/*/part/train.jsonl.gz")).unlink()
    flags = command(tmp_path / "other")
    again = run_script("train.py", *flags, "--local_files_only", env=hub.environment(home))
    assert again.returncode == 2 and "org/train" in again.stderr and "download_all.py" in again.stderr, again.stderr


@pytest.mark.slow
def test_what_is_missing_is_named_with_what_helps(hub, tmp_path, tiny_teacher, run_script, sources):
    flags = runs.flags(
        tiny_teacher, {"train": "org/train", "conversations": ""}, tmp_path / "run", local_files_only=True
    )
    done = run_script("train.py", *flags, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 2 and "download_all.py with the same flags brings it there" in done.stderr
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    shutil.copy(sources["train"], mirror / "train.jsonl.gz")
    done = run_script("train.py", *flags, env=hub.environment(mirror))
    assert done.returncode == 2 and "is a folder of text, not a cache" in done.stderr, done.stderr
    done = run_script(
        "download_all.py", *command(tmp_path / "run", eval_dataset="org/none"), env=hub.environment(mirror)
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "org/none" in done.stderr, done.stderr
