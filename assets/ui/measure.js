// Measure. Python measures and judges; this draws bars, replies and curves, and writes files from what was measured.
let run = 0;
let running = false;
let report = null;
let curves = null;
let damageTable = ''; // in Markdown
let shown = null; // the row whose replies are open
let seen = false;
let model = null; // the model and direction in use, as the bar says
let confinedTo = null; // the parts from which alone Talk removes the direction: measured beside the removal from all

const signed = (text) => text.replace('-', '−');
const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`; // the sign stays with its number

function drawRunning(progress) {
  pause(find('[data-start]'), running);
  if (!running) handOn([find('[data-cancel]')], find('[data-start]'));
  find('[data-cancel]').hidden = !running;
  const bar = find('progress');
  bar.hidden = !running;
  const [stage, done, total] = progress || ['', 0, 0];
  find('[data-measuring]').textContent = total ? `${stage}, ${done} of ${total}` : stage;
  if (total) [bar.max, bar.value] = [total, done];
  else bar.removeAttribute('value');
}

function rateNode(rate) {
  const node = make('button', undefined, 'rate');
  node.type = 'button';
  const cls = rate.harmful ? 'harmful' : 'harmless';
  const bar = make('span', undefined, 'stack');
  bar.setAttribute('aria-hidden', 'true');
  for (const kind of ['refused', 'answered', 'unclear']) {
    const part = make('span', undefined, kind);
    part.style.flexGrow = rate[kind];
    bar.append(part);
  }
  const share = (kind) => {
    const [low, high] = rate[`${kind}_interval`];
    return [kind, percent(rate[kind] / rate.n), `[${percent(low)} to ${percent(high)}]`];
  };
  const spared = () => {
    const [low, high] = rate.refused_interval;
    return ['did not refuse', percent(1 - rate.refused / rate.n), `[${percent(1 - high)} to ${percent(1 - low)}]`];
  };
  const numbers = make('span', undefined, 'rate-numbers');
  for (const [name, ...said] of [
    share('refused'), spared(), share('answered'),
    rate.unclear && share('unclear'),
    ['n', rate.n],
    rate.kl !== null && ['KL', rate.kl.toFixed(3), 'nats'],
    rate.cross_entropy !== null && ['cross-entropy', rate.cross_entropy.toFixed(3), 'nats per token'],
    rate.repetition !== null && ['repeated', percent(rate.repetition)],
  ].filter(Boolean)) {
    const one = make('span');
    one.append(`${name} `, make('b', said[0]), ...said.slice(1).map((more) => ` ${more}`));
    numbers.append(one);
  }
  node.append(make('span', `${cls}: ${rate.row}`, 'rate-name'), bar, numbers);
  node.dataset.key = key(rate);
  node.setAttribute('aria-expanded', String(shown === key(rate)));
  node.addEventListener('click', () => {
    shown = shown === key(rate) ? null : key(rate);
    drawReport();
    if (shown) find('[data-transcripts]').scrollIntoView({ block: 'nearest' }); // they open below all rows
  });
  return node;
}

const key = (rate) => `${rate.harmful} ${rate.row}`;

function drawReport() {
  find('[data-report]').hidden = !report;
  if (!report) return;
  const { direction } = report;
  const stale = direction && model && (model.model !== report.model || model.digest !== direction.digest);
  find('[data-made]').replaceChildren(make('b', report.model), madeWith() + (stale ? ' Another direction or model is in use by now: measure again.' : ''));
  const focused = document.activeElement?.dataset?.key; // the rows are made anew, and the keyboard stays on its row
  find('[data-rates]').replaceChildren(...[...report.rates].sort((a, b) => b.harmful - a.harmful).map(rateNode));
  if (focused) all('.rate').find((node) => node.dataset.key === focused)?.focus();
  drawTranscripts();
}

/** What was measured with what, after the model's name. */
function madeWith() {
  const { direction, mark, dtype, prompts, rules, toy } = report;
  const judge = rules === 'paper' ? ', judged by the paper’s phrases' : '';
  const used = direction ? signed(`, direction of layer ${direction.layer}, position ${direction.position} (${mark}); ${dtype}, `) : '; ';
  return `${used}prompts: ${prompts}${judge}.${toy ? ' A toy: no result about a real model.' : ''}`;
}

/** What the direction was made from. */
function madeFrom({ origin, contrast, n_harmful: first, n_harmless: second }) {
  if (origin) return `from ${origin}`;
  return contrast ? `${contrast}, from ${first} and ${second} prompts of its two classes` : `from ${first} harmful and ${second} harmless prompts`;
}

function drawTranscripts() {
  const node = find('[data-transcripts]');
  const rate = report.rates.find((each) => key(each) === shown);
  node.hidden = !rate;
  if (!rate) return;
  const row = report.rows.indexOf(rate.row);
  node.querySelector('h2').textContent = `${rate.harmful ? 'Harmful' : 'Harmless'} prompts, ${rate.row}`;
  node.querySelector('ol').replaceChildren(...report.completions.filter((each) => each.row === row && each.harmful === rate.harmful).map((each) => {
    const item = make('li');
    const text = make('p', each.text || '(empty)', 'reply');
    const tag = make('span', each.verdict, 'tag');
    tag.dataset.verdict = each.verdict;
    const foot = make('p', undefined, 'foot');
    foot.append(tag, make('span', each.because && ` ${each.because}`));
    if (rate.harmful) {
      const folded = make('details');
      folded.append(make('summary', each.prompt), text, foot);
      item.append(folded);
    } else {
      item.append(make('p', each.prompt, 'asked'), text, foot);
    }
    return item;
  }));
}

async function drawCurves() {
  find('[data-curves]').hidden = !curves;
  if (!curves || !seen) return;
  find('[data-curves-meaning]').textContent = `Means over ${curves.ablate.n} harmful and ${curves.add.n} harmless prompts. `
    + (curves.ablate.refusal ? '' : '“Starts like a refusal” is not known without refusal tokens: add one in Find. ')
    + `Grey: from the lowest to the highest of ${curves.add.n_random} random directions of the same size, the control. 1 is the paper’s setting. `
    + 'Refused: what the judge says of whole replies; one that repeats itself is unclear, so a push that is too strong lowers it again. '
    + 'Cross-entropy: of the unchanged model’s replies, as the edited model reads them; what it is above that at 0 is damage. Repeated: 4-grams that occurred in the same reply before.';
  await plotly();
  for (const node of all('[data-figure]')) {
    const [kind, what] = node.dataset.figure.split(' ');
    const drawn = curves[kind][`${what}_figure`];
    node.closest('figure').hidden = !drawn;
    if (!drawn) continue;
    const figure = painted(JSON.parse(drawn));
    await Plotly.react(node, figure.data, { ...figure.layout, shapes: [...(figure.layout.shapes || []), ...dialled(kind)] }, CONFIG);
  }
}

let dials = {}; // the strengths of Talk

/** Where the dial of this edit stands, as a line in its curves. */
function dialled(kind) {
  const at = kind === 'add' ? dials.addition : dials.removal;
  if (at === null || at === undefined) return [];
  return [{ type: 'line', x0: at, x1: at, y0: 0, y1: 1, yref: 'paper', layer: 'below', line: { color: colour('ink'), width: 2, dash: 'dot' }, opacity: 0.5 }];
}

document.addEventListener('strengths', ({ detail }) => {
  if (!element.isConnected) return;
  dials = detail;
  confinedTo = detail.writers;
  find('[data-confined-too]').hidden = !confinedTo;
  find('[data-confined-too]').textContent = confinedTo ? `In Talk the direction is removed only from ${detail.parts}: that is measured as a row of its own. The curves are of the removal from all.` : '';
  if (!curves || !seen || !window.Plotly) return;
  for (const node of all('[data-figure]')) {
    const [kind, what] = node.dataset.figure.split(' ');
    const drawn = node.data && curves[kind][`${what}_figure`];
    if (drawn) Plotly.relayout(node, { shapes: [...(painted(JSON.parse(drawn)).layout.shapes || []), ...dialled(kind)] });
  }
});

function cell(value) {
  const text = String(value);
  const safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text; // a spreadsheet must not compute it
  return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** What is done in a row, and how strongly: “direction added −1×” is two columns, of which one is a number. */
const what = (row) => row.replace(/ [−\d.]+×$/, '');
const strengthOf = (row) => (row === 'unchanged' ? 0 : Number(row.match(/ ([−\d.]+)×(?: from .*)?$/)?.[1].replace('−', '-') ?? 1));

/** Of every row of a table: what it was measured with. */
function provenance() {
  const { direction } = report;
  return {
    model: report.model, revision: report.revision ?? '', weights: report.fingerprint ?? '', dtype: report.dtype ?? '',
    direction: direction?.digest ?? '', layer: direction?.layer ?? '', position: direction?.position ?? '', mark: report.mark ?? '',
    prompts: report.prompts, judge: report.rules, max_new_tokens: report.max_new_tokens,
  };
}

/** The points of a curve as rows; `low` and `high` are of the random directions. */
function* pointsOf(name, cls, row) {
  const { n, scales, refusal, random_refusal: random, kl, cross_entropy: ce, repetition, refused } = curves[name];
  for (const [i, strength] of scales.entries()) {
    const among = (random || []).map((curve) => curve[i]);
    const start = refusal ? { starts_like_refusal: refusal[i], random_low: Math.min(...among), random_high: Math.max(...among) } : {};
    yield { class: cls, row, n, refused: refused?.[i], kl_nats: kl[i], cross_entropy_nats: ce?.[i], repeated: repetition?.[i], strength, ...start };
  }
}

const FILES = {
  csv: () => {
    const rows = report.rates.map((r) => ({
      class: r.harmful ? 'harmful' : 'harmless', row: what(r.row), strength: strengthOf(r.row), n: r.n,
      refused: r.refused, refused_low: r.refused_interval[0], refused_high: r.refused_interval[1],
      answered: r.answered, answered_low: r.answered_interval[0], answered_high: r.answered_interval[1],
      unclear: r.unclear, unclear_low: r.unclear_interval[0], unclear_high: r.unclear_interval[1], kl_nats: r.kl, cross_entropy_nats: r.cross_entropy, repeated: r.repetition,
      starts_like_refusal: null, random_low: null, random_high: null,
    }));
    const columns = Object.keys(rows[0]);
    if (curves) rows.push(...pointsOf('ablate', 'harmful', 'direction removed'), ...pointsOf('damage', 'harmless', 'direction removed'), ...pointsOf('add', 'harmless', 'direction added'));
    const [names, values] = [Object.keys(provenance()), Object.values(provenance())];
    return [[...columns, ...names], ...rows.map((row) => [...columns.map((name) => row[name] ?? ''), ...values])].map((row) => row.map(cell).join(',')).join('\n');
  },
  json: () => {
    const { markdown, ...measured } = report;
    const numbers = (curve) => Object.fromEntries(Object.entries(curve).filter(([name]) => !name.endsWith('_figure')));
    const plain = Object.entries(curves || {}).map(([kind, curve]) => [kind, numbers(curve)]);
    return JSON.stringify({ ...measured, curves: Object.fromEntries(plain) }, null, 1);
  },
  html: async () => {
    const { page, add, text } = newPage('Refusal with and without its direction');
    add(page.body, 'p', `${report.model}${madeWith()}`);
    const { direction } = report;
    add(page.body, 'p', direction ? `Weights ${report.fingerprint}${report.revision ? `, revision ${report.revision}` : ''}; direction ${direction.digest}, ‖r‖ ${direction.norm.toFixed(3)}, ${madeFrom(direction)}; judge: ${report.rules}; greedy, at most ${report.max_new_tokens} tokens.` : `Judge: ${report.rules}; greedy, at most ${report.max_new_tokens} tokens.`);
    const table = add(page.body, 'table');
    const row = (cells, tag = 'td') => { const line = add(table, 'tr'); cells.forEach((each) => add(line, tag, each)); };
    row(['prompts', 'direction', 'n', 'refused', 'answered', 'unclear', 'KL, nats', 'cross-entropy, nats per token', 'repeated 4-grams'], 'th');
    const share = (r, kind) => `${percent(r[kind] / r.n)} [${r[`${kind}_interval`].map(percent).join(' to ')}]`;
    for (const r of report.rates) row([r.harmful ? 'harmful' : 'harmless', r.row, r.n, share(r, 'refused'), share(r, 'answered'), share(r, 'unclear'), r.kl?.toFixed(3) ?? '–', r.cross_entropy?.toFixed(3) ?? '–', r.repetition === null ? '–' : percent(r.repetition)]);
    add(page.body, 'p', find('[data-report] > .meaning').textContent.replace(/ A click.*$/, ''));
    if (curves) {
      add(page.body, 'h2', 'By strength');
      add(page.body, 'p', find('[data-curves-meaning]').textContent);
      await plotly();
      for (const node of all('[data-figure]')) {
        const [kind, what] = node.dataset.figure.split(' ');
        if (!curves[kind][`${what}_figure`]) continue;
        const { data, layout } = painted(JSON.parse(curves[kind][`${what}_figure`]));
        const ground = colour('ground');
        const image = add(add(page.body, 'figure'), 'img');
        image.src = await Plotly.toImage({ data, layout: { ...layout, paper_bgcolor: ground, plot_bgcolor: ground } }, { format: 'svg', width: 720, height: 360 });
        image.alt = node.getAttribute('aria-label');
        add(image.parentNode, 'figcaption', image.alt);
      }
    }
    for (const r of report.rates) {
      const folded = add(page.body, 'details');
      add(folded, 'summary', `${r.harmful ? 'Harmful' : 'Harmless'} prompts, ${r.row}: every reply`);
      for (const each of report.completions.filter((c) => c.row === report.rows.indexOf(r.row) && c.harmful === r.harmful)) {
        add(add(folded, 'p'), 'b', each.prompt);
        add(folded, 'p', each.text || '(empty)');
        add(add(folded, 'p'), 'small', [each.verdict, each.because].filter(Boolean).join(': '));
      }
    }
    return text();
  },
  md: () => `${report.model}${madeWith()}\n\n${report.direction ? `Direction: \`${JSON.stringify(report.direction)}\`, ` : ''}judge: ${report.rules}, greedy, at most ${report.max_new_tokens} tokens.\n\n${report.markdown}${damageTable && `\n\n${damageTable}`}`,
};

function say(error) {
  find('[data-error]').hidden = !error;
  find('[data-error]').textContent = error || '';
}

function draw() {
  const next = props.value || {};
  if (!running || (next.run !== run && next.run !== -1)) return;
  if (next.measuring) {
    drawRunning(next.measuring);
    return;
  }
  if (next.report) {
    [report, curves, damageTable, shown] = [next.report, null, '', null];
    drawReport();
    drawCurves();
    return;
  }
  ended();
  say(next.error);
  if (next.curves) {
    [curves, damageTable] = [next.curves, next.damage_markdown];
    drawCurves();
  }
}

function ended() {
  running = false;
  drawRunning();
}

find('form.wish').addEventListener('submit', (event) => {
  event.preventDefault();
  if (running) return;
  run += 1;
  running = true;
  say('');
  drawRunning(['waiting for its turn', 0, 0]);
  const from = (which) => find(`[data-list-of="${which}"]`).value;
  trigger('measure', { run, writers: confinedTo, n: find('[data-n]').valueAsNumber, max_new_tokens: find('[data-length]').valueAsNumber, rules: find('[data-rules]').value, first: from('first'), second: from('second') });
});
find('[data-cancel]').addEventListener('click', () => {
  trigger('cancel', { run });
  ended();
  find('[data-measuring]').textContent = 'Cancelled.'; // what has begun ends at its next step
});
const write = find('[data-write] button');
let isWriting = false;

function writing(now, said = '', error = '') {
  isWriting = now;
  pause(write, now);
  find('[data-written]').textContent = said;
  find('[data-write-error]').hidden = !error;
  find('[data-write-error]').textContent = error;
}

find('[data-write]').addEventListener('submit', (submit) => {
  submit.preventDefault();
  if (isWriting) return;
  writing(true, 'Writing, loading and comparing: a large model takes minutes.');
  trigger('write', { folder: find('[data-folder]').value });
});
document.addEventListener('weights', ({ detail }) => { if (element.isConnected && isWriting) writing(false, detail.written, detail.error); });
all('[data-save]').forEach((button) => button.addEventListener('click', async () => {
  const kind = button.dataset.save;
  const type = { csv: 'text/csv', json: 'application/json', md: 'text/markdown', html: 'text/html' }[kind];
  save(`${report.model.replace(/[^\w.-]+/g, '-')}-measured.${kind}`, type, `${await FILES[kind]()}\n`);
}));
new ResizeObserver(() => {
  if (seen || !element.offsetWidth) return;
  seen = true;
  drawCurves();
}).observe(element);
document.addEventListener('theme', () => { if (element.isConnected) drawCurves(); });
document.addEventListener('direction', ({ detail }) => {
  if (!element.isConnected) return;
  model = detail;
  find('[data-public]').hidden = !detail.isLocal;
  find('[data-weights]').hidden = !detail.digest; // of two servers there are none here
  find('[data-write]').hidden = !detail.isLocal;
  find('[data-not-here]').hidden = detail.isLocal;
  find('[data-idle]').hidden = true;
  find('.measure-body').hidden = false;
  drawReport();
});
ofLink().then(({ measure: said }) => {
  if (!said) return;
  [find('[data-n]').value, find('[data-length]').value, find('[data-rules]').value] = [said.n, Math.min(said.length, find('[data-length]').max), said.rules];
  if (model?.isLocal) [find('[data-list-of="first"]').value, find('[data-list-of="second"]').value] = said.lists; // elsewhere they could not be seen
});
document.addEventListener('gather', ({ detail }) => {
  const number = (field) => find(field).valueAsNumber;
  const lists = ['first', 'second'].map((which) => find(`[data-list-of="${which}"]`).value);
  const isValid = element.isConnected && find('form.wish').checkValidity();
  if (isValid) detail.measure = { n: number('[data-n]'), length: number('[data-length]'), rules: find('[data-rules]').value, lists };
});
if (props.value?.most_tokens) find('[data-length]').max = props.value.most_tokens;
watch('value', draw);
drawRunning();
document.dispatchEvent(new CustomEvent('direction-wanted'));
document.dispatchEvent(new CustomEvent('strengths-wanted'));
