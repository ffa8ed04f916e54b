"""The README.md of an exported model: what it is, how near it is to the student, how to serve it."""

from pathlib import Path

from checkpoints.model_card import is_repository, licence
from models import LlambaConfig
from serving.folder import write_text
from serving.proof import Proof

GRANITE = """```bash
vllm serve . --served-model-name student
curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "student", "messages": [{"role": "user", "content": "What is a list?"}]}'
```

or without any code of its own in transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```
"""

GGUF = """```bash
llama-cli --model FILE
llama-server --model FILE --port 8080
curl http://localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What is a list?"}]}'
```
"""


UNPROVEN = "not compared with the student, since the package xllamacpp (llama.cpp) is not installed here"


def write_card(folder: Path, config: LlambaConfig, tag: str, dtype: str, sentence: str, commands: str) -> None:
    """Write README.md; tag: what the engines call the architecture; sentence: the proof's."""
    teacher = getattr(config, "teacher_model", None) or "a teacher that its checkpoint does not name"
    base = f"base_model: {teacher}\n" if is_repository(teacher) else ""
    layers = " ".join(map(str, config.attention_layers)) or "none"
    card = f"""---
pipeline_tag: text-generation
tags: [mamba2, distillation, {tag}]
{base}---
# A hybrid Mamba-2 student of {Path(teacher).name}, for serving

- attention layers: {layers}; of {config.n_layer} layers the others are Mamba-2
- weights in {dtype}
- {sentence}

In this folder:

{commands}
The licences of the teacher and of the text that the student was trained on apply to this model.{licence(teacher)}
"""
    write_text(folder / "README.md", card)


def told(proof: Proof) -> str:
    """A proof in one sentence."""
    rounding = ", what is rounded included" if proof.rounded else ""
    return (
        f"KL(student || this model) {proof.kl:.1e} nats a token, at {proof.positions} tokens of English text, "
        f"computed by {proof.engine}{rounding}"
    )
