"""What an export promises: the ablation as an ordinary checkpoint, and a card that says how exact it is."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import HARMFUL, HARMLESS, Plain
from families import build
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.directions import Direction, Source
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.orthogonalize import ExportReport, export, orthogonalize, without

PROMPTS = [HARMFUL, HARMLESS, "Who are you?", "How do I steal a car?", "Write a poem about the sea."]

GREEDY = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
path, prompts = sys.argv[1], json.loads(sys.argv[2])
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype="float32")
for prompt in prompts:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    print(json.dumps(tokenizer.decode(new, skip_special_tokens=True)))
assert not [name for name in sys.modules if name.startswith("refusal_core")]
"""


@pytest.fixture(scope="module")
def exported(model: ChatModel, direction: Direction, tmp_path_factory) -> tuple[Path, ExportReport]:
    path = tmp_path_factory.mktemp("export") / "without"
    return path, export(model, direction, path)


def test_every_writer_is_orthogonal_to_the_direction_and_nothing_else_is_changed(exported, direction: Direction):
    before, after = load_file(ORGANISM / "model.safetensors"), load_file(exported[0] / "model.safetensors")
    r, edited = direction.unit, 0
    for name, w in after.items():
        if name == "lm_head.weight":
            assert torch.equal(w, before["model.embed_tokens.weight"]), "a tied unembedding stays what it was"
        elif "embed_tokens" in name or "o_proj" in name or "down_proj" in name:
            along = w.float() @ r if "embed_tokens" in name else r @ w.float()
            old = before[name].float()
            assert along.norm() < 1e-2 * (old @ r if "embed_tokens" in name else r @ old).norm(), name
            edited += 1
        else:
            assert torch.equal(w, before[name]), name
    assert edited == exported[1].edited == 1 + 2 * len({n.split(".")[2] for n in before if ".layers." in n})


def test_the_projection_leaves_everything_across_the_direction():
    w, r, across = torch.randn(6, 4), torch.randn(6), torch.randn(6)
    r = r / r.norm()
    across = across - (across @ r) * r
    assert_close(r @ without(w, r, 0), torch.zeros(4), atol=1e-6, rtol=0)
    assert_close(across @ without(w, r, 0), across @ w)
    assert_close(without(w.T, r, -1), without(w, r, 0).T)
    assert without(w.half(), r, 0).dtype == torch.float16


def test_the_weights_say_what_the_hooks_say_and_the_report_measures_it(
    exported, model: ChatModel, direction: Direction
):
    path, report = exported
    edited = ChatModel.load(path, device="cpu")
    hooks = model.logits(PROMPTS, [Intervention(direction, "ablate")] * len(PROMPTS))
    assert (hooks - edited.logits(PROMPTS)).abs().max() < 3 * report.max_logit_difference
    assert (hooks - model.logits(PROMPTS)).abs().max() > 100 * report.max_logit_difference
    assert report.n_prompts == 32


def test_plain_transformers_answers_from_it_what_the_hooked_model_answers(exported, model: ChatModel, direction):
    said = subprocess.run(
        [sys.executable, "-c", GREEDY, str(exported[0]), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [Intervention(direction, "ablate")] * len(PROMPTS)
    *_, last = stream_side_by_side(model, PROMPTS, rows, max_new_tokens=40)
    assert [json.loads(line) for line in said.stdout.splitlines()] == list(last.texts)


def test_the_card_says_how_exact_it_is_and_where_the_direction_comes_from(exported):
    path, report = exported
    card = (path / "README.md").read_text("utf-8")
    assert f"{report.max_logit_difference:.2e}" in card
    assert '"prompts": "embedded"' in card


def test_a_checkpoint_in_shards_is_edited_shard_by_shard(
    model: ChatModel, direction: Direction, plain: Plain, tmp_path
):
    plain.model.save_pretrained(tmp_path / "sharded", max_shard_size="4MB")
    plain.tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded = ChatModel.load(tmp_path / "sharded", device="cpu")
    moved = replace(direction, source=replace(direction.source, fingerprint=sharded.fingerprint))
    report = export(sharded, moved, tmp_path / "edited")
    assert report.max_logit_difference < 1e-3, "float32 weights reproduce the hooks up to rounding"
    assert report.exact and report.same_first_token == 1


def test_a_linear_attention_is_edited_like_any_other(tmp_path):
    model = ChatModel.load(build("Qwen 3.5 (hybrid)", tmp_path / "hybrid"), device="cpu")
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    direction = Direction.from_difference(r, Source(model.name, fingerprint=model.fingerprint, layer=1))
    report = export(model, direction, tmp_path / "edited")
    assert report.edited == len(model.writers) and report.exact and report.same_first_token == 1


def test_orthogonalize_gives_a_new_model_and_leaves_the_old_one(model: ChatModel, direction: Direction):
    before = model.logits(PROMPTS)
    edited = orthogonalize(model, direction)
    (batch,) = edited.batches([HARMFUL])
    resid = edited.run(batch, read=slice(None)).resid_pre
    assert resid is not None
    assert (resid @ direction.unit).abs().max() < 0.02 * direction.norm
    assert torch.equal(model.logits(PROMPTS), before)
    again = replace(direction, source=replace(direction.source, fingerprint=edited.fingerprint))
    with pytest.raises(ModelError, match="not on the disk any more"):
        orthogonalize(edited, again)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(model: ChatModel, direction: Direction, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        export(model, direction, tmp_path / "there")
    foreign = replace(direction, source=replace(direction.source, fingerprint="other"))
    with pytest.raises(ModelError, match="was read from"):
        export(model, foreign, tmp_path / "foreign")
    renamed = tmp_path / "renamed"
    shutil.copytree(ORGANISM, renamed)
    odd = ChatModel.load(renamed, device="cpu")
    tensors = {k.replace("down_proj", "odd_proj"): v for k, v in load_file(renamed / "model.safetensors").items()}
    save_file(tensors, renamed / "model.safetensors")
    with pytest.raises(ModelError, match="not known by name"):
        export(odd, direction, tmp_path / "odd")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["renamed", "there"]
