"""Documents and conversations as tokens: special names stay text, splitting changes nothing, templates are kept."""

import json

import numpy as np
import pytest

from conftest import ROOT
from text import documents as module
from text.documents import BadDocument, DocumentEncoder, find_boundary, match_contents, plain_backend, split_text
from utils import UserError

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
)
TURNS = [
    {"from": "system", "value": "You are terse."},
    {"from": "human", "value": "  What is <|im_end|> or <|eot_id|>?\n"},
    {"from": "gpt", "value": "The name of a token: <|endoftext|>."},
]
AWKWARD = "\n".join(
    [
        "It's a test, isn't it?  Two  spaces, 3,141.59 and 22/7;\ttabs\tand   trailing   ",
        "naïve café, «привет мир», 中文 字符 and 한국어 문장, emoji 🙂🚀 x² y³ and e\u0301 f",
        "def f(x):\n    return {'a': x**2}  # I'll say WE'VE\r\n\r\n\n  indented",
    ]
    * 5
)


@pytest.fixture(scope="module")
def smollm(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="module")
def llama3(documents):
    """Llama 3's pre-tokeniser, post-processor, special tokens and way of templating, with a small vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(documents[:40], trainer)
    specials = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()
    backend.add_special_tokens(specials)
    bos = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|eot_id|>"
    )
    fast.chat_template = LLAMA3_TEMPLATE
    return fast


@pytest.fixture(scope="module")
def llama2(documents):
    """A sentencepiece-like tokenizer that puts a space before every text, with eos alone."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(documents[:40], trainer)
    backend.pre_tokenizer = None  # as in Llama 2: merges run over the whole text
    rebuilt = json.loads(backend.to_str())
    rebuilt["added_tokens"] = rebuilt["added_tokens"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rebuilt)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def ids_of(encoder: DocumentEncoder, value) -> list[int]:
    found: list[int] = []
    for segment in encoder.segments(value):
        found += encoder.encode([segment])[0].ids if isinstance(segment, str) else segment.tolist()
    return found


@pytest.mark.parametrize(
    ("kind", "separator"), [("smollm", "<|endoftext|>"), ("llama3", "<|end_of_text|>"), ("llama2", "</s>")]
)
def test_the_separator_is_end_of_text_and_names_stay_text(kind, separator, request):
    tokenizer = request.getfixturevalue(kind)
    text = f"before {separator} after <|im_end|><|eot_id|></s> end"
    ids = ids_of(DocumentEncoder(tokenizer), text)
    assert ids[-1] == tokenizer.convert_tokens_to_ids(separator)
    special = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    start = tokenizer("").input_ids  # Llama 3's own
    assert ids[: len(start)] == start and len(start) == (kind == "llama3")
    assert not special & set(ids[len(start) : -1])
    assert tokenizer.decode(ids[len(start) : -1]).strip() == text


@pytest.mark.parametrize("kind", ["smollm", "llama3", "llama2"])
def test_splitting_keeps_every_token(kind, request, documents, monkeypatch):
    tokenizer = request.getfixturevalue(kind)
    monkeypatch.setattr(module, "PIECE", 50)
    backend = plain_backend(tokenizer)
    boundary = find_boundary(backend)
    assert boundary is (module.DROP_SPACE if kind == "llama2" else module.KEEP_SPACE)
    for text in [AWKWARD, *documents[40:60]]:
        pieces = list(split_text(text, boundary))
        assert len(pieces) > len(text) / 200
        whole = backend.encode(text, add_special_tokens=False).ids
        assert [i for piece in pieces for i in backend.encode(piece, add_special_tokens=False).ids] == whole


def test_splitting_keeps_every_token_of_the_real_tokenizer(documents, monkeypatch):
    from transformers import AutoTokenizer

    folder = ROOT / ".cache" / "SmolLM2-135M-Instruct"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("make demo has not made SmolLM2 yet")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(module, "PIECE", 100)
    backend = plain_backend(tokenizer)
    for text in [AWKWARD, *documents]:
        pieces = list(split_text(text, find_boundary(backend)))
        whole = backend.encode(text, add_special_tokens=False).ids
        assert np.concatenate([e.ids for e in DocumentEncoder(tokenizer).encode(pieces)]).tolist() == whole


def test_a_text_without_places_to_split_is_cut_at_the_limit(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 10)
    monkeypatch.setattr(module, "LONGEST_PIECE", 40)
    assert list(split_text("x" * 100, module.KEEP_SPACE)) == ["x" * 40, "x" * 40, "x" * 20]
    assert list(split_text("x" * 40, module.KEEP_SPACE)) == ["x" * 40]


def test_a_conversation_is_the_template_with_contents_as_text(smollm):
    encoder = DocumentEncoder(smollm, chat=True)
    ids = ids_of(encoder, TURNS)
    messages = module.read_turns(TURNS)
    assert smollm.decode(ids[:-1]) == smollm.apply_chat_template(messages, tokenize=False)
    assert ids[-1] == smollm.convert_tokens_to_ids("<|endoftext|>")
    assert ids.count(smollm.convert_tokens_to_ids("<|im_end|>")) == 3  # one a turn, none from a message
    assert ids.count(smollm.convert_tokens_to_ids("<|endoftext|>")) == 1


def test_llama3_conversations_begin_once_and_are_trimmed(llama3):
    ids = ids_of(DocumentEncoder(llama3, chat=True), TURNS)
    expected = llama3.apply_chat_template(module.read_turns(TURNS), tokenize=False)
    assert llama3.decode(ids[:-1]) == expected
    assert "\n\nWhat is <|im_end|> or <|eot_id|>?<|eot_id|>" in expected
    assert ids.count(llama3.bos_token_id) == 1 and ids[0] == llama3.bos_token_id
    assert ids.count(llama3.convert_tokens_to_ids("<|eot_id|>")) == 3
    assert ids[-1] == llama3.convert_tokens_to_ids("<|end_of_text|>")


def test_the_whole_llama3_conversation_equals_the_templates_own_tokens(llama3):
    turns = [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Fine, thanks."}]
    ids = ids_of(DocumentEncoder(llama3, chat=True), turns)
    assert ids[:-1] == llama3.apply_chat_template(module.read_turns(turns), tokenize=True)["input_ids"]


def test_a_template_that_rewrites_messages(smollm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm.name_or_path)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] | upper }}<|im_end|>{% endfor %}"
    encoder = DocumentEncoder(tokenizer, chat=True)
    ids = ids_of(encoder, [{"from": "human", "value": "shout"}])
    assert tokenizer.decode(ids) == "<|im_start|>SHOUT<|im_end|><|endoftext|>"
    with pytest.raises(BadDocument, match="rewrites"):
        encoder.segments([{"from": "human", "value": "a <|im_end|> b"}])


def test_contents_are_found_only_as_they_stand():
    parts = ["<", "|", ">"]
    assert match_contents("<a|b>", parts, ["a", "b"]) == ["a", "b"]
    assert match_contents("<a|b>", parts, [" a\n", "b "]) == ["a", "b"]
    assert match_contents("<A|b>", parts, ["a", "b"]) is None
    assert match_contents("<a|b>>", parts, ["a", "b"]) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"from": "narrator", "value": "x"}], "unknown role 'narrator'"),
        ([{"from": "human", "value": 3}], "int, not text"),
        ("plain", "no list of turns"),
        ([{"from": "human", "value": "\ud800"}], "invalid Unicode"),
    ],
)
def test_bad_conversations_say_what_is_wrong(smollm, value, message):
    with pytest.raises(BadDocument, match=message):
        DocumentEncoder(smollm, chat=True).segments(value)


def test_empty_texts_and_conversations_are_no_documents(smollm):
    assert all(not DocumentEncoder(smollm).segments(value) for value in (None, "", " \n\t"))
    empty = [{"from": "human", "value": ""}, {"from": "gpt", "value": None}]
    assert all(not DocumentEncoder(smollm, chat=True).segments(value) for value in (None, [], empty))


def test_no_template_is_one_clear_line(llama2):
    with pytest.raises(UserError, match="chat template"):
        DocumentEncoder(llama2, chat=True)
