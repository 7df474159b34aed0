"""Figures of what was measured, as plotly figures that the page draws.

Colour means one thing, the place on the refusal direction: `harmful` and `harmless` name a role in each trace's
`meta`, and the page paints roles in the colours of its theme. Every layer of a map is a frame of one figure, so that
the page moves through the layers by itself.
"""

import html
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly
import plotly.graph_objects as go
from jaxtyping import Float

from refusal_core.geometry import LayerMap
from refusal_core.prompts import PromptSet

PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
"""The script that draws the figures, as it comes with plotly: nothing is fetched from elsewhere."""

ROLES = {"harmful": ("#D55E00", "triangle-up"), "harmless": ("#0072B2", "circle")}
"""Colour (in the light theme) and marker of each class: two cues, because one of them may not be seen."""

MARGIN = 1.08


def prompt_map(maps: Sequence[LayerMap], prompts: PromptSet, layer: int) -> go.Figure:
    """The prompts on the first two principal components: a scatter of `layer`, and a frame for every layer.

    Each layer is scaled by the root-mean-square distance of its prompts from their centre. The stream grows from
    layer to layer; on one pair of axes the first layers would be a dot, and on axes of their own the axes would move.
    """
    scaled = [_scale(m) for m in maps]
    hover = {"harmful": _hover(prompts, harmful=True), "harmless": _hover(prompts, harmful=False)}
    figure = go.Figure(
        data=[_scatter(role, scaled[layer][role], hover[role]) for role in ROLES],
        frames=[
            go.Frame(name=str(m.layer), data=[_coordinates(points[role]) for role in ROLES])
            for m, points in zip(maps, scaled, strict=True)
        ],
    )
    reach = MARGIN * max(float(np.abs(points[role]).max(initial=0)) for points in scaled for role in ROLES)
    x_reach = MARGIN * max(float(np.abs(points[role][:, 0]).max(initial=0)) for points in scaled for role in ROLES)
    figure.update_xaxes(range=[-x_reach or -1, x_reach or 1], title="PC1, toward refusing →", zeroline=True)
    figure.update_yaxes(range=[-reach or -1, reach or 1], title="PC2", zeroline=True)
    return _styled(figure).update_layout(hovermode="closest", uirevision="map")


def umap_map(
    harmful: Float[np.ndarray, "harmful axis"], harmless: Float[np.ndarray, "harmless axis"], prompts: PromptSet
) -> go.Figure:
    """The prompts of one layer as UMAP lays them out, on axes without numbers because those mean nothing."""
    points = {"harmful": harmful, "harmless": harmless}
    figure = go.Figure([_scatter(role, points[role], _hover(prompts, harmful=role == "harmful")) for role in ROLES])
    reach = MARGIN * float(np.abs(np.concatenate([harmful, harmless])).max())
    figure.update_xaxes(range=[-reach, reach], showticklabels=False, zeroline=False, title="UMAP, exploratory")
    figure.update_yaxes(range=[-reach, reach], showticklabels=False, zeroline=False)
    return _styled(figure).update_layout(hovermode="closest")


def star_on_map(maps: Sequence[LayerMap], activations: Float[np.ndarray, "layer d_model"]) -> list[list[float]]:
    """[x, y] of one more prompt on `prompt_map`, layer by layer, from its `resid_pre` at the map's position."""
    return [
        (m.coordinates(x)[:2] / _size(m)).round(3).tolist()
        for m, x in zip(maps, np.asarray(activations, float), strict=True)
    ]


def separation_by_layer(maps: Sequence[LayerMap], chosen: int) -> go.Figure:
    """How well each layer separates the classes, and how far its first component is the mean difference."""
    seen = [m for m in maps if m.separation is not None]
    layers = [m.layer for m in seen]
    measures = [m.separation for m in seen if m.separation is not None]
    lines = (
        ("AUROC on PC1", "ink", "solid", "circle", [s.auroc_pc1 for s in measures]),
        ("AUROC on the direction, held out", "muted", "dot", "square", [s.auroc for s in measures]),
        ("|cos(PC1, mean difference)|", "accent", "dash", "diamond", [abs(s.cos_pc1) for s in measures]),
    )
    figure = go.Figure(
        [
            go.Scatter(
                x=layers, y=values, name=name, meta={"role": role}, mode="lines+markers",
                line={"dash": dash, "width": 2}, marker={"symbol": symbol, "size": 7},
                hovertemplate=f"{name}: %{{y:.3f}}<extra>layer %{{x}}</extra>",
            )
            for name, role, dash, symbol, values in lines
        ]
    )  # fmt: skip
    figure.add_vline(x=chosen, line={"width": 1, "dash": "dot"}, name="chosen")
    figure.update_xaxes(title="layer (resid_pre)", range=[-0.3, len(maps) - 0.7], dtick=max(1, len(maps) // 12))
    figure.update_yaxes(range=[0, 1.04], dtick=0.25)
    return _styled(figure).update_layout(hovermode="x unified")


def reading_map(tokens: Sequence[str], along: Float[np.ndarray, "layer pos"], reach: float) -> go.Figure:
    """Where the stream lies along the direction, at the input of every layer and at every token of one text.

    The colours end at ±`reach`; what lies further has the last colour, and its number is in the hover.
    """
    return _heat(
        along, reach, [f"{i}: {t}" for i, t in enumerate(map(readable, tokens))], "x·r̂ / ‖r‖", "layer (resid_pre)"
    )


def writer_map(values: Float[np.ndarray, "layer part"], parts: Sequence[str], unit: str) -> go.Figure:
    """What each part of each layer does along the direction; NaN where a layer has no such part."""
    reach = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    return _heat(values, reach, list(parts), unit, "layer")


def _heat(values: np.ndarray, reach: float, columns: list[str], unit: str, rows: str) -> go.Figure:
    hover = [
        [f"{html.escape(column)}<br>layer {layer}: {value:+.3f}" for column, value in zip(columns, row, strict=True)]
        for layer, row in enumerate(values)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=[[None if np.isnan(v) else round(float(v), 4) for v in row] for row in values],
            zmin=-reach,
            zmax=reach,
            meta={"roles": ["harmless", "ground", "harmful"]},
            hovertext=hover,
            hoverinfo="text",
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 10, "outlinewidth": 0, "nticks": 5},
        )
    )
    figure.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=[html.escape(c.partition(": ")[2] or c) for c in columns],
        tickangle=-60 if max(map(len, columns)) > 3 else 0, showgrid=False, zeroline=False,
    )  # fmt: skip
    figure.update_yaxes(title=rows, dtick=max(1, len(values) // 12), showgrid=False, zeroline=False)
    return _styled(figure)


def dose_figure(
    scales: Sequence[float],
    direction: Sequence[float],
    random: tuple[Sequence[float], Sequence[float]],
    title: str,
) -> go.Figure:
    """A measure by strength: that of the direction, and the band between the lowest and the highest random one."""
    low, high = random
    figure = go.Figure(
        [
            go.Scatter(
                x=[*scales, *reversed(scales)], y=[*high, *reversed(low)], name="random directions", mode="lines",
                fill="toself", line={"width": 1, "dash": "dot"}, meta={"role": "muted"}, hoverinfo="skip",
            ),
            go.Scatter(
                x=list(scales), y=list(direction), name="the direction", mode="lines+markers", meta={"role": "ink"},
                line={"width": 2}, marker={"size": 6}, hovertemplate="%{x:.2f}: %{y:.3f}<extra></extra>",
            ),
        ]
    )  # fmt: skip
    figure.update_xaxes(title="strength", zeroline=True)
    figure.update_yaxes(title=title, rangemode="tozero")
    return _styled(figure)


def readable(token: str) -> str:
    """A token as it can be read on an axis: line breaks and spaces are part of it."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def _scale(layer_map: LayerMap) -> dict[str, Float[np.ndarray, "prompt axis"]]:
    size = _size(layer_map)
    return {role: getattr(layer_map, role)[:, :2] / size for role in ROLES}


def _size(layer_map: LayerMap) -> float:
    points = np.concatenate([layer_map.harmful, layer_map.harmless])
    return float(np.sqrt((points**2).sum(1).mean())) or 1.0


def _coordinates(points: Float[np.ndarray, "prompt axis"]) -> dict[str, list[float]]:
    """As plain lists: plotly's packed arrays are not unpacked in frames."""
    return {"x": points[:, 0].round(3).tolist(), "y": points[:, 1].round(3).tolist()}


def _scatter(role: str, points: Float[np.ndarray, "prompt axis"], hover: Sequence[str]) -> go.Scatter:
    colour, symbol = ROLES[role]
    return go.Scatter(
        **_coordinates(points),
        name=role,
        mode="markers",
        meta={"role": role},
        marker={"color": colour, "symbol": symbol, "size": 8, "opacity": 0.75},
        hovertext=list(hover),
        hoverinfo="text",
    )


def _hover(prompts: PromptSet, harmful: bool) -> list[str]:
    """What is shown at a point: the prompt's text with its category. Plotly reads tags, so everything is escaped."""
    texts = prompts.harmful if harmful else prompts.harmless
    categories = (prompts.harmful_categories if harmful else prompts.harmless_categories) or ("",) * len(texts)
    role = "harmful" if harmful else "harmless"
    return [
        "<br>".join(html.escape(line) for line in textwrap.wrap(text, 48, max_lines=6, placeholder=" …"))
        + f"<br><i>{role}{html.escape(', ' + category) if category else ''}</i>"
        for text, category in zip(texts, categories, strict=True)
    ]


def _styled(figure: go.Figure) -> go.Figure:
    """Plain axes on the page's own ground; the page adds the theme's colours."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 48, "r": 12, "t": 8, "b": 44},
        font={"family": "system-ui, sans-serif", "size": 12},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        showlegend=False,
    )
    return figure
