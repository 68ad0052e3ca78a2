# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Kills `ttt-omni serve` (SIGKILL) at random moments while sessions talk, starts it again, and goes on.

    python benchmarks/serve_kills.py --kills 20

Four clients of the realtime endpoint each hold a conversation of their own, turn after turn, with answers cut to some
tokens. A moment is a number of events that they have received together, and a while after it. After each kill every
file in the folder of sessions is read: it must be whole. After each restart each client takes its session up again,
and repeats the turn that was not completed. At the end each conversation, its tokens and its state, is compared with
the same one that nobody disturbed. Prints a table, and writes `benchmarks/results/serve_kills.json`.
"""

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import soxr
import torch
from reporting import RESULTS, store
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from ttt_omni import TTTOmniForCausalLM, TTTOmniProcessor
from ttt_omni.conversion import make_tiny
from ttt_omni.serving.audio import decode
from ttt_omni.serving.server import serve


SESSIONS = 4
TOKENS = 4
TOLERANCE = 1e-4


def text(turn: int) -> str:
    """A question that is typed, but for every fourth one, which is spoken; and what is typed beside that."""
    return f"And what is {turn}?"


def pcm16(session: int, turn: int) -> bytes | None:
    """The spoken part of a question, if it has one, as PCM16 at 24 kHz."""
    if turn % 4:
        return None
    noise = np.random.default_rng([session, turn]).standard_normal(8000 * (1 + (session + turn) % 3))
    waveform = soxr.resample((0.05 * noise).astype(np.float32), 16000, 24000)
    return np.rint(waveform.clip(-1, 1) * 32767).astype("<i2").tobytes()


class ServerProcess:
    """`ttt-omni serve`, forked from this process, which has imported the libraries: that takes most of a start."""

    def __init__(self, model: Path, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

        def run():
            log = os.open(folder.parent / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            serve(str(model), port=self.port, memory=str(folder))

        self.process = multiprocessing.get_context("fork").Process(target=run)
        self.process.start()
        while True:
            try:
                httpx.get(f"{self.address}/health")
                break
            except httpx.TransportError:
                if not self.process.is_alive():
                    raise RuntimeError((folder.parent / "server.log").read_text()[-2000:]) from None
                time.sleep(0.1)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


async def talk(address: str, id: str, session: int, completed: list[int], turns: int, received) -> None:
    """
    Turn after turn from the last completed one on, until the server is gone or all were completed; calls `received`
    for each event that comes.
    """
    try:
        async with connect(f"ws{address[4:]}/v1/realtime?session={id}") as websocket:

            async def send(**event):
                await websocket.send(json.dumps(event))

            await send(type="session.update", session={"audio": {"input": {"turn_detection": None}}})
            while completed[session] < turns:
                turn = completed[session]
                if (data := pcm16(session, turn)) is not None:
                    await send(type="input_audio_buffer.append", audio=base64.b64encode(data).decode())
                    await send(type="input_audio_buffer.commit")
                item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text(turn)}]}
                await send(type="conversation.item.create", item=item)
                await send(type="response.create", response={"max_output_tokens": TOKENS})
                while (event := json.loads(await websocket.recv()))["type"] != "response.done":
                    received()
                    if event["type"] == "error":
                        raise RuntimeError(event["error"]["message"])
                if event["response"]["status"] == "failed":
                    raise RuntimeError(event["response"]["status_details"]["error"]["message"])
                completed[session] += 1
    except (WebSocketException, OSError):
        pass


async def talk_until(server: ServerProcess, ids: list[str], completed: list[int], turns: int, events: float):
    """All clients, until the server is killed after so many events, whose fraction is one of 50 ms."""
    seen, enough = 0, asyncio.Event()

    def received():
        nonlocal seen
        seen += 1
        if seen >= events:
            enough.set()

    talks = asyncio.gather(
        *(talk(server.address, id, number, completed, turns, received) for number, id in enumerate(ids))
    )
    ended = asyncio.ensure_future(talks)
    await asyncio.wait({ended, asyncio.create_task(enough.wait())}, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        await asyncio.sleep(0.05 * (events % 1))
        server.kill()
    await talks


def saved_turns(model, processor, folder: Path, ids: list[str]) -> list[int]:
    """How many turns each file holds, once it is known to be whole."""
    turns = []
    for id in ids:
        path = folder / f"{id}.safetensors"
        turns.append(0)
        if path.exists():
            input_ids = model.load_memory(path).input_ids  # raises for a file that is damaged
            said = processor.decode(input_ids[0], skip_special_tokens=True)
            while text(turns[-1]) in said:
                turns[-1] += 1
    return turns


def undisturbed(model, processor, session: int, turns: int):
    """The same conversation by `generate`."""
    memory = None
    for turn in range(turns):
        content = [{"type": "text", "text": text(turn)}]
        if (data := pcm16(session, turn)) is not None:
            audio = decode(data, "pcm16", 60, "")
            content = [{"type": "audio", "audio": audio, "sampling_rate": 16000}, *content]
        message = {"role": "user", "content": content}
        pieces = processor.turn_pieces(message, None if memory is None else memory.input_ids)
        *_, memory = model.listen(pieces, memory)
        out = model.generate(**vars(memory), max_new_tokens=TOKENS, return_dict_in_generate=True)
        new = out.sequences[0, memory.input_ids.shape[1] :].tolist()
        if new[-1] in model.generation_config.eos_token_id:
            new.pop()
        memory.input_ids = torch.cat([memory.input_ids, torch.tensor([[*new, processor.answer_end_id]])], dim=1)
        memory.cache = out.cache
    return memory


def difference(model, path: Path, expected) -> float:
    """The largest between two conversations' states; infinite if their tokens differ."""
    memory = model.load_memory(path)
    if memory.input_ids.tolist() != expected.input_ids.tolist():
        return torch.inf
    pairs = zip(memory.cache.layers, expected.cache.layers)
    return max(
        float((x - other.tensors()[name]).abs().max())
        for layer, other in pairs
        for name, x in layer.tensors().items()
        if x.is_floating_point()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills `ttt-omni serve`, and goes on.")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--events", type=float, default=120, metavar="N", help="until a kill, at most; default: 120")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--output", type=Path, default=RESULTS / "serve_kills.json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), arguments.kills, arguments.events, random.Random(arguments.seed))
    store(arguments.output, results)
    sys.exit(int(not results["nothing_lost"]))


def measure(folder: Path, kills: int, most: float, generator: random.Random) -> dict:
    make_tiny(folder / "model")
    model = TTTOmniForCausalLM.from_pretrained(folder / "model")
    processor = TTTOmniProcessor.from_pretrained(folder / "model")
    sessions = folder / "sessions"
    sessions.mkdir()
    server = ServerProcess(folder / "model", sessions)
    ids = [httpx.post(f"{server.address}/v1/sessions").json()["id"] for _ in range(SESSIONS)]
    completed, rows = [0] * SESSIONS, []
    print(f"{'kill':>5}{'events':>9}{'said to clients':>20}{'in the files':>20}", flush=True)
    for kill in range(kills):
        events = generator.uniform(0, most)
        asyncio.run(talk_until(server, ids, completed, 10**9, events))
        in_files = saved_turns(model, processor, sessions, ids)
        # A turn may be in the file whose end the client did not hear of; it then is not repeated.
        is_whole = all(said <= saved <= said + 1 for said, saved in zip(completed, in_files))
        rows.append({"events": events, "completed": list(completed), "saved": in_files, "whole": is_whole})
        shown = [" ".join(map(str, turns)) for turns in (completed, in_files)]
        print(f"{kill:5}{events:9.2f}{shown[0]:>20}{shown[1]:>20}{'' if is_whole else '  LOST'}", flush=True)
        completed[:] = in_files
        server = ServerProcess(folder / "model", sessions)
    turns = max(completed) + 1
    asyncio.run(talk_until(server, ids, completed, turns, float("inf")))
    server.kill()
    left = sorted(path.name for path in sessions.iterdir() if path.suffix not in (".json", ".safetensors", ".lock"))
    paths = [sessions / f"{id}.safetensors" for id in ids]
    differences = [difference(model, path, undisturbed(model, processor, n, turns)) for n, path in enumerate(paths)]
    nothing_lost = all(row["whole"] for row in rows) and max(differences) <= TOLERANCE and not left
    print(
        f"{turns} turns in each of {SESSIONS} sessions; largest difference to undisturbed ones: {max(differences):.1e}"
    )
    print(f"left over: {left or 'nothing'}; {'nothing was lost' if nothing_lost else 'SOMETHING WAS LOST'}")
    results = {"kills": kills, "sessions": SESSIONS, "turns": turns, "differences": differences, "rows": rows}
    return {**results, "left_over": left, "nothing_lost": nothing_lost}


if __name__ == "__main__":
    main()
