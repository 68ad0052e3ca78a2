# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The command line: `ttt-omni convert`, `ttt-omni make-tiny` and `ttt-omni answer`."""

import argparse
import signal
import sys
from pathlib import Path

import soundfile
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import TextStreamer

from ..configuration_ttt_omni import TTTOmniConfig
from ..modeling_ttt_omni import TTTOmniForCausalLM
from ..processing_ttt_omni import TTTOmniProcessor
from ..training.calibration import calibrate_folder
from .graft import LAYER_TYPES
from .llama_omni import DTYPES, convert_llama_omni
from .tiny import make_tiny


# The instruction beside the speech that LLaMA-Omni was trained with.
INSTRUCTION = "Please directly answer the questions in the user's speech."


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Exits with one line on stderr and 1 for bad input, 2 for bad usage, or 130 for Ctrl-C."""
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    for number in (signal.SIGINT, signal.SIGTERM):  # the former may be ignored where a script started us
        signal.signal(number, signal.default_int_handler)
    try:
        command(**arguments)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except (ValueError, OSError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        _fail(" ".join(str(error).split()), 1)


def _fail(message: str, status: int) -> None:
    print(f"ttt-omni: error: {message}", file=sys.stderr)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ttt-omni", description="Convert LLaMA-Omni to TTT-Omni, and speak with it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="convert a LLaMA-Omni or Llama 3 checkpoint to TTT-Omni")
    convert.set_defaults(command=convert_llama_omni)
    convert.add_argument("--source", required=True, metavar="DIR", help="LLaMA-Omni or Llama 3 checkpoint")
    convert.add_argument("--output", required=True, metavar="DIR", help="new folder for the model")
    convert.add_argument(
        "--whisper", metavar="FILE_OR_DIR", help="OpenAI's .pt or a Transformers folder, if not inside the checkpoint"
    )
    convert.add_argument("--vocoder", metavar="FILE", help="fairseq's unit HiFi-GAN")
    convert.add_argument("--vocoder-config", metavar="FILE", help="the JSON that comes with it")
    convert.add_argument("--layers", help="layers that get TTT, as 24-31 or 0,2,5-7 (default: the upper quarter)")
    convert.add_argument(
        "--mode", choices=LAYER_TYPES, default="hybrid", help="TTT beside attention (default) or in its place"
    )
    convert.add_argument("--ttt-type", choices=["linear", "mlp"], default="linear", help="default: linear")
    convert.add_argument(
        "--mini-batch-size", type=int, default=64, metavar="N", help="tokens per step of the TTT state (default: 64)"
    )
    convert.add_argument("--attention-window", type=int, metavar="N", help="tokens that attention sees (default: all)")
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
    answer.add_argument("question", metavar="QUESTION.wav", help="recording of any length, WAV, FLAC, OGG or MP3")
    answer.add_argument("--output", required=True, metavar="ANSWER.wav", help="file for the answer, 16-bit PCM")
    answer.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    answer.add_argument("--device", default="auto", help="cpu, cuda, … (default: an accelerator if there is one)")
    answer.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: that of the files")
    return parser


def answer_question(
    question: str,
    output: str,
    model: str,
    max_new_tokens: int = 256,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """
    Prints the answer to the recording `question` as it comes, and writes it as speech to the WAV file `output`.

    Args:
        model: folder, or repository on the Hub.

    Raises:
        ValueError, OSError: a recording that cannot be read, a model that cannot be loaded or does not speak.
    """
    output = Path(output)
    if not output.parent.is_dir():
        raise ValueError(f"The folder {output.parent} for the answer does not exist.")
    if device == "auto":
        device = torch.accelerator.current_accelerator() or "cpu"
    _progress(f"Loading {model}")
    _check_model(model)
    processor = TTTOmniProcessor.from_pretrained(model)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "audio", "audio": question}, {"type": "text", "text": INSTRUCTION}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    speaker = TTTOmniForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    if speaker.config.vocoder_config is None:
        raise ValueError(f"The model {model} has no vocoder: it cannot speak.")
    _progress("Answering")
    answer = speaker.generate(
        **inputs.to(device),
        max_new_tokens=max_new_tokens,
        return_audio=True,
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    waveform = answer.waveform[0].float().cpu()
    if not waveform.any():
        _progress("The answer says nothing: no file is written")
        return
    sampling_rate = speaker.config.vocoder_config.sampling_rate
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        soundfile.write(temporary, waveform.numpy(), sampling_rate, format="WAV", subtype="PCM_16")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    _progress(f"Wrote {len(waveform) / sampling_rate:.1f} s of speech to {output}")


def _check_model(model: str) -> None:
    try:
        config, _ = TTTOmniConfig.get_config_dict(model)
    except OSError:
        config = {}
    if not config:
        raise ValueError(f"The model {model} is neither a folder with a config.json nor found on the Hub.")
    if config.get("model_type") != TTTOmniConfig.model_type:
        raise ValueError(f"{model} is no TTT-Omni model but {config.get('model_type')!r}: see `ttt-omni convert`.")


def _progress(message: str) -> None:
    print(f"ttt-omni: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
