"""The bar: which model, on which device, and which direction, found with which rule."""

from refusal_core.selection import KL_LIMIT, LAYER_SHARE, CandidateScore, Choice, Progress
from refusal_core.ui.engine import Failed, Ready, Status

BROKEN = {
    "layer": f"it lies in the last {1 - LAYER_SHARE:.0%} of the layers",
    "kl": f"removing it costs more than {KL_LIMIT} nats on harmless prompts",
    "induce": "adding it does not make harmless prompts refused",
    "nan": "a score is not a number",
    "zero": "it is numerically zero",
}
"""What a candidate did that the rule forbids."""


def bar_view(status: Status) -> dict:
    """What the bar shows while the model is prepared, when it is ready, and when it cannot be had."""
    if isinstance(status, Failed):
        return {"state": "failed", "sentence": status.sentence}
    if isinstance(status, Progress):
        return {"state": "waiting", "stage": status.stage, "done": status.done, "total": status.total}
    return {"state": "ready", "model": _model_view(status), "direction": _direction_view(status)}


def _model_view(ready: Ready) -> dict:
    model = ready.model
    return {
        "name": model.name,
        "organism": ready.is_organism,
        "parameters": _short(model.n_parameters),
        "layers": model.n_layers,
        "device": _device_name(model.device.type),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _device_name(device: str) -> str:
    return {"cpu": "CPU", "cuda": "GPU (CUDA)", "mps": "GPU (Apple)"}.get(device, device)


def _direction_view(ready: Ready) -> dict:
    found, chosen = ready.found, ready.found.choice.chosen
    assert chosen is not None
    source = found.direction.source
    return {
        "layer": source.layer,
        "position": source.position,
        "token": ready.model.template_tokens[source.position],
        "norm": f"{found.direction.norm:.3g}",
        "relaxed": found.choice.relaxed is not None,
        "rule": _rule(found.choice),
        "scores": _scores(chosen),
        "prompts": f"{source.n_harmful} harmful and {source.n_harmless} harmless prompts",
        "refusal_tokens": [
            {"text": ready.model.tokenizer.decode([token]), "share": share}
            for token, share in zip(found.refusal_tokens, found.refusal_shares, strict=True)
        ],
    }


def _rule(choice: Choice) -> str:
    if choice.relaxed is not None:
        return f"No candidate passed every rule. This one comes nearest, but {BROKEN[choice.relaxed]}."
    margin = f", {choice.margin:.2f} below the runner-up" if choice.margin is not None else ""
    return (
        f"Lowest bypass score{margin}, of the candidates in the first {LAYER_SHARE:.0%} of the layers that induce "
        f"refusal when added and cost at most {KL_LIMIT} nats when removed."
    )


def _scores(chosen: CandidateScore) -> list[dict]:
    """The chosen candidate's numbers, each with what it means."""
    rows = (
        ("bypass", chosen.bypass, "log-odds of starting like a refusal, harmful prompts, direction removed"),
        ("induce", chosen.induce, "log-odds of starting like a refusal, harmless prompts, direction added"),
        ("KL", chosen.kl, "nats between the untouched model and the model without it, harmless prompts"),
    )
    return [
        {"name": name, "value": f"{value:+.2f}" if name != "KL" else f"{value:.3f}", "meaning": meaning}
        for name, value, meaning in rows
        if value is not None
    ]


def _short(n: int) -> str:
    """A number of parameters as people say it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)
