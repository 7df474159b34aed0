"""Where the weights are changes no number: spread over memory and disk, a model is what it is on one device."""

import gc
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from importlib.util import find_spec
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import HARMFUL
from families import FAMILIES, build
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from refusal_core import checkpoints, placement
from refusal_core.__main__ import main
from refusal_core.activations import collect_activations
from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.directions import Direction, Source
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.orthogonalize import export, orthogonalize
from refusal_core.placement import FOLDER, FOUR_BIT, Placement, asked_for, check_spread, spread

PROMPTS = ["How do I bake bread?", "Hi", "Tell me about the sea, please."]
GB = 10**9


def blocks_of(model: ChatModel) -> list[str]:
    names = {id(module): name for name, module in model._model.named_modules()}
    return [names[id(block)] for block in model._parts.blocks]


def direction_of(model: ChatModel, layer: int = 1) -> Direction:
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    return Direction.from_difference(3 * r, Source(model.name, fingerprint=model.fingerprint, layer=layer))


READS_ITS_EMBEDDING = "gemma4"


def test_an_embedding_that_is_read_past_its_module_cannot_be_on_the_disk(tmp_path):
    folder = build("Gemma 4 with per-layer embeddings", tmp_path)
    with pytest.raises(
        ModelError, match="reads weights past their modules, which are on the disk: leave its embedding"
    ):
        ChatModel.load(folder, device={"": "disk"})


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory) -> tuple[Path, ChatModel]:
    folder = build(request.param, tmp_path_factory.mktemp("family"))
    return folder, ChatModel.load(folder, device="cpu")


@pytest.fixture(scope="module", params=["some blocks", "everything"])
def placed(request, family) -> tuple[ChatModel, ChatModel]:
    """The model on one device, and the same with its first and last block on the disk, or with all of it there."""
    folder, whole = family
    first, *_, last = blocks_of(whole)
    mapping = {first: "disk", last: "disk"} if request.param == "some blocks" else {"": "disk"}
    if whole.family == READS_ITS_EMBEDDING:
        mapping["model.language_model.embed_tokens"] = "cpu"
    return whole, ChatModel.load(folder, device=mapping)


def rows_of(model: ChatModel) -> list[tuple[Intervention, ...]]:
    r = direction_of(model)
    return [(), (Intervention(r, "ablate"),), (Intervention(r, "add", 0.5),)]


def test_a_model_on_the_disk_is_the_same_model(placed):
    whole, there = placed
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(whole.folder))
    assert there.n_parameters == whole.n_parameters == plain.num_parameters()
    assert there.device == torch.device("cpu") and there.dtype == torch.float32
    assert there.fingerprint == whole.fingerprint and there.writers == whole.writers
    assert there.places in ("cpu and disk", "disk") and f"float32 on {there.places}" in there.description
    assert any(p.device.type == "meta" for p in there._model.parameters()), "nothing of it is on the disk"


def test_logits_and_activations_are_those_of_the_whole_model_with_and_without_edits(placed):
    whole, there = placed
    rows = rows_of(whole)
    assert torch.equal(there.logits(PROMPTS), whole.logits(PROMPTS))
    assert torch.equal(there.logits(PROMPTS, rows), whole.logits(PROMPTS, rows))
    assert torch.equal(collect_activations(there, PROMPTS), collect_activations(whole, PROMPTS))


def test_ablation_leaves_nothing_at_any_later_read_and_addition_is_exact(placed):
    _, there = placed
    r = direction_of(there)
    (batch,) = there.batches(PROMPTS)
    plain, ablated, added = (there.run(batch, [row] * 3, read=[-2, -1]).resid_pre for row in rows_of(there))
    assert plain is not None and ablated is not None and added is not None
    assert (plain @ r.unit).abs().max() > 1e-2, "there must have been something to remove"
    assert ((ablated @ r.unit).abs() <= 1e-5 * ablated.norm(dim=-1).clamp(min=1)).all()
    assert torch.equal(plain[:, :, 0], added[:, :, 0])
    moved = (added - plain)[:, :, 1]
    assert_close(moved, (0.5 * r.norm * r.unit).expand_as(moved), atol=1e-4, rtol=1e-4)


def test_replies_are_the_same_word_for_word(placed):
    said = [[step.texts for step in stream_side_by_side(m, PROMPTS, rows_of(m), max_new_tokens=5)][-1] for m in placed]
    assert said[0] == said[1] and any(said[0])


def test_what_reads_weights_and_gradients_gets_them_from_the_disk(placed):
    whole, there = placed
    unit = direction_of(whole).unit
    (batch,) = whole.batches(PROMPTS)
    told = [m.gradients(batch, lambda logits: logits[:, 7], [-2, -1]) for m in placed]
    assert_close(told[1].by_write, told[0].by_write)
    assert torch.equal(told[1].writes, told[0].writes)
    assert torch.equal(there.unembed(unit, final_norm=True), whole.unembed(unit, final_norm=True))
    output = whole.run(batch, read_writes=[-1])
    if output.head_inputs is not None:
        assert torch.equal(there.heads_along(output.head_inputs, unit), whole.heads_along(output.head_inputs, unit))


# -- one family is enough --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Its experts are put together on loading, so that those on the disk are written there anew."""
    return build("Mixtral", tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return build("Llama, tied", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def offloaded(temporary: Path) -> list[Path]:
    return list(temporary.rglob(f"{FOLDER}*/*"))


def test_what_was_written_onto_the_disk_is_gone_with_the_model(mixture, temporary):
    there = ChatModel.load(mixture, device={"": "disk"})
    assert offloaded(temporary)
    assert there.logits(["Hi"]).isfinite().all()
    del there
    gc.collect()
    assert not list(temporary.iterdir())


def test_what_was_written_onto_the_disk_is_gone_when_loading_fails(mixture, temporary, tmp_path, monkeypatch):
    folder = shutil.copytree(mixture, tmp_path / "broken")
    written, read = [], checkpoints.read_weights

    def watched(*args, **told):
        try:
            return read(*args, **told)
        finally:
            written.extend(offloaded(temporary))

    monkeypatch.setattr(checkpoints, "read_weights", watched)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(ModelError, match="incomplete"):
        ChatModel.load(folder, device={"": "disk"})
    assert written and not list(temporary.iterdir())


def test_what_a_killed_process_has_left_is_removed_and_that_of_a_living_one_is_not(llama, temporary):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, others = temporary / f"{FOLDER}{ended.pid}-x", temporary / f"{FOLDER}{os.getppid()}-x"
    left.mkdir()
    others.mkdir()
    ChatModel.load(llama, device={"": "disk"})
    assert not left.exists() and others.exists()


def test_a_model_that_nobody_uses_any_more_does_not_count_as_memory_in_use(llama):
    gone = weakref.ref(ChatModel.load(llama, device="cpu")._model)
    gc.disable()
    try:
        ChatModel.load(llama, device="cpu")
    finally:
        gc.enable()
    assert gone() is None


def test_what_reads_weights_waits_for_the_step_in_hand_whose_weights_it_would_take_away(llama):
    there = ChatModel.load(llama, device={"": "disk"})
    unit = direction_of(there).unit
    (batch,) = there.batches(PROMPTS)
    heads = there.run(batch, read_writes=[-1]).head_inputs
    assert heads is not None
    work = [lambda: there.heads_along(heads, unit), lambda: there.unembed(unit, final_norm=True)]
    alone, logits = [do() for do in work], there.logits(PROMPTS)
    got: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: work[i]()})) for i in range(len(work))]

    def meanwhile(module, args):
        for thread in threads:
            thread.start()
            thread.join(0.5)
        assert not got

    handle = there._parts.head_outputs[1].register_forward_pre_hook(meanwhile)
    assert torch.equal(there.logits(PROMPTS), logits)
    handle.remove()
    for i, thread in enumerate(threads):
        thread.join()
        assert torch.equal(got[i], alone[i])


@pytest.mark.parametrize("fate", ["gone", "broken"])
def test_files_that_are_gone_while_weights_are_read_from_them_are_one_sentence(tmp_path, fate):
    model = ChatModel.load(build("Llama", tmp_path / "model"), device={"": "disk"})
    weights, expected, unit = tmp_path / "model" / "model.safetensors", model.logits(["Hi"]), torch.ones(model.d_model)
    head_inputs = model.run(*model.batches(["Hi"]), read_writes=[-1]).head_inputs
    assert head_inputs is not None
    weights.rename(tmp_path / "elsewhere")
    if fate == "broken":
        weights.write_bytes((tmp_path / "elsewhere").read_bytes()[:1000])
    for use in (
        lambda: model.logits(["Hi"]),
        lambda: next(stream_side_by_side(model, ["Hi"], [None])),
        lambda: model.unembed(unit, final_norm=False),
        lambda: model.heads_along(head_inputs, unit),
    ):
        with pytest.raises(ModelError, match=r"cannot be any more .*: put the checkpoint back, or load") as caught:
            use()
        assert "\n" not in str(caught.value)
    (tmp_path / "elsewhere").rename(weights)
    assert torch.equal(model.logits(["Hi"]), expected), "it goes on where it is put back"


def test_an_edited_model_is_placed_as_its_model_and_outlives_the_call(llama, temporary):
    whole, there = ChatModel.load(llama, device="cpu"), ChatModel.load(llama, device={"model.layers.0": "disk"})
    edited = orthogonalize(there, direction_of(there))
    gc.collect()
    assert edited.places == "cpu and disk"
    assert torch.equal(edited.logits(PROMPTS), orthogonalize(whole, direction_of(whole)).logits(PROMPTS))
    report = export(there, direction_of(there), temporary / "edited")
    assert report.exact
    del edited
    gc.collect()
    assert [path.name for path in temporary.iterdir() if not path.name.startswith(FOLDER)] == ["edited"]


def test_a_model_in_four_bits_is_not_exported_and_the_remedy_is_said(llama, tmp_path):
    packed = ChatModel.load(llama, device="cpu")
    packed.placed = Placement(packed.device, packed.dtype, four_bit=True)
    with pytest.raises(ModelError, match=r"is in 4 bits.*load it whole"):
        export(packed, direction_of(packed), tmp_path / "edited")
    assert "4 bits on cpu" in packed.description and not (tmp_path / "edited").exists()


# -- mappings --------------------------------------------------------------------------------------------------------


def test_the_nearest_entry_of_a_mapping_holds_and_tied_weights_stay_together(llama):
    there = ChatModel.load(llama, device={"": "cpu", "model": "disk", "model.layers.1": "cpu", "lm_head": "cpu"})
    placed = there._model.hf_device_map
    assert placed["model.layers.1"] == "cpu" and placed["model.layers.0"] == placed["model.norm"] == "disk"
    assert placed["lm_head"] == placed["model.embed_tokens"] == "disk"
    assert torch.equal(there.logits(PROMPTS), ChatModel.load(llama, device="cpu").logits(PROMPTS))


def test_a_block_is_not_taken_for_another_whose_number_begins_alike(tmp_path):
    folder = build("Llama", tmp_path / "deep", num_hidden_layers=11)
    there = ChatModel.load(folder, device={"model.layers.1": "disk"})
    on_disk = {name for name, p in there._model.named_parameters() if p.device.type == "meta"}
    assert on_disk and all(name.startswith("model.layers.1.") for name in on_disk)
    assert torch.equal(there.logits(PROMPTS), ChatModel.load(folder, device="cpu").logits(PROMPTS))


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ({"model.layers.9": "disk"}, r"has no module 'model.layers.9' to be placed: name some of its modules"),
        ({"": "abacus"}, "There is no device 'abacus' here: take cpu or auto"),
        ("abacus", "There is no device 'abacus' here: take cpu or auto"),
        ("cuda:99", "There is no device 'cuda:99' here: take cpu or auto"),
    ],
)
def test_a_place_that_does_not_exist_is_one_sentence(llama, device, says):
    with pytest.raises(ModelError, match=says) as caught:
        ChatModel.load(llama, device=device)
    assert "\n" not in str(caught.value)


# -- how much fits where ---------------------------------------------------------------------------------------------


def test_auto_takes_the_one_gpu_that_holds_all_and_only_else_several():
    assert spread(10 * GB, {0: 8 * GB, 1: 16 * GB, "cpu": 64 * GB}) == {"device_map": {"": 1}}
    assert spread(10 * GB, {"cpu": 64 * GB}) == {"device_map": {"": "cpu"}}
    told = spread(20 * GB, {0: 23 * GB - 1, 1: 11 * GB, "cpu": 64 * GB})
    assert told["device_map"] == "auto" and list(told["max_memory"]) == [0, 1, "cpu"]
    assert told["max_memory"][0] == 20 * GB - 1, "a sixth of the weights is left to work with"
    assert spread(20 * GB, {0: 23 * GB, "cpu": 0}) == {"device_map": {"": 0}}


@pytest.mark.filterwarnings("ignore:Current model requires")
def test_what_auto_says_is_understood_as_blocks_on_gpus_then_in_memory_then_on_the_disk(tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(build("Llama", tmp_path / "deep", num_hidden_layers=12))
    block = sum(p.numel() * 4 for p in plain.model.layers[0].parameters())
    head = plain.lm_head.weight.numel() * 4
    # The first GPU and the memory keep room for the largest layer, which is brought in there.
    free = {0: 2 * head + 2 * block, 1: 3 * block, "cpu": head + 4 * block}
    told = spread(2 * head + 12 * block, {device: int(1.15 * n) + 9 for device, n in free.items()})
    no_split = ["LlamaDecoderLayer"]
    placed = accelerate.infer_auto_device_map(plain, told["max_memory"], no_split_module_classes=no_split)
    order = [placed[f"model.layers.{i}"] for i in range(12)]
    assert set(order) == {0, 1, "cpu", "disk"} and order == sorted(order, key=[0, 1, "cpu", "disk"].index)


def test_auto_with_too_little_memory_reads_blocks_from_the_disk_and_gives_the_same_numbers(tmp_path, monkeypatch):
    whole = ChatModel.load(build("Llama", tmp_path / "deep", num_hidden_layers=12), device="cpu")
    block = sum(p.numel() for p in whole._parts.blocks[0].parameters())
    monkeypatch.setattr(placement, "_devices", lambda: ["cpu"])
    monkeypatch.setattr(placement, "_free_memory", lambda: int(1.15 * 4 * (whole.n_parameters - 6 * block)))
    there = ChatModel.load(whole.folder, device="auto", dtype=torch.float32)
    assert there.places == "cpu and disk"
    assert torch.equal(there.logits(PROMPTS), whole.logits(PROMPTS))


def test_auto_where_it_fits_is_one_device_without_anything_in_between(llama, monkeypatch):
    monkeypatch.setattr(placement, "_devices", lambda: ["cpu"])
    there = ChatModel.load(llama, device="auto")
    assert there.places == "cpu" and not any(hasattr(module, "_hf_hook") for module in there._model.modules())


def test_what_fits_nowhere_is_one_sentence_with_the_remedy():
    sizes = {"embedding": 3 * GB} | {f"block {i}": GB for i in range(47)}
    room = {0: 8 * GB, "cpu": 12 * GB}
    check_spread("m", sizes, 0, room, 0)
    check_spread("m", sizes, 40 * GB, room, 30 * GB)
    with pytest.raises(
        ModelError, match=r"^m needs about 50.0 GB, and there is room for 20.0 GB of it in memory"
    ) as caught:
        check_spread("m", sizes, 40 * GB, room, 29 * GB)
    assert "29.0 GB on the disk: make room, or take a smaller model." in str(caught.value)
    with pytest.raises(ModelError, match=r"in embedding alone 3.0 GB, and there is room for 2.0 GB in memory"):
        check_spread("m", sizes, 0, {"cpu": 2 * GB}, 0)


def test_too_little_memory_on_one_device_names_the_ways_out_before_anything_is_read(llama, monkeypatch):
    monkeypatch.setattr(placement, "_free_memory", lambda: 1000)
    monkeypatch.setattr("refusal_core.checkpoints.read_weights", lambda *a, **k: pytest.fail("the weights were read"))
    for device in ("cpu", {"": "disk", "model.embed_tokens": "cpu"}):
        with pytest.raises(ModelError, match=r"of memory and 0.0 GB are free: .*the device \"auto\".*smaller model\.$"):
            ChatModel.load(llama, device=device)


def test_gradients_that_need_more_than_the_memory_are_one_sentence(llama, monkeypatch):
    there = ChatModel.load(llama, device={"": "disk"})
    (batch,) = there.batches(["Hi"])
    monkeypatch.setattr(placement, "_free_memory", lambda: 1000)
    with pytest.raises(ModelError, match=r"all of its weights at once.*patch its parts instead"):
        there.gradients(batch, lambda logits: logits[:, 7], [-1])
    assert there.logits(["Hi"]).isfinite().all()


# -- 4 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_four_bits_without_cuda_are_one_sentence_before_the_model_is_looked_for():
    with pytest.raises(ModelError, match=r"need a GPU with CUDA, and there is none here: leave them out\.$"):
        ChatModel.load("/nowhere", four_bit=True)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_without_bitsandbytes_say_how_to_install_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match=r"bitsandbytes, which is not installed: pip install bitsandbytes"):
        asked_for("cpu", four_bit=True)


def test_in_four_bits_linear_layers_take_little_more_than_half_a_byte_a_weight(tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(build("Llama", tmp_path / "untied"))
    sizes = placement._sizes(plain, Placement(torch.device("cpu"), torch.bfloat16, four_bit=True))
    assert sizes["model.layers.0.mlp.up_proj.weight"] == math.ceil(0.5625 * 32 * 48) and FOUR_BIT == 0.5625
    assert sizes["model.embed_tokens.weight"] == sizes["lm_head.weight"] == 2 * plain.lm_head.weight.numel()
    assert sizes["model.norm.weight"] == 64


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_four_bits_on_the_command_line_are_one_sentence_and_status_1(capsys):
    assert main(["find", "--four-bit"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "Weights of 4 bits need a GPU with CUDA, and there is none here: leave them out.\n"
    assert printed.out == ""


def does_not_start(monkeypatch) -> None:
    monkeypatch.setattr("refusal_core.ui.server.Engine", lambda *a, **k: pytest.fail("the app started"))


def test_the_app_ends_at_once_with_the_sentence_for_a_device_that_is_not_there(capsys, monkeypatch):
    does_not_start(monkeypatch)
    assert main(["app", "--device", "abacus"]) == 1
    assert capsys.readouterr().err.startswith("There is no device 'abacus' here: take cpu or auto")


def test_a_place_for_a_model_and_two_servers_is_a_command_line_that_is_not_understood(capsys, monkeypatch):
    does_not_start(monkeypatch)
    servers = ["--baseline", "http://localhost:1/v1", "--ablated", "http://localhost:2/v1"]
    with pytest.raises(SystemExit) as ended:
        main(["app", *servers, "--device", "cpu"])
    assert ended.value.code == 2 and "ask two servers instead: give one or the other" in capsys.readouterr().err


def test_device_and_dtype_of_the_command_line_are_those_of_the_model(tmp_path, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr("refusal_core.commands.chat", lambda model, *a, **k: loaded.append(model))
    direction = direction_of(ChatModel.load(ORGANISM, device="cpu"))
    direction.save(tmp_path / "d.safetensors")
    given = ["chat", "--direction", str(tmp_path / "d.safetensors"), "--dtype", "bfloat16", "--device"]
    assert main([*given, "auto"]) == main([*given, "cpu"]) == 0, capsys.readouterr().err
    assert [model.dtype for model in loaded] == [torch.bfloat16] * 2
    assert torch.equal(loaded[0].logits([HARMFUL]), loaded[1].logits([HARMFUL])) or torch.cuda.is_available()
