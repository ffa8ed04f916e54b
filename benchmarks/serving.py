"""How fast a student is read and continued by its own code, by transformers' own class, and by llama.cpp.

python -m benchmarks.serving --preset 1b --device cuda:0                           random weights
python -m benchmarks.serving --model RUN/final --gguf FOLDER/model-float32.gguf    a servable checkpoint, on a CPU

Greedy, one row, the same weights in both classes, in `--dtype` (llama.cpp: the file's), after one call that warms
up. transformers' class takes fast kernels where mamba-ssm and causal-conv1d are installed; the first line says so.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.presets import preset
from distill.initialization import student_config
from evaluation.generation_speed import generation_figures
from hardware.devices import default_dtype
from model_utils import get_student_model
from models import LlambaConfig, LlambaForCausalLM
from serving import llama_cpp
from serving.granite import granite_config, granite_tensors


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2", choices=["8b", "1b", "smollm2", "tiny"])
    parser.add_argument("--model", default="", help="a servable checkpoint in place of --preset")
    parser.add_argument("--gguf", default="", help="its file for llama.cpp, on one thread")
    parser.add_argument("--contexts", type=int, nargs="*", default=[64, 1024])
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


@torch.no_grad()
def random_student(name: str) -> LlambaForCausalLM:
    """A servable student of a preset's teacher, its weights at random, with the preset's attention layers."""
    sizes = preset(name)
    config = student_config(sizes.teacher, mixer="mamba2", z_bias=False)
    fields: dict[str, Any] = {"attention_layers": list(sizes.layers)}
    fields["attention_cfg"] = LlambaConfig.describe_attention(sizes.teacher)
    return LlambaForCausalLM(LlambaConfig(**{**config.to_dict(), **fields}))


def native_twin(student: LlambaForCausalLM, dtype: torch.dtype) -> Any:
    """The same weights in transformers' GraniteMoeHybrid, on the student's device."""
    config = AutoConfig.for_model(**granite_config(student.config, dtype))
    with torch.device("meta"):
        native: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {name: tensor.to(dtype) for name, tensor in granite_tensors(student)}
    if student.config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    native.load_state_dict(weights, assign=True)
    with torch.device(student.device):  # what no state dict holds was made on no device
        native.model.rotary_emb = type(native.model.rotary_emb)(config)
    return native.eval()


def llama_cpp_figures(file: Path, contexts: list[int], tokens: int, vocabulary: int) -> list[str]:
    """A line for each length of prompt, as llama.cpp itself times it on one thread."""
    prompts = [torch.randint(3, vocabulary, (length,)).tolist() for length in contexts]
    rates = llama_cpp.ask(file, prompts=[prompts[0], *prompts], new=tokens, top=0)["rates"][1:]
    return [line("llama.cpp", *pair) for pair in zip(contexts, rates)]


def line(name: str, context: int, rates: dict[str, float]) -> str:
    return f"{name:22} {context:7,} {rates['read']:13,.0f} {rates['generated']:18,.1f}"


def main() -> None:
    args = parse()
    dtype = getattr(torch, args.dtype)
    found = {name: importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d", "kernels")}
    where = torch.cuda.get_device_name() if "cuda" in args.device else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}; installed: {found}")
    if args.model:
        student = get_student_model(args.model, None, dtype=torch.float32)
    else:
        with torch.device(args.device):  # a billion random numbers take a CPU long
            student = random_student(args.preset)
    student.to(args.device, dtype).eval()  # type: ignore[call-overload]
    print(f"{'':22} {'context':>7} {'tokens/s read':>13} {'tokens/s generated':>18}")
    with default_dtype(torch.float32):
        models = {"student": student, "transformers' class": native_twin(student, dtype)}
    for name, model in models.items():
        for context in args.contexts:
            figures = generation_figures(model, 1, context, args.decode)
            rates = {"read": context / figures["first_token_seconds"], "generated": figures["tokens_per_second"]}
            print(line(name, context, rates), flush=True)
    if args.gguf:
        print("\n".join(llama_cpp_figures(Path(args.gguf), args.contexts, args.decode, student.config.vocab_size)))


if __name__ == "__main__":
    main()
