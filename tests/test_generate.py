"""generate.py: a conversation in the terminal, with a student and with its teacher."""

import io
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import generate
from helpers.teachers import make_student
from models import LlambaForCausalLM

FLAGS = ["--max_new_tokens", "12", "--temperature", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_teacher, tokenizer_dir):
    folder = tmp_path_factory.mktemp("student")
    make_student(AutoModelForCausalLM.from_pretrained(tiny_teacher), [1]).save_pretrained(folder)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="module", params=["student", "teacher"])
def folder(request, student, tiny_teacher):
    return {"student": student, "teacher": tiny_teacher}[request.param]


def answer_by_hand(folder, messages):
    """(text, tokens) of the greedy answer to a conversation, or to a text as it is."""
    kind = LlambaForCausalLM if (folder / "config.json").read_text().count('"llamba"') else AutoModelForCausalLM
    model, tokenizer = (
        kind.from_pretrained(folder, dtype="auto").eval(),
        PreTrainedTokenizerFast.from_pretrained(folder),
    )
    if isinstance(messages, str):
        tokens = tokenizer(messages, return_tensors="pt").input_ids
    else:
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    mask = torch.ones_like(tokens)
    made = model.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, disable_compile=True)
    made = made[0, tokens.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True), len(made)


def test_one_message(folder, capsys):
    assert (
        generate.main(["--model", str(folder), "--prompt", "What is a mixer?", "--system", "Be brief.", *FLAGS]) == 0
    )
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a mixer?"}]
    text, tokens = answer_by_hand(folder, told)
    printed = capsys.readouterr()
    assert printed.out == text + "\n"
    assert re.search(rf"^\[{tokens} tokens, the first after [\d.]+ s, [\d.]+ tokens/s\]$", printed.err, re.M)


def test_a_conversation_that_is_forgotten(student, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("One.\n\nTwo.\n/new\nTwo.\n"))
    assert generate.main(["--model", str(student), *FLAGS]) == 0
    told, wanted = [], ""
    for message in ("One.", "Two."):
        told.append({"role": "user", "content": message})
        told.append({"role": "assistant", "content": answer_by_hand(student, told)[0]})
        wanted += told[-1]["content"] + "\n"
    wanted += answer_by_hand(student, [{"role": "user", "content": "Two."}])[0] + "\n"
    assert capsys.readouterr().out == wanted


def test_without_a_chat_template_text_is_continued(student, tmp_path, capsys):
    plain = tmp_path / "plain"
    shutil.copytree(student, plain)
    (plain / "chat_template.jinja").unlink()
    assert generate.main(["--model", str(plain), "--prompt", "The with statement", *FLAGS]) == 0
    assert capsys.readouterr().out == answer_by_hand(plain, "The with statement")[0] + "\n"


def test_an_answer_that_is_interrupted(student, capsys, monkeypatch):
    """Ctrl-C ends the answer and not the conversation; nothing is left running."""
    model, tokenizer = generate.load(generate.parse(["--model", str(student), "--device", "cpu"]))
    chat = generate.Chat(model, tokenizer, generate.parse(["--model", "", "--temperature", "0"]))
    pieces, answers = generate.Answer.pieces, []

    def interrupted(answer):
        answers.append(answer)
        yield next(pieces(answer))
        raise KeyboardInterrupt

    monkeypatch.setattr(generate.Answer, "pieces", interrupted)
    chat.say("One.")
    assert not answers[0].thread.is_alive() and 0 < len(answers[0].times) < 1024
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("flags", "said"),
    {
        "no model": (["--model", "./nowhere"], "nowhere does not exist"),
        "temperature": (["--model", "x", "--temperature", "-1"], "--temperature.*'-1' is not a number of at least 0"),
        "top_p": (["--model", "x", "--top_p", "0"], "--top_p.*'0' is not a number above 0 and at most 1"),
        "tokens": (["--model", "x", "--max_new_tokens", "0"], "--max_new_tokens.*'0' is not a whole number"),
    }.values(),
)
def test_mistakes_are_one_line(flags, said, capsys):
    try:
        status = generate.main(flags)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr().err.strip()
    assert status == 2 and re.search(said, printed) and len(printed.splitlines()) == 1
