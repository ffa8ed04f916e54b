"""llama.cpp at work, in a process of its own: it ends the process where it does not like a file.

`python -m serving.llama_cpp` reads a request as JSON from standard input and prints an answer; `ask` calls it.
"""

import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

FLOAT32, DISABLED = 0, 0  # ggml's and llama.cpp's numbers


class EngineDiffers(Exception):
    """An engine does not take what was written, or computes something else with it."""


def is_installed() -> bool:
    """Whether the package xllamacpp, llama.cpp's own server as a Python module, is here."""
    return importlib.util.find_spec("xllamacpp") is not None


def ask(file: Path, **request: Any) -> dict[str, Any]:
    """What llama.cpp answers with a GGUF file, on one CPU core, with keys and values in float32.

    prompts: lists of token ids; new: tokens to generate greedily after each; top: how many log-probabilities at
    each; texts: to be tokenised; parallel: prompts at a time. Returns completions, for each prompt a list of
    {"id", "top": {id: log-probability}} (empty where it tells none); rates, of each prompt's tokens a second read and
    generated; and tokens, for each text its ids. Raises `EngineDiffers` with the reason where it gives up.
    """
    command = [sys.executable, "-m", "serving.llama_cpp"]
    options: dict[str, Any] = dict(cwd=Path(__file__).parents[1], env={**os.environ, "GGML_NO_BACKTRACE": "1"})
    text = json.dumps({"model": str(file.absolute()), **request})
    ended = subprocess.run(command, input=text, text=True, capture_output=True, **options)
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if "ASSERT" in line or " E " in line or "rror" in line]
        why = " ".join(" ".join(lines[:3] or ended.stderr.splitlines()[-3:]).split())
        raise EngineDiffers(f"llama.cpp ended with status {ended.returncode}: {why[:500]}")
    return json.loads(ended.stdout.splitlines()[-1])


def start(model: str, parallel: int = 1, context: int = 2048) -> Any:
    """llama.cpp's own server in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_gpu_layers = parallel * context, parallel, 0
    params.cache_type_k = params.cache_type_v = FLOAT32
    params.flash_attn_type, params.warmup, params.fit_params = DISABLED, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def post(server: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer of one of the server's own endpoints."""
    url, headers = f"{server.listening_address}/{path}", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)


def complete(server: Any, prompt: list[int], new: int, top: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The greedy tokens after a prompt, each with the likeliest `top` tokens in its place.

    The server tells nothing of a token that leaves the text no whole UTF-8. Also tokens/s read and generated.
    """
    options = {"temperature": 0.0, "cache_prompt": False, "return_tokens": True, "n_probs": top, "n_predict": new}
    answer = post(server, "completion", {"prompt": prompt, **options})
    told: dict[int, list[dict[int, float]]] = {}
    for entry in answer.get("completion_probabilities", []):
        likeliest = {other["id"]: other["logprob"] for other in entry["top_logprobs"]}
        told.setdefault(entry["id"], []).append(likeliest)
    tokens = answer["tokens"]
    unsure = {token for token in tokens if tokens.count(token) != len(told.get(token, []))}
    rates = {"read": answer["timings"]["prompt_per_second"], "generated": answer["timings"]["predicted_per_second"]}
    return [{"id": token, "top": {} if token in unsure else told[token].pop(0)} for token in tokens], rates


def main(request: dict[str, Any]) -> dict[str, Any]:
    from concurrent.futures import ThreadPoolExecutor

    parallel = request.get("parallel", 1)
    server = start(request["model"], parallel)
    with ThreadPoolExecutor(parallel) as pool:
        prompts = request.get("prompts", [])
        found = list(pool.map(lambda p: complete(server, p, request["new"], request["top"]), prompts))
    texts = [{"content": text, "add_special": True} for text in request.get("texts", [])]
    tokens = [post(server, "tokenize", body)["tokens"] for body in texts]
    return {"completions": [told for told, _ in found], "rates": [rates for _, rates in found], "tokens": tokens}


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
