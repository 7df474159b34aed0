"""How refusal works inside a chat model: one direction of its residual stream, found, removed, added, and looked at.

Each module is a room, and may import only rooms above it:

    prompts         harmful and harmless instructions, split into train, val and test
    metrics         refusal score, KL divergence, phrase judge, intervals
    directions      difference in means; the Direction value; save and load
    interventions   ablate or add a direction; per-row edits
    chat_model      a chat model whose residual stream can be read and written
    activations     the residual stream of many prompts at the template positions
    generation      completions streamed side by side from one batch
    selection       score every candidate, lazily and exactly; apply the rule; the same for any two classes
    evaluation      rates with intervals, with and without; the first token by strength (dose–response)
    attribution     which parts write the direction, which words it raises, where each token lies along it
    orthogonalize   the ablation written into the weights; export, measured against the hooks
    geometry        PCA and separation, layer by layer; where one more prompt lies
    plots           figures
    organism/       the embedded model: corpus, training, evaluation
    ui/             the page, one tab per file
    __main__        the command line: app, find, evaluate, export

A `Direction` read from a `ChatModel` becomes an `Intervention`, a row of a batch carries some of them, and the
empty row is the baseline: everything shown side by side is one batch.
"""
