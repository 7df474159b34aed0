// Inside. Maps and lists come from Python; this paints them, and asks for other prompts.
let view = null;
let writers = null;
let finalNorm = 0;
let seen = false;
let dirty = false; // something has changed since the maps were read
let run = 0; // number of the reading on its way
let measures = 0;
let inUse = ''; // the direction of the bar

async function drawFigure(node, json) {
  await plotly();
  const figure = painted(JSON.parse(json));
  await Plotly.react(node, figure.data, figure.layout, CONFIG);
}

/** Keeps the nodes of maps that stay, so that Plotly draws into what it knows. */
function drawReadings() {
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
  find('[data-writers]').hidden = !writers;
  if (!writers) return;
  const share = `${Math.round(100 * writers.below)} %`;
  find('[data-writers-meaning]').textContent = `What is written below layer ${writers.layer}, where the direction is read, adds up to ${share} of it there. `
    + `${writers.heads ? '' : 'In this model heads cannot be told apart: what is written is no plain sum over them. '}`
    + `Patched: over ${writers.n_pairs} pairs, each part of a harmful run writes at the template’s tokens what it wrote for a harmless prompt; `
    + `everything together would take the refusal score from ${writers.scores[0].toFixed(1)} to ${writers.scores[1].toFixed(1)}.`.replaceAll('-', '−');
  find('[data-top]').replaceChildren(...writers.top.map(([name, effect]) => {
    const node = make('li');
    node.append(make('span', name), make('span', `${effect >= 0 ? '−' : '+'}${Math.abs(effect).toFixed(2)}`, 'number'));
    node.title = 'Change of the refusal score, in log-odds, when this part alone is patched';
    return node;
  }));
  if (!seen) return;
  drawFigure(find('[data-direct]'), writers.direct);
  drawFigure(find('[data-patched]'), writers.patched);
}

function say(error) {
  find('[data-error]').hidden = !error;
  find('[data-error]').textContent = error || '';
}

function draw() {
  const next = props.value || {};
  if (next.measuring) {
    const [stage, done, total] = next.measuring;
    find('[data-measuring]').textContent = `${stage}, ${done} of ${total}`;
    return;
  }
  if (next.direct || next.measured) {
    find('[data-measuring]').textContent = '';
    find('[data-measure]').disabled = false;
    say(next.error);
    if (next.direct && (!inUse || next.direction === inUse)) {
      writers = next;
      drawWriters();
    }
    if (next.run !== -1) return;
  }
  if (next.run !== run && next.run !== -1) return;
  find('.inside-body').setAttribute('aria-busy', 'false');
  say(next.error);
  if (!next.maps) return;
  if (writers && writers.direction !== next.direction) writers = null;
  view = next;
  find('[data-idle]').hidden = true;
  find('.inside-body').hidden = false;
  const [first, second] = view.prompts;
  if (!find('[data-first]').value) find('[data-first]').value = first;
  if (!find('[data-second]').value && second) find('[data-second]').value = second;
  drawReadings();
  drawWords();
  drawWriters();
}

function read() {
  dirty = false;
  run += 1;
  find('.inside-body').setAttribute('aria-busy', 'true');
  trigger('read', { run, first: find('[data-first]').value, second: find('[data-second]').value });
}

function show() {
  if (!element.offsetWidth) return;
  if (!seen || dirty) {
    seen = true;
    if (view && !dirty) { drawReadings(); drawWriters(); } else read();
  }
}

new ResizeObserver(show).observe(element);
find('form').addEventListener('submit', (event) => { event.preventDefault(); read(); });
find('[data-measure]').addEventListener('click', () => {
  find('[data-measure]').disabled = true;
  measures += 1;
  trigger('measure', { run: measures });
});
all('[data-norm]').forEach((button) => button.addEventListener('click', () => {
  finalNorm = Number(button.dataset.norm);
  drawWords();
}));
document.addEventListener('theme', () => { if (seen && view && element.isConnected) { drawReadings(); drawWriters(); } });
document.addEventListener('direction', ({ detail }) => {
  if (!element.isConnected) return;
  inUse = detail.digest;
  if (view && view.direction === detail.digest && view.model === detail.model) return;
  dirty = true;
  show();
});
watch('value', draw);
draw();
