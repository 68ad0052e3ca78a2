# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import shutil

import pytest
import torch
from layouts import text_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from short_stages import EXAMPLES, TEXTS, losses, shorten
from transformers import AutoModelForCausalLM

from ttt_omni import ttt_lora_config
from ttt_omni.conversion import ConversionError
from ttt_omni.training import distill_stage, layer_matching_loss, logit_matching_loss, make_parent


WINDOW = {"sliding_window": 5, "attention_sinks": 2}


def grafts(layer_types, source, **kwargs):
    """A parent, saved in the folder `source`, and a student with its weights, as far as it has them."""
    parent = text_model(["full_attention"] * len(layer_types))
    parent.save_pretrained(source)
    student = text_model(layer_types, seed=1, **kwargs)
    student.load_state_dict(parent.state_dict(), strict=False)
    return parent, student


def tokens(*shape):
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(0))


def changed(model, before):
    return {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}


def snapshot(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


@pytest.mark.parametrize(
    "layer_types, kwargs",
    [
        (["full_attention", "linear_attention", "hybrid"], {}),
        (["sliding_attention", "linear_attention", "hybrid_sliding"], WINDOW),
    ],
)
def test_parent_is_the_model_before_the_graft(tmp_path, layer_types, kwargs):
    original, student = grafts(layer_types, tmp_path, **kwargs)
    input_ids = tokens(2, 17)
    before = student(input_ids).logits
    parent = make_parent(student, tmp_path)
    assert torch.equal(parent(input_ids).logits, original(input_ids).logits)
    assert torch.equal(student(input_ids).logits, before)
    own = {name for name, x in parent.named_parameters() if all(x is not y for y in student.parameters())}
    assert own == {f"model.language_model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"}


def test_parent_from_a_checkpoint_in_the_original_layout(tmp_path):
    original, student = grafts(["full_attention", "linear_attention"], tmp_path / "ours")
    source = tmp_path / "source"
    source.mkdir()
    tensors = {name.replace("language_model.", ""): x for name, x in original.state_dict().items()}
    save_file(tensors, source / "model.safetensors")
    parent = make_parent(student, source)
    assert torch.equal(parent(tokens(1, 9)).logits, original(tokens(1, 9)).logits)


def test_parent_needs_its_attention(tmp_path):
    _, student = grafts(["full_attention", "linear_attention"], tmp_path)
    with pytest.raises(ConversionError, match="Layer 1 has no attention to learn from"):
        make_parent(student)
    tensors = load_file(tmp_path / "model.safetensors")
    q_proj = "model.language_model.layers.1.self_attn.q_proj.weight"
    save_file(tensors | {q_proj: torch.zeros(8, 16)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"has the shape \[8, 16\], expected \[16, 16\]"):
        make_parent(student, tmp_path)
    save_file({name: x for name, x in tensors.items() if name != q_proj}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="layer 1, lacks tensors for q_proj"):
        make_parent(student, tmp_path)


def attention_outputs(model, layer_idx, **inputs):
    """Input and output of a layer's attention."""
    found = []
    attention = model.model.language_model.layers[layer_idx].self_attn
    hook = attention.register_forward_hook(
        lambda module, args, kwargs, output: found.extend([kwargs.get("hidden_states", *args[:1]), output[0]]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return found


@pytest.mark.parametrize("layer_type", ["linear_attention", "hybrid", "hybrid_sliding"])
def test_layer_matching_loss_by_its_definition(tmp_path, layer_type):
    sliding = layer_type == "hybrid_sliding"
    layer_types = ["full_attention", layer_type, "full_attention"]
    _, student = grafts(layer_types, tmp_path, ttt_gate_init=0.4, **(WINDOW if sliding else {}))
    parent = make_parent(student, tmp_path)
    input_ids = tokens(2, 19)
    x, attended = attention_outputs(parent, 1, input_ids=input_ids)
    layer = student.model.language_model.layers[1]
    with torch.no_grad():
        missed = layer.ttt(x) - attended
        if sliding:  # the layer before is the parent's, so that the student's own window sees the same input
            student_x, windowed = attention_outputs(student, 1, input_ids=input_ids)
            torch.testing.assert_close(student_x, x)
            assert (windowed - attended)[:, 8:].abs().max() > 1e-2
            missed = torch.tanh(layer.ttt_gate.weight) * layer.ttt(x) - (attended - windowed)
    expected = missed.square().sum() / attended.square().sum()
    torch.testing.assert_close(layer_matching_loss(student, parent, {"input_ids": input_ids}), expected)


@pytest.mark.parametrize("layer_type", ["linear_attention", "hybrid", "hybrid_sliding"])
def test_matching_trains_ttt_and_nothing_else(tmp_path, layer_type):
    sliding = layer_type == "hybrid_sliding"
    _, student = grafts(["full_attention", layer_type, layer_type], tmp_path, **(WINDOW if sliding else {}))
    parent = make_parent(student, tmp_path)
    before, batch = snapshot(student), {"input_ids": tokens(2, 14)}
    logits = student(**batch).logits
    parent_logits = parent(**batch).logits
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-2)
    losses = []
    for _ in range(8):
        loss = layer_matching_loss(student, parent, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    parts = (".ttt.", ".ttt_gate.") if sliding else (".ttt.",)
    trained = {name for name in before if any(part in name for part in parts)}
    assert changed(student, before) == trained
    assert torch.equal(parent(**batch).logits, parent_logits)
    assert torch.equal(student(**batch).logits, logits) == (layer_type == "hybrid")  # whose gate stays shut


def test_matching_an_adapter_reaches_the_adapter_only(tmp_path):
    _, student = grafts(["full_attention", "linear_attention"], tmp_path)
    parent = make_parent(student, tmp_path)
    model = get_peft_model(student, ttt_lora_config(student, rank=2))
    layer_matching_loss(model, parent, {"input_ids": tokens(2, 9)}).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached and all(".ttt." in name and ("lora_" in name or "modules_to_save" in name) for name in reached)
    assert not any("lora" in name for name, _ in parent.named_modules())


def padded_and_packed(lengths):
    """The same sequences each alone, padded, and packed."""
    sequences = [tokens(1, 40)[:, i : i + length] for i, length in enumerate(lengths)]
    labels = [torch.where(torch.arange(length) > 0, x, -100) for x, length in zip(sequences, lengths)]
    input_ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    padded = {"input_ids": input_ids, "attention_mask": mask, "labels": torch.full_like(input_ids, -100)}
    for row, length in enumerate(lengths):
        columns = slice(None, length) if row % 2 else slice(max(lengths) - length, None)
        input_ids[row, columns] = sequences[row]
        mask[row, columns] = 1
        padded["labels"][row, columns] = labels[row]
    packed = {
        "input_ids": torch.cat(sequences, dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.cat(labels, dim=1),
    }
    return sequences, padded, packed


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layer_type", ["linear_attention", "hybrid_sliding"])
def test_padded_and_packed_sequences_match_alike(tmp_path, layer_type):
    kwargs = WINDOW if layer_type == "hybrid_sliding" else {}
    layer_types = ["full_attention", layer_type, layer_type]
    _, student = grafts(layer_types, tmp_path, ttt_gate_init=0.5, **kwargs)
    student.double()
    parent = make_parent(student, tmp_path)
    _, padded, packed = padded_and_packed([6, 11, 9])
    one, other = (layer_matching_loss(student, parent, batch) for batch in (padded, packed))
    torch.testing.assert_close(one, other)
    one, other = (gradients(student, loss) for loss in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-7)


def logit_loss(student, parent, batch, **kwargs):
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    return logit_matching_loss(student(**inputs, use_cache=False).last_hidden_state, parent, batch, **kwargs)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunked_divergence_by_its_definition(tmp_path, chunk_size):
    _, student = grafts(["full_attention", "linear_attention"], tmp_path)
    parent = make_parent(student, tmp_path)
    batch = padded_and_packed([6, 11, 9])[1]
    batch["labels"][:, 3] = -100
    found = gradients(student, logit_loss(student, parent, batch, temperature=2.0, chunk_size=chunk_size))

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p = (parent(**inputs).logits / 2)[:, :-1].softmax(-1)
    log_q = (student(**inputs).logits / 2)[:, :-1].log_softmax(-1)
    is_target = batch["labels"][:, 1:] != -100
    loss = 4 * (p * (p.log() - log_q)).sum(-1)[is_target].mean()
    torch.testing.assert_close(logit_loss(student, parent, batch, temperature=2.0, chunk_size=chunk_size), loss)
    expected = gradients(student, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_divergence_of_padded_packed_and_accumulated_sequences(tmp_path):
    _, student = grafts(["full_attention", "linear_attention"], tmp_path)
    parent = make_parent(student, tmp_path)
    sequences, padded, packed = padded_and_packed([6, 11, 9])
    expected = logit_loss(student, parent, padded)
    torch.testing.assert_close(logit_loss(student, parent, packed), expected)
    shares = [
        logit_loss(student, parent, {"input_ids": x, "labels": x}, num_items_in_batch=5 + 10 + 8) for x in sequences
    ]
    torch.testing.assert_close(sum(shares), expected)


def test_divergence_of_the_parent_from_itself(tmp_path):
    _, student = grafts(["full_attention", "hybrid"], tmp_path)  # with a gate of 0
    parent = make_parent(student)
    input_ids = tokens(2, 11)
    batch = {"input_ids": input_ids, "labels": input_ids}
    loss = logit_loss(student, parent, batch)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(student, loss).values())
    with torch.no_grad():
        student.model.language_model.layers[1].ttt_gate.weight.fill_(2.0)
    loss = logit_loss(student, parent, batch)
    assert loss.item() > 1e-3
    assert all(p.grad is None for p in parent.parameters() if all(p is not q for q in student.parameters()))


def test_nothing_to_match():
    model = text_model(["full_attention"])
    with pytest.raises(ValueError, match="no layer of the model has TTT"):
        layer_matching_loss(model, make_parent(model), {"input_ids": tokens(1, 3)})


def parse(*words):
    return distill_stage.parse([str(word) for word in words])


def train(*words):
    return distill_stage.train(*parse(*words))


@pytest.fixture(scope="module")
def replaced(tiny_model_dir, tmp_path_factory):
    """The tiny model with TTT in attention's place in the upper half of its layers."""
    from ttt_omni.conversion import convert_llama_omni

    source, output = tiny_model_dir / "llama-omni", tmp_path_factory.mktemp("replaced") / "model"
    parts = {name: source / file for name, file in PARTS.items()}
    convert_llama_omni(source, output, **parts, layers="2-3", mode="replace", dtype="float32")
    return output


PARTS = {"whisper": "whisper.pt", "vocoder": "vocoder.pt", "vocoder_config": "vocoder_config.json"}


@pytest.fixture(scope="module")
def stages(tmp_path_factory, tiny_model_dir, replaced):
    """Both stages in short form, by their name."""
    folder = tmp_path_factory.mktemp("stages")
    manifest = folder / "texts.jsonl"
    manifest.write_text("\n".join(TEXTS))
    short = {
        "model": str(replaced),
        "source": str(tiny_model_dir / "llama-omni"),
        "manifest": str(manifest),
        "length": 256,
        "per_device_train_batch_size": 1,
        "memory_learning_rate": 1e-2,
        "max_steps": 3,
    }
    for path in (EXAMPLES / "distillation").glob("*.yaml"):
        shorten(path, folder / path.name, **short)
    return {path.stem: str(path) for path in folder.glob("*.yaml")}


@pytest.fixture(scope="module")
def matched(stages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("matched") / "adapter"
    train(stages["layers"], f"--output_dir={folder}")
    return folder


def test_first_stage(matched, replaced):
    curve = losses(matched)
    assert len(curve) == 3 and curve[-1] < 0.9 * curve[0], curve
    base = AutoModelForCausalLM.from_pretrained(replaced)
    before = snapshot(base)
    model = PeftModel.from_pretrained(base, matched).merge_and_unload()
    differing = changed(model, before)
    assert {name.split(".")[3] for name in differing} == {"2", "3"}
    assert all(".ttt." in name for name in differing) and any("v_proj" in name for name in differing)


def test_second_stage_goes_on_from_the_first(stages, matched, tmp_path):
    fresh, previous = (
        train(stages["logits"], f"--output_dir={tmp_path / name}", *more)
        for name, more in (("fresh", ["--max_steps=1"]), ("next", [f"--previous={matched}"]))
    )
    curve = [entry["loss"] for entry in previous.state.log_history if "loss" in entry]
    assert curve[0] < fresh.state.log_history[0]["loss"]
    assert curve[-1] < curve[0]
    assert "| distillation | logits |" in (tmp_path / "next" / "README.md").read_text()


def test_interrupted_run_goes_on_from_its_checkpoint(matched, stages, tmp_path):
    checkpoint = "checkpoint-2"
    shutil.copytree(matched / checkpoint, tmp_path / checkpoint)
    trainer = train(stages["layers"], f"--output_dir={tmp_path}")
    assert trainer.state.global_step == 3
    assert losses(tmp_path) == pytest.approx(losses(matched), rel=1e-5)
    resumed, straight = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, matched))
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-5, rtol=1e-4)


def test_bad_arguments(stages, tmp_path):
    with pytest.raises(ValueError, match="`objective` must be one of layers, logits, got 'all'"):
        parse(stages["layers"], "--objective=all", f"--output_dir={tmp_path}")
    with pytest.raises(ValueError, match="`backpropagate_length` has no meaning here"):
        parse(stages["layers"], "--backpropagate_length=64", f"--output_dir={tmp_path}")
