"""The README.md of a checkpoint: what the model is, what it was made from, how far it got."""

import re
from pathlib import Path
from typing import Any

from checkpoints.origins import recorded_commits


def model_card(metadata: dict[str, Any]) -> str:
    """Markdown with teacher, data, tokens, figures and flags of a checkpoint's `training_state.json`."""
    flags, progress = metadata["flags"], metadata["progress"]
    flags_of_text = ["dataset_name"]
    if flags["second_dataset_name"] and not flags["skip_stage2"]:
        flags_of_text.append("second_dataset_name")
    text = [flags[flag] for flag in flags_of_text]
    commits = recorded_commits(metadata)

    flags = {name: without_folders(value) for name, value in flags.items()}

    def named(flag: str) -> str:
        return f"`{flags[flag]}`" + (f" at commit {commits[flag]}" if flag in commits else "")

    rows = "\n".join(
        f"| `--{name}` | `{value}` |" for name, value in sorted(flags.items()) if value not in (None, "")
    )
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    layers = " ".join(map(str, metadata.get("attention_layers") or ())) or "none"
    lines = [
        f"teacher: {named('teacher_model')}, student started from {named('student_model')}",
        f"attention layers kept: {layers}",
        f"text: {', then '.join(map(named, flags_of_text))}",
        f"trained on {progress['tokens']:,} tokens in {progress['optimizer_step']:,} optimizer steps",
        *held_out(progress, flags["eval_dataset"]),
        f"made with {versions}",
    ]
    facts = "\n".join(f"- {line}" for line in lines)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [mamba2, llamba, distillation]
{links(flags["teacher_model"], text)}---
# A hybrid Mamba-2 student of {flags["teacher_model"]}

{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("<this folder>", trust_remote_code=True)
```

The licences of the teacher and of the text apply to this model.{licence(flags["teacher_model"])}

| flag | value |
| --- | --- |
{rows}
"""


def held_out(progress: dict[str, Any], name: str) -> list[str]:
    """The last evaluation and, where another one was better, the best one; nothing without evaluations."""
    last, best = progress["evaluation"], progress["best"]
    if not last:
        return []
    figures = (
        f"held-out text `{name}`, {last['tokens']:,.0f} tokens, at step {last['step']:,}: "
        f"KL(teacher, student) {last['kl']:.4f} nats a token, top-1 agreement {last['top1_agreement']:.1%}, "
        f"perplexity {last['student_perplexity']:.3f} ({last['perplexity_ratio']:.3f} times the teacher's "
        f"{last['teacher_perplexity']:.3f})"
    )
    better = f"lowest held-out KL of the run: {best['kl']:.4f} at step {best['step']:,}"
    return [figures, better] if best["step"] != last["step"] else [figures]


def links(teacher: str, text: list[str]) -> str:
    """The Hub's own fields for the teacher and the text, where they are repositories and not local files."""
    base = f"base_model: {teacher}\n" if is_repository(teacher) else ""
    names = [name for name in text if is_repository(name)]
    return base + (f"datasets: [{', '.join(names)}]\n" if names else "")


def without_folders(value: Any) -> Any:
    """A flag's value as strangers may see it: of an absolute path its last part alone, also within a list."""
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def licence(teacher: str) -> str:
    """What a Llama's licence asks of models made from it (Llama 3.1 Community License, section 1.b.i)."""
    if not re.search(r"llama-?[34]", teacher.lower()):
        return ""
    return (
        " The teacher's is Llama's: whoever passes this model on adds the licence and a notice, writes "
        '"Built with Llama" where it is used, and begins the model\'s name with "Llama".\n\nBuilt with Llama'
    )


def is_repository(name: str) -> bool:
    """True for what can be a Hub id and is no file or folder here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()
