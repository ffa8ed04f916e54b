"""Talk to a model in the terminal: its answers as they come, and how fast.

    python generate.py --model RUN/final
    python generate.py --model RUN/final --prompt "What is a mixer?" --temperature 0

A line is a message; an empty line does nothing, /new forgets the conversation, Ctrl-C ends an answer, Ctrl-D the
script. Messages go through the tokenizer's chat template; where there is none the text is continued as it is.
"""

import argparse
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flags.reading import HelpFormatter, Parser, device_name, real, whole
from hub.hub_files import reading_status
from utils import UserError, wait_passively

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a student, or of any model of transformers")
    add("--prompt", default="", help="one message: its answer is printed, and nothing is asked")
    add("--system", default="", help="system message of the conversation")
    add("--max_new_tokens", type=whole(1), default=1024, help="tokens of an answer at most")
    add("--temperature", type=real(0), default=0.7, help="0: the likeliest token each time")
    add(
        "--top_p",
        type=real(0, above=True, maximum=1),
        default=0.95,
        help="share of the likeliest tokens to draw from",
    )
    add("--seed", type=whole(0), help="seed of the draws; without it they differ each time")
    add("--device", type=device_name, default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="auto: as it was saved")
    add("--local_files_only", action="store_true", help="read from the caches alone")
    add("--network_patience", type=real(0), default=600.0, help="seconds to ride out a network fault")
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """(model, tokenizer). Raises `UserError` naming what cannot be loaded."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

    from hardware.devices import check_device
    from hub.model_files import fetch_model
    from model_utils import get_student_model, get_tokenizer, require_model_folder

    where = check_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network: dict[str, Any] = dict(local_files_only=args.local_files_only, network_patience=args.network_patience)
    fetch_model("--model", args.model, weights=True, **network)
    require_model_folder(args.model)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    options: dict[str, Any] = dict(dtype=dtype, local_files_only=True)
    try:
        kind = PreTrainedConfig.get_config_dict(args.model, local_files_only=True)[0].get("model_type")
        if kind == "llamba":  # through this folder's code, and none that came with the checkpoint
            model: Any = get_student_model(args.model, None, **options)
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(args.model, local_files_only=True)
        else:
            tokenizer = get_tokenizer(args.model, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {args.model} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return model.to(where).eval(), tokenizer


class Answer:
    """One answer: its text in pieces as they come, and afterwards its figures."""

    def __init__(
        self, model: Any, tokenizer: "PreTrainedTokenizerBase", inputs: "BatchEncoding", options: dict[str, Any]
    ):
        import torch
        from transformers import StoppingCriteria, TextIteratorStreamer

        self.stopped = False
        self.times: list[float] = []
        answer = self

        class Counted(StoppingCriteria):
            def __call__(self, input_ids: "Tensor", scores: "Tensor", **unused: object) -> "Tensor":
                answer.times.append(time.perf_counter())
                return input_ids.new_full((input_ids.shape[0],), answer.stopped, dtype=torch.bool)

        self.streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.failure: BaseException | None = None
        arguments = {**inputs, **options, "streamer": self.streamer, "stopping_criteria": [Counted()]}
        self.thread = threading.Thread(target=self._run, args=(model, arguments), daemon=True)
        self.began = time.perf_counter()

    def _run(self, model: Any, arguments: dict[str, Any]) -> None:
        try:
            model.generate(**arguments)
        except BaseException as error:  # told in the thread that reads
            self.failure = error
            self.streamer.end()

    def pieces(self) -> Iterator[str]:
        self.thread.start()
        yield from self.streamer
        self.thread.join()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """No more tokens; what is on its way still comes."""
        self.stopped = True
        self.thread.join()

    def figures(self) -> str:
        """Tokens, the first one's delay, and the rate of those after it."""
        count, first = len(self.times), self.times[0] - self.began
        rate = (count - 1) / (self.times[-1] - self.times[0]) if count > 1 else 1 / first
        return f"{count} tokens, the first after {first:.2f} s, {rate:.1f} tokens/s"


class Chat:
    """A conversation with a model."""

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerBase", args: argparse.Namespace):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
        if args.temperature > 0:
            self.options |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
        self.options["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else None
        self.options = {name: value for name, value in self.options.items() if value is not None}
        self.forget()

    def forget(self) -> None:
        self.messages = [{"role": "system", "content": self.args.system}] if self.args.system else []

    def inputs(self, message: str) -> "BatchEncoding":
        """What the model reads: the conversation in the template's form, or the text itself where there is none."""
        if not self.tokenizer.chat_template:
            return self.tokenizer(message, return_tensors="pt").to(self.model.device)
        self.messages.append({"role": "user", "content": message})
        options: dict[str, Any] = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
        read: Any = self.tokenizer.apply_chat_template(self.messages, **options)
        return read.to(self.model.device)

    def say(self, message: str) -> None:
        """Print the answer to a message as it comes, and its figures on standard error."""
        answer, text = Answer(self.model, self.tokenizer, self.inputs(message), self.options), ""
        try:
            for piece in answer.pieces():
                text += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            answer.stop()
        print(flush=True)
        if answer.times:
            print(f"[{answer.figures()}]", file=sys.stderr, flush=True)
        self.messages.append({"role": "assistant", "content": text})


def talk(chat: Chat, asked: bool) -> None:
    """Messages from standard input until it ends; `asked` for by a prompt."""
    while True:
        try:
            message = input("> " if asked else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if message == "/new":
            chat.forget()
        elif message:
            chat.say(message)


def converse(args: argparse.Namespace) -> None:
    """Load the model, and answer a prompt or whoever writes."""
    model, tokenizer = load(args)
    from hardware.devices import seed_everything

    if args.seed is not None:
        seed_everything(args.seed)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chat = Chat(model, tokenizer, args)
    if args.prompt:
        chat.say(args.prompt)
    else:
        talk(chat, sys.stdin.isatty())


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    wait_passively(args.device or "cpu")
    return reading_status(lambda: converse(args))


if __name__ == "__main__":
    sys.exit(main())
