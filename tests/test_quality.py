"""benchmarks/quality.py in a process of its own: results that outlive a kill, budgets, the report."""

import json

import pytest

from helpers import runs


@pytest.fixture
def bench(tmp_path, tiny_teacher, documents, run_script):
    """Runs the benchmark on tiny experiments; returns the finished process."""
    sources = runs.write_sources(tmp_path / "text", documents)
    lines = [
        "# comment",
        "base: --batch_size 2 --hidden_tokens 512 --max_lr 1e-3 --shuffle_buffer 16",
        "one: @base --layers 1",
        "none: @base --layers -1 --hidden_tokens 0 --second_dataset_tokens 256",
        "bad: @base --layers 1 --max_lr 1e30 --max_bad_steps 2 --grad_clip 1e30 --hidden_tokens 0",
        "greedy: @base --layers 1 --hidden_tokens 99999",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")

    def call(*flags):
        return run_script(
            "benchmarks.quality", "--teacher", tiny_teacher, "--train", sources["train"], "--valid",
            sources["heldout"], "--stage2", sources["conversations"], "--experiments", tmp_path / "list.txt",
            "--tokens", 1500, "--seq_length", 64, "--evaluations", 3, "--eval_tokens", 256, "--recall_pairs", 2,
            "--recall_lengths", 128,
            "--recall_rows", 2, "--device", "cpu", "--dtype", "float32", "--output", tmp_path / "out", *flags,
        )  # fmt: skip

    return call


def rows_of(folder):
    return {row["name"]: row for row in map(json.loads, (folder / "results.jsonl").read_text().splitlines())}


@pytest.mark.slow
def test_results_table_plot_and_what_is_done_is_not_done_again(bench, tmp_path):
    done = bench("--only", "one", "none", "bad")
    assert done.returncode == 1, done.stderr[-3000:]
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["one", "none", "bad"] and "status 4" in rows["bad"]["error"]
    one = rows["one"]
    assert {name: found["tokens"] for name, found in one["stages"].items()} == {"hidden": 512, "stage1": 896}
    assert {name: found["tokens"] for name, found in rows["none"]["stages"].items()} == {
        "stage1": 1152,
        "stage2": 256,
    }
    assert all(found["tokens_per_second"] > 0 for found in one["stages"].values())
    assert one["attention_layers"] == [1] and rows["none"]["attention_layers"] == []
    assert [point[0] for point in one["curve"]] == [0, 384, 512, 768, 1152, 1408] and one["held_out"]["kl"] > 0
    assert 0 <= one["recall"]["phone_book/2"]["student"] <= 1 and one["recall_share"]["all"]["of"] == 12
    table = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:5]] == ["| one", "| none", "| teacher"]
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out" / "runs").glob("one/checkpoint-*"))
    again = bench("--only", "one")
    assert again.returncode == 0 and "==" not in again.stdout and rows_of(tmp_path / "out") == rows
    text = (tmp_path / "list.txt").read_text()
    (tmp_path / "list.txt").write_text(text.replace("one: @base", "one: @base --tokens 1024 --max_lr 5e-4"))
    changed = bench("--only", "one")
    assert changed.returncode == 0, changed.stderr[-3000:]
    one = rows_of(tmp_path / "out")["one"]
    assert "5e-4" in one["flags"] and one["stages"]["stage1"]["tokens"] == 512


def test_mistakes_are_found_before_anything_runs(bench, tmp_path):
    for flags, words in (
        (["--only", "one", "two"], ["--only two"]),
        (["--only", "greedy"], ["greedy", "--tokens"]),
        (["--only", "one", "--tokens", "100"], ["--tokens"]),
    ):
        done = bench(*flags)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
            done.stderr
        )
        assert all(word in done.stderr for word in words) and not (tmp_path / "out").exists()
    with (tmp_path / "list.txt").open("a") as file:
        file.write("three: @four --layers 1\n")
    assert "@four" in bench("--only", "one").stderr
