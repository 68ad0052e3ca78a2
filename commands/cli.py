# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The command line: `ttt-omni convert`, `make-tiny`, `calibrate`, `answer` and `chat`."""

import argparse
import signal
import sys

from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError

from ..conversion.graft import LAYER_TYPES
from ..conversion.llama_omni import DTYPES, convert_llama_omni
from ..conversion.tiny import make_tiny
from ..training.calibration import calibrate_folder
from .chat import answer_question, chat
from .terminal import forgiving_terminal


# What the libraries raise for what a user can get wrong.
BAD_INPUT = (
    ValueError,
    OSError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
    httpx.HTTPError,
    httpx.InvalidURL,
)


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Exits with one line on stderr and 1 for bad input, 2 for bad usage, or 130 for Ctrl-C."""
    with forgiving_terminal():
        arguments = vars(_parser().parse_args(argv))
        command = arguments.pop("command")
        for number in (signal.SIGINT, signal.SIGTERM):  # the former may be ignored where a script started us
            signal.signal(number, signal.default_int_handler)
        try:
            command(**arguments)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BAD_INPUT as error:
            _fail(" ".join(str(error).split()) or type(error).__name__, 1)


def _fail(message: str, status: int) -> None:
    print(f"ttt-omni: error: {message}", file=sys.stderr)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ttt-omni", description="Convert LLaMA-Omni to TTT-Omni, and speak with it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="convert LLaMA-Omni, or a Llama, Qwen or Mistral, to TTT-Omni")
    convert.set_defaults(command=convert_llama_omni)
    convert.add_argument("--source", required=True, metavar="SOURCE", help="folder, owner/name on the Hub, or GGUF")
    convert.add_argument("--output", required=True, metavar="DIR", help="new folder for the model")
    convert.add_argument(
        "--whisper", metavar="SOURCE", help="OpenAI's .pt, or Transformers' or CTranslate2's, if not inside the source"
    )
    convert.add_argument("--vocoder", metavar="FILE", help="fairseq's unit HiFi-GAN, or owner/name/file on the Hub")
    convert.add_argument("--vocoder-config", metavar="FILE", help="the JSON that comes with it")
    convert.add_argument("--layers", help="layers that get TTT, as 24-31 or 0,2,5-7 (default: the upper quarter)")
    convert.add_argument(
        "--mode", choices=LAYER_TYPES, default="hybrid", help="TTT beside attention (default) or in its place"
    )
    convert.add_argument("--ttt-type", choices=["linear", "mlp"], default="linear", help="default: linear")
    convert.add_argument(
        "--mini-batch-size", type=int, default=64, metavar="N", help="tokens per step of the TTT state (default: 64)"
    )
    convert.add_argument(
        "--attention-window",
        type=int,
        metavar="N",
        help="tokens that attention sees, and 100 that speech does (default: all)",
    )
    convert.add_argument(
        "--attention-sinks", type=int, default=4, metavar="N", help="first tokens that it sees for ever (default: 4)"
    )
    convert.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    convert.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)")

    tiny = commands.add_parser("make-tiny", help="make a small random model, to try things on")
    tiny.set_defaults(command=make_tiny)
    tiny.add_argument("output", metavar="DIR", help="new folder for the model")

    calibrate = commands.add_parser("calibrate", help="centre the memory's queries and keys, before fine-tuning")
    calibrate.set_defaults(command=calibrate_folder)
    calibrate.add_argument("--model", required=True, metavar="DIR", help="a converted model")
    calibrate.add_argument("--data", required=True, metavar="MANIFEST", help="JSONL file of a few conversations")
    calibrate.add_argument("--output", required=True, metavar="DIR", help="new folder for the calibrated model")
    calibrate.add_argument("--device", default="auto", help="cpu, cuda, … (default: an accelerator if there is one)")

    answer = commands.add_parser("answer", help="answer a spoken question in speech")
    answer.set_defaults(command=answer_question)
    answer.add_argument("--model", required=True, metavar="DIR_OR_REPO", help="folder, or repository on the Hub")
    answer.add_argument(
        "question",
        metavar="QUESTION.wav",
        help="recording of any length, WAV, FLAC, OGG or MP3; a URL; or a pipe, as /dev/stdin",
    )
    answer.add_argument(
        "--output", required=True, metavar="ANSWER.wav", help="file for the answer: .wav, .flac or .ogg"
    )
    answer.add_argument("--stream", action="store_true", help="let the file, a .wav, grow with the answer")
    _add_conversation_arguments(answer, "saved while listening, and goes on where it was interrupted")

    chat_parser = commands.add_parser("chat", help="a spoken conversation of several turns")
    chat_parser.set_defaults(command=chat)
    chat_parser.add_argument("--model", required=True, metavar="DIR_OR_REPO", help="folder, or repository on the Hub")
    chat_parser.add_argument("questions", nargs="*", metavar="FILE", help="recordings (default: the microphone)")
    chat_parser.add_argument("--output", metavar="DIR", help="folder for the answers, answer-1.wav and so on")
    _add_conversation_arguments(chat_parser, "saved after each turn, and goes on if there is one")
    return parser


def _add_conversation_arguments(parser: argparse.ArgumentParser, memory: str) -> None:
    parser.add_argument("--play", action="store_true", help="play the answer on the sound device")
    parser.add_argument("--memory", metavar="FILE", help=f"the conversation, which is {memory}")
    parser.add_argument("--skip-silence", action="store_true", help="leave out silent windows of 30 s")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: an accelerator if there is one)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: that of the files")


if __name__ == "__main__":
    main()
