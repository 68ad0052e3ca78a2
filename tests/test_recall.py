# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni evaluate`, on models whose right answer is known, and the corpus that demands recall."""

import copy
import json
import random
from types import SimpleNamespace

import pytest
import torch
from layouts import text_model, write_tokenizer
from peft import get_peft_model
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM, TTTOmniProcessor, ttt_lora_config
from ttt_omni.commands.cli import main
from ttt_omni.conversion import convert_llama_omni
from ttt_omni.evaluation import conditions, recall
from ttt_omni.evaluation.conditions import conditions_of, load, max_length, read, state_alone, under
from ttt_omni.evaluation.corpus import HEARD, REMEMBERED, make_recall_corpus
from ttt_omni.evaluation.facts import HELD_OUT_KINDS, KINDS, Fact, draw_facts, read_facts
from ttt_omni.evaluation.layers import as_ranges, attention_to_facts, retrieving_layers
from ttt_omni.evaluation.perplexity import evaluate_perplexity
from ttt_omni.training import ConversationDataset
from ttt_omni.training.lora import merge_adapter


TALK = "It rained all day. Nobody went out.\nThe cat slept on the chair, and the soup was cold! Was it late?\n" * 20
WINDOW = {"sliding_window": 6, "attention_sinks": 2}
HYBRID = ["sliding_attention", "hybrid_sliding", "hybrid_sliding"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def talk(tmp_path):
    (tmp_path / "talk.txt").write_text(TALK)
    return tmp_path / "talk.txt"


class Listener(torch.nn.Module):
    """It reads its cache as texts: `respond` says what follows a stem, of the fact asked for and all of the facts."""

    device = torch.device("cpu")
    config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=10**6)

    def __init__(self, tokenizer, facts, respond):
        super().__init__()
        self.tokenizer, self.facts, self.respond = tokenizer, facts, respond

    def forward(self, input_ids, cache, **kwargs):
        keys = input_ids.double()[:, None, :, None]
        keys, _ = cache.update(keys, keys, 0)
        following = torch.tensor([[self.following(row)] for row in keys.flatten(1).long()])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, len(self.tokenizer)).float())

    def following(self, ids):
        """The next token of a row."""
        text, _, said = self.tokenizer.decode(ids).rpartition("<|im_start|>assistant\n")
        fact = next((fact for fact in self.facts if f"user\n{fact.question}<" in text), None)
        answer = "" if fact is None else f"{fact.stem} {self.respond(text, fact, self.facts)}"
        return self.tokenizer(answer[len(said) :] + "<|im_end|>", add_special_tokens=False)["input_ids"][0]


@pytest.fixture
def listen(tokenizer, talk, monkeypatch):
    """The rows of a listener's evaluation."""

    def draw(*args, **kwargs):
        facts[:] = draw_facts(*args, **kwargs)
        return list(facts)

    def evaluate(respond, **kwargs):
        model = Listener(tokenizer, facts, respond)
        kwargs = {"num_facts": [6], "rounds": 4, "conditions": ["model"]} | kwargs
        rows = recall.evaluate_recall(model, tokenizer, talk, distances=(900, 200), **kwargs)
        assert [row["distance"] for row in rows] == [200, 900] and {row["asked"] for row in rows} == {24}
        return rows

    facts = []
    monkeypatch.setattr(recall, "draw_facts", draw)
    return evaluate


@pytest.mark.parametrize("held_out", [False, True])
def test_who_remembers_all_is_right(listen, held_out):
    def respond(text, fact, facts):
        assert fact.told in text  # or else nobody could know
        return fact.value

    for row in listen(respond, held_out=held_out):
        assert row["recall"] == 1 and set(row["kinds"].values()) == {1}
        assert row["shuffled"] < 0.3 and row["chance"] < 0.3


def test_nothing_is_told_where_nothing_is_told(listen):
    def respond(text, fact, facts):
        assert fact.told not in text
        return "tiger"

    listen(respond, conditions=["nothing told"])


def test_who_always_says_the_same_is_right_by_chance(listen):
    values = []
    listen(lambda text, fact, facts: values.append(fact.value) or fact.value)
    for word in (max(sorted(set(values)), key=values.count), "tiger"):
        for row in listen(lambda *args, word=word: word):
            assert row["recall"] <= row["chance"] < 0.3
            assert row["recall"] == row["chance"] or word == "tiger"


def test_who_confuses_the_facts_is_right_by_chance(listen):
    for row in listen(lambda text, fact, facts: facts[(facts.index(fact) + 1) % len(facts)].value):
        assert row["shuffled"] == 1 and row["recall"] < 0.3


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"distances": [0]}, "`distances` must be at least 1 token"),
        ({"distances": [2 * 10**6]}, "made for fewer tokens than the distance of 2000000"),
        ({"rounds": 0}, "`rounds` must be at least 1"),
        ({"num_facts": [8, 3000]}, "no 3000 facts"),
        ({"num_facts": [8, 0]}, "`num_facts` must be at least 1"),
        ({"conditions": ["state"]}, "'state' is no condition of this model: choose from model, nothing told"),
    ],
)
def test_what_will_not_do(tokenizer, talk, kwargs, message):
    model = Listener(tokenizer, [], None)
    with pytest.raises(ValueError, match=message):
        recall.evaluate_recall(model, tokenizer, talk, **{"distances": [9], **kwargs})


def test_a_value_is_whole_words():
    assert recall.says("It is TIGER.", "tiger") and recall.says("in New\n York", "New York")
    assert not recall.says("tigers", "tiger") and not recall.says("124", "12")


class Plain(torch.nn.Module):
    """A model, of which nobody knows what padding does to it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.rows = model, []

    @property
    def device(self):
        return self.model.device

    def forward(self, input_ids, cache, use_cache, logits_to_keep):
        self.rows.append(len(input_ids))
        return self.model(input_ids, cache=cache, logits_to_keep=logits_to_keep)


def one_by_one(model, questions, cache, new_tokens):
    """Each question on a copy of the cache, token by token."""
    answers = []
    for question in questions:
        copied = copy.deepcopy(cache)
        said = [int(read(model, torch.tensor([question]), copied).argmax())]
        for _ in range(new_tokens - 1):
            said.append(int(read(model, torch.tensor([said[-1:]]), copied).argmax()))
        answers.append(said)
    return answers


@pytest.mark.parametrize("at_once", [1, 10**9])
@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("condition", ["model", "state", "full"])
def test_questions_asked_together_are_answered_as_one_by_one(condition, is_ours, at_once, monkeypatch):
    monkeypatch.setattr(conditions, "BYTES_AT_ONCE", at_once)
    with under("full" if condition == "full" else "model", text_model(HYBRID, ttt_gate_init=0.7, **WINDOW)) as model:
        cache = DynamicCache(config=model.config)
        generator = torch.Generator().manual_seed(0)
        read(model, torch.randint(50, (1, 21), generator=generator), cache)
        cache = state_alone(model, cache) if condition == "state" else cache
        lengths = [3, 9, 4, 9, 3, 1]
        questions = [torch.randint(50, (length,), generator=generator).tolist() for length in lengths]
        expected, asked = one_by_one(model, questions, cache, 7), model if is_ours else Plain(model)
        assert conditions.answer(asked, questions, cache, 7, None) == expected
        assert conditions.answer(asked, questions[::-1], cache, 7, None) == expected[::-1]  # the cache is as it was
        stop = expected[0][0]
        ends = [said[: said.index(stop) + 1] if stop in said else said for said in expected]
        found = conditions.answer(asked, questions[:1], cache, 7, stop)
        assert found == ends[:1] == [[stop]]
    if not is_ours and at_once > 1:
        assert max(asked.rows) == 2  # those of the same length


def test_conditions():
    """Each is what it says, and none is left behind."""
    model = text_model(HYBRID, ttt_gate_init=0.7, **WINDOW)
    ids = torch.arange(40) * 7 % 50

    def logits(current):
        with torch.no_grad():
            return current(ids[None], use_cache=False).logits

    assert conditions_of(model) == ["model", "window", "ring", "full"]
    before = logits(model)
    others = {}
    for condition in conditions_of(model):
        with under(condition, model) as current:
            others[condition] = logits(current)
    assert torch.equal(others.pop("model"), before) and torch.equal(logits(model), before)
    for layers, condition, kwargs in (
        (["sliding_attention"] * 3, "window", WINDOW),
        (["sliding_attention"] * 3, "ring", WINDOW | {"attention_sinks": 0}),
        (["full_attention"] * 3, "full", {}),
    ):
        alone = text_model(layers, **kwargs)
        alone.load_state_dict({name: x for name, x in model.state_dict().items() if ".ttt" not in name})
        torch.testing.assert_close(others[condition], logits(alone))
    assert not torch.allclose(others["window"], others["ring"])
    assert max_length(model, "window") == float("inf") and max_length(model, "full") == 131072
    with pytest.raises(ValueError, match="choose from model"), under("ring", text_model(["linear_attention"])):
        pass


def test_state_alone():
    """It is all that is left: the same where nothing but the state can know, and not where attention does."""
    ids = torch.arange(21)[None] * 7 % 50
    for layers, is_state in ((["linear_attention"] * 2, True), (HYBRID, False)):
        model = text_model(layers, ttt_gate_init=0.7, **WINDOW)
        cache = DynamicCache(config=model.config)
        read(model, ids, cache)
        alone, fresh = state_alone(model, cache), DynamicCache(config=model.config)
        assert all(layer.get_seq_length() == 0 for layer in alone.layers)
        found = [read(model, torch.tensor([[5, 6, 7]]), each) for each in (cache, alone, fresh)]
        assert torch.allclose(found[0], found[1], atol=1e-5) == is_state
        assert not torch.allclose(found[1], found[2], atol=1e-3)


def test_perplexity(talk, tokenizer):
    """That of one pass over the whole, stretch by stretch, and the norm of the state at its end."""
    model = text_model(HYBRID, vocab_size=len(tokenizer), ttt_gate_init=0.7, **WINDOW)
    rows = evaluate_perplexity(model, tokenizer, talk, length=700)
    ids = torch.tensor([tokenizer(TALK)["input_ids"][:700]])
    for condition in conditions_of(model):
        found = [row for row in rows if row["condition"] == condition]
        assert [(row["first"], row["last"]) for row in found] == [(1, 512), (513, 699)]
        with under(condition, model) as current, torch.no_grad():
            logits = current(ids, use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        for row in found:
            expected = losses[row["first"] - 1 : row["last"]].mean().exp().item()
            assert row["perplexity"] == pytest.approx(expected, rel=1e-4)
            assert (row["state_norm"] is None) == (condition == "full")
    norms = [row["state_norm"] for row in rows if row["condition"] == "model"]
    assert norms[0] < norms[1]


def test_facts():
    """No question has two answers, what is held out is held out, and what is changed has another value."""
    for seed in range(200):
        draw = random.Random(seed)
        facts = draw_facts(draw, 8, changes=2)
        told, changed = facts[:8], facts[8:]
        assert len({(fact.kind, fact.question, fact.stem) for fact in told}) == 8
        for old, new in zip(told, changed):
            assert old.kind == new.kind and (old.value != new.value or old.kind in ("day", "month"))
        held_out = draw_facts(draw, 8, held_out=True)
        trained = {kind.name: kind for kind in KINDS}
        for fact in (*told, *changed, *held_out):
            assert recall.says(fact.told, fact.value) and not recall.says(fact.question + fact.stem, fact.value)
        for fact in told:
            patterns = [text.split("{")[0] for text in trained[fact.kind].told[:-1]]
            assert any(fact.told.startswith(pattern) for pattern in patterns)
    assert not {kind.name for kind in KINDS} & {kind.name for kind in HELD_OUT_KINDS}
    assert len(draw_facts(random.Random(0), 128)) == 128
    with pytest.raises(ValueError, match="no 3000 facts"):
        draw_facts(random.Random(0), 3000)


def test_corpus(talk, tmp_path):
    """The same at each run; its answers are of what was told, and nothing of what is held out is in it."""
    manifest = tmp_path / "recall.jsonl"
    make_recall_corpus(manifest, talk, conversations=300, words=30)
    again = tmp_path / "again.jsonl"
    make_recall_corpus(again, talk, conversations=300, words=30)
    assert manifest.read_bytes() == again.read_bytes()
    records = [json.loads(line) for line in manifest.read_text().splitlines()]
    corrected = 0
    for record in records:
        texts = [turn["value"] for turn in record["conversations"]]
        answers = [text for text in texts[1::2] if text not in (*REMEMBERED, *HEARD)]
        told = " ".join(texts[0 : len(texts) - 2 * len(answers) : 2])
        assert answers and all(recall.says(told, answer.rstrip(".").split()[-1]) for answer in answers)
        corrected += any(start in text for text in texts for start in ("changed: ", "before: ", "correct that: "))
    assert 0.1 < corrected / len(records) < 0.4
    spoken = [turn["value"] for turn in records[-1]["conversations"]]
    write_graft(tmp_path)
    processor, config = (cls.from_pretrained(tmp_path / "graft") for cls in (TTTOmniProcessor, TTTOmniConfig))
    dataset = ConversationDataset(manifest, processor, config)
    labels = dataset[len(records) - 1]["labels"]
    learnt = dataset.processor.tokenizer.decode(labels[labels != -100])
    assert learnt == "".join(f"{answer}<|im_end|>" for answer in spoken[1::2])
    text = manifest.read_text()
    for kind in KINDS:
        assert kind.asked[-1][0].split("{")[0] not in text
    for word in ("plays the", "ordered a glass", "as a present"):
        assert word not in text


def test_ordinary_conversations_stand_in_the_corpus(talk, tmp_path):
    """Some alone, some among the other talk; what is spoken is left out, and what is no conversation is refused."""
    chat = tmp_path / "chat.jsonl"
    lines = [[{"from": "human", "value": f"What is {n}?"}, {"from": "gpt", "value": f"It is {n}."}] for n in range(20)]
    lines.append([{"from": "human", "value": "<speech>"}, {"from": "gpt", "value": "I hear."}])
    chat.write_text("".join(json.dumps({"conversations": turns}) + "\n" for turns in lines))
    manifest = tmp_path / "recall.jsonl"
    make_recall_corpus(manifest, talk, conversations=200, words=30, chat=chat)
    shares = []
    for line in manifest.read_text().splitlines():
        texts = [turn["value"] for turn in json.loads(line)["conversations"]]
        ordinary = [
            (q, a) for q, a in zip(texts[::2], texts[1::2]) if q.startswith("What is") and a == f"It is {q[8:-1]}."
        ]
        shares.append(2 * len(ordinary) / len(texts))
    assert "<speech>" not in manifest.read_text()
    assert 0.15 < sum(share == 1 for share in shares) / len(shares) < 0.35
    assert 0.2 < sum(0 < share < 1 for share in shares) / len(shares) < 0.5
    for bad in ("[]", "{", '{"conversations": [{"value": "a"}]}', '{"conversations": 3}'):
        chat.write_text(chat.read_text().splitlines()[0] + "\n" + bad)
        with pytest.raises(ValueError, match="line 2: no conversation"):
            make_recall_corpus(manifest, talk, chat=chat)
    chat.write_text("")
    with pytest.raises(ValueError, match="no conversations in text"):
        make_recall_corpus(manifest, talk, chat=chat)


def write_graft(folder) -> None:
    """A small one that neither hears nor speaks, in `folder / "graft"`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder / "llama")
    write_tokenizer(folder / "llama")
    convert_llama_omni(folder / "llama", folder / "graft", layers="0")


def test_an_adapter_is_merged(tmp_path):
    write_graft(tmp_path)
    model = TTTOmniForCausalLM.from_pretrained(tmp_path / "graft", dtype=torch.float32)
    model = get_peft_model(model, ttt_lora_config(model, rank=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        loaded, tokenizer = load(tmp_path / "adapter", dtype="float32", device="cpu")
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
    rounded, _ = load(tmp_path / "adapter", device="cpu")  # the graft is in bfloat16
    ttt = rounded.model.language_model.layers[0].ttt
    assert (ttt.q_proj.weight.dtype, ttt.inner_model.W1.dtype) == (torch.bfloat16, torch.float32)
    assert len(tokenizer) == len(load(tmp_path / "graft", device="cpu")[1])
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = TTTOmniForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(tensor.dtype == merged[name].dtype for name, tensor in rounded.state_dict().items())
    assert all(tensor.equal(merged[name]) for name, tensor in rounded.state_dict().items())
    assert TTTOmniProcessor.from_pretrained(tmp_path / "merged").tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not any(path.is_dir() for path in (tmp_path / "merged").iterdir())
    with pytest.raises(ValueError, match="adapter_config.json"):
        merge_adapter(tmp_path / "graft", tmp_path / "other")


def test_facts_of_ones_own(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"told": "I am Bo.", "question": "Who am I?", "value": "Bo"}\n\n')
    assert read_facts(path) == [Fact("I am Bo.", "Who am I?", "", "Bo", "own")]
    for bad in ("[]", "{", '{"told": "x"}', '{"told": "x", "question": "y", "value": 3}', '{"answer": ""}'):
        path.write_text('{"told": "I am Bo.", "question": "Who am I?", "value": "Bo"}\n' + bad)
        with pytest.raises(ValueError, match="line 2: a fact is"):
            read_facts(path)


def test_command_on_a_model_of_transformers(tokenizer, talk, tmp_path, capsys):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    words = ["evaluate", "recall", "--model", tmp_path / "llama", "--talk", talk, "--output", tmp_path / "out"]
    words += ["--distances", "64,300,5000", "--num-facts", "2,4", "--rounds", "1"]
    main([str(word) for word in words])
    assert capsys.readouterr().out.count("| the model as it is | 0% | 0% |") == 2
    result = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert [(row["condition"], row["facts"], row["distance"], row["asked"]) for row in result["rows"]] == [
        (condition, facts, distance, facts)
        for condition in ("model", "nothing told")
        for facts in (2, 4)
        for distance in (64, 300)
    ]  # 5,000 tokens are more than it is made for
    assert (tmp_path / "out" / "recall.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit):
        main([str(word) for word in [*words, "--output", tmp_path / "none", "--conditions", "window"]])
    assert "choose from model, nothing told" in capsys.readouterr().err


def test_layers_that_look_back(tokenizer):
    """Attention to the value as it was told counts, and nothing else."""

    class Looking(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, **kwargs):
            told, _, asked = tokenizer.decode(input_ids[0]).partition("<|im_start|>assistant")
            fact = next(fact for fact in facts if f"user\n{fact.question}<" in asked)
            start = told.index(fact.told) + fact.told.rindex(fact.value)
            start = len(tokenizer(told[:start], add_special_tokens=False)["input_ids"])
            looked = torch.zeros(3, 1, 2, *2 * input_ids.shape[1:])  # [layers, B, H, T, T]
            looked[0, :, :, -2] = looked[1, 0, :, -1, start - 1] = 1
            looked[2, 0, :, -1, start : start + len(fact.value)] = 0.6 / len(fact.value)
            looked[1, 0, 1, -1, start] = 0.5
            return SimpleNamespace(attentions=tuple(looked))

    facts = draw_facts(random.Random("0 0"), 12)
    attention = attention_to_facts(Looking(), tokenizer, rounds=1)
    assert attention == pytest.approx([0, 0.5, 1.2])
    assert retrieving_layers(attention) == [1, 2] and retrieving_layers([0.3, 1, 0]) == [1]
    assert as_ranges([18, 20, 21, 22, 24]) == "18,20-22,24"


def test_convert_where_a_model_looks_back(tmp_path, capsys):
    write_graft(tmp_path)
    words = ["convert", "--source", tmp_path / "llama", "--output", tmp_path / "out", "--layers", "auto"]
    main([str(word) for word in words])
    assert "It looks back at what it was told in the layers 0." in capsys.readouterr().err
    assert TTTOmniConfig.from_pretrained(tmp_path / "out").text_config.layer_types == ["hybrid"]
    config = json.loads((tmp_path / "llama" / "config.json").read_text()) | {"model_type": "omni_speech_llama"}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        main([str(word) for word in [*words, "--output", tmp_path / "none"]])
    assert "`--layers auto` needs a language model" in capsys.readouterr().err
