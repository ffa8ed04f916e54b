"""Every block of commands on the pages runs as it stands, with small models and text in place of the large ones."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import download_fineweb_all
import download_fineweb_subset
import evaluate
import export
import generate
from arguments import parse_arguments
from conftest import ROOT, tiny_llama_config
from helpers import runs
from helpers.hub_server import LoopbackHub
from helpers.pages import PAGES, Desk, blocks

# Blocks that do not run here: a part of their text, or their page, and why.
NOT_RUN = {
    "make demo": "the demo itself takes minutes, the suite would run itself",
    "pip install -r requirements.txt": "installs packages and asks for an account",
    "--tasks arc_easy": "needs lm-evaluation-harness and its data; tests/evaluation/test_evaluate.py runs both",
    "--suite standard": "as the line above",
    "--output_dir runs/llama-eight": "its file is tried by the block before; README.md starts runs in both ways",
    "--output_dir runs/llama-own": "a choice of layers takes long; README.md and docs/serving.md run its flags",
    "vllm serve": "needs vLLM; tests/engines.sh runs it",
    "transformers chat": "a server does not end, and asks for packages of its own",
    "docs/schedulers.md": "needs a scheduler; tests/run/test_schedulers.py parses and runs its files",
}
# What is done before a block and after it, where a reader would wait, or knows what he has.
UNTIL = "for try in $(seq 2400); do grep -q '{}' {} && break; sleep 0.1; done; grep -q '{}' {}"
TRAINS, SAVED = (UNTIL.format(*2 * (text, "train.log")) for text in ("step 3", "saved"))
BEFORE = {
    "nohup python": "export STEPS=1000000",
    "kill -": TRAINS,
    "--local_files_only": "hub=$HF_ENDPOINT; export HF_ENDPOINT=http://127.0.0.1:9",
}
AFTER = {
    "kill -USR1": SAVED,
    "kill -TERM": "wait %1 || [ $? = 143 ]; unset STEPS",
    "> all.log": UNTIL.format(*2 * ("finished", "all.log")),
    "--local_files_only": "export HF_ENDPOINT=$hub",
}
PARSERS = {
    "train.py": parse_arguments,
    "evaluate.py": evaluate.parse,
    "export.py": export.parse,
    "generate.py": generate.parse,
    "download_fineweb_subset.py": download_fineweb_subset.parse,
    "download_fineweb_all.py": download_fineweb_all.parse,
    "download_all.py": parse_arguments,
}


def found_in(table, block):
    """What a table says of a block."""
    return [said for part, said in table.items() if part in block.code or part == block.page]


def runs_here(block):
    return block.language in ("bash", "python") and not found_in(NOT_RUN, block)


@pytest.fixture(scope="session")
def hub(tmp_path_factory, tokenizer_dir, documents):
    """The models and the text that the pages name, in a small size."""
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub() as server:
        for name, model in small_models().items():
            model.save_pretrained(folder / name)
            for file in tokenizer_dir.iterdir():
                (folder / name / file.name).write_bytes(file.read_bytes())
            server.add("models", name, folder / name)
        sources = {"HuggingFaceFW/fineweb-edu": write_text, "teknium/OpenHermes-2.5": write_turns}
        for name, write in {**sources, "HuggingFaceTB/cosmopedia": write_stories}.items():
            write(folder / name, documents)
            server.add("datasets", name, folder / name)
        yield server


def small_models():
    """Models by their Hub names, with the depth that the flags on the pages ask for."""
    from transformers import LlamaForCausalLM

    from models import LlambaConfig, LlambaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    ssm = {"d_state": 8, "n_v_heads": 2, "n_qk_heads": 2}
    llamba = LlambaConfig(vocab_size=512, d_model=16, n_layer=32, mlp_cfg={"intermediate_size": 32}, ssm_cfg=ssm)
    llama = {
        "meta-llama/Llama-3.1-8B-Instruct": dict(num_hidden_layers=32),
        "HuggingFaceTB/SmolLM2-135M-Instruct": dict(num_hidden_layers=30, tie_word_embeddings=True),
    }
    models = {name: LlamaForCausalLM(tiny_llama_config(**sizes, **more)) for name, more in llama.items()}
    return {**models, "goombalab/Llamba-8B-untied-unaligned": LlambaForCausalLM(llamba)}


def write_text(folder: Path, documents):
    """A subset of FineWeb-Edu."""
    (folder / "data" / "CC-MAIN-2014-49").mkdir(parents=True)
    table = pa.table({"text": [text[:2000] for text in documents[:60]]})
    pq.write_table(table, folder / "data" / "CC-MAIN-2014-49" / "train-00000-of-00001.parquet")


def write_stories(folder: Path, documents):
    """A data set with a subset of the name that the page mixes in."""
    (folder / "data" / "stories").mkdir(parents=True)
    table = pa.table({"text": [text[:2000] for text in documents[20:40]]})
    pq.write_table(table, folder / "data" / "stories" / "train-00000-of-00001.parquet")


def write_turns(folder: Path, documents):
    """OpenHermes-2.5: one JSON file, a list of conversations."""
    folder.mkdir(parents=True)
    turns = [[{"from": "human", "value": text[:40]}, {"from": "gpt", "value": text[:400]}] for text in documents[:40]]
    rows = [{"conversations": turn, "system_prompt": None} for turn in turns]
    (folder / "openhermes2_5.json").write_text(json.dumps(rows, indent=2))


def furnish(folder: Path, documents):
    """Files that a page takes for the reader's own."""
    sources = runs.write_sources(folder, documents)
    sources["conversations"].rename(folder / "talk.jsonl.gz")
    (folder / "text").mkdir()
    runs.write_rows(folder / "code.jsonl.gz", [{"text": text} for text in documents[40:60]])
    runs.write_rows(folder / "text" / "own.jsonl.gz", [{"body": text} for text in documents[:20]])


RUN_HERE = [page for page in PAGES if not page.startswith("benchmarks")]  # those need a GPU


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN_HERE if any(map(runs_here, blocks(page)))])
def test_every_block_runs_as_it_stands(page, hub, tmp_path, documents):
    with Desk(tmp_path, hub) as desk:
        furnish(desk.folder, documents)
        for block in blocks(page):
            if not runs_here(block):
                continue
            for code in (*found_in(BEFORE, block), block.code, *found_in(AFTER, block)):
                status, output = desk.run(code, block.language if code is block.code else "bash")
                assert status == 0, f"{block}\n{code}\n{output[-3000:]}"


def test_a_block_that_fails_is_seen(hub, tmp_path):
    """The first failure of a block counts, whatever comes after it; that of a job once it is asked for."""
    with Desk(tmp_path, hub) as desk:
        assert desk.run("true\n(exit 3)\ntrue\n")[0] == 3
        assert desk.run("echo all is well") == (0, "all is well")
        assert desk.run("(exit 4) & wait %1\n")[0] == 4
        assert desk.run("raise SystemExit(5)\n", "python")[0] == 5
        status, output = desk.run("python train.py --device cuda:7 --dtype nonsense\n")
        assert status == 2 and output.startswith("error: argument --dtype")


@pytest.mark.parametrize("table", [NOT_RUN, BEFORE, AFTER])
def test_what_is_said_of_blocks_is_said_of_some(table):
    every = [block for page in RUN_HERE for block in blocks(page)]
    for part, said in table.items():
        assert any(found_in({part: said}, block) for block in every), part


@pytest.mark.parametrize("page", PAGES)
def test_flags_of_every_command_are_known(page):
    """Also of those that are not run: scripts by their own parsers, benchmarks by what they declare."""
    for block in blocks(page):
        for line in block.commands() if block.language == "bash" else ():
            words = list(itertools.takewhile(lambda word: not set(word) & set(">&|;"), shlex.split(line)))
            if "--config" in words:  # a file that an earlier block made
                at = words.index("--config")
                words[at : at + 2] = []
            for name, parse in PARSERS.items():
                if name in words:
                    parse(words[words.index(name) + 1 :])
            for module in re.findall(r"-m benchmarks\.(\w+)", line):
                given = {word for word in words[words.index("-m") :] if word.startswith("--")}
                assert given <= declared(module), f"{block}: {line}"
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"{block}: {line}"


def declared(module):
    """The flags of a benchmark, with train.py's where it hands on what it does not know."""
    source = (ROOT / "benchmarks" / f"{module}.py").read_text()
    own = {f"--{name}" for name in re.findall(r'"--(\w+)"', source)}
    return own | {f"--{name}" for name in vars(parse_arguments([]))} if "parse_known_args" in source else own
