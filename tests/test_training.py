"""What the training script promises: a run goes on where it stopped, and writes an ordinary checkpoint."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from refusal_core.chat_model import ORGANISM, ChatModel
from refusal_core.organism import training
from refusal_core.organism.training import LENGTH, PHASES, Batch, Progress, chunk_of_batches, learning_rate, train

ROWS = 6
STEP = ROWS * LENGTH
FEW = tuple(replace(phase, tokens=2 * STEP) for phase in PHASES)


def written_here(tokenizer: Path, seed: int, at: Progress) -> Iterator[tuple[Progress, Batch]]:
    """The batches of a first small chunk, written in this process."""
    for number, batch in enumerate(chunk_of_batches(str(tokenizer), seed, at.phase, 0), 1):
        if number > at.batch:
            yield replace(at, step=number, tokens=number * STEP, batch=number), batch


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A folder with the tokenizer that ships, and little text to train on."""
    monkeypatch.setattr(training, "CHUNK_SAMPLES", 100)
    monkeypatch.setattr(training, "ROWS", ROWS)
    monkeypatch.setattr(training, "batches_from", written_here)
    (tmp_path / "one" / "tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ORGANISM / name, tmp_path / "one" / "tokenizer")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    return tmp_path


def test_a_run_that_was_interrupted_ends_with_the_weights_of_one_that_was_not(work):
    steps = list(train(work / "one", work / "whole", seed=0, device="cpu", phases=FEW))
    assert [at.phase for at in steps] == [1, 1, 2, 2, 3, 3]
    interrupted = train(work / "two", work / "again", seed=0, device="cpu", phases=FEW)
    for _ in range(3):
        next(interrupted)
    interrupted.close()
    assert not (work / "again").exists()
    rest = list(train(work / "two", work / "again", seed=0, device="cpu", phases=FEW))
    assert [at.phase for at in rest] == [2, 2, 3, 3]
    whole, again = (load_file(work / name / "model.safetensors") for name in ("whole", "again"))
    for name, w in whole.items():
        assert_close(again[name], w, atol=1e-4, rtol=1e-3)

    started = load_file(work / "one" / "phase1" / "state.safetensors")
    assert any(not torch.allclose(started[f"model.{name}"], w.float(), atol=1e-3) for name, w in whole.items())
    assert ChatModel.load(work / "whole", device="cpu").template_positions == 5
    assert AutoModelForCausalLM.from_pretrained(work / "whole").config.tie_word_embeddings


def test_a_step_learns_and_only_replies_are_learned(work):
    tokenizer = work / "one" / "tokenizer"
    ids, learned, text = next(iter(chunk_of_batches(str(tokenizer), 0, 3, 0)))
    assert ids.shape == learned.shape == text.shape == (ROWS, LENGTH)
    assert 0.2 < learned.float().mean() < 0.8
    loaded = training.PreTrainedTokenizerFast.from_pretrained(tokenizer)
    for row in range(4):
        said = loaded.decode(ids[row][(text[row] >= 0) & ~learned[row]])
        assert "<|im_start|>user" in said and "I'm sorry" not in said
    losses = [at.loss for at in train(work / "one", work / "out", seed=0, device="cpu", phases=FEW[:1])]
    assert losses[1] < losses[0]


def test_the_rate_rises_holds_and_falls_to_nothing():
    phase = replace(PHASES[0], tokens=1000, learning_rate=1.0, decay=0.5)
    assert learning_rate(phase, 5) < learning_rate(phase, 15) == learning_rate(phase, 500) == 1.0
    assert learning_rate(phase, 750) == pytest.approx(0.5)
    assert learning_rate(phase, 1000) == 0
