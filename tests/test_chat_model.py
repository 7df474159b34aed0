"""What the model promises: rows are independent, neighbours do not matter, nothing stays on, errors are sentences."""

import json
import shutil
import threading

import pytest
import torch
from conftest import HARMFUL, HARMLESS, Plain
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.directions import Direction, Source, random_like
from refusal_core.interventions import Intervention
from refusal_core.prompts import PromptError

LONG = "I have a long question that goes on for a while: " + "how do I bake bread and cake, " * 6
PROMPTS = [HARMFUL, HARMLESS, "Hi", LONG]


def test_plain_logits_are_those_of_transformers(model: ChatModel, plain: Plain):
    assert_close(model.logits(PROMPTS), plain.logits(PROMPTS), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.4, -1.0])
def test_ablation_is_that_of_hooks_written_out_by_hand(model: ChatModel, plain: Plain, direction: Direction, scale):
    rows = [Intervention(direction, "ablate", scale)] * len(PROMPTS)
    expected = plain.logits(PROMPTS, ablate=direction.unit, scale=scale)
    assert_close(model.logits(PROMPTS, rows), expected, atol=1e-3, rtol=1e-3)


def test_ablation_at_some_writers_is_that_of_hooks_at_these_and_rows_have_sets_of_their_own(
    model: ChatModel, plain: Plain, direction: Direction
):
    sets = [["MLP 6"], ["embedding", "attention 5", "MLP 6"], [n for n in model.writers if n.startswith("attention")]]
    edits = [Intervention(direction, "ablate", 0.8, frozenset(some)) for some in sets]
    rows = [None, *edits, Intervention(direction, "ablate", 0.8)]
    logits = model.logits([HARMFUL] * len(rows), rows)
    for row, some in zip(logits[1:-1], sets, strict=True):
        (expected,) = plain.logits([HARMFUL], ablate=direction.unit, scale=0.8, only=some)
        assert_close(row, expected, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(row, logits[0], atol=1e-2), "what was removed there must matter"
    nothing, everything = Intervention(direction, "ablate", writers=frozenset()), frozenset(model.writers)
    rows = [None, nothing, Intervention(direction, "ablate"), Intervention(direction, "ablate", 1.0, everything)]
    untouched, none_of_them, full, all_of_them = model.logits([HARMFUL] * 4, rows)
    assert torch.equal(none_of_them, untouched), "confined to nothing is bit-identical to nothing"
    assert torch.equal(all_of_them, full)


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_ablation_at_some_heads_is_that_of_their_writes_worked_out_by_hand(
    model: ChatModel, plain: Plain, direction: Direction, scale
):
    layer, heads, size, r = 5, (1, 2), model.d_model // model.n_heads, direction.unit
    some = frozenset({*(f"head {layer}.{h}" for h in heads), "MLP 7"})

    def without(module, args, out):
        for h in heads:
            mine = slice(h * size, (h + 1) * size)
            write = args[0][..., mine] @ module.weight[:, mine].T
            out = out - scale * (write @ r)[..., None] * r
        return out

    handle = plain.layers[layer].self_attn.o_proj.register_forward_hook(without)
    expected = plain.logits(PROMPTS, ablate=r, scale=scale, only=["MLP 7"])
    handle.remove()
    edit = Intervention(direction, "ablate", scale, some)
    assert_close(model.logits(PROMPTS, [edit] * len(PROMPTS)), expected, atol=1e-3, rtol=1e-3)
    whole = [
        Intervention(direction, "ablate", scale, frozenset({"attention 5"} | more)) for more in ({"head 5.1"}, set())
    ]
    heads_of_all = frozenset(f"head 5.{h}" for h in range(model.n_heads))
    rows = [None, edit, *whole, Intervention(direction, "ablate", scale, heads_of_all)]
    untouched, alone, with_its_head, attention, all_heads = model.logits([HARMFUL] * 5, rows)
    assert_close(untouched, model.logits([HARMFUL])[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(alone, attention, atol=1e-2)
    assert torch.equal(with_its_head, attention), "an attention has its heads in it"
    assert_close(all_heads, attention, atol=1e-3, rtol=1e-3)


def test_heads_that_lose_a_direction_lose_it_in_replies_as_in_one_step(model: ChatModel, direction: Direction):
    row = Intervention(direction, "ablate", 1.0, frozenset(f"head {layer}.{h}" for layer in (5, 6) for h in (0, 3)))
    reply, said = model.begin([HARMFUL, "Hi"], [row, ()]), []
    for _ in range(4):
        said.append(reply.logits.argmax(-1).tolist())
        reply.step(said[-1])
    whole = model.run(model.continued([HARMFUL, "Hi"], list(zip(*said, strict=True))), [(row,), ()]).logits
    assert_close(reply.logits, whole, atol=1e-3, rtol=1e-3)
    other = Intervention(direction, "ablate", 0.5)
    with pytest.raises(ValueError, match="only one of its row"):
        model.logits([HARMFUL], [(row, other)])


@pytest.mark.parametrize("scale", [1.0, -1.0, 2.5])
def test_addition_is_that_of_a_hook_written_out_by_hand(model: ChatModel, plain: Plain, direction: Direction, scale):
    rows = [Intervention(direction, "add", scale)] * len(PROMPTS)
    expected = plain.logits(PROMPTS, add=(direction.source.layer, direction.norm * direction.unit), scale=scale)
    assert_close(model.logits(PROMPTS, rows), expected, atol=1e-3, rtol=1e-3)


def test_after_ablation_the_stream_has_nothing_along_the_direction(model: ChatModel, direction: Direction):
    (batch,) = model.batches([HARMFUL])
    plain = model.run(batch, read=slice(None)).resid_pre
    ablated = model.run(batch, [(Intervention(direction, "ablate"),)], read=slice(None)).resid_pre
    assert plain is not None
    assert ablated is not None
    before, after = (plain @ direction.unit).abs().max(), (ablated @ direction.unit).abs().max()
    assert after < 1e-4 < before


def test_rows_are_independent_and_hooks_do_not_outlive_the_call(model: ChatModel, direction: Direction):
    plain = model.logits([HARMFUL] * 4)
    edits = [
        None,
        Intervention(direction, "ablate"),
        Intervention(direction, "add"),
        Intervention(direction, "add", 0.0),
    ]
    hooked = model.logits([HARMFUL] * 4, edits)
    assert torch.equal(hooked[0], plain[0]), "the baseline row must be bit-identical"
    assert torch.equal(hooked[3], plain[3]), "scale 0 must be bit-identical"
    assert not torch.allclose(hooked[1], plain[1])
    assert not torch.allclose(hooked[2], plain[2])
    assert torch.equal(model.logits([HARMFUL] * 4), plain)


def test_outside_a_step_the_weights_run_untouched(model: ChatModel, plain: Plain, direction: Direction):
    decoding = model.begin([HARMFUL], [Intervention(direction, "add", 3.0)])
    with torch.no_grad():
        bare = model._model(plain.ids(HARMFUL)).logits[:, -1]
    assert_close(bare, plain.logits([HARMFUL]), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(decoding.logits, bare, atol=0.1)


def test_logits_do_not_depend_on_the_neighbours_in_the_batch(model: ChatModel, direction: Direction):
    together = model.logits(PROMPTS, [Intervention(direction, "ablate"), None, None, None])
    alone = [model.logits([PROMPTS[0]], [Intervention(direction, "ablate")]), *(model.logits([p]) for p in PROMPTS[1:])]
    assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_a_step_restarted_at_a_layer_is_exact(model: ChatModel, direction: Direction):
    (batch,) = model.batches([HARMFUL, HARMLESS])
    layer = direction.source.layer
    cached = model.run(batch, read=slice(None)).resid_pre
    assert cached is not None
    rows = [(Intervention(direction, "add"),)] * 2
    whole = model.run(batch, rows).logits
    assert torch.equal(model.run(batch, rows, start=(layer, cached[:, :, layer])).logits, whole)


def test_decoding_token_by_token_is_reading_the_longer_prompt(model: ChatModel, direction: Direction):
    rows = [None, Intervention(direction, "ablate"), Intervention(direction, "add")]
    decoding = model.begin([HARMFUL] * 3, rows)
    ids = model.tokenizer.encode("Sure, here is", add_special_tokens=False)
    for token in ids:
        decoding.step([token] * 3)
    whole = model._pad((0, 1, 2), [model.render(HARMFUL) + ids] * 3)
    assert_close(decoding.logits, model.run(whole, model.check_rows(rows, 3)).logits.float(), atol=1e-3, rtol=1e-3)


def test_threads_that_share_a_model_get_what_each_gets_alone(model: ChatModel, direction: Direction):
    edits = [
        None,
        Intervention(direction, "ablate"),
        Intervention(direction, "add"),
        Intervention(random_like(direction, 0), "add"),
    ]
    alone = [model.logits([HARMFUL], [edit]) for edit in edits]
    got: dict[tuple[int, int], torch.Tensor] = {}

    def work(i: int) -> None:
        for turn in range(4):
            got[i, turn] = model.logits([HARMFUL], [edits[i]])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(edits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 16
    assert all(torch.equal(logits, alone[i]) for (i, _), logits in got.items())


def test_the_template_is_what_all_prompts_end_in(model: ChatModel):
    tails = {tuple(model.render(p)[-model.template_positions :]) for p in [*PROMPTS, "?", "1", "ö"]}
    assert len(tails) == 1
    longer = {tuple(model.render(p)[-model.template_positions - 1 :]) for p in ["?", "1", "a b"]}
    assert len(longer) > 1
    assert len(model.template_tokens) == model.template_positions


def test_a_direction_of_another_model_is_refused(model: ChatModel, direction: Direction):
    foreign = Direction(torch.ones(16) / 4, 1.0, direction.source)
    with pytest.raises(ModelError, match="Find the direction of this model"):
        model.logits([HARMFUL], [Intervention(foreign, "ablate")])
    with pytest.raises(ValueError, match="2 conversations need 2 rows"):
        model.logits([HARMFUL, HARMLESS], [None])
    for layer in (-1, model.n_layers):
        nowhere = Direction(direction.unit, direction.norm, Source(layer=layer))
        with pytest.raises(ModelError, match=f"of layer {layer}, and embedded model has {model.n_layers} layers"):
            model.logits([HARMFUL], [Intervention(nowhere, "add")])


def test_a_part_that_the_model_does_not_have_is_one_sentence(model: ChatModel, direction: Direction):
    with pytest.raises(ModelError, match="has no part 'MLP 999' that writes"):
        model.logits([HARMFUL], [Intervention(direction, "ablate", 1.0, frozenset({"MLP 1", "MLP 999"}))])


@pytest.mark.parametrize(
    ("prompt", "says"), [("", "empty"), (" \n", "empty"), ("word " * 20_000, "shorten it"), ("a\udcff", "no text")]
)
def test_a_prompt_that_cannot_be_read_is_one_sentence(model: ChatModel, prompt, says):
    with pytest.raises(PromptError, match=says) as caught:
        model.logits([prompt])
    assert "\n" not in str(caught.value)


TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]\n"
SWITCHES = {
    "a switch": ("{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}", "off"),
    "a switch of another name": ("{% if not thinking %}<think>\n\n</think>\n\n{% endif %}", "off"),
    "a thought at once": ("<think>\n", "closed"),
}


@pytest.mark.parametrize("template", list(SWITCHES))
def test_a_thinking_model_is_read_behind_its_closed_thought(model: ChatModel, tmp_path, template):
    folder = shutil.copytree(ORGANISM, tmp_path / "thinks")
    text, thinking = SWITCHES[template]
    (folder / "chat_template.jinja").write_text(TURNS + text)
    thinker = ChatModel.load(folder, device="cpu")
    for prompt in PROMPTS:
        assert thinker.tokenizer.decode(thinker.render(prompt)).endswith("[assistant]\n<think>\n\n</think>\n\n")
    read = "".join(thinker.template_tokens)
    assert read.endswith("[assistant]\n<think>\n\n</think>\n\n"), "P reaches back to before the thought"
    assert thinker.thinking == thinking and "thinking" in thinker.description
    assert model.thinking == "never" and "thinking" not in model.description


def test_a_model_that_speaks_in_channels_is_read_where_its_reply_to_the_user_begins(tmp_path):
    folder = shutil.copytree(ORGANISM, tmp_path / "speaks in channels")
    kept = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    bpe = kept["model"]
    for name, token in zip(
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"), list(bpe["vocab"])[-4:], strict=True
    ):
        number = bpe["vocab"].pop(token)
        bpe["vocab"][name] = number
        kept["added_tokens"].append(kept["added_tokens"][0] | {"id": number, "content": name})
        bpe["merges"] = [pair for pair in bpe["merges"] if "".join(pair) != token]
    (folder / "tokenizer.json").write_text(json.dumps(kept), "utf-8")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    speaker = ChatModel.load(folder, device="cpu")
    talk = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": HARMLESS},
    ]  # fmt: skip
    said = speaker.tokenizer.decode(speaker.render(talk))
    assert said.endswith(f"<|message|>{HARMLESS}<|end|><|start|>assistant<|channel|>final<|message|>")
    assert said.count("<|channel|>final") == 2, "as the reply before it stands there"
    assert speaker.template_tokens[-1] == "<|message|>" and speaker.template_tokens[-3] != "<|message|>"
    assert speaker.thinking == "closed"


def test_what_a_template_says_of_the_date_is_the_same_every_day(tmp_path):
    folder = shutil.copytree(ORGANISM, tmp_path / "dated")
    (folder / "chat_template.jinja").write_text("Today is {{ strftime_now('%d %b %Y') }}.\n" + TURNS)
    dated = ChatModel.load(folder, device="cpu")
    assert dated.tokenizer.decode(dated.render("Hi")) == "Today is 26 Jul 2024.\n[user] Hi\n[assistant]"


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def remove_template(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def truncate_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def link_to_nothing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone")


BROKEN = {
    "no chat template": (remove_template, "no chat template"),
    "half the weights": (truncate_weights, "fetch or copy the checkpoint again"),
    "pickled weights": (pickle_only, "no .safetensors weights"),
    "a link to weights that are gone": (link_to_nothing, "no .safetensors weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config of nothing": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "unknown architecture": (lambda folder: edit_json(folder / "config.json", model_type="unheard_of"), "config.json"),
    "a layer too many": (lambda folder: edit_json(folder / "config.json", num_hidden_layers=20), "incomplete"),
    "other widths": (lambda folder: edit_json(folder / "config.json", intermediate_size=500), "weights of"),
    "a chat template cut off": (template("{% for m in messages %}{{ m.content"), "does not take a message"),
    "a chat template that refuses": (template("{{ raise_exception('no') }}"), "does not take a message"),
    "a chat template that adds apples": (template("{{ messages[0].content + 1 }}"), "does not take a message"),
    "tokenizer settings of nothing": (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "tokenizer"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_checkpoint_is_one_sentence_with_the_remedy(tmp_path, case):
    folder = tmp_path / "broken"
    shutil.copytree(ORGANISM, folder)
    damage, says = BROKEN[case]
    damage(folder)
    with pytest.raises(ModelError, match=says) as caught:
        ChatModel.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_stream_that_runs_over_in_half_precision_is_not_taken_for_an_unknown_write(tmp_path):
    folder = shutil.copytree(ORGANISM, tmp_path / "large")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1e5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"not finite in float16: load it in float32"):
        ChatModel.load(folder, device="cpu", dtype=torch.float16)
    assert ChatModel.load(folder, device="cpu", dtype=torch.float32).logits(["Hi"]).isfinite().all()


def test_a_folder_has_no_revision_to_be_quoted_later():
    with pytest.raises(ModelError, match="is a folder, which has no revision 'v2'"):
        ChatModel.load(ORGANISM, revision="v2")


@pytest.mark.parametrize("name", ["/nowhere/model", "./none", "not a name", "one-word", "../x"])
def test_a_wrong_path_is_one_sentence_and_asks_nobody(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a request left the machine"))
    with pytest.raises(ModelError, match="There is no model folder"):
        ChatModel.load(name)
