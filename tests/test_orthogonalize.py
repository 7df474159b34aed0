"""What an export promises: the ablation as an ordinary checkpoint, and a card that says how exact it is."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import HARMFUL, HARMLESS, Plain
from families import FAMILIES, build, is_approximate
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusal_core import orthogonalize as orthogonalize_module
from refusal_core import weights
from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.directions import Direction, Source
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.metrics import kl_divergence, refusal_probability
from refusal_core.orthogonalize import N_HELD_OUT, ExportReport, export, orthogonalize
from refusal_core.prompts import load_prompts
from refusal_core.selection import Found

ROOT = Path(__file__).parent.parent
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


def test_whoever_can_read_the_folder_can_read_all_of_it(exported):
    modes = {file.name: file.stat().st_mode & 0o777 for file in exported[0].iterdir()}
    assert set(modes.values()) == {exported[0].stat().st_mode & 0o666}, modes


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


def test_a_tied_unembedding_that_is_in_the_file_all_the_same_stays_what_it_was(tmp_path):
    build("Llama", tmp_path / "model", tie_word_embeddings=True)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    model = ChatModel.load(tmp_path / "model", device="cpu", dtype=torch.float32)
    direction = Direction(torch.eye(32)[3], 2.0, Source(fingerprint=model.fingerprint, layer=1))
    assert export(model, direction, tmp_path / "edited").exact
    config = json.loads((tmp_path / "edited" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False, "who goes by the config would unembed with the edited embedding"
    after = load_file(tmp_path / "edited" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], weights["lm_head.weight"])


def test_another_copy_of_the_weights_beside_them_is_not_in_the_export(tmp_path):
    folder = build("Llama", tmp_path / "model")
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    model = ChatModel.load(folder, device="cpu", dtype=torch.float32)
    direction = Direction(torch.eye(32)[3], 2.0, Source(fingerprint=model.fingerprint, layer=1))
    assert export(model, direction, tmp_path / "edited").exact
    assert [p.name for p in (tmp_path / "edited").glob("*.safetensors")] == ["model.safetensors"]


def test_where_no_token_begins_a_refusal_the_report_and_the_card_say_so_instead_of_none(tmp_path, monkeypatch):
    model, direction = tiny("Llama", tmp_path / "model")
    monkeypatch.setattr(orthogonalize_module, "derive_refusal_tokens", lambda *firsts: ())
    report = export(model, direction, tmp_path / "edited")
    assert report.refusal_tokens == () and math.isnan(report.refusing) and "is not known" in report.refusal
    assert report.refusal in (tmp_path / "edited" / "README.md").read_text()


MOST_APART = 0.6
"""How far logits of the approximation may lie from the hooks' on these checkpoints; at most 0.5 was measured."""


@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_family_the_weights_are_the_hooks_or_say_that_they_approximate_them(name, tmp_path):
    model, direction = tiny(name, tmp_path / "model")
    report = export(model, direction, tmp_path / "edited")
    assert report.exact != is_approximate(name), report.max_logit_difference
    assert report.max_logit_difference < (MOST_APART if is_approximate(name) else 1e-3)
    edited = ChatModel.load(tmp_path / "edited", device="cpu", dtype=torch.float32)
    (batch,) = edited.batches([HARMFUL])
    written = edited.run(batch, read_writes=range(-4, 0)).writes
    assert written is not None
    assert (written @ direction.unit).abs().max() < 1e-4 * written.norm(dim=-1).max(), "nothing is written along it"
    hooks, plain = (model.logits(PROMPTS, [row] * len(PROMPTS)) for row in (Intervention(direction, "ablate"), None))
    apart = (edited.logits(PROMPTS) - hooks).abs().max()
    assert apart < (MOST_APART if is_approximate(name) else 1e-3) and apart < (plain - hooks).abs().max()


@pytest.mark.parametrize("name", ["Gemma 4 with per-layer embeddings, text", "Gemma 4 with per-layer embeddings"])
def test_where_norms_stand_after_the_writers_every_matrix_is_edited_and_the_export_says_it_is_not_exact(name, tmp_path):
    model, direction = tiny(name, tmp_path / "model")
    report = export(model, direction, tmp_path / "edited")
    assert report.edited == len(model.writers) and not report.exact
    assert "**approximate**" in (tmp_path / "edited" / "README.md").read_text("utf-8")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "edited"))
    writers = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(writers) == len(model.writers)
    for name in writers:
        sizes = torch.linalg.svdvals(before[name] - after[name])
        assert sizes[1] < 1e-4 * sizes[0], f"{name}: one direction of what it writes, and nothing else"
    with pytest.raises(ModelError, match="write without a bias"):
        export(model, direction, tmp_path / "added", variant="addition")


@pytest.mark.parametrize(
    "name", ["Gemma 2", "OLMo 2", "GLM 4", "Gemma 4 MoE, text", "Gemma 4 with per-layer embeddings"]
)
def test_a_norm_of_uneven_gains_writes_nothing_along_the_direction_and_lies_nearer_to_the_hooks_than_a_plain_edit(
    name, tmp_path, monkeypatch
):
    """As they are in real checkpoints; some are 0."""
    file = build(name, tmp_path / "model") / "model.safetensors"
    tensors, scale = load_file(file), torch.Generator().manual_seed(1)
    norms = [n for n in tensors if re.search(r"\.post_\w*norm\w*\.weight$", n) and "vision" not in n]
    for norm in norms:
        one = 1.0 if name == "Gemma 2" else 0.0  # which it adds to the weight
        gains = (one + tensors[norm]) * (0.5 * torch.randn(tensors[norm].shape, generator=scale)).exp()
        gains[:2] = 0
        tensors[norm] = gains - one
    save_file(tensors, file, {"format": "pt"})
    model = ChatModel.load(tmp_path / "model", device="cpu", dtype=torch.float32)
    direction = some_direction(model)
    hooks = model.logits(PROMPTS, [Intervention(direction, "ablate")] * len(PROMPTS))
    (batch,) = model.batches([HARMFUL])
    apart, along = [], []
    for _ in ("as the norm needs it", "plain"):
        edited = orthogonalize(model, direction)
        apart.append((edited.logits(PROMPTS) - hooks).abs().mean().item())
        written = edited.run(batch, read_writes=range(-4, 0)).writes
        assert written is not None
        along.append(((written @ direction.unit).abs().max() / written.norm(dim=-1).max()).item())
        monkeypatch.setattr(ChatModel, "gain_behind", lambda *which, **how: None)
    assert norms and along[0] < 1e-5 < 1e-2 < along[1], along
    assert apart[0] < 0.8 * apart[1], apart


def test_experts_in_one_tensor_of_unknown_layout_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FUSED_AXIS", {})
    model, direction = tiny("Gemma 4 MoE, text", tmp_path / "model")
    with pytest.raises(ModelError, match=r"not known by name.*Remove the direction with hooks instead\.$"):
        export(model, direction, tmp_path / "edited")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


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


# -- variants --------------------------------------------------------------------------------------------------------


def tiny(name: str, folder: Path, layer: int = 2) -> tuple[ChatModel, Direction]:
    """A small random model of a family, and a direction of it."""
    model = ChatModel.load(build(name, folder), device="cpu", dtype=torch.float32)
    return model, some_direction(model, layer)


def some_direction(model: ChatModel, layer: int = 2) -> Direction:
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    return Direction.from_difference(3 * r, Source(model.name, fingerprint=model.fingerprint, layer=layer))


def test_a_projected_export_that_keeps_norms_is_what_its_report_and_card_say(model, found: Found, tmp_path):
    place, tokens = (found.direction.source.position, found.direction.source.layer), found.refusal_tokens
    report = export(
        model,
        found.direction,
        tmp_path / "edited",
        variant="projected-norm-preserving",
        harmless_mean=found.harmless_mean(*place),
        refusal_tokens=tokens,
    )
    harmful, harmless = found.harmful[:, *place].double().mean(0), found.harmless[:, *place].double().mean(0)
    mu, r = harmless / harmless.norm(), harmful - harmless
    r = ((r - (r @ mu) * mu) / (r - (r @ mu) * mu).norm()).float()
    before, after = (load_file(folder / "model.safetensors") for folder in (ORGANISM, tmp_path / "edited"))
    for name, w in before.items():
        if "embed_tokens" in name or "o_proj" in name or "down_proj" in name:
            old, new = (x.float() if "embed_tokens" in name else x.float().T for x in (w, after[name]))
            assert (new @ r).norm() < 1e-2 * (old @ r).norm(), name
            assert_close(new.norm(dim=-1), old.norm(dim=-1), atol=1e-3, rtol=1e-3)
    prompts = load_prompts("test").draw(N_HELD_OUT)
    edited = ChatModel.load(tmp_path / "edited", device="cpu")
    plain_bad, bad = model.logits(prompts.harmful), edited.logits(prompts.harmful)
    plain_good, good = model.logits(prompts.harmless), edited.logits(prompts.harmless)
    assert report.kl == pytest.approx(kl_divergence(plain_good, good).mean().item(), rel=1e-3)
    assert report.refusing == (refusal_probability(bad, tokens) > 0.5).double().mean().item() < 0.2
    assert report.refusing_unchanged == (refusal_probability(plain_bad, tokens) > 0.5).double().mean().item() > 0.7
    read = model.logits(prompts.harmful, [Intervention(found.direction, "ablate")] * N_HELD_OUT)
    assert report.max_difference_from_paper >= (read - bad).abs().max().item() - 1e-4
    assert report.max_difference_from_paper > report.max_logit_difference > 0.01 and not report.exact
    card = (tmp_path / "edited" / "README.md").read_text("utf-8")
    for said in (
        f"{report.max_logit_difference:.2e}",
        f"{report.kl:.4f}",
        "**approximate**",
        "mean of 128 harmless prompts",
    ):
        assert said in card


def test_without_the_harmless_mean_a_projection_says_what_it_needs(model: ChatModel, direction: Direction, tmp_path):
    with pytest.raises(ModelError, match="needs the mean of the harmless activations"):
        export(model, direction, tmp_path / "edited", variant="projected")
    with pytest.raises(ModelError, match="belongs to an addition"):
        export(model, direction, tmp_path / "edited", strength=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["GPT-2", "GPT-BigCode", "Llama, tied"])
def test_no_variant_of_the_removal_lets_the_stream_say_anything_along_its_direction(name, tmp_path):
    model, direction = tiny(name, tmp_path)
    (batch,) = model.batches([HARMFUL])
    before = model.run(batch, read=slice(None)).resid_pre
    assert before is not None
    mean = before[0, -1, 2].double()
    for variant in ("ablation", "norm-preserving", "projected"):
        edited = orthogonalize(model, direction, variant=variant, harmless_mean=mean)
        r = direction.unit.double()
        if variant == "projected":
            r -= (r @ mean) / (mean @ mean) * mean
            r /= r.norm()
        removed = replace(direction, unit=r.float())
        resid = edited.run(batch, read=slice(None)).resid_pre
        assert resid is not None
        assert (before @ removed.unit).abs().max() > 0.1 > 1e-4 > (resid @ removed.unit).abs().max()
        hooks = model.logits([HARMFUL], [Intervention(removed, "ablate")])
        far = (hooks - edited.logits([HARMFUL])).abs().max()
        assert far > 1e-2 if variant == "norm-preserving" else far < 1e-4


@pytest.mark.parametrize(
    "name", ["Llama with biases", "Llama, tied", "Phi (parallel)", "GPT-2", "GPT-NeoX (sequential)", "Granite"]
)
def test_an_addition_in_a_bias_is_the_addition_of_the_hooks(name, tmp_path):
    model, direction = tiny(name, tmp_path)
    edited = orthogonalize(model, direction, variant="addition", strength=-0.7)
    hooks = model.logits(PROMPTS, [Intervention(direction, "add", -0.7)] * len(PROMPTS))
    assert_close(edited.logits(PROMPTS), hooks, atol=2e-4, rtol=1e-3)
    assert (hooks - model.logits(PROMPTS)).abs().max() > 0.05


def test_an_addition_without_a_bias_to_take_it_is_refused(tmp_path):
    model, direction = tiny("Qwen 2", tmp_path / "model")
    with pytest.raises(ModelError, match="write without a bias"):
        export(model, direction, tmp_path / "edited", variant="addition")
    first = replace(direction, source=replace(direction.source, layer=0))
    with pytest.raises(ModelError, match="no block stands before layer 0"):
        export(model, first, tmp_path / "edited", variant="addition")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_addition_to_a_checkpoint_in_shards_is_complete_in_its_index(tmp_path):
    folder = build("Llama, tied", tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "sharded")
    sharded = ChatModel.load(tmp_path / "sharded", device="cpu", dtype=torch.float32)
    direction = Direction(torch.eye(32)[3], 2.0, Source(fingerprint=sharded.fingerprint, layer=1))
    report = export(sharded, direction, tmp_path / "edited", variant="addition")
    index = json.loads((tmp_path / "edited" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["model.layers.0.mlp.down_proj.bias"] == index["model.layers.0.mlp.down_proj.weight"]
    assert report.exact and report.edited == 1 and len(set(index.values())) > 1


# -- killed ----------------------------------------------------------------------------------------------------------


def test_a_killed_export_leaves_no_folder_that_looks_whole_and_the_next_run_clears_up(tmp_path):
    model, direction = tiny("Llama", tmp_path / "model")
    direction.save(tmp_path / "direction.safetensors")
    out = tmp_path / "out" / "edited"
    command = [sys.executable, "-m", "refusal_core", "export", str(tmp_path / "model"), "--device", "cpu"]
    command += ["--direction", str(tmp_path / "direction.safetensors"), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(".edited-*/model.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (left,) = out.parent.iterdir()
    assert left.name.startswith(f".edited-{process.pid}-"), "what is there is hidden, and not what was asked for"
    at_work, other = out.parent / f".edited-{os.getpid()}-00.part", out.parent / f".edited-2-{process.pid}-00.part"
    at_work.mkdir()
    other.mkdir()
    report = export(model, direction, out)
    assert {p.name for p in out.parent.iterdir()} == {"edited", at_work.name, other.name}
    assert (out / "README.md").exists() and report.exact
    assert ChatModel.load(out, device="cpu").n_layers == model.n_layers


def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(model: ChatModel, direction: Direction, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot be written .* name another folder"):
        export(model, direction, tmp_path / "file" / "edited")


@pytest.mark.parametrize(
    ("shape", "axis"), [((50, 16), -1), ((16, 50), -2), ((16, 50), 0), ((3, 7, 16), -1), ((3, 16, 7), 1), ((16,), 0)]
)
@pytest.mark.parametrize("change", [weights.without, weights.with_norms_kept])
def test_a_tensor_changed_in_pieces_is_the_one_changed_whole(shape, axis, change, monkeypatch):
    w, r = torch.randn(shape), torch.nn.functional.normalize(torch.randn(16), dim=0)
    seen: list[int] = []

    def noted(piece: torch.Tensor) -> torch.Tensor:
        seen.append(piece.numel())
        return change(piece, r, axis)

    monkeypatch.setattr(orthogonalize_module, "PIECE", 64)
    assert_close(orthogonalize_module._in_pieces(w, axis, noted), change(w, r, axis), atol=1e-6, rtol=1e-5)
    assert sum(seen) == w.numel() and (len(shape) == 1 or len(seen) > 2)


def test_what_is_compared_with_the_hooks_is_read_block_by_block_from_its_files(model, direction, tmp_path, monkeypatch):
    beside, places = ChatModel.load_beside, []

    def noted(self: ChatModel, *args, **how) -> ChatModel:
        edited = beside(self, *args, **how)
        places.append(edited.places)
        return edited

    monkeypatch.setattr(ChatModel, "load_beside", noted)
    report = export(model, direction, tmp_path / "edited")
    assert places == ["cpu and disk"] and report.exact
