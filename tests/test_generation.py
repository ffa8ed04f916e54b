"""generate(): a constant-size state that gives the same tokens as no cache, in every way of decoding."""

import pytest
import torch
from transformers import TextStreamer

from test_model_utils import TEACHERS, make_student, make_teacher


@pytest.fixture(scope="module", params=["grouped queries", "mistral, sliding", "qwen3"])
def student(request):
    return make_student(make_teacher(TEACHERS[request.param]), [1])


def generate(student, prompt, **options):
    mask = options.pop("attention_mask", torch.ones_like(prompt))
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0) | options
    return student.generate(prompt, attention_mask=mask, **options)


@pytest.mark.parametrize("length", [1, 2, 3, 9, 140])
def test_greedy_equals_no_cache(student, length):
    prompt = torch.randint(3, 512, (2, length))
    assert torch.equal(generate(student, prompt), generate(student, prompt, use_cache=False))


def test_beam_search_equals_no_cache(student):
    prompt = torch.randint(3, 512, (2, 9))
    options = dict(num_beams=3, max_new_tokens=8)
    assert torch.equal(generate(student, prompt, **options), generate(student, prompt, use_cache=False, **options))


def test_sampling_equals_no_cache_for_the_same_seed(student):
    prompt = torch.randint(3, 512, (2, 9))
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(generate(student, prompt, do_sample=True, use_cache=use_cache))
    assert torch.equal(*results)


def test_left_padding_changes_nothing(student):
    prompt = torch.randint(3, 512, (2, 9))
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), prompt), 1)
    mask = torch.cat((torch.zeros(2, 4, dtype=torch.long), torch.ones_like(prompt)), 1)
    assert torch.equal(generate(student, padded, attention_mask=mask)[:, 4:], generate(student, prompt))


def test_a_prompt_in_two_prefills_equals_one(student):
    prompt = torch.randint(3, 512, (1, 300))
    whole = student(prompt, use_cache=True)
    first = student(prompt[:, :170], use_cache=True)
    second = student(prompt[:, 170:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(second.logits, whole.logits[:, 170:], atol=1e-4)


def test_the_mixers_state_does_not_grow(student):
    sizes = []
    for length in (20, 200):
        cache = student(torch.randint(3, 512, (1, length)), use_cache=True).past_key_values
        layer = cache.layers[0]
        sizes.append(layer.keys.numel() + layer.values.numel())
    assert sizes[0] == sizes[1] and cache.get_seq_length() == 200


def test_unknown_arguments_are_passed_over_without_a_word(student, recwarn):
    prompt = torch.randint(3, 512, (1, 5))
    assert torch.equal(generate(student, prompt, return_mixer_matrix=True), generate(student, prompt))
    assert not [warning for warning in recwarn if "return_mixer_matrix" in str(warning.message)]


def test_streaming(student, tokenizer_dir, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    generate(student, torch.randint(3, 512, (1, 5)), streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip()
