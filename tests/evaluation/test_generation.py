"""generate(): a constant-size state that gives the same tokens as no cache, in every way of decoding."""

import pytest
import torch
from transformers import TextStreamer

from helpers.teachers import TEACHERS, make_student, make_teacher


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


def state_bytes(cache, layers):
    """Bytes that the cache of these layers keeps in memory, whole storages counted."""
    tensors = [tensor for i in layers for tensor in (cache.layers[i].keys, cache.layers[i].values)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("steps", [0, 5])
def test_the_state_has_a_constant_size(student, steps):
    """In bytes: a mixer keeps 3 inputs of its convolution and a matrix a head, whatever the prompt's length."""
    mixers = [0, 2, 3]
    mixer = student.backbone.layers[0].mixer
    wanted = 4 * (3 * mixer.d_conv + mixer.n_v_heads * mixer.d_state * mixer.d_head)
    for length in (1, 20, 700):
        cache = student(torch.randint(3, 512, (2, length)), use_cache=True).past_key_values
        for _ in range(steps):
            student(torch.randint(3, 512, (2, 1)), past_key_values=cache, use_cache=True)
        assert state_bytes(cache, mixers) == 2 * 3 * wanted
        assert cache.get_seq_length() == length + steps


def test_an_attention_layer_keeps_keys_and_values_of_every_token_that_it_will_see(student):
    """The hybrid's only state that grows; a sliding window's does not grow past it."""
    a_token = 2 * 2 * 16 * 4  # keys and values, key/value heads, their width, float32
    most = (student.config.sliding_window or 1000) - 1
    for length in (4, 100):
        cache = student(torch.randint(3, 512, (1, length)), use_cache=True).past_key_values
        student(torch.randint(3, 512, (1, 1)), past_key_values=cache, use_cache=True)
        keys = cache.layers[1].keys
        assert a_token * keys.shape[-2] == 2 * keys.nbytes == a_token * min(length + 1, most)


def test_unknown_arguments_are_passed_over_without_a_word(student, recwarn):
    prompt = torch.randint(3, 512, (1, 5))
    assert torch.equal(generate(student, prompt, return_mixer_matrix=True), generate(student, prompt))
    assert not [warning for warning in recwarn if "return_mixer_matrix" in str(warning.message)]


def test_streaming(student, tokenizer_dir, capsys):
    """What a streamer prints, token by token as they come, is what generate() returns."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    prompt = torch.randint(3, 512, (1, 5))
    tokens = generate(student, prompt, streamer=TextStreamer(tokenizer, skip_prompt=True))
    printed = capsys.readouterr().out
    assert printed.strip() and printed == tokenizer.decode(tokens[0, 5:]) + "\n"


def test_left_padded_rows_equal_themselves_alone(student):
    """Prompts of different lengths in one batch; some shorter than the convolution is wide."""
    rows = [torch.randint(3, 512, (length,)) for length in (1, 2, 9, 30)]
    padded = torch.stack([torch.cat((torch.zeros(30 - len(row), dtype=torch.long), row)) for row in rows])
    mask = torch.stack([(torch.arange(30) >= 30 - len(row)).long() for row in rows])
    together = generate(student, padded, attention_mask=mask)[:, 30:]
    for row, found in zip(rows, together):
        alone = generate(student, row[None])[0, len(row) :]  # shorter than its row in the batch if it ended itself
        assert torch.equal(found[: len(alone)], alone) and not found[len(alone) :].any()


def test_a_padded_batch_with_beams_and_sampling(student):
    prompt = torch.randint(3, 512, (2, 9))
    prompt[0, :4] = 0
    mask = (prompt != 0).long()
    for options in (dict(num_beams=3), dict(do_sample=True, top_k=20), dict(num_beams=2, do_sample=True)):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            results.append(generate(student, prompt, attention_mask=mask, use_cache=use_cache, **options))
        assert torch.equal(*results), options


def test_a_long_prompt_in_one_prefill(student):
    """Many chunks and a rest: the tokens that follow are those without a cache."""
    prompt = torch.randint(3, 512, (1, 1500))
    assert torch.equal(generate(student, prompt), generate(student, prompt, use_cache=False))
