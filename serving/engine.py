# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""One thread that owns the model, and answers all conversations in one batch, joined and left at any token."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import Cache, PreTrainedConfig

from ..cache_ttt_omni import BatchedCache, snapshot
from ..memory_ttt_omni import TTTOmniMemory
from ..modeling_ttt_omni import TTTOmniForCausalLM
from ..processing_ttt_omni import TTTOmniProcessor
from ..streaming_ttt_omni import SpeechStream, TextStream, TTTOmniStreamEvent


FIRST_CHUNK_SIZE, CHUNK_SIZE = 10, 40  # units of a first sound, and of those after it
TOKENS_HEARD_AT_ONCE = 300  # a window of 30 s


@dataclass(eq=False)
class Answer:
    """
    An answer that an [`Engine`] makes.

    Args:
        pieces: of the prompt, as `processor.turn_pieces` yields them.
        memory: of the conversation so far, which is left as it is.
        deliver: takes each [`TTTOmniStreamEvent`], and at the end `None`, on the engine's thread.
        speaks: whether it is spoken.
        options: `max_new_tokens` and what else `generate` takes.
        seed: of sampling.
    """

    pieces: Iterator[dict[str, torch.Tensor]]
    memory: TTTOmniMemory | None
    deliver: Callable[[TTTOmniStreamEvent | None], None]
    speaks: bool = False
    options: dict = field(default_factory=dict)
    seed: int | None = None

    # What comes of it.
    heard: TTTOmniMemory | None = None  # the prompt, before the answer
    tokens: list[int] = field(default_factory=list)
    units: list[torch.LongTensor] = field(default_factory=list)  # of each token
    cache: Cache | None = None
    finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"
    error: Exception | None = None
    is_cancelled: bool = False

    @property
    def prompt_tokens(self) -> int:
        return 0 if self.heard is None else self.heard.input_ids.shape[1]

    def cancel(self) -> None:
        """Ends it after the token that is being made."""
        self.is_cancelled = True

    def conversation(self, answer_end_id: int, num_tokens: int | None = None) -> TTTOmniMemory:
        """
        The conversation with this answer, or with its first `num_tokens` as if no more had been said.

        Raises:
            ValueError: if not all of the prompt was heard, or there are not as many tokens.
        """
        if self.heard is None:
            raise ValueError("The question was not heard to its end.")
        if num_tokens is None or num_tokens == len(self.tokens):
            num_tokens, cache = len(self.tokens), self.cache
        else:
            cache = snapshot(self.heard.cache)
        if not 0 <= num_tokens <= len(self.tokens):
            raise ValueError(f"The answer has {len(self.tokens)} tokens, got {num_tokens}.")
        tokens = torch.tensor([[*self.tokens[:num_tokens], answer_end_id]])
        input_ids = torch.cat([self.heard.input_ids, tokens], dim=1)
        return TTTOmniMemory(cache, input_ids, torch.ones_like(input_ids))


@dataclass
class _Question:
    """What is being heard of an answer's prompt, as [`listen`] does it."""

    answer: Answer
    listening: Iterator[TTTOmniMemory]
    memory: TTTOmniMemory | None  # of all pieces so far

    @property
    def num_tokens(self) -> int:
        return 0 if self.memory is None else self.memory.input_ids.shape[1]


class _Row:
    """An answer while it is in the batch."""

    def __init__(self, answer: Answer, model: TTTOmniForCausalLM, processor: TTTOmniProcessor):
        self.answer = answer
        self.text = TextStream(processor.tokenizer)
        self.speech = SpeechStream(model, FIRST_CHUNK_SIZE, CHUNK_SIZE) if answer.speaks else None
        self.generator = None
        if answer.seed is not None:
            self.generator = torch.Generator(model.device).manual_seed(answer.seed)

    def begin(self, model: TTTOmniForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[1, vocab_size]` and state `[1, hidden_size]` behind the prompt."""
        heard = self.answer.heard
        memory = TTTOmniMemory(snapshot(heard.cache), heard.input_ids, heard.attention_mask)
        return model.generate(**vars(memory), custom_generate=self._prefill, **self.answer.options)

    def _prefill(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `generate(custom_generate=…)` calls once it has made these of its arguments."""
        self.input_ids, self.logits_processor, self.stopping_criteria = input_ids, logits_processor, stopping_criteria
        self.do_sample = generation_config.do_sample
        eos = generation_config.eos_token_id
        self.ends = set() if eos is None else set(torch.as_tensor(eos).flatten().tolist())
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        self.cache = outputs.cache
        return outputs.logits[:, -1], outputs.last_hidden_state[:, -1]

    def choose(self, logits: torch.Tensor) -> int:
        """The next token by `logits` `[1, vocab_size]`."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        scores = self.logits_processor(self.input_ids, logits)
        if self.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1, generator=self.generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        self.input_ids = torch.cat([self.input_ids, token], dim=1)
        self.answer.tokens.append(int(token))
        return int(token)

    @property
    def says_nothing(self) -> bool:
        """Whether it ends before it began."""
        return len(self.answer.tokens) == 1 and self.answer.tokens[0] in self.ends

    def is_over(self) -> bool:
        return bool(self.stopping_criteria(self.input_ids, None).all())

    def say(self, token: int, units: torch.LongTensor | None) -> None:
        """Delivers a token, and what sounds with its units."""
        waveform = None
        if units is not None:
            self.answer.units.append(units)
            waveform = self.speech.push_units(units)
        self._deliver(self.text.push(token), waveform, token)

    def finish(self, reason: str) -> None:
        answer = self.answer
        if reason != "cancelled":
            self._deliver(self.text.flush(), None if self.speech is None else self.speech.flush())
        if answer.tokens and answer.tokens[-1] in self.ends:
            answer.tokens.pop()
            reason = "stop"
        answer.cache, answer.finish_reason = self.cache, reason
        answer.deliver(None)

    def _deliver(self, text, waveform, token=None):
        if waveform is not None:
            waveform = waveform.float().cpu() if len(waveform) else None
        self.answer.deliver(TTTOmniStreamEvent(text or None, waveform, token))


class _Together:
    """The caches of several owners as one, put together anew where the owners change."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.forget()

    def cache_of(self, owners: list) -> BatchedCache:
        if owners != self.owners:
            self.part()
            self.owners, self.cache = list(owners), BatchedCache([owner.cache for owner in owners], self.config)
        return self.cache

    def part(self) -> None:
        """Gives each owner its cache back."""
        for owner, cache in zip(self.owners, self.cache.split() if self.owners else []):
            owner.cache = cache
        self.forget()

    def forget(self) -> None:
        self.owners, self.cache = [], None


class Engine:
    """
    Answers conversations, all in one batch.

    Between two tokens of those that are being answered, one piece is heard of those that are not yet, or several short
    ones. Each answer's tokens, units and samples are those of the conversation alone, up to the rounding of a batch.

    Args:
        model, processor: of which nobody else may use the model meanwhile, but to read its weights.
    """

    def __init__(self, model: TTTOmniForCausalLM, processor: TTTOmniProcessor):
        self.model, self.processor = model, processor
        self.arrived: deque[Answer] = deque()
        self.questions: deque[_Question] = deque()
        self.rows: list[_Row] = []
        self.language, self.speech = _Together(model.config.get_text_config()), None
        if model.config.speaks:
            self.speech = _Together(model.config.speech_decoder_config)
        self.is_closed = False
        self.wakes = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, answer: Answer) -> None:
        """
        Begins to make an answer.

        Raises:
            ValueError: if it shall be spoken by a model that cannot.
            RuntimeError: if the engine is closed.
        """
        if answer.speaks and not self.model.config.speaks:
            raise ValueError("This model cannot speak: it has no speech decoder, or no vocoder.")
        with self.wakes:
            if self.is_closed:
                raise RuntimeError("The engine is closed.")
            self.arrived.append(answer)
            self.wakes.notify()

    def close(self) -> None:
        """Ends all answers, and the thread."""
        with self.wakes:
            self.is_closed = True
            self.wakes.notify()
        self.thread.join()

    def heard_tokens(self, answer: Answer, samples: int) -> int:
        """How many tokens of a spoken answer are heard to their end in its first `samples`."""
        units = torch.cat(answer.units) if answer.units else torch.empty(0, dtype=torch.long)
        with torch.no_grad():
            durations = self.model.vocoder.durations(units.to(self.model.vocoder.device))
        ends = [0, *(durations.cumsum(0) * self.model.config.vocoder_config.hop_length).tolist()]
        said = torch.tensor([len(units) for units in answer.units]).cumsum(0).tolist()
        heard = [ends[number] <= samples for number in said]
        return min(heard.index(False) if False in heard else len(answer.tokens), len(answer.tokens))

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self.wakes:
                self.wakes.wait_for(lambda: self.is_closed or self.arrived or self.questions or self.rows)
                if self.is_closed:
                    break
                arrived, self.arrived = self.arrived, deque()
            self.questions.extend(map(self._listen, arrived))
            self._hear()
            if self.rows:
                self._make_a_token()
        for answer in [*self.arrived, *(item.answer for item in (*self.questions, *self.rows))]:
            _fail(answer, RuntimeError("The server is shutting down."))

    def _listen(self, answer: Answer) -> _Question:
        memory = answer.memory
        if memory is not None:
            memory = TTTOmniMemory(snapshot(memory.cache), memory.input_ids, memory.attention_mask)
        return _Question(answer, self.model.listen(answer.pieces, memory), memory)

    def _hear(self) -> None:
        """Pieces of questions, until it is time for the next token."""
        num_tokens = 0
        while self.questions and num_tokens < TOKENS_HEARD_AT_ONCE:
            question = self.questions.popleft()
            before = question.num_tokens
            self._hear_a_piece(question)
            num_tokens += question.num_tokens - before

    def _hear_a_piece(self, question: _Question) -> None:
        """After the last one, the answer begins."""
        answer = question.answer
        if answer.is_cancelled:
            answer.finish_reason = "cancelled"
            answer.deliver(None)
            return
        try:
            if (memory := next(question.listening, None)) is not None:
                question.memory = memory
                self.questions.append(question)
                return
            answer.heard = question.memory
            self._begin(answer)
        except Exception as error:
            _fail(answer, error)

    def _begin(self, answer: Answer) -> None:
        row = _Row(answer, self.model, self.processor)
        logits, state = row.begin(self.model)
        token, units = row.choose(logits), None
        if row.speech is not None:
            units = row.speech.unit_stream.push(state[: 0 if row.says_nothing else 1])
        row.say(token, units)
        self._keep([row])

    def _make_a_token(self) -> None:
        """Of each answer that is being made."""
        leaving = [row for row in self.rows if row.answer.is_cancelled]
        if leaving:
            self._leave(leaving)
        rows = list(self.rows)
        if not rows:
            return
        try:
            tokens = torch.cat([row.input_ids[:, -1:] for row in rows]).to(self.model.device)
            outputs = self.model(input_ids=tokens, cache=self.language.cache_of(rows), use_cache=True)
            tokens = [row.choose(outputs.logits[index : index + 1, -1]) for index, row in enumerate(rows)]
            units = self._speak(rows, outputs.last_hidden_state)
            self.rows = []
            for row, token in zip(rows, tokens):
                row.say(token, units.get(row))
            self._keep(rows)
        except Exception as error:
            self.rows = []
            for together in filter(None, (self.language, self.speech)):
                together.forget()
            for row in rows:
                _fail(row.answer, error)

    def _speak(self, rows: list[_Row], states: torch.Tensor) -> dict[_Row, torch.LongTensor]:
        """The units that the rows which speak begin at their `states` `[B, 1, hidden_size]`."""
        indices = [index for index, row in enumerate(rows) if row.speech is not None]
        if not indices:
            return {}
        streams = [rows[index].speech.unit_stream for index in indices]
        logits = self.model.speech_decoder(states[indices], cache=self.speech.cache_of(streams))
        return {rows[index]: stream.collapse(logits[row]) for row, (index, stream) in enumerate(zip(indices, streams))}

    def _keep(self, rows: list[_Row]) -> None:
        """Lets those of `rows` go on that are not over."""
        self.rows += rows
        over = [row for row in rows if row.is_over()]
        if over:
            self._leave(over)

    def _leave(self, rows: list[_Row]) -> None:
        self.language.part()
        if self.speech is not None:
            self.speech.part()
        self.rows = [row for row in self.rows if row not in rows]
        for row in rows:
            row.finish("cancelled" if row.answer.is_cancelled else "length")


def _fail(answer: Answer, error: Exception) -> None:
    answer.error, answer.finish_reason = error, "error"
    answer.deliver(None)
