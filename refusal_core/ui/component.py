"""A part of the page: markup, script and data.

The markup is fixed and holds no data; the script draws what Python hands over, text as text nodes. Gradio runs a
template that a value is put into, so no value is ever put into one.
"""

import json
from pathlib import Path

import gradio as gr

ASSETS = Path(__file__).parent.parent.parent / "assets" / "ui"


def part(name: str, *shared: str, value: dict | None = None) -> gr.HTML:
    """The component of `assets/ui/<name>.html` and `.js`; its value is data for the script.

    `shared` names scripts that stand before its own, after `nodes.js`, which every part begins with.
    """
    script = "".join((ASSETS / f"{file}.js").read_text("utf-8") for file in ("nodes", *shared, name))
    return _component(name, (ASSETS / f"{name}.html").read_text("utf-8"), script, value or {})


def relay(name: str) -> gr.HTML:
    """A part that shows nothing: every value it gets is an event `name` on the page, with the value as detail."""
    script = f"""watch('value', () => {{
  if (element.isConnected) document.dispatchEvent(new CustomEvent({json.dumps(name)}, {{ detail: props.value }}));
}});"""
    return _component(name, "<span hidden></span>", script, {})


def _component(name: str, template: str, script: str, value: dict) -> gr.HTML:
    return gr.HTML(
        value=value,
        html_template=template,
        js_on_load=script,
        apply_default_css=False,
        elem_id=name,
        container=False,
        padding=False,
    )
