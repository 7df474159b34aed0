// Find. Every candidate with its scores; a click takes one, for everything on the page, in this session.

const MEANING = {
  bypass: 'Log-odds that replies to harmful prompts start like a refusal once the direction is removed: lower is stronger.',
  induce: 'Log-odds that replies to harmless prompts start like a refusal once it is added: above 0 it induces refusal.',
  kl: 'What removing it costs on harmless prompts: nats between the first tokens with and without it, at most 0.1.',
  comply: 'Cosine, where the classes are least alike, of harmful prompts without the direction to harmless prompts: higher is stronger.',
  refuse: 'Cosine, where the classes are least alike, of harmless prompts with the direction added to harmful prompts: higher is stronger.',
  d_prime: 'How far the two classes lie apart along the direction, in standard deviations, on prompts it was not made from.',
};
const apart = ([first, second]) => `Chance that a prompt of the class “${first}” lies further along the direction than one of “${second}”; neither was it made from.`;
const NAME = { bypass: 'bypass', induce: 'induce', kl: 'KL', comply: 'comply', refuse: 'refuse', auroc: 'AUROC', d_prime: 'd′' };
const OF_REFUSAL = ['bypass', 'induce', 'kl'];
const OF_COSMIC = ['comply', 'refuse', 'kl'];
const OF_CONTRAST = ['auroc', 'd_prime'];

let view = null;
let measure = 'bypass';
let inUse = null; // the direction, as the bar says
let askedFor = ''; // the one for which the candidates were shown anew
let filling = null; // how far the unknown cells are being measured
let fills = 0; // number of the run that does it

function shown(name, value) {
  if (value === null) return 'not measured';
  const text = ['kl', 'auroc', 'comply', 'refuse'].includes(name) ? value.toFixed(3) : `${value < 0 ? '' : '+'}${value.toFixed(name === 'norm' ? 2 : 1)}`;
  return text.replace('-', '−');
}

const UNIT = { bypass: 'log-odds', induce: 'log-odds', kl: 'nats', d_prime: 'sd' };

/** A score as it is said alone, with its unit. */
function spoken(name, value) {
  return value === null || !UNIT[name] ? shown(name, value) : `${shown(name, value)} ${UNIT[name]}`;
}

function is(cell, [position, layer]) {
  return cell.position === position && cell.layer === layer;
}

function measures() {
  if (view.contrast) return OF_CONTRAST;
  return view.chosen_by ? OF_COSMIC : OF_REFUSAL;
}

function said(cell) {
  const scores = measures().map((name) => `${NAME[name]} ${spoken(name, cell[name])}`).join(', ');
  const marks = [is(cell, view.rule) && 'the rule’s choice', is(cell, view.used) && 'in use'].filter(Boolean).join(', ');
  return [`Layer ${cell.layer}, position ${cell.position}: ${scores}.`, cell.why, marks].filter(Boolean).join(' ');
}

function button(cell) {
  const node = make('button', undefined, 'cell-button');
  node.type = 'button';
  const value = cell[measure];
  const known = value !== null;
  node.classList.toggle('rejected', Boolean(cell.rejected));
  node.classList.toggle('unknown', !known);
  node.classList.toggle('used', is(cell, view.used));
  node.classList.toggle('chosen', is(cell, view.rule));
  node.disabled = cell.rejected === 'zero';
  if (known) node.style.setProperty('--value', scoreColour(NAME[measure], value));
  node.append(make('span', is(cell, view.rule) ? '★' : '', 'star'), make('span', known ? shown(measure, value) : node.disabled ? '0' : '?', 'value'));
  node.setAttribute('aria-label', said(cell));
  node.setAttribute('aria-pressed', String(is(cell, view.used)));
  node.dataset.cell = `${cell.position} ${cell.layer}`;
  for (const event of ['mouseenter', 'focus']) node.addEventListener(event, () => drawDetail(cell));
  node.addEventListener('click', () => trigger('choose', { position: cell.position, layer: cell.layer }));
  return node;
}

let seen = null; // the cell in use that the map was moved to last

/** Moves a map that is wider than its place sideways, to a cell that is in use since; the tab must be in sight. */
function showUsed() {
  if (!view || !element.offsetWidth || seen === `${view.model} ${view.used}`) return;
  const [holder, used] = [find('.cells-holder'), find('.cell-button.used')];
  if (used) holder.scrollLeft += used.getBoundingClientRect().right - holder.getBoundingClientRect().right + used.offsetWidth;
  seen = `${view.model} ${view.used}`;
}

function drawCells() {
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.cell : undefined;
  const head = make('tr');
  head.append(make('th', 'layer'), ...Array.from({ length: view.layers }, (_, layer) => {
    const th = make('th', String(layer));
    th.scope = 'col';
    return th;
  }));
  find('thead').replaceChildren(head);
  find('.cells').classList.toggle('many', view.layers > 16);
  find('tbody').replaceChildren(...view.positions.map(({ position, token }) => {
    const row = make('tr');
    const name = make('th');
    name.scope = 'row';
    name.append(make('span', String(position).replace('-', '−')), ' ', make('code', readable(token)));
    row.append(name);
    for (const cell of view.cells.filter((c) => c.position === position).sort((a, b) => a.layer - b.layer)) {
      const td = make('td');
      td.append(button(cell));
      row.append(td);
    }
    return row;
  }));
  if (focused) all('.cell-button').find((node) => node.dataset.cell === focused)?.focus();
}

function drawDetail(cell) {
  const token = view.positions.find((p) => p.position === cell.position).token;
  const rows = [
    ['where', `input of layer ${cell.layer}, position ${String(cell.position).replace('-', '−')} ${readable(token)}`],
    ...measures().map((name) => [NAME[name], spoken(name, cell[name])]),
    ['size ‖r‖', shown('norm', cell.norm).replace('+', '')],
  ];
  find('[data-detail]').replaceChildren(...rows.map(([name, value]) => {
    const row = make('div');
    row.append(make('dt', name), make('dd', value));
    return row;
  }));
  find('[data-why]').textContent = cell.why || (is(cell, view.rule) ? `The rule’s choice: ${view.contrast ? 'the furthest apart' : view.chosen_by ? 'the highest refuse + comply' : 'the lowest bypass'} of those that are left.` : '');
}

function drawFunnel() {
  const most = view.funnel[0].left;
  find('[data-funnel]').replaceChildren(...view.funnel.map(({ name, left }) => {
    const item = make('li');
    item.style.setProperty('--share', `${(100 * left) / most}%`);
    item.append(make('b', String(left)), ` ${name}`);
    return item;
  }));
}

function drawFilling() {
  const [fill, cancel] = [find('[data-fill]'), find('[data-cancel-fill]')];
  pause(fill, filling !== null);
  if (!view.unknown) handOn([fill, cancel], find('.cells-holder'));
  else if (!filling) handOn([cancel], fill);
  cancel.hidden = !filling;
  fill.hidden = !view.unknown;
  find('[data-filling]').textContent = filling ? `${filling[0]}${filling[2] ? `, ${filling[1]} of ${filling[2]}` : ''}` : '';
  const bar = find('progress');
  bar.hidden = filling === null;
  if (filling) [bar.max, bar.value] = [filling[2] || 1, filling[1]];
  find('.swatch.unknown').parentElement.hidden = !view.unknown;
}

function draw() {
  const next = props.value || {};
  if (next.filling || next.filled) {
    if (!view || (next.table !== undefined && next.table !== view.table)) return; // of candidates that are not shown any more
    filling = next.filling || null;
    drawFilling();
    if (next.error) drawError(next.error); // the candidates as they stand would say that there is none
    else if (next.filled) trigger('show', {});
    return;
  }
  if (!next.cells) {
    if (next.error) drawError(next.error);
    return;
  }
  if (view && view.table !== next.table) filling = null;
  view = next;
  showInUse();
  find('[data-idle]').hidden = true;
  find('.find-body').hidden = false;
  drawError(view.error);
  const isRule = view.used.join(' ') === view.rule.join(' ');
  const [reset, drop] = [find('[data-reset]'), find('[data-drop]')];
  const gone = [isRule && reset, !view.own && drop].filter(Boolean);
  const left = gone.some((node) => node.contains(document.activeElement));
  reset.hidden = isRule;
  if (find('[data-origin]').textContent !== view.origin) find('[data-origin]').textContent = view.origin; // said once
  drop.hidden = !view.own;
  if (!measures().includes(measure)) [measure] = measures();
  drawMeasure();
  if (left) find('.cell-button.used')?.focus(); // the buttons that are gone took this one
  drawFunnel();
  drawFilling();
  drawDetail(view.cells.find((cell) => is(cell, view.used)) || view.cells.find((cell) => is(cell, view.rule)));
  drawSearch(view);
  showUsed();
  readPrompt();
}

// -- a prompt as the model reads it ---------------------------------------------------------------------------------

let reading = null; // the message that was asked for last, and the model

/** Asks for the tokens of the message in Talk, when it or the model has changed since; the tab must be in sight. */
function readPrompt() {
  if (!view || !element.offsetWidth) return;
  const prompt = document.querySelector('#talk [data-prompt]')?.value || '';
  const wanted = JSON.stringify([view.model, prompt, document.querySelector('#talk .turn:last-child .words')?.textContent]);
  if (reading === wanted) return;
  reading = wanted;
  trigger('read_prompt', { prompt });
}

function piece({ text, template, position }) {
  const item = make('li', undefined, template ? 'template' : '');
  item.append(make('code', readable(text)));
  if (position !== null) item.append(make('small', String(position).replace('-', '−')));
  item.title = template ? 'of the template' : 'of the message';
  if (template) item.append(make('span', ' (template)', 'unseen'));
  return item;
}

function drawRead(next) {
  const pieces = find('[data-pieces]');
  if (next.error) {
    find('[data-read-meaning]').textContent = next.error;
    pieces.replaceChildren();
    return;
  }
  find('[data-read-meaning]').textContent = `The message of Talk alone, as prompts are read when a direction is looked for: ${next.n} tokens, ${next.n_template} of the chat template (boxed). `
    + 'Positions count from the end, where the reply begins.';
  const nodes = next.tokens.map(piece);
  if (next.left_out) nodes.splice(next.cut, 0, make('li', `… ${next.left_out} tokens left out …`, 'left-out'));
  pieces.replaceChildren(...nodes);
}

function drawError(sentence) {
  const error = find('[data-error]');
  error.hidden = !sentence;
  error.textContent = sentence;
}

/** Candidates that were on their way while a direction was taken are shown anew, with that one in use: once. */
function showInUse() {
  if (!inUse || inUse.isSaved || inUse.digest === askedFor || view.used.join(' ') === [inUse.position, inUse.layer].join(' ')) return;
  askedFor = inUse.digest;
  trigger('show', {});
}

/** What the colours of the map say: the ends of their scale, which are those of `scoreColour`. */
function drawScale() {
  const [low, high] = { bypass: [-12, 12], induce: [-12, 12], kl: [0, 0.3], auroc: [0.5, 1], d_prime: [0, 6] }[measure] || [0, 1];
  const stops = Array.from({ length: 9 }, (_, index) => scoreColour(NAME[measure], low + (index / 8) * (high - low)));
  find('[data-scale] i').style.background = `linear-gradient(90deg, ${stops.join(', ')})`;
  const side = low < 0 ? [' toward answering', ' toward refusing'] : ['', ''];
  find('[data-low]').textContent = `${String(low).replace('-', '−')}${side[0]}`;
  find('[data-high]').textContent = `${low < 0 ? '+' : ''}${high}${UNIT[measure] ? ` ${UNIT[measure]}` : ''}${side[1]}`;
}

function drawMeasure() {
  drawScale();
  find('[data-meaning]').textContent = measure === 'auroc' ? apart(view.classes) : MEANING[measure];
  all('[data-measure]').forEach((node) => {
    node.hidden = !measures().includes(node.dataset.measure);
    node.setAttribute('aria-pressed', String(node.dataset.measure === measure));
  });
  drawCells();
}

all('[data-measure]').forEach((node) => node.addEventListener('click', () => {
  measure = node.dataset.measure;
  drawMeasure();
}));
find('[data-drop]').addEventListener('click', () => trigger('drop', {}));
new ResizeObserver(() => { showUsed(); readPrompt(); }).observe(element);
document.addEventListener('direction', ({ detail }) => { if (element.isConnected) inUse = detail; });
document.addEventListener('rendered', ({ detail }) => { if (element.isConnected && detail) drawRead(detail); });
find('[data-reset]').addEventListener('click', () => trigger('choose', {}));
find('[data-fill]').addEventListener('click', () => {
  if (filling) return;
  filling = ['starting', 0, 0];
  drawError('');
  drawFilling();
  fills += 1;
  trigger('fill', { run: fills });
});
find('[data-cancel-fill]').addEventListener('click', () => {
  filling = ['ending at the next step', 0, 0];
  drawFilling();
  trigger('cancel_fill', { run: fills });
});
watch('value', draw);
draw();
document.dispatchEvent(new CustomEvent('direction-wanted'));
