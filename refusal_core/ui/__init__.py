"""The page: one file per tab, one bar above them, and the server that shows them. No maths in here.

    server    the command line of the app, what the server allows, starting and stopping
    page      all parts on one page
    bar       what everything on the page is about: model, device, direction
    talk      one prompt, three replies: unchanged, direction removed, direction added
    forecast  what the panes are about to say to a message, at every strength
    map       where harmful and harmless prompts lie, layer by layer
    find      every candidate direction with its scores; one of them can be taken; a prompt as the model reads it
    search    a direction found anew for one visitor, from prompts or with refusal tokens of their own
    measure   how strong the effect is, how sure, at what price; and the same in the weights
    inside    where a prompt lies along the direction, and who writes that
    line      where visitors wait for work of which only so much is done at once
    lending   work on a GPU that is borrowed for it, where a Space lends one; elsewhere the work itself
    engine    the model and its direction, or two servers instead, prepared in the background and shared by all visitors

Each part is a small component of its own: markup and script in `assets/ui`, data from here. What users and models
write reaches the page as data and is set as text, never as markup.
"""

import importlib
import os

# Read by gradio and huggingface_hub while they are imported: neither reports to anybody.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_SSR_MODE", "False")

GPUS_ARE_LENT = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")
"""Whether this is a Space with ZeroGPU hardware: the process has no GPU, and borrows one for a call."""

if GPUS_ARE_LENT:
    importlib.import_module("spaces")  # before torch, which it lets believe in a GPU that is not there yet
