"""How refusal works inside a chat model: one direction of its residual stream, found, removed, added, and looked at.

Each module is a room, and may import only rooms above it:

    hub             the Hugging Face hub: its public lists of prompts, files at one commit, what it says in one sentence
    prompts         harmful and harmless instructions, split into train, val and test
    metrics         refusal score, KL divergence, phrase judge, intervals
    directions      difference in means; the Direction value; save and load
    interventions   ablate or add a direction; per-row edits
    checkpoints     a model's files: found in a folder or on the hub, judged before anything large is fetched
    decoding        replies in progress, of all visitors in one batch
    placement       where a model's weights are: on one device, or spread over GPUs, memory and the disk
    products        products of a few rows with large matrices, as fast as the memory of a machine without a GPU
    bridge          which modules of a family stand on the residual stream, as TransformerLens names them
    chat_model      a chat model whose residual stream can be read and written
    formats         directions in the files of other tools
    activations     the residual stream of many prompts at the template positions
    generation      completions streamed side by side from one batch
    selection       score every candidate, lazily and exactly; apply the rule; the same for any two classes
    findings        what a search found, saved and read back; the cache that makes a second start immediate
    evaluation      rates with intervals, with and without; the first token by strength (dose–response)
    endpoints       the same chat and rates from models behind servers that speak the OpenAI protocol
    attribution     which parts write the direction, which words it raises, where each token lies along it
    weights         which tensors of a checkpoint write to the stream; one of them without a direction
    orthogonalize   an intervention written into the weights; export, measured against the hooks
    geometry        PCA and separation, layer by layer; where one more prompt lies
    plots           figures
    organism/       the embedded model: corpus, training, evaluation
    ui/             the page, one tab per file
    terminal        bars, tables, and a chat in three columns
    commands        the commands of the command line: their options, and what they print
    __main__        the command line: app, find, chat, evaluate, export

A `Direction` read from a `ChatModel` becomes an `Intervention`, a row of a batch carries some of them, and the
empty row is the baseline: everything shown side by side is one batch.
"""

import os
import sys

# Threads that spin while they wait for one another take the cores from those they wait for: on a machine with other work
# to do, one step of a small model then takes a hundred times as long. Threads that sleep at once have to be woken for each
# of its many small products, which takes longer than the products: so they spin for some ten microseconds first (libgomp,
# which torch has on Linux, counts the rounds). Every thread that computes has threads of its own to help it, as the page's
# and the visitors' do; once there are more than cores, libgomp lets only ACTIVE ones spin at all. Read when torch is
# loaded, so said before.
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE" if sys.platform == "linux" else "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("KMP_BLOCKTIME", "0")  # where torch has another OpenMP, whose ACTIVE threads would spin for ever
