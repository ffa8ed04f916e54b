"""The tiny teachers and students, and the text, that every combination runs on."""

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from conftest import tiny_llama_config
from helpers import runs
from helpers.combinations import warm

LAYERS = 2


class Pair:
    """Folders of models and files of text under `folder`, made when they are first asked for."""

    stage_steps: ClassVar = {"matrix": 3, "hidden": 3, "stage1": 4, "stage2": 2}
    stretch = 1  # sequences are so many times as long as the table says
    flags: ClassVar[dict[str, Any]] = {}  # for every run

    def __init__(self, folder: Path, tokenizer_dir: Path, documents: list[str]):
        self.folder, self.tokenizer_dir = folder, tokenizer_dir
        short = [" ".join(text.split())[: 40 + 37 * i % 300] for i, text in enumerate(documents)]
        self.short = [text for text in short if len(text) >= 40]
        self.sources = runs.write_sources(folder / "text", documents)
        runs.write_rows(self.sources["train"], [{"text": text} for text in self.short])
        runs.write_rows(self.sources["heldout"], [{"text": max(documents, key=len)}])  # one: no ends within it

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_dir)

    def teacher(self, name: str) -> Path:
        """An untied or a tied teacher. Its weights are large, so that its distributions are far from even."""
        folder = self.folder / f"teacher-{name}"
        if not folder.exists():
            import torch
            from transformers import LlamaForCausalLM

            torch.manual_seed(0)
            sizes = dict(num_hidden_layers=LAYERS, initializer_range=0.15, tie_word_embeddings=name == "tied")
            LlamaForCausalLM(tiny_llama_config(**sizes)).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return folder

    def student(self, name: str, teacher: str) -> str:
        """What `--student_model` is: from_teacher, a Llamba of sizes of its own, or one that is distilled already."""
        make = {"llamba": self._llamba, "distilled": self._distilled}
        return str(make[name](teacher)) if name in make else name

    def _llamba(self, teacher: str) -> Path:
        folder = self.folder / "llamba"
        if not folder.exists():
            import torch

            from models import LlambaConfig, LlambaForCausalLM

            torch.manual_seed(1)
            mixer = dict(d_state=8, n_v_heads=4, n_qk_heads=2, expand=2, chunk_size=16, activation="identity")
            mlp = dict(intermediate_size=128, bias=False, act_fn="silu")
            sizes = dict(vocab_size=512, d_model=64, n_layer=LAYERS, pad_vocab_size_multiple=8, tie_embeddings=False)
            config = LlambaConfig(**sizes, mlp_cfg=mlp, ssm_cfg={**mixer, "bias": False})
            LlambaForCausalLM(config).save_pretrained(folder)
        return folder

    def _distilled(self, teacher: str) -> Path:
        folder = self.folder / f"distilled-{teacher}"
        if not folder.exists():
            flags = runs.flags(self.teacher(teacher), self.sources, folder, max_steps=1, skip_stage2=True)
            assert warm.train(flags, folder.with_suffix(".log")) == [0], folder.with_suffix(".log").read_text()
        return folder / "final"

    def one_pass(self, sequences: int, seq_length: int) -> Path:
        """A text with `sequences` sequences of seq_length + 1 tokens, the last of which it need not fill."""
        path = self.folder / "text" / f"pass-{sequences}-{seq_length}.jsonl.gz"
        if not path.exists():
            tokens, rows = 0, []
            for text in self.short:
                more = len(self.tokenizer(text)["input_ids"]) + 1  # and the separator
                if tokens + more <= sequences * (seq_length + 1):
                    tokens, rows = tokens + more, [*rows, {"text": text}]
            assert -(-tokens // (seq_length + 1)) == sequences
            runs.write_rows(path, rows)
        return path
