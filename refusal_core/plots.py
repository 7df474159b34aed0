"""Figures of what was measured, as plotly figures that the page draws.

Colour means one thing, the place on the refusal direction: `harmful` and `harmless` name a role in each trace's
`meta`, and the page paints roles in the colours of its theme. A map is a figure without points, with the points of
every layer beside it in a compact form: the page moves through the layers by itself, on axes that stay.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import plotly
import plotly.graph_objects as go
from jaxtyping import Float

from refusal_core.geometry import LayerMap

PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
"""The script that draws the figures, as it comes with plotly: nothing is fetched from elsewhere."""

ROLES = {"harmful": ("#D55E00", "triangle-up", "diamond"), "harmless": ("#0072B2", "circle", "circle")}
"""Colour (in the light theme) and marker of each class, in 2-D and in 3-D: two cues, one of them may not be seen."""

TITLES = {
    "pca": ("PC1, toward {} →", "PC2"),
    "turned": ("PC1, toward {} →", "PC2, PC3, turned", "PC3, PC2, turned"),
    "along": ("along the direction, ‖r‖ = 1, toward {} →", "main spread at right angles, ‖r‖ = 1"),
}
"""The axes of a map, by the name of what is on them; {} is what the direction points at."""

MARGIN = 1.08
STEPS = 32_767
"""How finely a coordinate is sent: in so many steps from the centre to the edge of the axes."""


def prompt_map(maps: Sequence[LayerMap], axes: str, toward: str) -> go.Figure:
    """The axes for the prompts of every layer, on the `TITLES` of `axes`, and a trace for each class without points.

    `toward` is text that says what lies in the direction, “refusing”.

    Principal components are scaled layer by layer to the root-mean-square distance of the prompts from their centre:
    the stream grows, and on one scale the first layers would be a dot. A direction's own norm is one scale for all.
    """
    titles = [title.format(html.escape(toward, quote=False)) for title in TITLES[axes]]
    drawn = [_drawn(m)[:, : len(titles)] for m in maps]
    low, high = (np.array([edge(d, axis=0) for d in drawn]) for edge in (np.min, np.max))
    ranges = _ranges(low.min(0), high.max(0), symmetric=axes != "along")
    traces = [_markers(role, len(titles)) for role in ROLES]
    if len(titles) == 2:
        figure = go.Figure(traces)
        figure.update_xaxes(range=ranges[0], title=titles[0], zeroline=True)
        figure.update_yaxes(range=ranges[1], title=titles[1], zeroline=True)
    else:
        scene = {
            f"{name}axis": {
                "range": edges, "title": {"text": title}, "showticklabels": False, "showbackground": False,
                "showspikes": False,
            }
            for name, edges, title in zip("xyz", ranges, titles, strict=True)
        }  # fmt: skip
        camera = {"eye": {"x": 0.32, "y": -1.82, "z": 0.65}, "center": {"x": 0, "y": 0, "z": -0.14}}
        figure = go.Figure(traces, {"scene": scene | {"aspectmode": "cube", "camera": camera}})
    _styled(figure).update_layout(hovermode="closest", uirevision=axes)
    return figure if len(titles) == 2 else figure.update_layout(margin=dict.fromkeys("lrtb", 0))


def points_of(maps: Sequence[LayerMap], axes: str) -> dict:
    """The points of `prompt_map`, as `packed` gives them."""
    n = len(TITLES[axes])
    return packed({role: np.stack([getattr(m, role)[:, :n] / m.unit for m in maps]) for role in ROLES})


def umap_map(harmful: Float[np.ndarray, "harmful axis"], harmless: Float[np.ndarray, "harmless axis"]) -> go.Figure:
    """The axes for a layer that UMAP has laid out, without numbers because those mean nothing; no points, as above."""
    reach = MARGIN * float(np.abs(np.concatenate([harmful, harmless])).max())
    figure = go.Figure([_markers(role, 2) for role in ROLES])
    figure.update_xaxes(range=[-reach, reach], showticklabels=False, zeroline=False, title="UMAP, exploratory")
    figure.update_yaxes(range=[-reach, reach], showticklabels=False, zeroline=False)
    return _styled(figure).update_layout(hovermode="closest", uirevision="umap")


def packed(points: Mapping[str, Float[np.ndarray, "layer _ axis"]]) -> dict:
    """The coordinates of each role as 16-bit integers in base64, axis by axis within a layer, in units of `step`.

    About a third of the length of the same numbers in JSON; a step is less than a pixel is wide.
    """
    step = max(float(np.abs(p).max(initial=0.0)) for p in points.values()) / STEPS or 1.0
    whole = {role: np.rint(p.swapaxes(1, 2) / step).astype("<i2") for role, p in points.items()}
    return {"step": step} | {role: base64.b64encode(w.tobytes()).decode("ascii") for role, w in whole.items()}


def star_on_map(
    maps: Sequence[LayerMap], activations: Float[np.ndarray, "layer d_model"], axes: str
) -> list[list[float]]:
    """The coordinates of one more prompt on `prompt_map`, layer by layer, from its `resid_pre` at the map's position."""
    return [
        (m.coordinates(x)[: len(TITLES[axes])] / m.unit).round(3).tolist()
        for m, x in zip(maps, np.asarray(activations, float), strict=True)
    ]


def separation_by_layer(maps: Sequence[LayerMap], chosen: int) -> go.Figure:
    """How well each layer separates the classes, how far its first component is the mean difference, and d′ below."""
    seen = [(m.layer, m.shares[0], m.separation) for m in maps if m.separation is not None]
    lines = (
        ("AUROC on PC1", "ink", "solid", "circle", "y", [s.auroc_pc1 for _, _, s in seen]),
        ("AUROC on the mean difference, held out", "muted", "dot", "square", "y", [s.auroc for _, _, s in seen]),
        ("|cos(PC1, mean difference)|", "ink", "dash", "diamond", "y", [s.cos_pc1 for _, _, s in seen]),
        ("variance on PC1", "muted", "longdash", "x", "y", [share for _, share, _ in seen]),
        ("d′ on the mean difference, held out", "ink", "dot", "square", "y2", [s.d_prime for _, _, s in seen]),
    )
    figure = go.Figure(
        [
            go.Scatter(
                x=[layer for layer, _, _ in seen], y=[round(v, 4) for v in values], yaxis=axis, name=name,
                meta={"role": role}, mode="lines+markers", line={"dash": dash, "width": 2},
                marker={"symbol": symbol, "size": 7}, hovertemplate=f"{name}: %{{y:.3f}}<extra>layer %{{x}}</extra>",
            )
            for name, role, dash, symbol, axis, values in lines
        ]
    )  # fmt: skip
    mark = {"x0": chosen, "x1": chosen, "y0": 0, "y1": 1, "yref": "paper"}
    figure.add_shape(type="line", name="chosen", line={"width": 1, "dash": "dot"}, **mark)
    every = max(1, len(maps) // 12)
    figure.update_xaxes(title="layer (resid_pre)", range=[-0.3, len(maps) - 0.7], dtick=every, anchor="y2")
    figure.update_layout(
        yaxis={"range": [0, 1.04], "dtick": 0.25, "domain": [0.4, 1]},
        yaxis2={"rangemode": "tozero", "domain": [0, 0.28], "title": "d′", "nticks": 4},
    )
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
        [
            f"{html.escape(column, quote=False)}<br>layer {layer}: {value:+.3f}"
            for column, value in zip(columns, row, strict=True)
        ]
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
        tickvals=list(range(len(columns))), ticktext=[html.escape(c.partition(": ")[2] or c, quote=False) for c in columns],
        tickangle=-60 if max(map(len, columns)) > 3 else 0, showgrid=False, zeroline=False,
    )  # fmt: skip
    figure.update_yaxes(title=rows, dtick=max(1, len(values) // 12), showgrid=False, zeroline=False)
    return _styled(figure)


def dose_figure(
    scales: Sequence[float],
    direction: Sequence[float],
    random: tuple[Sequence[float], Sequence[float]] | None,
    title: str,
) -> go.Figure:
    """A measure by strength: that of the direction, and the band between the lowest and the highest random one, if any.

    Shares and probabilities all have the same axis, from 0 to 1.
    """
    figure = go.Figure()
    if random is not None:
        low, high = random
        figure.add_scatter(
            x=[*scales, *reversed(scales)], y=[*high, *reversed(low)], name="random directions", mode="lines",
            fill="toself", line={"width": 1, "dash": "dot"}, meta={"role": "muted"}, hoverinfo="skip",
        )  # fmt: skip
    figure.add_scatter(
        x=list(scales), y=list(direction), name="the direction", mode="lines+markers", meta={"role": "ink"},
        line={"width": 2}, marker={"size": 6}, hovertemplate="%{x:.2f}: %{y:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title="strength", zeroline=True)
    is_share = title.startswith(("probability", "share"))
    figure.update_yaxes(title=title, rangemode="tozero", range=[0, 1.04] if is_share else None)
    return _styled(figure)


def readable(token: str) -> str:
    """A token as it can be read on an axis: line breaks and spaces are part of it."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def _drawn(layer_map: LayerMap) -> Float[np.ndarray, "prompt axis"]:
    return layer_map.points / layer_map.unit


def _ranges(low: np.ndarray, high: np.ndarray, symmetric: bool) -> list[list[float]]:
    """The edges of axes that hold everything from `low` to `high`; around 0 where an axis has no sign of its own."""
    if symmetric:
        low, high = np.minimum(low, -high), np.maximum(high, -low)
    edge = (MARGIN - 1) * (high - low) / 2
    return [[float(a), float(b)] if a < b else [-1.0, 1.0] for a, b in zip(low - edge, high + edge, strict=True)]


def _markers(role: str, n_axes: int) -> go.Scatter | go.Scatter3d:
    colour, flat, solid = ROLES[role]
    common = {"name": role, "mode": "markers", "meta": {"role": role}, "hoverinfo": "text"}
    if n_axes == 2:
        return go.Scatter(**common, marker={"color": colour, "symbol": flat, "size": 8, "opacity": 0.75})
    return go.Scatter3d(**common, marker={"color": colour, "symbol": solid, "size": 4, "opacity": 0.75})


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
