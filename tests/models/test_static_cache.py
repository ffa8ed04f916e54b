"""generate(cache_implementation="static"): fixed addresses, and the tokens of the plain path."""

import pytest
import torch
from transformers import StaticCache

from helpers.teachers import TEACHERS, make_student, make_teacher

pytestmark = pytest.mark.slow
LAYERS = {"llama3 rope": [1], "mistral, sliding": [0, 2], "qwen2, sliding in half": [1, 3], "qwen3": [3]}


@pytest.fixture(scope="module", params=[*LAYERS, "mixers only", "attention only"])
def student(request):
    teacher = make_teacher(TEACHERS.get(request.param, TEACHERS["grouped queries"]))
    layers = {"mixers only": [], "attention only": [0, 1, 2, 3]}.get(request.param)
    return make_student(teacher, LAYERS[request.param] if layers is None else layers)


def generate(student, prompt, mask=None, **options):
    mask = torch.ones_like(prompt) if mask is None else mask
    options = dict(max_new_tokens=24, do_sample=False, pad_token_id=0) | options
    return student.generate(prompt, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)


def assert_equal(found, wanted):
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(found.logits, wanted.logits, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=["greedy", "beams", "chunks"]
)
def test_static_equals_no_cache(student, options):
    """Three prompts in a batch, two of them padded on the left."""
    prompt = torch.randint(3, 512, (3, 21))
    mask = torch.ones_like(prompt)
    for row, padding in enumerate((0, 2, 17)):
        prompt[row, :padding] = mask[row, :padding] = 0
    wanted = generate(
        student, prompt, mask, use_cache=False, **{k: v for k, v in options.items() if k == "num_beams"}
    )
    assert_equal(generate(student, prompt, mask, cache_implementation="static", **options), wanted)


@pytest.mark.parametrize("static", [True, False])
def test_a_prompt_read_token_by_token(student, static):
    """A single token may be padding."""
    prompt = torch.randint(3, 512, (2, 9))
    mask = torch.ones_like(prompt)
    prompt[0, :4] = mask[0, :4] = 0
    wanted = generate(student, prompt, mask, use_cache=False)
    options = {"cache_implementation": "static"} if static else {}
    assert_equal(generate(student, prompt, mask, prefill_chunk_size=1, **options), wanted)


def test_a_continued_prompt_keeps_its_addresses(student):
    """A second turn on the same static cache; every tensor stays where it is, for a CUDA graph."""
    first, second = torch.randint(3, 512, (2, 11)), torch.randint(3, 512, (2, 5))
    cache = StaticCache(config=student.config, max_cache_len=100)
    assert cache.is_compileable
    start = generate(student, first, past_key_values=cache, max_new_tokens=4).sequences
    assert cache.is_compileable
    places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    prompt = torch.cat((start, second), 1)
    wanted = generate(student, prompt, use_cache=False, max_new_tokens=8)
    assert_equal(generate(student, prompt, past_key_values=cache, max_new_tokens=8), wanted)
    assert places == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    cache.reset()
    wanted = generate(student, first, use_cache=False, max_new_tokens=4)
    assert_equal(generate(student, first, past_key_values=cache, max_new_tokens=4), wanted)


def test_one_decoding_step_is_one_graph():
    """Compiled without breaks, and not again for the next token."""
    student = make_student(make_teacher(TEACHERS["llama3 rope"]), [1])
    prompt = torch.randint(3, 512, (1, 7))
    cache = StaticCache(config=student.config, max_cache_len=40)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    step = torch.compile(student, backend=backend, fullgraph=True)
    mask = torch.ones_like(prompt)
    tokens = generate(student, prompt, use_cache=False, max_new_tokens=8)
    with torch.no_grad():
        student(**inputs(student, prompt, mask, cache))
        for index in range(6):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = tokens.sequences[:, 7 + index, None]
            found = step(**inputs(student, token, mask, cache)).logits[:, -1]
            assert torch.allclose(found, tokens.logits[index + 1], atol=2e-4)
    assert len(compiled) == 1


def inputs(student, tokens, mask, cache):
    """A forward pass's arguments as `generate` prepares them."""
    past = cache.get_seq_length()
    masks = student.create_masks_for_generate(
        config=student.config,
        inputs_embeds=torch.empty(*tokens.shape, 0),
        attention_mask=mask,
        past_key_values=cache,
    )
    positions = (torch.arange(tokens.shape[1]) + past)[None]
    return dict(input_ids=tokens, attention_mask=masks, position_ids=positions, past_key_values=cache, use_cache=True)
