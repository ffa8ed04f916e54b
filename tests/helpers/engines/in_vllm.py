"""What vLLM computes with an exported student beside what is expected of it; runs in vLLM's environment.

`python in_vllm.py FOLDER/NAME/expected.json` prints rows of a table; with `--rates` tokens/s instead.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

NEAR_TIE = 1e-3
READ = 256  # tokens of prompts a step: longer ones are read in chunks


def compared(wanted: dict, output) -> tuple[int, bool, float]:
    """Equal tokens, whether the first other one is a near-tie, and the largest difference of a log-probability."""
    far, equal = 0.0, 0
    for token, other, lead, top, found in zip(
        wanted["tokens"], output.token_ids, wanted["leads"], wanted["top"], output.logprobs
    ):
        both = [(value, found[int(index)].logprob) for index, value in top.items() if int(index) in found]
        far = max(far, *(abs(one - two) for one, two in both))
        if token != other:
            assert lead < NEAR_TIE, f"{token} and not {other}, by {lead} nats"
            return equal, True, far
        equal += 1
    return equal, False, far


def main(file: Path, rates: bool) -> None:
    from vllm import LLM, SamplingParams

    wanted = json.loads(file.read_text())
    options = dict(max_num_seqs=2, max_num_batched_tokens=READ, enable_prefix_caching=False, max_logprobs=40)
    llm = LLM(str(file.parent / "granite"), dtype="float32", max_model_len=2048, enforce_eager=True, **options)
    prompts = [{"prompt_token_ids": row["prompt"]} for row in wanted]
    new = SamplingParams(temperature=0, max_tokens=len(wanted[0]["tokens"]), logprobs=20, ignore_eos=True)
    if rates:
        for length in (64, 1000):
            print(rate(llm, {"prompt_token_ids": wanted[-1]["prompt"][:length]}, SamplingParams))
        return
    for way, outputs in {
        "one at a time": [llm.generate(prompt, new)[0] for prompt in prompts],
        "two at once": llm.generate(prompts, new),
    }.items():
        rows = [compared(row, output.outputs[0]) for row, output in zip(wanted, outputs)]
        equal, total = sum(row[0] for row in rows), sum(len(row["tokens"]) for row in wanted)
        lengths = ", ".join(str(len(row["prompt"])) for row in wanted)
        parted, far = sum(row[1] for row in rows), max(row[2] for row in rows)
        print(f"| {file.parent.name} | {lengths} | {way} | {equal} of {total} | {parted} | {far:.1e} |")


def rate(llm, prompt: dict, params) -> str:
    """Tokens a second read, and generated one by one, by the difference of two calls, each the shortest of three."""

    def seconds(tokens: int) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            llm.generate(prompt, params(temperature=0, max_tokens=tokens, ignore_eos=True))
            times.append(time.perf_counter() - start)
        return min(times)

    first, more, length = seconds(1), seconds(33), len(prompt["prompt_token_ids"])
    return f"{'vLLM':22} {length:7,} {length / first:13,.0f} {32 / (more - first):18,.1f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), "--rates" in sys.argv)
