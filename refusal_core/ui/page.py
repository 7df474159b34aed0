"""The page: the bar, the tabs, and what happens when something is clicked."""

from collections.abc import Iterator

import gradio as gr

from refusal_core.prompts import PromptError
from refusal_core.ui.bar import bar_view
from refusal_core.ui.component import part
from refusal_core.ui.engine import Engine, Ready
from refusal_core.ui.map import map_view
from refusal_core.ui.talk import Ask, Stops, Turn, opening_view, talk, view

VISITORS_AT_ONCE = 16
TITLE = "Refusal is a direction"
SENT = ("run", "action", "prompt", "example", "removal", "addition", "temperature", "max_new_tokens", "seed")
"""The fields of a request to the Talk tab."""


def build(engine: Engine, stops: Stops) -> gr.Blocks:
    """The page on `engine`; `stops` knows who wants their replies stopped."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        turns = gr.State(())
        bar = part("bar", bar_view(engine.status))
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Talk", id="talk"):
                panes = part("talk")
            with gr.Tab("Map", id="map"):
                atlas = part("map")

        def open_page() -> Iterator[tuple]:
            for status in engine.changes():
                if not isinstance(status, Ready):
                    yield bar_view(status), gr.skip(), gr.skip()
                    continue
                yield bar_view(status), opening_view(status), gr.skip()
                yield gr.skip(), gr.skip(), map_view(engine, status)

        def answer(turns: tuple[Turn, ...], event: gr.EventData, request: gr.Request) -> Iterator[tuple]:
            try:
                ask = Ask.read({name: getattr(event, name, None) for name in SENT})
            except PromptError as error:
                run = getattr(event, "run", 0)
                yield turns, view(turns, run if isinstance(run, int) else 0, error=str(error))
                return
            ready = engine.status
            if not isinstance(ready, Ready):
                yield turns, view(turns, ask.run, error="The model is still being prepared: wait for it.")
                return
            stop = stops.begin(str(request.session_hash), ask.run)
            yield from talk(ready, turns, ask, stop)

        def stop_answer(event: gr.EventData, request: gr.Request) -> None:
            run = getattr(event, "run", None)
            if isinstance(run, int):
                stops.stop(str(request.session_hash), run)

        def show_position(event: gr.EventData) -> dict:
            ready = engine.status
            if not isinstance(ready, Ready):
                return gr.skip()
            try:
                return map_view(engine, ready, getattr(event, "position", None))
            except PromptError as error:
                return {"error": str(error)}

        def leave(request: gr.Request) -> None:
            stops.forget(str(request.session_hash))

        def after_failure(turns: tuple[Turn, ...]) -> dict:
            return view(turns, -1, error="Something went wrong here, and the log says what: send it again.")

        page.load(
            open_page,
            outputs=[bar, panes, atlas],
            concurrency_limit=VISITORS_AT_ONCE,
            show_progress="hidden",
            api_visibility="private",
        )
        asked = panes.ask(
            answer,
            turns,
            [turns, panes],
            trigger_mode="multiple",
            concurrency_limit=VISITORS_AT_ONCE,
            show_progress="hidden",
            api_visibility="private",
        )
        asked.failure(after_failure, turns, panes, queue=False, show_progress="hidden", api_visibility="private")
        # Past the queue: a stop must not wait behind what it stops.
        panes.stop(stop_answer, trigger_mode="multiple", queue=False, show_progress="hidden", api_visibility="private")
        atlas.position(
            show_position,
            None,
            atlas,
            trigger_mode="multiple",
            concurrency_limit=2,
            show_progress="hidden",
            api_visibility="private",
        )
        page.unload(leave)
    return page
