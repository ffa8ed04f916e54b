"""Speed of the data loader against its tokenizer alone, and how long a training loop waits for data.

    python -m benchmarks.data --tokenizer FOLDER [--data ../shared/data/fineweb_like/CC-MAIN-2014-49]

Same text, same process, in turns: the tokenizer's own batch call on texts in memory before and after each pass of the
loader, over parquet files and over the same text as JSONL.GZ. A loader's share is of the mean of the two tokenizer
passes beside it. Then a consumer that takes 15,000 tokens/s, and the share of its time that it waits. Run it with two
cores, `taskset -c 0,1 python -m benchmarks.data ...`; on a busy machine, many rounds over one file of `--data` tell
more than few over all.
"""

import argparse
import gzip
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

import pyarrow.parquet as pq  # noqa: E402

from data import SourceSpec, TextLoader, build_loader  # noqa: E402
from text.documents import plain_backend  # noqa: E402


def tokenizer_rate(tokenizer, texts: list[str]) -> tuple[float, int]:
    """(tokens/s, tokens) of the backend's fastest batch call, about a million characters a call, its best size."""
    backend, batch, tokens, characters = plain_backend(tokenizer), [], 0, 0
    since = time.perf_counter()
    for text in [*texts, None]:
        if text is None or characters > 1 << 20:
            tokens += sum(len(e.ids) for e in backend.encode_batch_fast(batch, add_special_tokens=False))
            batch, characters = [], 0
        if text is not None:
            batch.append(text)
            characters += len(text)
    return tokens / (time.perf_counter() - since), tokens


def loader_rate(loader: TextLoader, tokens: int) -> float:
    """Tokens/s of an endless loader over as many tokens as a pass has, from its first batch on.

    At the first batch it has read a block ahead, and at the end, a pass later, again: what lies between is the work
    of one whole pass. The wait for the first batch is told apart.
    """
    batches, left = iter(loader), tokens
    next(batches)
    since = time.perf_counter()
    while left > 0:
        left -= next(batches).tokens.numel()
    rate = (tokens - left) / (time.perf_counter() - since)
    loader.close()
    return rate


def waiting_share(loader: TextLoader, rate: float, steps: int) -> tuple[float, float]:
    """(seconds until the first batch, share of the time behind it that a consumer of `rate` tokens/s waits)."""
    batches = iter(loader)
    since = time.perf_counter()
    tokens = next(batches).tokens.shape[1] - 1
    first = time.perf_counter() - since
    since, waited = time.perf_counter(), loader.waited_seconds
    for _ in range(steps):
        time.sleep(tokens / rate)
        next(batches)
    return first, (loader.waited_seconds - waited) / (time.perf_counter() - since)


def write_gzip(folder: Path, texts: list[str]) -> None:
    """The texts as four shards, as download_fineweb_subset.py writes them."""
    for shard in range(4):
        with gzip.open(folder / f"shard-{shard:05d}.jsonl.gz", "wt", encoding="utf-8", compresslevel=6) as handle:
            handle.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[shard::4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of a fast tokenizer")
    parser.add_argument(
        "--data", default=str(ROOT.parent / "shared/data/fineweb_like/CC-MAIN-2014-49"), help="folder or file"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seq_length", type=int, default=4096, help="tokens")
    parser.add_argument("--wait_steps", type=int, default=100, help="steps of the consumer at 15,000 tokens/s")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    data = Path(args.data)
    files = [data] if data.is_file() else sorted(data.glob("*.parquet"))
    texts = [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]

    def load(folder: object) -> TextLoader:
        return build_loader(SourceSpec(str(folder)), tokenizer, seq_length=args.seq_length, batch_size=1)

    with tempfile.TemporaryDirectory() as scratch:
        write_gzip(Path(scratch), texts)
        folders = {"parquet": args.data, "jsonl.gz": scratch}
        print(f"{len(os.sched_getaffinity(0))} cores, {sum(map(len, texts)):,} characters, {args.rounds} rounds")
        rates: dict[str, list[float]] = {name: [] for name in folders}
        shares: dict[str, list[float]] = {name: [] for name in folders}
        rate, tokens = tokenizer_rate(tokenizer, texts)
        alone = [rate]
        for round_number in range(1, args.rounds + 1):
            for name, folder in folders.items():
                rates[name].append(loader_rate(load(folder), tokens))
                alone.append(tokenizer_rate(tokenizer, texts)[0])
                shares[name].append(rates[name][-1] / statistics.mean(alone[-2:]))
                print(f"round {round_number}, {name:8} {rates[name][-1]:12,.0f} tokens/s {shares[name][-1]:7.1%}")
        print(f"tokenizer alone {statistics.median(alone):12,.0f} tokens/s ({min(alone):,.0f} to {max(alone):,.0f})")
        for name in folders:
            rate, share = statistics.median(rates[name]), statistics.median(shares[name])
            print(f"loader, {name:8} {rate:11,.0f} tokens/s {share:7.1%} of the tokenizer alone")
        for name, folder in folders.items():
            first, share = waiting_share(load(folder), 15_000, args.wait_steps)
            print(f"{name:8} first batch after {first:.2f} s; then waits {share:.3%} of the time at 15,000 tokens/s")


if __name__ == "__main__":
    main()
