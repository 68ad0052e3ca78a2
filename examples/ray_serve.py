# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Replicas of `ttt-omni serve` on several machines, by Ray Serve:

    pip install -e ".[serve]" "ray[serve]"

    python examples/ray_serve.py --model demo --memory /shared/sessions --replicas 2

Each turn is a POST of `{"session": ID, "text": …}` or, with a WAV in base64, `{"session": ID, "audio": …}`; without a
session a new one begins. Ray sends the turns of a session to the replica that has it (multiplexing on its id), and the
others' to others. The memories are files in a folder that all replicas see, so that when a replica dies in the middle
of a conversation, the turn is made in another, from the last completed one.

Seen with Ray 2.60, two replicas of the tiny model on two cores and `--new-tokens 48`: the turns of three sessions went
to the replica of each; `kill -9` of it 1.5 s into the third of four turns; that turn came from the other replica, and
all four had the text and the speech of the same conversation undisturbed.
"""

import argparse
import asyncio
import base64
import os
from pathlib import Path

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from ttt_omni import TTTOmniForCausalLM, TTTOmniProcessor
from ttt_omni.serving.audio import decode, encode
from ttt_omni.serving.chat import with_instruction
from ttt_omni.serving.errors import APIError
from ttt_omni.serving.server import Limits, Server
from ttt_omni.serving.sessions import owner_of


SESSIONS_PER_REPLICA = 16


@serve.deployment
class Talker:
    """A replica: a model, and the sessions that were with it last."""

    def __init__(self, model: str, memory: str, new_tokens: int):
        loaded = TTTOmniForCausalLM.from_pretrained(model).eval()
        processor = TTTOmniProcessor.from_pretrained(model)
        self.server = Server(loaded, processor, model, Path(memory), Limits(new_tokens=new_tokens))

    @serve.multiplexed(max_num_models_per_replica=SESSIONS_PER_REPLICA)
    async def turns_of(self, session: str) -> asyncio.Lock:
        """What Ray knows a session by: its turns, one after the other."""
        return asyncio.Lock()

    async def answer(self, turn: dict) -> dict:
        """Text, speech and session of one turn."""
        server = self.server
        async with await self.turns_of(serve.get_multiplexed_model_id()):
            async with server.sessions.open(turn["session"], owner_of(None)) as session:
                content = [{"type": "text", "text": turn["text"]}] if "text" in turn else []
                if "audio" in turn:
                    audio = decode(base64.b64decode(turn["audio"]), "wav", server.limits.audio_seconds, "audio")
                    content.append({"type": "audio", "audio": audio, "sampling_rate": 16000})
                content = with_instruction(content, server.processor.speech_instruction)
                options, speaks = {"max_new_tokens": server.limits.new_tokens}, server.model.config.speaks
                message = {"role": "user", "content": content}
                async with server.answer(message, session.memory, speaks, options, None) as stream:
                    events = [event async for event in stream]
                await session.save(stream.answer.conversation(server.answer_end_id))
        said = {"session": session.id, "text": "".join(event.text or "" for event in events), "replica": os.getpid()}
        waveforms = [event.waveform.numpy() for event in events if event.waveform is not None]
        if waveforms:
            said["audio"] = base64.b64encode(encode(np.concatenate(waveforms), server.speech_rate, "wav")).decode()
        return said

    def create(self) -> str:
        return self.server.sessions.create(owner_of(None))


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Door:
    """Takes requests, and sends each to the replica that has its session."""

    def __init__(self, talkers):
        self.talkers = talkers

    async def __call__(self, request: Request) -> JSONResponse:
        turn = await request.json()
        if "session" not in turn:
            turn["session"] = await self.talkers.create.remote()
        talkers = self.talkers.options(multiplexed_model_id=turn["session"])
        for attempt in range(3):
            try:
                return JSONResponse(await talkers.answer.remote(turn))
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, APIError):
                    raise
                return JSONResponse({"error": error.cause.error}, error.cause.status)
            except ray.exceptions.RayActorError:  # it died: the turn was not completed
                if attempt == 2:
                    raise
                await asyncio.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Replicas of a TTT-Omni server, by Ray Serve.")
    parser.add_argument("--model", required=True, metavar="DIR_OR_REPO")
    parser.add_argument("--memory", required=True, metavar="DIR", help="folder that all replicas see")
    parser.add_argument("--replicas", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--gpus", type=float, default=0, metavar="N", help="of each replica (default: 0)")
    arguments = parser.parse_args()
    memory = Path(arguments.memory).resolve()
    memory.mkdir(parents=True, exist_ok=True)
    model = str(Path(arguments.model).resolve()) if Path(arguments.model).exists() else arguments.model
    talkers = Talker.options(num_replicas=arguments.replicas, ray_actor_options={"num_gpus": arguments.gpus})
    serve.run(Door.bind(talkers.bind(model, str(memory), arguments.new_tokens)), blocking=True)


if __name__ == "__main__":
    main()
