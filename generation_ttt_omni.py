# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Generation of text and speech."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import (
    AutoTokenizer,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerBase,
    StaticCache,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg

from .cache_ttt_omni import OwnedTensorsMixin, SlidingWindowLayer, add_ttt_layers, has_fixed_size
from .configuration_ttt_omni import audio_embedding_lengths
from .streaming_ttt_omni import SpeechStream, TextStream, TTTOmniStreamEvent


LOOKUP = "prompt_lookup_num_tokens"


@dataclass
class TTTOmniGenerateOutput(ModelOutput):
    """
    What `generate(return_audio=True)` returns.

    Args:
        sequences: `[B, prompt + new]`, as of any text model.
        units: B tensors `[U]`, the speech units of each row's answer.
        waveform: B float32 tensors `[samples]` at the vocoder's sampling rate; `None` if the model has no vocoder.
        cache: the cache, for the next turn of the conversation.
        sequences_scores, scores, logits, beam_indices, attentions, hidden_states: as in Transformers, where asked for.
    """

    sequences: torch.LongTensor | None = None
    units: list[torch.LongTensor] | None = None
    waveform: list[torch.FloatTensor] | None = None
    cache: Cache | None = None
    sequences_scores: torch.FloatTensor | None = None
    scores: tuple[torch.FloatTensor] | None = None
    logits: tuple[torch.FloatTensor] | None = None
    beam_indices: torch.LongTensor | None = None
    attentions: tuple | None = None
    hidden_states: tuple | None = None


class TTTOmniGenerationMixin(GenerationMixin):
    """Transformers' generation, from spoken prompts and with spoken answers."""

    output_modalities = ("text", "audio")

    @torch.no_grad()
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        return_audio: bool = False,
        generation_mode: str | None = None,
        **kwargs,
    ):
        """
        Generate as any text model does, and with `return_audio=True` speak the answer.

        Args:
            inputs: `[B, T]`, or pass `input_ids`.
            generation_config: as in Transformers, overridden by `kwargs`.
            return_audio: whether to return a [`TTTOmniGenerateOutput`] with units and waveform.
            generation_mode: `"audio"` is the same as `return_audio=True`, as Transformers' pipelines say it.
            kwargs: `input_features` and `input_features_mask` of the prompt's speech, and what Transformers takes.
                If no layer has full attention, a `compile_config` with `cache_implementation="static"` compiles steps.

        Returns:
            What Transformers returns, or a [`TTTOmniGenerateOutput`].

        Raises:
            ValueError: if speech is asked of a model that has no speech decoder, or another mode than text and audio;
                for an `assistant_model`; for `prompt_lookup_num_tokens` with speech or a cache that holds something.
        """
        if generation_mode not in (None, *self.output_modalities):
            raise ValueError(f"`generation_mode` must be one of {self.output_modalities}, got {generation_mode!r}.")
        return_audio = return_audio or generation_mode == "audio"
        if return_audio and self.config.speech_decoder_config is None:
            raise ValueError("This model has no speech decoder (`speech_decoder_config` is None): it cannot speak.")
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if kwargs.get("input_features") is not None:
            kwargs.update(self._embed_prompt(input_ids, **kwargs))
            kwargs = {key: value for key, value in kwargs.items() if not key.startswith("input_features")}
        if kwargs.get("assistant_model") is not None:
            raise ValueError("No other model may assist this one: use `prompt_lookup_num_tokens`.")
        if self._looks_up(generation_config, kwargs):
            if return_audio:
                raise ValueError(
                    "Assisted decoding makes several tokens at once, which cannot be spoken: ask for text."
                )
            if kwargs.get("cache") is not None and int(kwargs["cache"].get_seq_length()) > 0:
                raise ValueError("Prompt-lookup decoding reads all of the prompt anew: pass an empty cache, or none.")
        if not return_audio:
            return super().generate(input_ids, generation_config, **kwargs)

        speech_states = []
        kwargs["return_dict_in_generate"] = True
        outputs = super().generate(input_ids, generation_config, speech_states=speech_states, **kwargs)
        prompt_length = 0 if input_ids is None else input_ids.shape[1]
        new_tokens = outputs.sequences[:, prompt_length:]
        states = self._answer_states(outputs, speech_states)
        lengths = _spoken_lengths(new_tokens, self._eos_token_ids(generation_config, kwargs))
        units = [self.speak(row[:length]) for row, length in zip(states, lengths)]
        waveform = [self.vocoder(row) for row in units] if self.config.vocoder_config is not None else None
        fields = {name: value for name, value in outputs.items() if name in TTTOmniGenerateOutput.__annotations__}
        return TTTOmniGenerateOutput(units=units, waveform=waveform, **fields)

    def stream(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        first_chunk_size: int = 10,
        chunk_size: int = 40,
        **kwargs,
    ) -> Iterator[TTTOmniStreamEvent]:
        """
        Generate one answer, and speak while it comes, where the model has a speech decoder and a vocoder. Joined, the
        waveforms are that of `generate(return_audio=True)`.

        Generation advances while the returned generator is iterated over, and ends with it; `close()` ends it early.

        Args:
            inputs, generation_config, kwargs: as in [`generate`], for one row and without beams.
            tokenizer: by default that in the folder or repository from which the model was loaded.
            first_chunk_size: speech units to wait for until there is a first sound; fewer make it come sooner.
            chunk_size: units to wait for afterwards; more cost less.

        Returns:
            A generator of [`TTTOmniStreamEvent`], one per token and one at the end, each with a piece of text, a
            piece of waveform, both or none.

        Raises:
            ValueError: if a chunk has no units, or there is no tokenizer; with the first event, if there are several
                rows.
        """
        if "return_audio" in kwargs:
            raise ValueError("`return_audio` is for `generate`: `stream` speaks where the model can.")
        speech = SpeechStream(self, first_chunk_size, chunk_size) if self.config.speaks else None
        text = TextStream(self._own_tokenizer() if tokenizer is None else tokenizer)
        return self._stream(text, speech, inputs, generation_config, kwargs)

    @torch.no_grad()
    def _stream(self, text, speech, inputs, generation_config, kwargs):
        for token, state in self.generate(inputs, generation_config, custom_generate=decode_steps, **kwargs):
            yield _stream_event(text.push(token), speech and speech.push(state), token)
        yield _stream_event(text.flush(), speech and speech.flush())

    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the folder or repository from which this model was loaded."""
        if getattr(self, "_tokenizer", None) is None:
            try:
                # with the config, as reading it again would ask whether to trust the code that is running
                self._tokenizer = AutoTokenizer.from_pretrained(
                    self.config.name_or_path, config=self.config, revision=getattr(self.config, "_commit_hash", None)
                )
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"There is no tokenizer at {self.config.name_or_path!r}, from which this model was loaded: pass "
                    "`tokenizer=processor.tokenizer`."
                ) from error
        return self._tokenizer

    def speak(self, hidden_states: torch.Tensor) -> torch.LongTensor:
        """The units `[U]` that the speech decoder makes of one row's `hidden_states` `[T, hidden_size]`."""
        if hidden_states.shape[0] == 0:
            return torch.empty(0, dtype=torch.long, device=hidden_states.device)
        frames = self.speech_decoder(hidden_states.unsqueeze(0))[0].argmax(-1)
        return self.speech_decoder.collapse(frames)

    def _embed_prompt(
        self, input_ids, input_features, input_features_mask=None, cache=None, attention_mask=None, **kwargs
    ):
        """Embeddings of the part of the prompt that the cache does not hold yet, and where that part starts."""
        start = 0
        if cache is not None:
            add_ttt_layers(cache, self.config.get_text_config())
            start = int(cache.get_seq_length())
        # As in Transformers: with a cache, a mask as long as `input_ids` says that these are the whole conversation.
        is_whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
        if start > 0 and is_whole:
            is_new = self._is_new_window(
                input_ids == self.config.audio_token_id, start, input_features, input_features_mask
            )
            input_ids, input_features = input_ids[:, start:], input_features[is_new]
            input_features_mask = None if input_features_mask is None else input_features_mask[is_new]
        if input_features.shape[0] == 0:
            input_features = None
        embeds = self.model.embed(self._to_device(input_ids), input_features, input_features_mask)
        return {"prompt_embeds": embeds, "prompt_start": start}

    def _is_new_window(self, is_audio, start, input_features, input_features_mask):
        """Which windows `[W]` belong to placeholders from `start` on; `is_audio` `[B, T]` marks all placeholders."""
        if input_features_mask is None:
            input_features_mask = torch.ones(input_features[:, 0].shape)
        lengths = audio_embedding_lengths(input_features_mask, self.config.audio_downsample).tolist()
        if sum(lengths) == int(is_audio[:, start:].sum()):
            return torch.ones(len(lengths), dtype=torch.bool)
        is_new, windows = [], iter(lengths)
        for cached, total in zip(is_audio[:, :start].sum(1).tolist(), is_audio.sum(1).tolist()):
            seen = 0
            while seen < total and (length := next(windows, None)) is not None:
                is_new.append(seen >= cached)
                seen += length
        if len(is_new) != len(lengths):
            raise ValueError("The prompt's audio placeholders do not fit its `input_features`.")
        return torch.tensor(is_new)

    @staticmethod
    def _answer_states(outputs, speech_states):
        """The state that predicted each new token of each returned row, `[B, T, hidden_size]`."""
        states = torch.stack(speech_states, dim=1)  # [rows while generating, steps, hidden_size]
        beams = getattr(outputs, "beam_indices", None)
        if beams is None:
            return states
        beams = beams[:, : states.shape[1]].to(states.device).clamp(min=0)
        return states[beams, torch.arange(beams.shape[1], device=states.device)]

    def _looks_up(self, generation_config, kwargs) -> bool:
        configs = (generation_config, self.generation_config)
        lookups = [kwargs.get(LOOKUP), *(getattr(config, LOOKUP, None) for config in configs)]
        return any(lookup is not None for lookup in lookups)

    def _eos_token_ids(self, generation_config, kwargs) -> set[int]:
        eos = kwargs.get("eos_token_id")
        for config in (generation_config, self.generation_config):
            eos = getattr(config, "eos_token_id", None) if eos is None else eos
        return _as_set(eos)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if model_kwargs.get("cache") is not None:  # before Transformers asks it for the number of its tokens
            add_ttt_layers(model_kwargs["cache"], self.config.get_text_config())
            cache = model_kwargs["cache"]
            for layer in cache.layers:
                if isinstance(layer, OwnedTensorsMixin):
                    layer.forget_past()  # which an earlier prompt-lookup recorded
            if has_fixed_size(cache):
                is_asked_for = isinstance(cache, StaticCache) and generation_config.compile_config is not None
                for layer in cache.layers:  # pieces of a prompt, which Transformers would compile too, are no steps
                    layer.is_compileable = is_asked_for and generation_config.prefill_chunk_size is None

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, cache, position_ids=None, **kwargs):
        """What Transformers prepares for a step that is compiled: only full attention takes it."""
        if set(config.get_text_config().layer_types) - {"full_attention"}:
            return attention_mask
        return create_masks_for_generate(config, inputs_embeds, attention_mask, cache, position_ids, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        cache: Cache | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_start: int = 0,
        speech_states: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> dict:
        model_inputs = super().prepare_inputs_for_generation(input_ids, cache=cache, **kwargs)
        is_step = not kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") == 1
        if is_step and cache is not None and cache.is_compileable and has_fixed_size(cache):
            # All rows go on by a token; what grows with each would be compiled anew.
            model_inputs.pop("attention_mask", None)
            model_inputs.pop("position_ids", None)
            for layer in cache.layers:
                if isinstance(layer, SlidingWindowLayer):
                    layer.roll()
        if prompt_embeds is None or model_inputs.get("input_ids") is None:
            return model_inputs
        input_ids = model_inputs["input_ids"]
        start = 0 if cache is None else int(cache.get_seq_length()) - prompt_start
        embeds = prompt_embeds[:, start : start + input_ids.shape[1]]
        if embeds.shape[1] > 0:
            new_embeds = self.get_input_embeddings()(input_ids[:, embeds.shape[1] :])
            model_inputs["inputs_embeds"] = torch.cat([embeds, new_embeds], dim=1)
            model_inputs["input_ids"] = None
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        if model_kwargs.get("speech_states") is not None:
            model_kwargs["speech_states"].append(outputs.last_hidden_state[:, -1].clone())  # no view of all the prompt
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)


def decode_steps(
    model: GenerationMixin,
    input_ids: torch.LongTensor,
    logits_processor: Callable,
    stopping_criteria: Callable,
    generation_config: GenerationConfig,
    **model_kwargs,
) -> Iterator[tuple[int, torch.Tensor]]:
    """
    Transformers' `GenerationMixin._sample` for one row, as a generator that can be left at any token: what
    `generate(custom_generate=decode_steps)` returns.

    Yields:
        Each token, and the states to be spoken for it: `[1, hidden_size]`, or `[0, hidden_size]` where an answer ends
        before it began.

    Raises:
        ValueError: if there are several rows.
    """
    if input_ids.shape[0] > 1:
        raise ValueError(
            f"A stream speaks one answer, got {input_ids.shape[0]} rows: pass one prompt, and neither `num_beams` nor "
            "`num_return_sequences`."
        )
    prompt_length, ends = input_ids.shape[1], _as_set(generation_config.eos_token_id)
    step = model
    if model._valid_auto_compile_criteria(model_kwargs, generation_config):
        step = model.get_compiled_call(generation_config.compile_config)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        states = outputs.last_hidden_state[:, -1].clone()  # [1, hidden_size]
        del outputs
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1)
        else:
            token = scores.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
        says_nothing = input_ids.shape[1] == prompt_length + 1 and int(token) in ends
        yield int(token), states[:0] if says_nothing else states
        if stopping_criteria(input_ids, None).all():
            return
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1 if model_kwargs["use_cache"] else None, **model_kwargs
        )
        outputs = step(**inputs, return_dict=True)


def _stream_event(text, waveform, token=None):
    return TTTOmniStreamEvent(text or None, None if waveform is None or len(waveform) == 0 else waveform, token)


def _as_set(eos_token_id: int | list[int] | torch.Tensor | None) -> set[int]:
    return set() if eos_token_id is None else set(torch.as_tensor(eos_token_id).flatten().tolist())


def _spoken_lengths(new_tokens: torch.LongTensor, eos_token_ids: set[int]) -> list[int]:
    """
    How many of each row's tokens are spoken: up to its end-of-sequence token, whose state is that of the last word
    (and is spoken by the original, too), but none where that token is the first.
    """
    lengths = []
    for row in new_tokens.tolist():
        end = next((i for i, token in enumerate(row) if token in eos_token_ids), len(row) - 1)
        lengths.append(0 if row and end == 0 and row[0] in eos_token_ids else end + 1)
    return lengths
