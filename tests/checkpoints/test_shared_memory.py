"""Weights that lie in the same memory and are still two."""

import torch
from safetensors.torch import load_file

from helpers.checkpoint_tools import make_store, save, tiny_model


def test_an_untied_head_in_the_embeddings_memory_is_saved(tmp_path):
    """As a frozen student's are in a tied teacher's, from which they were transferred."""
    model = tiny_model()
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    head.data = embedding.data
    frozen = ["model.embed_tokens.weight", "lm_head.weight"]
    save(make_store(tmp_path), "checkpoint-1", model, frozen=frozen)
    files = (tmp_path / "checkpoint-1").glob("*.safetensors")
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert stored.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(stored[name], embedding) for name in frozen)
