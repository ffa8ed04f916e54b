"""What only a GPU shows of the fast path: compiled layers in a CUDA graph, kept from call to call."""

import copy

import pytest
import torch

from helpers.teachers import TEACHERS, make_student, make_teacher
from models import fast_path
from models.fast_path import FastCache, decoder_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
GREEDY = dict(do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True, eos_token_id=None)


def make(kind="llama3 rope", layers=(1,), dtype=torch.float32):
    return make_student(make_teacher(TEACHERS[kind]), list(layers)).to("cuda", dtype)


@pytest.fixture(scope="module")
def student():
    return make()


def prompts(rows=3, length=21):
    prompt = torch.randint(3, 512, (rows, length), device="cuda")
    mask = torch.ones_like(prompt)
    for row, padding in enumerate((0, 2, 17)[:rows]):
        prompt[row, :padding] = mask[row, :padding] = 0
    return prompt, mask


def generate(student, prompt, mask=None, tokens=24, **options):
    mask = torch.ones_like(prompt) if mask is None else mask
    return student.generate(prompt, attention_mask=mask, max_new_tokens=tokens, **GREEDY, **options)


def assert_equal(found, wanted):
    cache = found.past_key_values
    assert isinstance(cache, FastCache) and cache.space.graph is not None
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.allclose(a, b, atol=5e-4) for a, b in zip(found.logits, wanted.logits, strict=True))


@pytest.mark.parametrize(("kind", "layers", "rows"), [("mistral, sliding", [0, 2], 1), ("qwen3", [3], 3)])
def test_the_tokens_of_the_plain_path(kind, layers, rows):
    """256 tokens in float32, so that the cache grows on the way, alone and in a padded batch."""
    student = make(kind, layers)
    prompt, mask = prompts(rows)
    wanted = generate(student, prompt, mask, 256, disable_compile=True)
    assert_equal(generate(student, prompt, mask, 256), wanted)


def test_a_graph_that_is_used_again_after_other_shapes(student):
    """The same graph, with other rows and lengths recorded between, and a continued prompt."""
    decoder, wanted = decoder_of(student), {}
    for rows in (1, 3, 2, 1, 3):
        prompt, mask = prompts(rows)
        found = generate(student, prompt, mask)
        assert_equal(found, generate(student, prompt, mask, disable_compile=True))
        used = wanted.setdefault(rows, found.past_key_values.space)
        assert used is found.past_key_values.space
        more = torch.cat((found.sequences, prompts(rows, 5)[0]), 1)
        mask = torch.nn.functional.pad(mask, (0, more.shape[1] - mask.shape[1]), value=1)
        second = generate(student, more, mask, past_key_values=found.past_key_values)
        assert_equal(second, generate(student, more, mask, disable_compile=True))
        del found, second
    assert len(decoder.spaces) == 3


def test_a_cache_that_is_kept_is_not_used_again(student):
    prompt, mask = prompts()
    kept = generate(student, prompt, mask)
    copied = copy.deepcopy(kept.past_key_values)
    other = generate(student, *prompts())
    assert other.past_key_values.space is not kept.past_key_values.space is not copied.space
    more = torch.cat((kept.sequences, prompts(3, 5)[0]), 1)
    mask = torch.nn.functional.pad(mask, (0, more.shape[1] - mask.shape[1]), value=1)
    wanted = generate(student, more, mask, disable_compile=True)
    for cache in (copied, kept.past_key_values):
        assert_equal(generate(student, more, mask, past_key_values=cache), wanted)


def test_weights_that_change_are_seen(student):
    """In place by the graph that there is; where they stand elsewhere, by a new one."""
    student = copy.deepcopy(student)
    prompt, mask = prompts()
    first = generate(student, prompt, mask)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.1)
    changed = generate(student, prompt, mask)
    assert_equal(changed, generate(student, prompt, mask, disable_compile=True))
    for p in student.parameters():
        p.data = p.data * 0.8
    moved = generate(student, prompt, mask)
    assert_equal(moved, generate(student, prompt, mask, disable_compile=True))
    assert not torch.allclose(first.logits[-1], moved.logits[-1], atol=1e-2)


def test_bf16_is_as_near_to_float32_as_the_plain_path_is():
    """Within 2e-2 of the largest logit, or as near as bf16 itself comes with these weights."""
    student = make(dtype=torch.bfloat16)
    prompt, mask = prompts(1)
    errors = {}
    for plain in (False, True):
        found = generate(student, prompt, mask, disable_compile=plain)
        with torch.no_grad():
            exact = copy.deepcopy(student).float()(found.sequences).logits[0, prompt.shape[1] - 1 : -1]
        logits = torch.cat(found.logits).float()
        errors[plain] = ((logits - exact).abs().amax(-1) / exact.abs().amax(-1)).mean().item()
    assert errors[False] <= max(2e-2, 1.25 * errors[True])


def test_where_it_cannot_it_says_so_once(student, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    type(fast_path.logger).warning_once.cache_clear()
    prompt, mask = prompts(1)
    handle = student.backbone.layers[0].register_forward_hook(lambda *_: None)
    try:
        for _ in range(2):
            assert not isinstance(generate(student, prompt, mask).past_key_values, FastCache)
    finally:
        handle.remove()
        logging.disable_propagation()
    assert sum("generate takes its plain path" in record.message for record in caplog.records) == 1
