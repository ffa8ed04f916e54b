"""The README.md of a checkpoint: what the model is, what it was made from, how far it got."""

from typing import Any


def model_card(metadata: dict[str, Any]) -> str:
    """Markdown with teacher, data, tokens, figures and flags of a checkpoint's `training_state.json`."""
    flags, progress = metadata["flags"], metadata["progress"]
    stages = [flags["dataset_name"]]
    if flags["second_dataset_name"] and not flags["skip_stage2"]:
        stages.append(flags["second_dataset_name"])
    best = progress["best"]
    rows = "\n".join(
        f"| `--{name}` | `{value}` |" for name, value in sorted(flags.items()) if value not in (None, "")
    )
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    held_out = f"- best held-out KL: {best['kl']:.4f} nats a token, at step {best['step']}\n" if best else ""
    layers = " ".join(map(str, metadata.get("attention_layers") or ())) or "none"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [mamba2, llamba, distillation]
---
# A hybrid Mamba-2 student of {flags["teacher_model"]}

- teacher: `{flags["teacher_model"]}`, student started from `{flags["student_model"]}`
- attention layers kept: {layers}
- text: {", then ".join(f"`{name}`" for name in stages)}
- trained on {progress["tokens"]:,} tokens in {progress["optimizer_step"]:,} optimizer steps
{held_out}- made with {versions}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("<this folder>", trust_remote_code=True)
```

The licences of the teacher and of the text apply to this model.

| flag | value |
| --- | --- |
{rows}
"""
