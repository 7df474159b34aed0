"""A part of the page: markup, script and data.

The markup is fixed and holds no data; the script draws what Python hands over, text as text nodes. Gradio runs a
template that a value is put into, so no value is ever put into one.
"""

from pathlib import Path

import gradio as gr

ASSETS = Path(__file__).parent.parent.parent / "assets" / "ui"


def part(name: str, value: dict | None = None) -> gr.HTML:
    """The component of `assets/ui/<name>.html` and `.js`, after `nodes.js`; its value is data for the script."""
    return gr.HTML(
        value=value or {},
        html_template=(ASSETS / f"{name}.html").read_text("utf-8"),
        js_on_load="".join((ASSETS / f"{file}.js").read_text("utf-8") for file in ("nodes", name)),
        apply_default_css=False,
        elem_id=name,
        container=False,
        padding=False,
    )
