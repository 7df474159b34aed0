// Inside. Maps and lists come from Python; this paints them, and asks for other prompts.
let view = null;
let writers = null;
let finalNorm = 0;
let seen = false;
let dirty = false; // something has changed since the maps were read
let failed = false; // the first reading, so that there are no maps yet
let run = 0; // number of the reading on its way
let measures = 0;
let inUse = ''; // the direction of the bar
let readOf = ''; // that of the reading on its way
let chosen = new Set(); // parts by name
let wide = 0; // how wide the tab was when its maps were drawn; 0 while it is not in sight
const [SLANTED, UPRIGHT] = [16, 13]; // px from one label of a map to the next, at least
const BESIDE = 120; // px beside the columns of a map: the layers and the colours

/** Labels that would run into each other stand upright, and of more than there is room for some are left out, not the last. */
function spaced({ tickvals, ticktext, ...axis }, width) {
  const each = Math.max(1, width - BESIDE) / tickvals.length;
  const step = Math.ceil(UPRIGHT / each);
  const isKept = (_, index) => (tickvals.length - 1 - index) % step === 0;
  return { ...axis, tickvals: tickvals.filter(isKept), ticktext: ticktext.filter(isKept), tickangle: each < SLANTED ? -90 : axis.tickangle };
}

async function drawFigure(node, json, marks = []) {
  await plotly();
  const figure = painted(JSON.parse(json));
  figure.layout.xaxis = spaced(figure.layout.xaxis, node.clientWidth);
  figure.layout.shapes = marks;
  await Plotly.react(node, figure.data, figure.layout, CONFIG);
}

/** The parts that are chosen, framed in a map of parts. */
function frames() {
  return [...chosen].flatMap((name) => {
    const [part, where] = name.split(' ');
    const [layer, head] = (where || '').split('.');
    const [x, y] = [writers.columns.indexOf(head === undefined ? part : `${part} ${head}`), Number(layer)];
    return x < 0 ? [] : [{ type: 'rect', x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color: colour('ink'), width: 2 } }];
  });
}

async function drawParts(node, json) {
  await drawFigure(node, json, frames());
  node.removeAllListeners('plotly_click');
  node.on('plotly_click', ({ points: [{ x, y }] }) => {
    const column = writers.columns[x];
    const [part, head] = column.split(' ');
    toggle(head === undefined ? `${part} ${y}` : `${part} ${y}.${head}`);
  });
}

function toggle(name) {
  if (!chosen.delete(name)) chosen.add(name);
  drawWriters();
}

function partButton(name, title) {
  const button = make('button', name, 'chip-button');
  button.type = 'button';
  button.title = title;
  button.setAttribute('aria-pressed', String(chosen.has(name)));
  button.addEventListener('click', () => toggle(name));
  return button;
}

function drawChosen() {
  const names = writers.parts.filter((name) => chosen.has(name));
  const focused = document.activeElement.closest('[data-chosen]');
  find('[data-chosen]').replaceChildren(...names.map((name) => partButton(name, 'Choose it no longer')));
  if (focused) find('[data-add]').focus();
  if (!names.length) handOn([find('[data-only]'), find('[data-none]')], find('[data-add]'));
  find('[data-only]').disabled = !names.length;
  find('[data-none]').disabled = !names.length;
  const option = (name) => Object.assign(make('option', name), { value: name });
  const first = Object.assign(make('option', 'another part …'), { value: '' });
  const [list, others] = [find('[data-add]'), writers.parts.filter((name) => !chosen.has(name))];
  const picked = list.value;
  list.replaceChildren(first, ...others.map(option));
  list.value = others.includes(picked) ? picked : '';
  find('[data-put]').disabled = !list.value;
}

/** A fall of the refusal score, with a sign that can be read. */
function fall(effect) {
  return effect === null ? '…' : `${effect < 0 ? '−' : '+'}${Math.abs(effect).toFixed(2)}`;
}

/** Keeps the nodes of maps that stay, so that Plotly draws into what it knows. */
function drawReadings() {
  ['harmful', 'harmless'].forEach((role, index) => { find(`[data-toward="${role}"]`).textContent = view.toward[index]; });
  const holder = find('[data-readings]');
  while (holder.children.length > view.maps.length) holder.lastChild.remove();
  view.maps.forEach(({ title, figure }, index) => {
    if (!holder.children[index]) {
      const node = make('figure');
      node.append(make('figcaption', ''), make('div', undefined, 'plot reading'));
      holder.append(node);
    }
    const [caption, plot] = holder.children[index].children;
    caption.textContent = title;
    plot.setAttribute('role', 'group');
    plot.setAttribute('aria-label', `Layer by token: ${title}`);
    if (seen) drawFigure(plot, figure);
  });
}

function drawWords() {
  const { raised, lowered } = view.words[finalNorm];
  const item = ([token, value]) => {
    const node = make('li');
    node.append(make('code', readable(token)), make('span', `${value >= 0 ? '+' : '−'}${Math.abs(value).toFixed(2)}`, 'number'));
    return node;
  };
  find('[data-raised]').replaceChildren(...raised.map(item));
  find('[data-lowered]').replaceChildren(...lowered.map(item));
  all('[data-norm]').forEach((button) => button.setAttribute('aria-pressed', String(Number(button.dataset.norm) === finalNorm)));
}

function drawWriters() {
  const patched = writers && writers.patched;
  find('[data-writers]').hidden = !writers;
  find('[data-every]').hidden = !patched;
  if (!writers) return;
  const share = `${Math.round(100 * writers.below)} %`;
  find('[data-writers-meaning]').textContent = `What is written below layer ${writers.layer}, where the direction is read, adds up to ${share} of it there. `
    + (writers.heads ? '' : 'In this model heads cannot be told apart: what is written is no plain sum over them. ')
    + (patched ? patchedMeaning(patched) : 'What the parts do to the refusal is not known without refusal tokens: add one in Find.');
  all('[data-patched]').forEach((node) => { node.hidden = !patched; });
  const held = document.activeElement.closest('[data-top]') && document.activeElement.textContent;
  find('[data-top]').replaceChildren(...(patched ? patched.top : []).map(([name, first, exact]) => {
    const row = make('tr');
    const head = make('th');
    head.scope = 'row';
    head.append(partButton(name, 'Choose this part, or choose it no longer'));
    row.append(head, make('td', fall(first), 'number'), make('td', fall(exact), 'number'));
    return row;
  }));
  if (held) all('[data-top] button').find((button) => button.textContent === held)?.focus();
  drawChosen();
  if (!seen) return;
  drawParts(find('[data-direct]'), writers.direct);
  if (patched) drawParts(find('[data-first-pass]'), patched.map);
}

function patchedMeaning({ n_pairs: pairs, scores: [harmful, harmless] }) {
  const [more, less] = writers.classes;
  return `Patched: over ${pairs} pairs, each part of a run on a prompt of the class “${more}” does at the template’s tokens what it did for one of “${less}”; `
    + `everything together would take the refusal score from ${harmful.toFixed(1)} to ${harmless.toFixed(1)}. `.replaceAll('-', '−')
    + 'The first pass has all parts at once, from one gradient, and is right for small changes only: it can miss a part. The exact numbers are of one part patched at a time.';
}

function say(error) {
  find('[data-error]').hidden = !error;
  find('[data-error]').textContent = error || '';
}

function draw() {
  const next = props.value || {};
  if (next.measures !== undefined || (next.run === -1 && next.measured)) {
    measured(next);
    if (next.run !== -1) return;
  }
  if (next.run !== run && next.run !== -1) return;
  find('.inside-body').setAttribute('aria-busy', 'false');
  say(next.error);
  if (!next.maps) {
    failed = !view; // opened again, the tab tries again
    find('[data-idle]').hidden = true;
    find('.pair').hidden = false;
    return;
  }
  if (writers && writers.direction !== next.direction) writers = null;
  view = next;
  find('[data-idle]').hidden = true;
  find('.pair').hidden = false;
  find('.inside-body').hidden = false;
  const [first, second] = view.prompts;
  if (!find('[data-first]').value) find('[data-first]').value = first;
  if (!find('[data-second]').value && second) find('[data-second]').value = second;
  drawReadings();
  drawWords();
  drawWriters();
}

/** What the measurement in hand says; of one that was cancelled nothing more. */
function measured(next) {
  if (!isMeasuring || (next.measures !== measures && next.run !== -1)) return;
  if (next.measuring) {
    const [stage, done, total] = next.measuring;
    find('[data-measuring]').textContent = total ? `${stage}, ${done} of ${total}` : stage;
    return;
  }
  find('[data-measuring]').textContent = next.measured ? '' : 'first pass done, now exactly';
  say(next.error);
  if (next.direct) {
    writers = next;
    drawWriters();
  }
  if (next.measured) measuring(false);
}

function read() {
  [dirty, failed, readOf] = [false, false, inUse];
  run += 1;
  find('.inside-body').setAttribute('aria-busy', 'true');
  trigger('read', { run, first: find('[data-first]').value, second: find('[data-second]').value });
}

function show() {
  const before = wide;
  wide = element.offsetWidth;
  if (!wide || (props.value && props.value.closed)) return;
  if (!seen || dirty || (failed && !before)) {
    seen = true;
    if (view && !dirty) { drawReadings(); drawWriters(); } else read();
  } else if (view && wide !== before) {
    drawReadings();
    drawWriters();
  }
}

ofLink().then(({ inside }) => {
  if (!inside || view) return;
  [find('[data-first]').value, find('[data-second]').value] = inside;
  if (seen) read();
});
document.addEventListener('gather', ({ detail }) => {
  if (element.isConnected && view) detail.inside = [find('[data-first]').value, find('[data-second]').value];
});
new ResizeObserver(show).observe(element);
find('form').addEventListener('submit', (event) => { event.preventDefault(); read(); });
let isMeasuring = false;

function measuring(now) {
  isMeasuring = now;
  for (const button of ['[data-measure]', '[data-every]']) pause(find(button), now);
  if (!now) handOn([find('[data-cancel]')], find('[data-measure]'));
  find('[data-cancel]').hidden = !now;
}

/** The page waits no longer; what has begun ends at its next step. */
function stopMeasuring(said) {
  trigger('cancel', { run: measures });
  measuring(false);
  find('[data-measuring]').textContent = said;
}

for (const [button, every] of [['[data-measure]', false], ['[data-every]', true]]) {
  find(button).addEventListener('click', () => {
    if (isMeasuring) return;
    measuring(true);
    measures += 1;
    find('[data-measuring]').textContent = 'waiting for its turn';
    trigger('measure', { run: measures, every });
  });
}
find('[data-cancel]').addEventListener('click', () => stopMeasuring('Cancelled.'));
find('[data-add]').addEventListener('change', ({ target }) => { find('[data-put]').disabled = !target.value; });
find('[data-put]').addEventListener('click', () => {
  toggle(find('[data-add]').value);
  find('[data-add]').focus(); // the list has begun anew, and there is nothing to add yet
});
find('[data-none]').addEventListener('click', () => { chosen = new Set(); drawWriters(); });
find('[data-only]').addEventListener('click', () => {
  document.dispatchEvent(new CustomEvent('confine', { detail: writers.parts.filter((name) => chosen.has(name)) }));
  showTab('Talk').focus(); // the button that was pressed is out of sight now
});
document.addEventListener('confined', ({ detail }) => {
  if (!element.isConnected) return;
  chosen = new Set(detail);
  if (writers) drawWriters();
});
all('[data-norm]').forEach((button) => button.addEventListener('click', () => {
  finalNorm = Number(button.dataset.norm);
  drawWords();
}));
document.addEventListener('theme', () => { if (seen && view && element.isConnected) { drawReadings(); drawWriters(); } });
document.addEventListener('direction', ({ detail }) => {
  if (!element.isConnected) return;
  if (isMeasuring && inUse !== detail.digest) stopMeasuring('That was about another direction: measure again.');
  inUse = detail.digest;
  if (view && view.direction === detail.digest && view.model === detail.model) {
    if (readOf !== inUse) {
      run += 1; // what is on its way is about a direction that has been left
      find('.inside-body').setAttribute('aria-busy', 'false');
    }
    return;
  }
  dirty = true;
  show();
});
watch('value', draw);
draw();
document.dispatchEvent(new CustomEvent('direction-wanted'));
