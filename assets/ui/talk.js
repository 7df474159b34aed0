// Talk. Python holds the conversation; this draws it, as text, and sends what is asked for.
const find = (selector) => element.querySelector(selector);
const all = (selector) => [...element.querySelectorAll(selector)];

const PANES = ['unchanged', 'removed', 'added'];
const NAMES = { unchanged: 'Unchanged', removed: 'Direction removed', added: 'Direction added' };
const PATIENCE = 160; // ms a dial has to rest before the panes answer again

const prompt = find('[data-prompt]');
const send = find('[data-send]');
const stop = find('[data-stop]');

let run = 0; // number of the run on screen; older ones are not drawn
let running = false;
let waiting = null; // a request that waits for the run on screen to end
let sent = null; // the message that is to leave the composer once it is accepted
let seed = 0;
let turns = 0;
let opened = false;
let resting;

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

// -- asking -------------------------------------------------------------------------------------------------------

function number(selector, fallback) {
  const value = find(selector).valueAsNumber;
  return Number.isFinite(value) ? value : fallback;
}

function settings() {
  const on = (pane) => find(`[data-on="${pane}"]`).checked;
  return {
    removal: on('removed') ? number('[data-dial="removal"]', 100) / 100 : null,
    addition: on('added') ? number('[data-dial="addition"]', 1) : null,
    temperature: number('[data-temperature]', 0),
    max_new_tokens: number('[data-length]', 96),
    seed,
  };
}

/** Sends a request, after the one that runs has been stopped: their updates must not overtake each other. */
function request(action, text = '', example = false) {
  clearTimeout(resting);
  const asked = { action, prompt: text, example };
  if (running) {
    waiting = asked;
    halt();
    return;
  }
  run += 1;
  setRunning(true);
  trigger('ask', { run, ...asked, ...settings() });
}

function halt() {
  trigger('stop', { run });
}

/** Asks for a message; pressed while replies run, it stops them first. Pressed twice, it is asked once. */
function ask(action, text) {
  if (!opened || (running && sent === text)) return;
  sent = text;
  request(action, text);
}

function again() {
  if (turns) request('again');
}

function setRunning(now) {
  running = now;
  send.hidden = now;
  stop.hidden = !now;
  find('.turns').setAttribute('aria-busy', String(now));
  find('[data-retry]').disabled = now || !turns;
  find('[data-clear]').disabled = !turns;
}

// -- drawing ------------------------------------------------------------------------------------------------------

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function turnNode(index) {
  const list = find('.turns');
  while (list.children.length <= index) {
    const turn = make('article', undefined, 'turn');
    const said = make('p', undefined, 'said');
    said.append(make('span', '', 'who'), make('span', '', 'words'));
    turn.append(said);
    for (const pane of PANES) turn.append(cell(pane));
    list.append(turn);
  }
  return list.children[index];
}

function cell(pane) {
  const node = make('section', undefined, 'cell');
  node.dataset.pane = pane;
  node.setAttribute('aria-label', NAMES[pane]);
  const meter = make('div', undefined, 'meter');
  meter.append(make('span', undefined, 'track'), make('span', '', 'reading'));
  meter.firstChild.append(make('span', undefined, 'needle'));
  const foot = make('p', undefined, 'foot');
  foot.append(make('span', '', 'tag'), make('span', '', 'because'), make('span', '', 'rest'));
  node.append(meter, make('p', '', 'reply'), foot);
  return node;
}

function drawTurn(node, turn) {
  setText(node.querySelector('.who'), turn.example ? 'Example' : 'You');
  setText(node.querySelector('.words'), turn.prompt);
  for (const pane of PANES) drawCell(node.querySelector(`[data-pane="${pane}"]`), pane, turn.replies[pane]);
}

function drawCell(node, pane, reply) {
  node.classList.toggle('off', !reply);
  const shown = reply || { text: '', ending: 'off' };
  setText(node.querySelector('.reply'), shown.text);
  node.classList.toggle('running', reply !== undefined && !reply.ending);
  drawMeter(node.querySelector('.meter'), shown);
  const tag = node.querySelector('.tag');
  setText(tag, shown.verdict || '');
  tag.dataset.verdict = shown.verdict || '';
  setText(node.querySelector('.because'), because(shown));
  setText(node.querySelector('.rest'), rest(pane, shown));
}

function drawMeter(node, reply) {
  const known = reply.refusal !== null && reply.refusal !== undefined;
  node.classList.toggle('unknown', !known);
  if (!known) return;
  node.querySelector('.needle').style.left = `${100 * reply.refusal}%`;
  const percent = 100 * reply.refusal;
  const shown = percent > 0 && percent < 1 ? '<1' : percent < 100 && percent > 99 ? '>99' : String(Math.round(percent));
  setText(node.querySelector('.reading'), `starts like a refusal ${shown} %`);
  node.title = 'Probability that the first token is one that refusals start with. It says nothing about the rest of the reply.';
}

function because(reply) {
  if (reply.verdict === 'refused') return `says “${reply.because}”`;
  if (reply.verdict === 'answered') return 'no refusal phrase found';
  return reply.because || '';
}

function rest(pane, reply) {
  if (reply.ending === 'off') return 'off';
  if (reply.ending === '') return '';
  const strength = pane === 'removed' ? `${Math.round(100 * reply.strength)} %` : pane === 'added' ? `${reply.strength.toFixed(2)}×` : '';
  const end = { stopped: `stopped at ${reply.tokens} tokens`, length: `cut at ${reply.tokens} tokens`, end: `${reply.tokens} tokens` };
  return [strength, end[reply.ending]].filter(Boolean).join(' · ');
}

function drawTurns(view) {
  const list = find('.turns');
  const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 120;
  view.turns.forEach((turn, index) => drawTurn(turnNode(index), turn));
  while (list.children.length > view.turns.length) list.lastChild.remove();
  const grew = view.turns.length > turns;
  turns = view.turns.length;
  find('[data-idle]').hidden = !opened || turns > 0;
  if (opened) setText(find('[data-idle]'), 'Ask something, or take one of the examples.');
  if (turns > 1 && (atEnd || grew)) scrollTo({ top: document.documentElement.scrollHeight });
}

function drawErrors(view) {
  const error = find('[data-error]');
  error.hidden = !view.error;
  setText(error, view.error);
  setText(find('[data-notice]'), view.notice);
}

/** The message leaves the composer when the conversation has it, not before: a refused one must not be lost. */
function accept(view) {
  const last = view.turns[view.turns.length - 1];
  if (sent === null || view.error || !last || last.prompt !== sent) return;
  if (prompt.value === sent) prompt.value = '';
  sent = null;
  grow();
}

function draw() {
  const view = props.value;
  if (!view || !view.turns) return;
  if (view.examples) {
    open(view);
    return;
  }
  if (view.run !== run && view.run !== -1) return;
  drawTurns(view);
  drawErrors(view);
  accept(view);
  if (view.error) sent = null;
  if (!view.running) finish();
}

function finish() {
  setRunning(false);
  if (!waiting) return;
  const next = waiting;
  waiting = null;
  request(next.action, next.prompt, next.example);
}

// -- examples -----------------------------------------------------------------------------------------------------

function open(view) {
  if (opened) return;
  opened = true;
  const { opening, harmless, harmful, layer } = view.examples;
  find('[data-where]').textContent = `at layer ${layer}`;
  find('[data-harmless]').replaceChildren(...harmless.map((text) => example(text)));
  find('[data-harmful]').replaceChildren(...harmful.map(({ category, text }) => example(text, category)));
  find('[data-examples]').hidden = false;
  send.disabled = false;
  request('fresh', opening, true);
}

function example(text, category) {
  const chip = make('button', undefined, 'chip-button');
  chip.type = 'button';
  chip.title = 'Ask this in a new conversation';
  if (category) chip.append(make('small', category), ' ');
  chip.append(text);
  chip.addEventListener('click', () => ask('fresh', text));
  return chip;
}

// -- controls -----------------------------------------------------------------------------------------------------

function grow() {
  prompt.style.height = 'auto';
  prompt.style.height = `${Math.min(prompt.scrollHeight, 200)}px`;
}

function turned() {
  clearTimeout(resting);
  resting = setTimeout(again, PATIENCE);
}

function showDials() {
  find('[data-value="removal"]').textContent = `${find('[data-dial="removal"]').value} %`;
  for (const pane of ['removed', 'added']) {
    element.querySelector('.talk').classList.toggle(`without-${pane}`, !find(`[data-on="${pane}"]`).checked);
  }
  find('[data-mode]').textContent = number('[data-temperature]', 0) > 0 ? 'sampled' : 'greedy';
}

function bind() {
  const dial = find('[data-dial="addition"]');
  const box = find('[data-box="addition"]');
  dial.addEventListener('input', () => { box.value = Number(dial.value).toFixed(2); });
  box.addEventListener('change', () => {
    const value = Number.isFinite(box.valueAsNumber) ? Math.min(2, Math.max(-1, box.valueAsNumber)) : 1;
    dial.value = value;
    box.value = value.toFixed(2);
    turned();
  });
  all('[data-dial]').forEach((input) => {
    input.addEventListener('input', () => { showDials(); turned(); });
    input.addEventListener('dblclick', () => {
      input.value = input.defaultValue;
      input.dispatchEvent(new Event('input'));
    });
  });
  all('[data-on], [data-temperature], [data-length]').forEach((input) => {
    input.addEventListener('change', () => { showDials(); turned(); });
  });
  all('[data-segment]').forEach((button) => button.addEventListener('click', () => {
    find('.talk').dataset.show = button.dataset.segment;
    all('[data-segment]').forEach((other) => other.setAttribute('aria-pressed', String(other === button)));
  }));
  find('form').addEventListener('submit', (submit) => {
    submit.preventDefault();
    ask('ask', prompt.value);
  });
  stop.addEventListener('click', () => { waiting = null; halt(); });
  find('[data-retry]').addEventListener('click', () => { seed += 1; again(); });
  find('[data-clear]').addEventListener('click', () => request('clear'));
  prompt.addEventListener('input', grow);
  prompt.addEventListener('keydown', (key) => {
    if (key.key !== 'Enter' || key.shiftKey || key.isComposing) return;
    key.preventDefault();
    ask('ask', prompt.value);
  });
}

const onKey = (key) => {
  if (!element.isConnected) {
    document.removeEventListener('keydown', onKey);
    return;
  }
  if (key.key === 'Escape' && running) {
    waiting = null;
    halt();
  }
  const typing = key.target.closest('input, textarea, select, [contenteditable]');
  if (key.key === '/' && !typing && !key.ctrlKey && !key.metaKey) {
    key.preventDefault();
    prompt.focus();
  }
};

document.addEventListener('keydown', onKey);
document.addEventListener('compose', (event) => {
  prompt.value = event.detail;
  grow();
  prompt.focus();
});
bind();
showDials();
watch('value', draw);
draw();
