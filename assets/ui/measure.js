// Measure. Python measures and judges; this draws bars, replies and curves, and writes files from what was measured.
let run = 0;
let running = false;
let report = null;
let curves = null;
let damageTable = ''; // in Markdown
let shown = null; // the row whose replies are open
let seen = false;
let model = null; // the model and direction in use, as the bar says

const signed = (text) => text.replace('-', '−');
const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`; // the sign stays with its number

function drawRunning(progress) {
  pause(find('[data-start]'), running);
  if (!running) handOn([find('[data-cancel]')], find('[data-start]'));
  find('[data-cancel]').hidden = !running;
  const bar = find('progress');
  bar.hidden = !running;
  const [stage, done, total] = progress || ['', 0, 1];
  find('[data-measuring]').textContent = running && stage ? `${stage}, ${done} of ${total}` : '';
  bar.max = total;
  bar.value = done;
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
  const numbers = make('span', undefined, 'rate-numbers');
  for (const [name, ...said] of [
    share('refused'), share('answered'),
    rate.unclear && ['unclear', percent(rate.unclear / rate.n)],
    ['n', rate.n],
    rate.kl !== null && ['KL', rate.kl.toFixed(3)],
    rate.cross_entropy !== null && ['cross-entropy', rate.cross_entropy.toFixed(3)],
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
  find('[data-made]').replaceChildren(
    make('b', report.model),
    (direction ? signed(`, direction of layer ${direction.layer}, position ${direction.position}; ${report.dtype}, prompts: ${report.prompts}.`) : `; prompts: ${report.prompts}.`)
      + (report.toy ? ' A toy: no result about a real model.' : '') + (stale ? ' Another direction or model is in use by now: measure again.' : ''),
  );
  const focused = document.activeElement?.dataset?.key; // the rows are made anew, and the keyboard stays on its row
  find('[data-rates]').replaceChildren(...[...report.rates].sort((a, b) => b.harmful - a.harmful).map(rateNode));
  if (focused) all('.rate').find((node) => node.dataset.key === focused)?.focus();
  drawTranscripts();
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
    + 'Cross-entropy: of the unchanged model’s replies, as the edited model reads them; what it is above that at 0 is damage. Repeated: 4-grams that occurred in the same reply before.';
  await plotly();
  for (const node of all('[data-figure]')) {
    const [kind, what] = node.dataset.figure.split(' ');
    const drawn = curves[kind][`${what}_figure`];
    node.closest('figure').hidden = !drawn;
    if (!drawn) continue;
    const figure = painted(JSON.parse(drawn));
    await Plotly.react(node, figure.data, figure.layout, CONFIG);
  }
}

function cell(value) {
  const text = String(value);
  const safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text; // a spreadsheet must not compute it
  return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** What is done in a row, and how strongly: “direction added −1×” is two columns, of which one is a number. */
const what = (row) => row.replace(/ [−\d.]+×$/, '');
const strengthOf = (row) => (row === 'unchanged' ? 0 : Number(row.match(/ ([−\d.]+)×$/)?.[1].replace('−', '-') ?? 1));

const FILES = {
  csv: () => {
    const head = ['class', 'row', 'n', 'refused', 'refused_low', 'refused_high', 'answered', 'answered_low', 'answered_high', 'unclear', 'kl_nats', 'cross_entropy_nats', 'repeated', 'strength'];
    const rows = report.rates.map((r) => [r.harmful ? 'harmful' : 'harmless', what(r.row), r.n, r.refused, ...r.refused_interval, r.answered, ...r.answered_interval, r.unclear, r.kl ?? '', r.cross_entropy ?? '', r.repetition ?? '', strengthOf(r.row)]);
    for (const [name, row] of curves ? [['damage', 'direction removed'], ['add', 'direction added']] : []) {
      const { n, scales, kl, cross_entropy: ce, repetition } = curves[name];
      rows.push(...scales.map((scale, i) => ['harmless', row, n, ...Array(7).fill(''), kl[i] ?? '', ce[i] ?? '', repetition[i], scale]));
    }
    return [head, ...rows].map((row) => row.map(cell).join(',')).join('\n');
  },
  json: () => {
    const { markdown, ...measured } = report;
    const numbers = (curve) => Object.fromEntries(Object.entries(curve).filter(([name]) => !name.endsWith('_figure')));
    const plain = Object.entries(curves || {}).map(([kind, curve]) => [kind, numbers(curve)]);
    return JSON.stringify({ ...measured, curves: Object.fromEntries(plain) }, null, 1);
  },
  html: async () => {
    const { page, add, text } = newPage('Refusal with and without its direction');
    add(page.body, 'p', find('[data-made]').textContent);
    const { direction } = report;
    add(page.body, 'p', direction ? `Weights ${report.fingerprint}${report.revision ? `, revision ${report.revision}` : ''}; direction ${direction.digest}, ‖r‖ ${direction.norm.toFixed(3)}, from ${direction.n_harmful} harmful and ${direction.n_harmless} harmless prompts; judge: ${report.rules}; greedy, at most ${report.max_new_tokens} tokens.` : `Judge: ${report.rules}; greedy, at most ${report.max_new_tokens} tokens.`);
    const table = add(page.body, 'table');
    const row = (cells, tag = 'td') => { const line = add(table, 'tr'); cells.forEach((each) => add(line, tag, each)); };
    row(['prompts', 'direction', 'n', 'refused', 'answered', 'unclear', 'KL, nats', 'cross-entropy, nats per token', 'repeated 4-grams'], 'th');
    const share = (r, kind) => `${percent(r[kind] / r.n)} [${r[`${kind}_interval`].map(percent).join(' to ')}]`;
    for (const r of report.rates) row([r.harmful ? 'harmful' : 'harmless', r.row, r.n, share(r, 'refused'), share(r, 'answered'), percent(r.unclear / r.n), r.kl?.toFixed(3) ?? '–', r.cross_entropy?.toFixed(3) ?? '–', r.repetition === null ? '–' : percent(r.repetition)]);
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
  md: () => `${find('[data-made]').textContent}\n\n${report.direction ? `Direction: \`${JSON.stringify(report.direction)}\`, ` : ''}judge: ${report.rules}, greedy, at most ${report.max_new_tokens} tokens.\n\n${report.markdown}${damageTable && `\n\n${damageTable}`}`,
};

function say(error) {
  find('[data-error]').hidden = !error;
  find('[data-error]').textContent = error || '';
}

function draw() {
  const next = props.value || {};
  if (next.run !== run && next.run !== -1) return;
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
  running = false;
  drawRunning();
  say(next.error);
  if (next.curves) {
    [curves, damageTable] = [next.curves, next.damage_markdown];
    drawCurves();
  }
}

find('form').addEventListener('submit', (event) => {
  event.preventDefault();
  if (running) return;
  run += 1;
  running = true;
  say('');
  drawRunning(['starting', 0, 1]);
  const from = (which) => find(`[data-list-of="${which}"]`).value;
  trigger('measure', { run, n: find('[data-n]').valueAsNumber, max_new_tokens: find('[data-length]').valueAsNumber, first: from('first'), second: from('second') });
});
find('[data-cancel]').addEventListener('click', () => {
  find('[data-measuring]').textContent = 'cancelling …';
  trigger('cancel', { run });
});
all('[data-save]').forEach((button) => button.addEventListener('click', async () => {
  const kind = button.dataset.save;
  const type = { csv: 'text/csv', json: 'application/json', md: 'text/markdown', html: 'text/html' }[kind];
  save(`measured.${kind}`, type, `${await FILES[kind]()}\n`);
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
  find('[data-idle]').hidden = true;
  find('.measure-body').hidden = false;
  drawReport();
});
watch('value', draw);
drawRunning();
document.dispatchEvent(new CustomEvent('direction-wanted'));
