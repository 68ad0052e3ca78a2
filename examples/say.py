# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Has a text-to-speech program say a model's answer, each sentence while the next is written.

    python examples/say.py smollm2 "Why is the sky blue?"
    python examples/say.py smollm2 "Why is the sky blue?" --command "flite -t {text}"
"""

import argparse
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor

from transformers import AutoModelForCausalLM, AutoProcessor

from ttt_omni import iter_sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, or repository on the Hub")
    parser.add_argument("question", help="in text")
    parser.add_argument("--command", default="espeak-ng -- {text}", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    processor = AutoProcessor.from_pretrained(arguments.model)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": arguments.question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    events = model.stream(**inputs, max_new_tokens=arguments.max_new_tokens)
    words = shlex.split(arguments.command)
    with ThreadPoolExecutor(1) as voice:  # one sentence after the other
        spoken = []
        for sentence in iter_sentences(event.text or "" for event in events):
            print(sentence, flush=True)
            command = [word.replace("{text}", sentence) for word in words]
            spoken.append(voice.submit(subprocess.run, command, check=True))
        for sentence in spoken:
            sentence.result()


if __name__ == "__main__":
    main()
