"""`generate` on its fast path gives the tokens of the plain one, whatever came before it on the same model."""

import copy
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from helpers.teachers import TEACHERS, make_student, make_teacher
from models import fast_path, workspace
from models.fast_path import FastCache
from models.workspace import Workspace, capacity_for

KINDS = {name: [1] for name in TEACHERS} | {
    "qwen2, sliding in half": [1, 3],
    "mixers only": [],
    "attention only": [0, 1, 2, 3],
}
GREEDY = dict(do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)


@pytest.fixture(scope="module", params=KINDS)
def student(request):
    return make_student(make_teacher(TEACHERS.get(request.param, TEACHERS["grouped queries"])), KINDS[request.param])


@pytest.fixture(scope="module")
def hybrid():
    return make_student(make_teacher(TEACHERS["grouped queries"]), [1])


def generate(student, prompt, mask=None, **options):
    mask = torch.ones_like(prompt) if mask is None else mask
    return student.generate(prompt, attention_mask=mask, **GREEDY | dict(max_new_tokens=24) | options)


def assert_equal(found, wanted):
    assert isinstance(found.past_key_values, FastCache) and torch.equal(found.sequences, wanted.sequences)
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(found.logits, wanted.logits, strict=True))


def padded_prompts(rows=3, length=21):
    prompt = torch.randint(3, 512, (rows, length))
    mask = torch.ones_like(prompt)
    for row, padding in enumerate((0, 2, 17)):
        prompt[row, :padding] = mask[row, :padding] = 0
    return prompt, mask


def test_padded_prompts_in_a_batch(student):
    prompt, mask = padded_prompts()
    assert_equal(generate(student, prompt, mask), generate(student, prompt, mask, use_cache=False))


@pytest.mark.slow
def test_the_tokens_of_256_steps(student):
    """Beyond the first capacity, so that the cache grows on the way."""
    prompt, mask = padded_prompts()
    options = dict(max_new_tokens=256, eos_token_id=None)
    assert_equal(
        generate(student, prompt, mask, **options), generate(student, prompt, mask, disable_compile=True, **options)
    )


def test_a_continued_prompt_and_a_copy_of_its_cache(student):
    prompt, mask = padded_prompts()
    first = generate(student, prompt, mask, max_new_tokens=6)
    longer = torch.cat((first.sequences, torch.randint(3, 512, (3, 5))), 1)
    mask = torch.nn.functional.pad(mask, (0, longer.shape[1] - mask.shape[1]), value=1)
    wanted = generate(student, longer, mask, use_cache=False)
    for cache in (copy.deepcopy(first.past_key_values), first.past_key_values):
        assert_equal(generate(student, longer, mask, past_key_values=cache), wanted)


def count_compiled(function):
    """(the function compiled by a back end that counts, the list that it appends to)."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(fast_path.own_code(function), backend=backend, fullgraph=True), graphs


@pytest.mark.parametrize("rows", [1, 2])
def test_one_layer_of_each_kind_is_compiled_for_all(rows):
    """Without breaks, with the products of a single row, and not again for another token, layer or capacity."""
    student = make_student(make_teacher(TEACHERS["qwen3, biases"]), [1, 3])
    mixers, of_mixers = count_compiled(fast_path.mixer_step)
    attention, of_attention = count_compiled(fast_path.attention_step)
    prompt = torch.randint(3, 512, (rows, 9))
    wanted = generate(student, prompt, use_cache=False)
    with torch.no_grad():
        for capacity in (40, 50, 60):
            cache = FastCache(student, capacity)
            student(prompt, past_key_values=cache, use_cache=True)
            for token, logits in zip(wanted.sequences[:, 9:12].T, wanted.logits[1:4]):
                cache.space.tokens.copy_(token[:, None])
                cache.space.positions.copy_(cache.space.place)
                found = cache.space.step(student, mixers, attention)[:, -1]
                cache.space.length.tokens += 1
                assert torch.allclose(found, logits, atol=2e-4)
    assert len(of_mixers) == 1 and len(of_attention) <= 2  # the second for any length


@pytest.mark.parametrize("part", [128, 256])
def test_a_long_prompt_is_read_in_parts(student, monkeypatch, part):
    """The logits that a whole one gives, with padding, and no forward pass over more tokens than are allowed."""
    prompt, mask = padded_prompts(length=700)
    mask[1, :300] = 0
    wanted = student(prompt, attention_mask=mask, use_cache=True, logits_to_keep=3)
    lengths, read = [], student.backbone.forward
    monkeypatch.setattr(fast_path, "PART", 3 * part)

    def counted(**inputs):
        lengths.append(inputs["input_ids"].shape[1])
        return read(**inputs)

    monkeypatch.setattr(student.backbone, "forward", counted)
    with torch.no_grad():
        for cache in (FastCache(student, 800), DynamicCache(config=student.config)):
            options = dict(past_key_values=cache, use_cache=True, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
            found = student(input_ids=prompt, attention_mask=mask, logits_to_keep=3, **options)
            assert torch.allclose(found.logits, wanted.logits, atol=3e-4)
            assert cache.get_seq_length() == 700
    assert max(lengths) == part and sum(lengths) == 2 * 700


def test_rows_that_end_early_are_as_if_alone(hybrid):
    """Rows end at tokens of their own, so that the batch goes on without them."""
    prompts = torch.randint(3, 512, (3, 9))
    endless = dict(max_new_tokens=20, eos_token_id=-1)
    alone = [generate(hybrid, row[None], **endless).sequences[0, 9:] for row in prompts]
    ends = [int(alone[0][4]), int(alone[1][11])]
    together = generate(hybrid, prompts, eos_token_id=ends, max_new_tokens=20).sequences[:, 9:]
    for row, found in zip(alone, together):
        end = next((i + 1 for i, token in enumerate(row.tolist()) if token in ends), len(row))
        assert torch.equal(found[:end], row[:end]) and not found[end:].any()


def test_two_models_do_not_share_what_they_keep(hybrid):
    """Steps taken by turns, each on a cache of its own; one model's cache is refused by another."""
    other = make_student(make_teacher(TEACHERS["grouped queries"]), [1])
    prompt = torch.randint(3, 512, (1, 9))
    wanted = [generate(model, prompt, use_cache=False, max_new_tokens=6) for model in (hybrid, other)]
    caches = [FastCache(model, 30) for model in (hybrid, other)]
    with torch.no_grad():
        for model, cache in zip((hybrid, other), caches):
            model(prompt, past_key_values=cache, use_cache=True)
        for step in range(5):
            for model, cache, found in zip((hybrid, other), caches, wanted):
                token = found.sequences[:, 9 + step, None]
                logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1]
                assert torch.allclose(logits, found.logits[step + 1], atol=2e-4)
        with pytest.raises(ValueError, match="belongs to the model"):
            other(prompt[:, :1], past_key_values=caches[0], use_cache=True)


def test_rows_of_a_cache_are_chosen_and_repeated(hybrid):
    """As for several answers to one prompt that is read once."""
    prompt, mask = padded_prompts()
    cache = generate(hybrid, prompt, mask, max_new_tokens=1).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 0, 0])
    token, mask = torch.randint(3, 512, (4, 1)), torch.nn.functional.pad(mask[rows], (0, 1), value=1)
    with torch.no_grad():
        positions = mask.sum(-1, keepdim=True) - 1
        found = hybrid(token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        wanted = hybrid(torch.cat((prompt[rows], token), 1), attention_mask=mask,
                        position_ids=(mask.cumsum(-1) - 1).clamp(min=0))  # fmt: skip
    assert torch.allclose(found.logits[:, -1], wanted.logits[:, -1], atol=2e-4)


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}, {"disable_compile": True}]
)
def test_other_ways_take_their_own_path(hybrid, options):
    found = generate(hybrid, torch.randint(3, 512, (1, 5)), max_new_tokens=4, **options)
    assert not isinstance(found.past_key_values, FastCache)


def test_what_is_recorded_comes_from_the_plain_layers(hybrid):
    """Hidden states of every token, on the fast path's cache."""
    prompt = torch.randint(3, 512, (2, 9))
    found = generate(hybrid, prompt, output_hidden_states=True, max_new_tokens=5)
    whole = hybrid(found.sequences, output_hidden_states=True)
    assert isinstance(found.past_key_values, FastCache)
    for step, states in enumerate(found.hidden_states[1:], 9):
        assert all(torch.allclose(a[:, 0], b[:, step], atol=2e-4) for a, b in zip(states, whole.hidden_states))


def test_why_a_call_takes_the_plain_path(hybrid):
    """Whatever a recorded step would not see: hooks, adapters, other rotary embeddings, dropout."""
    student = copy.deepcopy(hybrid)

    def reason(mode="sample"):
        return fast_path.why_plain(student, student.generation_config, mode)

    assert reason() == reason("greedy_search") == "" and "by beam search" in reason("beam_search")
    assert "training" in (student.train() and reason()) and student.eval()
    handle = student.backbone.layers[2].mlp.register_forward_hook(lambda *_: None)
    assert "hooked" in reason() and handle.remove() is None and reason() == ""
    student.backbone.rotary_emb.rope_type = "dynamic"
    assert "'dynamic' change with the length" in reason()
    student.backbone.rotary_emb.rope_type = "default"
    adapted = type("Adapted", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})(64, 64)
    student.backbone.layers[1].self_attn.q_proj = adapted
    assert "wrapped" in reason()


def test_what_is_hooked_between_two_calls_is_seen_by_the_second(hybrid):
    """A kept cache goes on through the layers' own forward passes, and back on the fast path without the hook."""
    student, calls = copy.deepcopy(hybrid), []
    written = generate(student, torch.randint(3, 512, (1, 9)), max_new_tokens=4)
    handle = student.backbone.layers[2].mixer.register_forward_hook(lambda *_: calls.append(1))
    options = dict(past_key_values=written.past_key_values, max_new_tokens=4)
    hooked = generate(student, written.sequences, **options)
    assert len(calls) == 4
    handle.remove()
    wanted = generate(student, written.sequences, use_cache=False, max_new_tokens=4)
    assert torch.equal(hooked.sequences, wanted.sequences)
    assert_equal(
        generate(student, hooked.sequences, **options),
        generate(student, hooked.sequences, use_cache=False, max_new_tokens=4),
    )
    assert len(calls) == 4 and not written.past_key_values.plain


def test_autocast_takes_the_plain_path(hybrid):
    prompt = torch.randint(3, 512, (1, 9))
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(hybrid, prompt, max_new_tokens=4)
    assert not isinstance(found.past_key_values, FastCache) and found.sequences.shape == (1, 13)


def test_a_cache_refuses_another_number_of_rows(hybrid):
    cache = generate(hybrid, torch.randint(3, 512, (3, 9)), max_new_tokens=2).past_key_values
    for tokens in (1, 5):
        with pytest.raises(ValueError, match="1 rows for a cache of 3"), torch.no_grad():
            hybrid(torch.ones(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)


def test_a_graph_holds_while_weights_and_buffers_stand_where_they_were(hybrid):
    student = copy.deepcopy(hybrid).to(torch.bfloat16)
    decoder, space, cache = fast_path.Decoder(), Workspace(student, 1, 256), FastCache(student, 9)
    weight, rotary = student.lm_head.weight, student.backbone.rotary_emb

    def holds():
        space.graph, decoder.spaces = object(), [(space, weakref.ref(cache))]
        decoder.check_weights(student)
        return space.graph is not None and len(decoder.spaces) == 1

    assert not holds() and holds()
    weight.data.mul_(2)
    assert holds()
    rotary.inv_freq = rotary.inv_freq.clone()
    assert not holds() and holds()
    weight.data = weight.data.view(torch.float16)
    assert not holds() and holds()


def test_a_workspace_is_given_to_one_cache(hybrid):
    """Also where a cache ends while another one looks for its workspace."""
    decoder, space = fast_path.Decoder(), Workspace(hybrid, 1, 256)
    pair = (space, weakref.ref(FastCache(hybrid, 9)))
    decoder.spaces = [pair]
    assert decoder._spare(2, 256) is None and decoder._spare(1, 256) is space and decoder._spare(1, 256) is None
    assert decoder._drop(pair) is False


def test_a_graph_is_captured_on_its_models_device(hybrid, monkeypatch):
    """Whatever device is current: torch's own stream belongs to the first that was."""
    captured = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    def graph(recorded, **options):
        captured.append(options["stream"].device)
        return nullcontext()

    cuda = dict(Stream=lambda device: SimpleNamespace(device=device, wait_stream=lambda other: None), graph=graph)
    cuda |= dict(current_stream=lambda device: stream, stream=lambda entered: nullcontext(), CUDAGraph=object)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**cuda))
    space = Workspace(hybrid, 1, 256)
    space.length.tokens = 3  # on a CPU no further than that is read
    with torch.no_grad():
        space.record(hybrid, fast_path.mixer_step, fast_path.attention_step)
    workspace.capture_stream.cache_clear()
    assert captured == [hybrid.device] and space.graph is not None and space.length.tokens == 0


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 4095, 4097, 33000, 131200])
def test_capacities_are_few_and_near(tokens):
    capacity = capacity_for(tokens)
    assert tokens <= capacity <= max(tokens + 256, 1.125 * tokens + 1) and capacity_for(capacity) == capacity


def test_a_step_that_cannot_be_recorded_runs_as_it_is(hybrid, monkeypatch):
    """First without compilation, then without a graph; each is said, and neither is tried again."""
    tried = []

    def record(space, model, mixers, attention):
        tried.append(mixers)
        raise RuntimeError("no working compiler")

    monkeypatch.setattr(Workspace, "record", record)
    monkeypatch.setattr(fast_path.logger, "warning", lambda text: said.append(text))
    said, decoder = [], fast_path.Decoder()
    for _ in range(2):
        assert decoder._record(hybrid, 1, 256).graph is None
    assert len(tried) == 2 and tried[1] is fast_path.mixer_step
    refused = [text.split(",")[0] for text in said if "cannot" in text]
    assert refused == ["the decoding step cannot be compiled", "the decoding step cannot be recorded"]
