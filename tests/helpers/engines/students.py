"""Students for `tests/engines.sh`: a trained one and random ones, exported, with what their own code computes.

`python students.py FOLDER` writes FOLDER/NAME/granite and FOLDER/NAME/expected.json; what is there stays.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import demo  # noqa: E402
import export  # noqa: E402
import train  # noqa: E402
from conftest import tiny_llama_config  # noqa: E402
from helpers.servable import checkpoint_of, servable_student  # noqa: E402
from model_utils import get_student_model, get_tokenizer  # noqa: E402
from serving.proof import log_probabilities, real_text  # noqa: E402
from smollm2 import smollm2_folder  # noqa: E402

LENGTHS = (1, 2, 7, 64, 300, 1000)
NEW, TOP = 16, 20
WIDE = dict(hidden_size=256, intermediate_size=512, vocab_size=49152, num_attention_heads=4, head_dim=64)
RANDOM = {
    "mixers-alone": dict(layers=[]),
    "one-of-four": dict(layers=[1]),
    "expand-2": dict(layers=[1, 3], expand=2),
    "z-bias": dict(layers=[2], z_bias=True),
    "attention-alone": dict(layers=[0, 1, 2, 3]),
}


def trained(folder: Path) -> Path:
    """A student of SmolLM2 after 16 steps of alignment and 16 of distillation, on the demo's text."""
    text = folder.parent / "text"
    flags = [
        *demo.SHARED,
        *("--teacher_model", teacher(), "--student_model", "from_teacher", "--mixer", "mamba2", "--no_z_bias"),
        *("--layers", *map(str, range(0, 30, 2)), "--dataset_name", text / "train.jsonl.gz", "--dataset_subset", ""),
        *("--max_steps", 16, "--hidden_tokens", 16 * 512, "--hidden_lr", "2e-4", "--max_lr", "2e-4", "--skip_stage2"),
        *("--freeze_replaced_layers", "--freeze_mlp", "--output_dir", folder),
    ]
    if not (folder / "final").exists():
        demo.write_text(text)
        assert train.main([*map(str, flags)]) == 0
    return folder / "final"


def teacher() -> Path:
    return smollm2_folder(demo.TEACHER)


@torch.no_grad()
def expected(student, prompts: list[list[int]]) -> list[dict]:
    """For each prompt the greedy tokens, their lead in nats over the next, and the likeliest log-probabilities."""
    rows = []
    for prompt in prompts:
        options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        tokens = student.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)[0]
        scores, ids = log_probabilities(student, tokens[:-1])[len(prompt) - 1 :].topk(TOP)
        leads = (scores[:, 0] - scores[:, 1]).tolist()
        top = [dict(zip(map(str, row), values)) for row, values in zip(ids.tolist(), scores.tolist())]
        rows.append({"prompt": prompt, "tokens": tokens[len(prompt) :].tolist(), "leads": leads, "top": top})
    return rows


def main(folder: Path) -> None:
    ids = get_tokenizer(str(teacher())).encode(real_text())
    prompts = [ids[start : start + length] for start, length in enumerate(LENGTHS)]
    for name, options in {"trained": None, **RANDOM}.items():
        here = folder / name
        if (here / "expected.json").exists():
            continue
        if options is None:
            own = trained(here)
            assert export.main([f"--model={own}", "--format=gguf", f"--output={here / 'gguf'}"]) == 0
        else:
            torch.manual_seed(0)
            student = servable_student(config=tiny_llama_config(**WIDE), **options)
            own = checkpoint_of(student, here / "own", teacher())
        assert export.main([f"--model={own}", "--format=granite", f"--output={here / 'granite'}"]) == 0
        student = get_student_model(str(own), None, dtype=torch.float32).eval()
        (here / "expected.json").write_text(json.dumps(expected(student, prompts)))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
