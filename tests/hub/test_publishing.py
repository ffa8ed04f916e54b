"""A checkpoint pushed to a (loopback) Hub and loaded from there where this repository is not; its model card."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
from huggingface_hub import ModelCard

from checkpoints.files import damage
from checkpoints.model_card import model_card
from evaluation.card import write_into_card
from helpers.hub_server import LoopbackHub
from helpers.teachers import TEACHERS, make_student, make_teacher
from model_utils import get_student_model

PUSH = """
import sys
from huggingface_hub import upload_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).push_to_hub(name)
AutoTokenizer.from_pretrained(folder, trust_remote_code=True).push_to_hub(name)
upload_file(path_or_fileobj=folder + "/README.md", path_in_repo="README.md", repo_id=name)
"""
UPLOAD = """
import sys
from huggingface_hub import HfApi
folder, name = sys.argv[1:]
HfApi().create_repo(name)
HfApi().upload_folder(repo_id=name, folder_path=folder)
"""
LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
name, results = sys.argv[1:]
config = AutoConfig.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(model.config) is type(config) and config.attention_layers == [1]
tokens = tokenizer("The history of the import statement", return_tensors="pt").input_ids
generated = model.generate(tokens, max_new_tokens=8, do_sample=False)
torch.save([tokens, model(tokens).logits, generated], results)
"""
METADATA = {
    "progress": {"tokens": 1_234_567, "optimizer_step": 1200, "evaluation": {}, "best": {}},
    "flags": {
        "teacher_model": "org/teacher", "student_model": "from_teacher", "dataset_name": "org/text",
        "second_dataset_name": "talk.jsonl.gz", "skip_stage2": False, "eval_dataset": "held.jsonl", "layers": [1],
        "wandb_entity": None, "resume_force": False,
    },
    "versions": {"torch": "2.13.0"},
}  # fmt: skip
FIGURES = dict(kl=0.25, top1_agreement=0.75, student_perplexity=9.0, teacher_perplexity=8.0, perplexity_ratio=1.125)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_dir):
    """(folder, student): a hybrid as a run leaves it: weights, remote code, tokenizer, card, manifest."""
    from transformers import AutoTokenizer

    from checkpoints.store import CheckpointStore

    student = make_student(make_teacher(TEACHERS["llama3 rope"]), [1])
    student.requires_grad_(False)
    store = CheckpointStore(tmp_path_factory.mktemp("run"))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    card = model_card(METADATA)
    options = dict(tokenizer=tokenizer, trainer_state={}, metadata=METADATA, model_card=card)
    assert store.save("final", model=student, **options) and store.wait()
    return store.output_dir / "final", student


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


def elsewhere(code, *arguments, hub, folder):
    """Run code in a process of its own that has the Hub and not this repository."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("HF_")}
    env |= hub.environment(folder / "home")
    if "TRANSFORMERS_UNDER_TEST" in os.environ:  # another release's folder
        env["PYTHONPATH"] = os.environ["TRANSFORMERS_UNDER_TEST"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["push_to_hub", "upload_folder"])
def test_pushed_and_loaded_from_the_hub(checkpoint, hub, tmp_path, way):
    folder, student = checkpoint
    name = f"someone/{way}"
    elsewhere(PUSH if way == "push_to_hub" else UPLOAD, folder, name, hub=hub, folder=tmp_path)
    uploaded = {path.name for path in hub.repositories["models", name].iterdir()}
    assert {"config.json", "tokenizer.json", "modeling_llamba.py", "state_space.py", "README.md"} <= uploaded
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    elsewhere(LOAD, name, fresh / "results.pt", hub=hub, folder=fresh)
    tokens, logits, generated = torch.load(fresh / "results.pt")
    with torch.no_grad():
        assert torch.allclose(logits, student(tokens).logits, atol=1e-5)
    assert torch.equal(generated, student.generate(tokens, max_new_tokens=8, do_sample=False))
    card = (hub.repositories["models", name] / "README.md").read_text()
    assert "student of org/teacher" in card and "1,234,567 tokens in 1,200 optimizer steps" in card


def test_a_spoilt_upload_is_refused(hub):
    """The Hub of these tests checks what it is sent, so that the test above can fail."""
    request = urllib.request.Request(f"{hub.url}/lfs/{'0' * 64}", data=b"content", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=10)


def test_the_card_says_what_the_model_is():
    card = model_card(METADATA)
    data = ModelCard(card).data
    assert data.base_model == "org/teacher" and data.datasets == ["org/text"]
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert "- text: `org/text`, then `talk.jsonl.gz`" in card and "torch 2.13.0" in card
    assert "| `--layers` | `[1]` |" in card and "| `--resume_force` | `False` |" in card
    assert "--wandb_entity" not in card and "held-out" not in card


def test_the_card_has_the_held_out_figures():
    metadata = json.loads(json.dumps(METADATA))
    last = {**FIGURES, "tokens": 4096.0, "step": 1200}
    metadata["progress"] |= {"evaluation": last, "best": last}
    card = model_card(metadata)
    assert (
        "- held-out text `held.jsonl`, 4,096 tokens, at step 1,200: KL(teacher, student) 0.2500 nats a token, top-1 "
        "agreement 75.0%, perplexity 9.000 (1.125 times the teacher's 8.000)\n"
    ) in card
    assert "lowest" not in card
    metadata["progress"]["best"] = {**last, "kl": 0.2, "step": 600}
    assert "- lowest held-out KL of the run: 0.2000 at step 600\n" in model_card(metadata)


def test_a_card_shows_no_folder_of_this_machine(tmp_path):
    metadata = json.loads(json.dumps(METADATA))
    metadata["flags"] |= {"teacher_model": f"{tmp_path}/teacher", "dataset_name": f"{tmp_path}/text.jsonl.gz"}
    metadata["flags"] |= {"output_dir": "/elsewhere/run", "mix": ["/elsewhere/code.jsonl=0.2"]}
    card = model_card(metadata)
    assert str(tmp_path) not in card and "elsewhere" not in card
    assert "student of teacher" in card and "- text: `text.jsonl.gz`" in card and "code.jsonl=0.2" in card


def test_a_llamas_licence_is_named():
    metadata = json.loads(json.dumps(METADATA))
    assert "Built with Llama" not in model_card(metadata)
    metadata["flags"]["teacher_model"] = "meta-llama/Llama-3.1-8B-Instruct"
    card = model_card(metadata)
    assert card.count("\nBuilt with Llama\n") == 1 and 'name with "Llama"' in card


def test_an_evaluation_goes_into_the_card(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint[0], tmp_path / "run" / "final")
    report = {"flags": {"dataset_name": "/elsewhere/held.jsonl"}, "held_out": {**FIGURES, "tokens": 64.0},
              "recall_share": {"all": {"share": 0.5}, "trained": {"share": None}},
              "harness": {"piqa": {"acc": 0.75}}}  # fmt: skip
    for kl in (0.5, 0.25):  # a second evaluation takes the first one's place
        report["held_out"]["kl"] = kl
        assert write_into_card(folder, report)
        assert damage(folder) is None
    text = (folder / "README.md").read_text()
    assert text.count("| held.jsonl | KL(teacher, student), nats a token | 0.25 |") == 1 and "0.5 |" in text
    assert text.count("<!-- evaluation -->") == 1 and "elsewhere" not in text
    results = ModelCard(text).data.eval_results
    assert {(entry.dataset_name, entry.metric_type, entry.metric_value) for entry in results} >= {
        ("held.jsonl", "kl", 0.25), ("piqa", "acc", 0.75), ("recall in context", "all, share of the teacher's", 0.5),
    }  # fmt: skip
    assert not write_into_card(tmp_path, report)


def test_local_files_are_no_hub_links(tmp_path):
    metadata = json.loads(json.dumps(METADATA))
    metadata["flags"] |= {"teacher_model": str(tmp_path), "dataset_name": "text/", "skip_stage2": True}
    data = ModelCard(model_card(metadata)).data
    assert data.base_model is None and data.datasets is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_flag_reaches_a_hybrid_checkpoint(checkpoint, attention):
    folder, student = checkpoint
    teacher = make_teacher(TEACHERS["llama3 rope"])
    again = get_student_model(str(folder), teacher, dtype=torch.float32, attn_implementation=attention).eval()
    config = again.backbone.attention_config
    assert config._attn_implementation == attention and again.backbone.layers[1].self_attn.config is config
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits, student(tokens).logits, atol=1e-4)
