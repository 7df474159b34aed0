// Talk. Python holds the conversation; this draws it, as text, and sends what is asked for.

const PANES = ['unchanged', 'removed', 'added', 'control'];
const NAMES = { unchanged: 'Unchanged', removed: 'Direction removed', added: 'Direction added', control: 'Random control' };
const PATIENCE = 160; // ms a dial has to rest before the panes answer again
const PAUSE = 120; // ms without a key before the message is foretold

const prompt = find('[data-prompt]');
const send = find('[data-send]');
const stop = find('[data-stop]');

let run = 0; // number of the run on screen; older ones are not drawn
let running = false;
let started = document.body; // what had the focus when the replies were asked for
let waiting = null; // a request that waits for the run on screen to end
let sent = null; // the message that is to leave the composer once it is accepted
let parts = []; // what writes to the stream of the model, and the heads in it, by name
let writers = null; // the parts from which alone the direction is removed; null is all
let turns = 0;
let script = []; // what a link or a file has still to ask, each message with its settings
let begun = false; // what the link says has been done
let taking = null; // the direction of a file is being taken, and who waits for it
let direction = ''; // the one in use
let inUse = {}; // what the bar says of it
let classes = ['harmful', 'harmless']; // whose difference it is
let drawn = null; // the view on screen
let opened = ''; // the model the page is open on
let closed = null; // what two servers instead of a model cannot do, with the reasons
let resting;
let pausing;
let foretelling = 0; // number of the forecast that is being made, 0 if none
let forecasts = 0;
let outdated = false; // the message or a setting has changed since that forecast was asked for
let about = ''; // what stood in the composer then
let forecast = null;

// -- asking -------------------------------------------------------------------------------------------------------

function number(selector, fallback) {
  const value = find(selector).valueAsNumber;
  return Number.isFinite(value) ? value : fallback;
}

const mostTokens = () => Number(find('[data-length]').max);

/** The settings of a message from elsewhere, with no longer a reply than there can be here. */
function bounded(own) {
  return own.max_new_tokens > mostTokens() ? { ...own, max_new_tokens: mostTokens() } : own;
}

const isSampled = () => number('[data-temperature]', 0) > 0;

function settings() {
  const on = (pane) => find(`[data-on="${pane}"]`).checked;
  return {
    removal: on('removed') ? number('[data-dial="removal"]', 100) / 100 : null,
    addition: on('added') ? number('[data-dial="addition"]', 1) : null,
    control: on('control') ? number('[data-dial="addition"]', 1) : null,
    temperature: number('[data-temperature]', 0),
    max_new_tokens: number('[data-length]', 96),
    seed: number('[data-seed]', 0),
    system: find('[data-system]').value.trim(),
    writers: writers && [...writers].sort(),
  };
}

/** Confines the removal to these parts; null is all of them. What cannot be done is said where it would show. */
function confine(names, problem = '') {
  writers = names;
  if (!names) handOn([find('[data-everywhere]')], find('[data-on="removed"]'));
  find('[data-confined]').hidden = !names && !problem;
  find('[data-everywhere]').hidden = !names;
  find('[data-removed-where]').textContent = names ? `at ${counted(names)}` : 'everywhere';
  find('[data-confined-to]').textContent = names ? `Removed only from ${counted(names)}: ${listed(names)}.` : problem;
  find('[data-confined-to]').title = names ? names.join(', ') : '';
  document.dispatchEvent(new CustomEvent('confined', { detail: names || [] }));
  showDials();
}

function counted(names) {
  return names.length === 1 ? '1 part' : `${names.length} parts`;
}

function listed(names) {
  return names.length > 6 ? `${names.slice(0, 5).join(', ')} and ${names.length - 5} more` : names.join(', ');
}

/**
 * Sends a request, after the one that runs has been stopped: their updates must not overtake each other. Without settings
 * of its own it is answered with those on the page.
 */
function request(action, text = '', example = false, own = null) {
  clearTimeout(resting);
  const asked = { action, prompt: text, example, own };
  if (running) {
    waiting = asked;
    halt();
    return;
  }
  run += 1;
  setRunning(true);
  trigger('ask', { run, action, prompt: text, example, ...(own || settings()) });
}

function halt() {
  trigger('stop', { run });
}

/** Asks for a message; pressed while replies run, it stops them first. Pressed twice, it is asked once. */
function ask(action, text) {
  if (!opened || (running && sent === text)) return;
  sent = text;
  script = [];
  request(action, text);
}

/** Answers the last message anew, with the settings as they stand; a message that waits will be asked with them anyway. */
function again() {
  if (waiting && waiting.action !== 'again') return;
  if (turns || running) request('again');
}

/** The focus goes with the work: what it was on can neither be pressed meanwhile nor hold it. */
function setRunning(now) {
  const held = document.activeElement;
  running = now;
  send.hidden = now;
  stop.hidden = !now;
  find('.turns').setAttribute('aria-busy', String(now));
  find('[data-retry]').disabled = now || !turns;
  for (const button of ['[data-edit]', '[data-undo]']) find(button).disabled = now || !turns;
  find('[data-clear]').disabled = !turns;
  all('[data-save]').forEach((button) => { button.disabled = now || !turns; });
  if (now) started = held;
  if (now && [send, find('[data-retry]'), find('[data-undo]')].includes(held)) {
    stop.focus();
  } else if (!now && held === stop) {
    (started.disabled ? prompt : started).focus();
  } else if (!turns && held === find('[data-clear]')) {
    prompt.focus();
  }
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
    turn.append(splitNode(), alongNode());
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
  const copy = make('button', 'copy', 'copy');
  copy.type = 'button';
  copy.setAttribute('aria-label', `Copy what “${NAMES[pane]}” said`);
  copy.addEventListener('click', () => copyReply(copy, node));
  foot.append(make('span', '', 'tag'), make('span', '', 'because'), make('span', '', 'rest'), copy);
  const problem = make('p', '', 'problem');
  problem.setAttribute('role', 'alert');
  node.append(meter, make('p', '', 'reply'), problem, foot);
  return node;
}

/** Where the browser keeps the clipboard to itself, the text is selected instead. */
async function copyReply(button, cell) {
  const reply = cell.querySelector('.reply');
  try {
    await navigator.clipboard.writeText(reply.textContent);
    button.textContent = 'copied';
  } catch {
    getSelection().selectAllChildren(reply);
    button.textContent = 'selected';
  }
  setTimeout(() => { button.textContent = 'copy'; }, 1500);
}

/** Where the panes part from the unchanged one, folded until somebody wants to know. */
function splitNode() {
  const split = make('details', undefined, 'split');
  split.append(make('summary', ''), make('div'));
  split.hidden = true;
  return split;
}

/** For each token at which panes part, what they and the unchanged one held likely there. */
function drawSplits(node, splits) {
  const parted = PANES.filter((pane) => splits[pane]);
  node.hidden = !parted.length;
  if (node.hidden || node.dataset.drawn === JSON.stringify(splits)) return;
  node.dataset.drawn = JSON.stringify(splits);
  const at = (pane) => splits[pane].index;
  const said = parted.map((pane) => `${NAMES[pane]} at token ${at(pane) + 1}`).join(' · ');
  setText(node.querySelector('summary'), `First split from Unchanged: ${said}`);
  const indices = [...new Set(parted.map(at))].sort((one, other) => one - other);
  node.lastChild.replaceChildren(...indices.flatMap((index) => {
    const here = parted.filter((pane) => at(pane) === index);
    const likely = Object.assign({}, ...here.map((pane) => splits[pane].likely));
    const lists = make('div', undefined, 'likelies');
    lists.append(...PANES.map((pane) => likelyNode(pane, index, likely[pane] || [])));
    return [make('p', `Likely as token ${index + 1}`), lists];
  }));
}

function likelyNode(pane, index, tokens) {
  const list = make('ol', undefined, 'likely');
  list.dataset.pane = pane;
  if (tokens.length) list.setAttribute('aria-label', `Most likely as token ${index + 1}: ${NAMES[pane]}`);
  else list.setAttribute('aria-hidden', 'true');
  list.append(...tokens.map(([text, share]) => {
    const item = make('li');
    item.style.setProperty('--share', `${100 * share}%`);
    item.append(make('code', readable(text)), ' ', make('span', percent(share)));
    return item;
  }));
  return list;
}

/** The bar in the text at the first token that is another than the unchanged pane's. */
function partingNode(pane) {
  const bar = make('span', undefined, 'parting');
  bar.setAttribute('role', 'img');
  bar.setAttribute('aria-label', 'from here on another text than Unchanged');
  bar.title = `${NAMES[pane]} parts from Unchanged here`;
  return bar;
}

/** The text of a reply, with the bar where it parts from the unchanged one; a reply that is coloured is left as it is. */
function drawReply(node, pane, text, split) {
  const drawn = JSON.stringify([text, split ? split.characters : null]);
  if (node.dataset.drawn === drawn) return;
  node.dataset.drawn = drawn;
  plain(node, pane);
}

function plain(node, pane) {
  const [text, characters] = JSON.parse(node.dataset.drawn || '["", null]');
  if (characters === null) {
    node.replaceChildren(text);
    return;
  }
  const points = [...text];
  node.replaceChildren(points.slice(0, characters).join(''), partingNode(pane), points.slice(characters).join(''));
}

function drawTurn(node, turn) {
  setText(node.querySelector('.who'), turn.example ? 'Example' : 'You');
  setText(node.querySelector('.words'), turn.prompt);
  const splits = turn.splits || {};
  for (const pane of PANES) drawCell(node.querySelector(`.cell[data-pane="${pane}"]`), pane, turn.replies[pane], splits[pane]);
  drawSplits(node.querySelector('.split'), splits);
  if (Object.values(turn.replies).every((reply) => reply.ending)) return;
  node.querySelector('.along').hidden = true;
  delete node.dataset.tinted; // the colours go while the text grows, also where it comes to be the same
}

function drawCell(node, pane, reply, split) {
  node.classList.toggle('off', !reply);
  const shown = reply || { text: '', ending: 'off' };
  drawReply(node.querySelector('.reply'), pane, shown.text, split);
  node.classList.toggle('running', reply !== undefined && !reply.ending);
  drawMeter(node.querySelector('.meter'), shown);
  const tag = node.querySelector('.tag');
  setText(tag, shown.verdict || '');
  tag.dataset.verdict = shown.verdict || '';
  setText(node.querySelector('.because'), because(shown));
  setText(node.querySelector('.problem'), shown.problem || '');
  if (!shown.text) handOn([node.querySelector('.copy')], prompt);
  node.querySelector('.copy').hidden = !shown.text;
  setText(node.querySelector('.rest'), rest(pane, shown));
}

function drawMeter(node, reply) {
  const known = reply.refusal !== null && reply.refusal !== undefined;
  node.classList.toggle('unknown', !known);
  if (!known) return;
  node.querySelector('.needle').style.left = `${100 * reply.refusal}%`;
  setText(node.querySelector('.reading'), `starts like a refusal ${percent(reply.refusal)}`);
  node.title = 'Probability that the first token is one that refusals start with. It says nothing about the rest of the reply.';
}

function percent(share) {
  const whole = 100 * share;
  return `${whole > 0 && whole < 1 ? '<1' : whole < 100 && whole > 99 ? '>99' : Math.round(whole)} %`;
}

function because(reply) {
  if (reply.verdict === 'refused') return `says “${reply.because}”`;
  if (reply.verdict === 'answered') return 'no refusal phrase found';
  return reply.because || '';
}

function rest(pane, reply) {
  if (reply.ending === 'off') return 'off';
  if (reply.ending === '') return '';
  const strength = pane === 'removed' ? `${Math.round(100 * reply.strength)} %` : pane === 'unchanged' ? '' : `${signed(reply.strength)}×`;
  const share = reply.writers ? `only from ${counted(reply.writers)}` : '';
  const tokens = reply.tokens === 1 ? '1 token' : `${reply.tokens} tokens`;
  const end = reply.tokens === null // a server that does not count them
    ? { stopped: 'stopped', length: 'cut at the longest', end: '', filtered: '' }
    : { stopped: `stopped at ${tokens}`, length: `cut at ${tokens}`, memory: `did not fit, cut at ${tokens}`, end: tokens, filtered: `cut off at ${tokens}` };
  return [strength, share, end[reply.ending]].filter(Boolean).join(' · ');
}

function drawTurns(view) {
  const list = find('.turns');
  const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 120;
  view.turns.forEach((turn, index) => drawTurn(turnNode(index), turn));
  while (list.children.length > view.turns.length) list.lastChild.remove();
  const grew = view.turns.length > turns;
  turns = view.turns.length;
  find('[data-examples]').hidden = !opened || turns > 1; // a conversation needs the room
  find('[data-idle]').hidden = !opened || turns > 0;
  if (opened) setText(find('[data-idle]'), 'Ask something, or take one of the examples.');
  if (turns > 1 && grew && matchMedia('(max-width: 760px)').matches) list.lastChild.scrollIntoView(); // the composer stands below all of it
  else if (turns > 1 && (atEnd || grew)) scrollTo({ top: document.documentElement.scrollHeight });
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
  if (!props.value || !(props.value.turns || props.value.error || props.value.notice)) return;
  const view = { turns: [], ...(props.value.turns ? {} : drawn), ...props.value }; // what has none leaves those on screen
  if (view.examples) {
    open(view);
    return;
  }
  if (view.run !== run && view.run !== -1) return;
  drawn = view;
  drawTurns(view);
  drawErrors(view);
  if (props.value.turns) accept(view);
  if (view.error) [sent, script] = [null, []]; // the next message would take the sentence away, and lack this one before it
  if (!view.running) finish();
}

function finish() {
  setRunning(false);
  foretell();
  askTint();
  if (!waiting && script.length) waiting = { action: 'ask', example: false, ...script.shift() };
  if (!waiting) return;
  const next = waiting;
  waiting = null;
  request(next.action, next.prompt, next.example, next.own);
}

/** Asks these messages in a new conversation, each with the settings of its own where it has some. */
function replay(messages) {
  script = messages;
  const { prompt: text, own } = script.shift();
  request('fresh', text, false, own);
}

// -- along the reply ----------------------------------------------------------------------------------------------

const SVG = 'http://www.w3.org/2000/svg';
const [WIDE, HIGH] = [600, 120];

function shape(tag, attributes, className) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (className) node.setAttribute('class', className);
  return node;
}

/** The tokens of the replies as a chart, folded until somebody wants to know; the slider under it is its cursor. */
function alongNode() {
  const node = make('details', undefined, 'along');
  const cursor = make('input');
  cursor.type = 'range';
  cursor.min = 0;
  cursor.setAttribute('aria-label', 'Token of the replies');
  cursor.addEventListener('input', () => pointAt(node.closest('.turn'), cursor.valueAsNumber));
  node.addEventListener('toggle', () => pointAt(node.closest('.turn'), cursor.valueAsNumber));
  const chart = make('div', undefined, 'chart');
  chart.append(shape('svg', { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: 'none', 'aria-hidden': 'true' }), make('span', '', 'level one'), make('span', '', 'level zero'));
  chart.addEventListener('pointermove', ({ clientX }) => {
    const { left, width } = chart.getBoundingClientRect();
    pointAt(node.closest('.turn'), Math.round(Math.min(1, Math.max(0, (clientX - left) / width)) * cursor.max));
  });
  node.append(make('summary', 'Along the reply: where each token lies on the direction'), make('p', undefined, 'legend-of-panes'), chart, cursor, make('p', '', 'pointed'));
  node.querySelector('.pointed').setAttribute('role', 'status');
  node.hidden = true;
  return node;
}

/** Asks where the tokens of a turn lie, the last one first that is not coloured as it should be. */
function askTint() {
  const kind = find('[data-tint]').value;
  if (kind === 'off') clearTints();
  if (kind === 'off' || running) return;
  const turn = [...find('.turns').children].findLastIndex((node) => node.dataset.tinted !== colouring(node));
  if (turn >= 0) trigger('tint', { run, turn, inside: kind === 'inside' });
}

/** Names what the colours of a turn say: who read which replies along which direction. */
function colouring(node) {
  const texts = [...node.querySelectorAll('.reply')].map((reply) => reply.textContent);
  return JSON.stringify([find('[data-tint]').value, direction, texts]);
}

function clearTints() {
  all('.along').forEach((node) => { node.hidden = true; });
  all('.reply').forEach((reply) => plain(reply, reply.parentElement.dataset.pane));
  all('.turn').forEach((node) => { delete node.dataset.tinted; });
}

/** Colours the tokens of a turn, and draws their chart; for replies that have changed meanwhile nothing. */
function tinted({ run: about, turn, inside, panes }) {
  const node = find('.turns').children[turn];
  if (about !== run || running || !node || find('[data-tint]').value !== (inside ? 'inside' : 'untouched')) return;
  node.dataset.tinted = colouring(node);
  const shown = Object.entries(panes).filter(([pane, tokens]) => cellOf(node, pane).textContent === tokens.map(([text]) => text).join(''));
  if (!shown.length) node.querySelectorAll('.reply').forEach((reply) => plain(reply, reply.parentElement.dataset.pane)); // another reading would stay
  for (const [pane, tokens] of shown) {
    const nodes = tokens.map(([text, along], index) => token(pane, text, along, index, inside));
    const split = drawn.turns[turn].splits?.[pane];
    if (split) nodes.splice(split.index, 0, partingNode(pane));
    cellOf(node, pane).replaceChildren(...nodes);
  }
  drawAlong(node, Object.fromEntries(shown), inside);
  askTint();
}

const cellOf = (turn, pane) => turn.querySelector(`.cell[data-pane="${pane}"] .reply`);

function token(pane, text, along, index, inside) {
  const node = make('span', text, 'token');
  const toward = Math.min(1, Math.max(0, along));
  node.style.setProperty('--tint', shade(toward));
  node.dataset.toward = toward >= 0.5 ? 'refusing' : 'answering'; // the look of the underline
  const fixed = inside && pane === 'removed' ? '; where all of it is removed, the same at every token by construction' : '';
  node.title = `${signed(along)} of the way from the ${classes[1]} to the ${classes[0]} mean${fixed}`;
  node.addEventListener('mouseenter', () => pointAt(node.closest('.turn'), index));
  return node;
}

function signed(value) {
  return value.toFixed(2).replace('-', '−');
}

function drawAlong(turn, panes, inside) {
  const node = turn.querySelector('.along');
  const values = Object.values(panes).flat().map(([, along]) => along);
  node.hidden = !values.length;
  if (node.hidden) return;
  const [low, high] = [Math.min(0, ...values), Math.max(1, ...values)];
  const longest = Math.max(...Object.values(panes).map((tokens) => tokens.length));
  const x = (index) => (longest > 1 ? (index / (longest - 1)) * WIDE : WIDE / 2);
  const y = (value) => 6 + ((high - value) / (high - low)) * (HIGH - 12);
  const svg = node.querySelector('.chart svg');
  svg.replaceChildren(
    ...[0, 1].map((mean) => shape('line', { x1: 0, x2: WIDE, y1: y(mean), y2: y(mean) }, mean ? 'mean harmful' : 'mean harmless')),
    ...Object.entries(panes).reverse().map(([pane, tokens]) => { // the unchanged one on top
      const line = shape('polyline', { points: tokens.map(([, along], index) => `${x(index)},${y(along)}`).join(' ') }, 'reading');
      line.dataset.pane = pane;
      return line;
    }),
    shape('line', { x1: 0, x2: 0, y1: 0, y2: HIGH }, 'cursor'),
  );
  for (const [level, mean, name] of [['.one', 1, classes[0]], ['.zero', 0, classes[1]]]) {
    const label = node.querySelector(level);
    setText(label, `${mean} · mean of ${name} prompts`);
    label.style.top = `${(100 * y(mean)) / HIGH}%`;
  }
  node.querySelector('.legend-of-panes').replaceChildren(...Object.keys(panes).map((pane) => {
    const line = make('span');
    const sample = shape('svg', { viewBox: '0 0 34 8', width: 34, height: 8, 'aria-hidden': 'true' });
    sample.append(shape('line', { x1: 0, x2: 34, y1: 4, y2: 4 }, 'reading'));
    [line, sample.firstChild].forEach((named) => { named.dataset.pane = pane; }); // hidden with its pane on a phone
    line.append(sample, NAMES[pane]);
    return line;
  }));
  node.along = { panes, x, inside };
  const cursor = node.querySelector('input');
  cursor.max = longest - 1;
  cursor.value = 0;
  pointAt(turn, 0);
}

/** Marks a token in every pane, in the text and in the chart, and says its numbers. */
function pointAt(turn, index) {
  const node = turn.querySelector('.along');
  if (node.hidden || !node.along) return;
  const { panes, x, inside } = node.along;
  node.querySelector('input').value = index;
  for (const end of ['x1', 'x2']) node.querySelector('.cursor').setAttribute(end, x(index));
  turn.querySelectorAll('.token.here').forEach((token) => token.classList.remove('here'));
  const said = [];
  for (const [pane, tokens] of Object.entries(panes)) {
    if (!tokens[index]) continue;
    const [text, along] = tokens[index];
    cellOf(turn, pane).querySelectorAll('.token')[index]?.classList.toggle('here', node.open);
    said.push(`${NAMES[pane]} “${readable(text)}” ${signed(along)}`);
  }
  node.querySelector('.pointed').textContent = `Token ${index + 1}: ${said.join(' · ')}. 0 is the mean of the ${classes[1]} prompts, 1 that of the ${classes[0]} ones.`
    + (inside ? ' Inside the changed model a direction that is removed at 100 % reads the same everywhere, by construction.' : '');
}

// -- the forecast -------------------------------------------------------------------------------------------------

/** Foretells the message in the composer, or the last one if there is none, after a pause; one forecast at a time. */
function foretell() {
  clearTimeout(pausing);
  if (!opened || (!prompt.value.trim() && !turns)) {
    [foretelling, outdated] = [0, false]; // what is on its way is about a message that is gone
    paint(null);
    return;
  }
  pausing = setTimeout(() => {
    const text = prompt.value;
    const asked = text.trim() ? 'ask' : 'again';
    if (foretelling) {
      outdated = true;
    } else if (asked === 'ask' || turns) {
      outdated = false;
      forecasts += 1;
      foretelling = forecasts;
      about = text;
      trigger('forecast', { run: foretelling, action: asked, prompt: text, example: false, ...settings() });
    }
  }, PAUSE);
}

function foretold(view) {
  if (!foretelling || (view.run !== foretelling && view.run !== -1)) return;
  foretelling = 0;
  // What is about a message that has changed meanwhile is not shown: the next forecast is on its way.
  if (prompt.value === about) paint(view.place ? view : null);
  if (outdated) foretell();
}

const SCALE = { removal: 100, addition: 1 }; // what a dial counts for one strength
const PANE = { removal: 'removed', addition: 'added' };
const DIAL = { removed: 'removal', added: 'addition', control: 'addition' }; // one dial is the strength of both

function along(dial, strength) {
  const share = (strength * SCALE[dial.dataset.dial] - dial.min) / (dial.max - dial.min);
  return `calc(9px + ${share.toFixed(4)} * (100% - 18px))`; // where the middle of the thumb is
}

function shade(probability) {
  return probability < 0.5
    ? `color-mix(in oklab, var(--harmless) ${(100 - 200 * probability).toFixed(1)}%, var(--rule))`
    : `color-mix(in oklab, var(--harmful) ${(200 * probability - 100).toFixed(1)}%, var(--rule))`;
}

/** The value at a strength between two of the curve's. */
function between(scales, values, strength) {
  const next = Math.max(1, scales.findIndex((scale) => scale >= strength));
  const share = (strength - scales[next - 1]) / (scales[next] - scales[next - 1]);
  return values[next - 1] + share * (values[next] - values[next - 1]);
}

function paint(view) {
  forecast = view;
  for (const name of Object.keys(PANE)) {
    const dial = find(`[data-dial="${name}"]`);
    const curve = view && view.curves[PANE[name]].refusal && view.curves[PANE[name]];
    dial.classList.toggle('painted', Boolean(curve));
    const stops = curve ? curve.scales.map((scale, index) => `${shade(curve.refusal[index])} ${along(dial, scale)}`) : [];
    dial.style.setProperty('--paint', curve ? `linear-gradient(90deg, ${stops.join(', ')})` : 'none');
    const flips = Boolean(curve) && curve.flip !== null;
    const notch = find(`[data-flip="${name}"]`);
    notch.hidden = !flips;
    if (flips) notch.style.left = along(dial, curve.flip);
    const at = flips && (name === 'removal' ? `${Math.round(100 * curve.flip)} %` : `${curve.flip.toFixed(2).replace('-', '−')}×`);
    setText(find(`[data-flips="${name}"]`), flips ? `flips at ${at}` : '');
  }
  setText(find('[data-place]'), view ? view.place.sentence : '');
  drawForetold();
  tellForecast();
}

/** Tells the map what is painted here: nothing else is foretold anywhere. */
function tellForecast() {
  document.dispatchEvent(new CustomEvent('foretold', { detail: forecast }));
}

/** Of each pane, at the strength of its dial: whether its reply will start like a refusal, and how far it is moved. */
function drawForetold() {
  const which = prompt.value.trim() && turns ? 'the next reply will' : 'will'; // not the one that stands below
  for (const pane of PANES) {
    const curve = forecast && forecast.curves[pane];
    const isOn = pane === 'unchanged' || find(`[data-on="${pane}"]`).checked;
    const strength = pane !== 'unchanged' && find(`[data-dial="${DIAL[pane]}"]`).valueAsNumber / SCALE[DIAL[pane]];
    const at = (values) => (isOn && values ? between(curve.scales, values, strength) : null);
    const probability = pane === 'unchanged' ? forecast && forecast.unchanged : at(curve && curve.refusal);
    const isKnown = typeof probability === 'number';
    const node = find(`[data-foretold="${pane}"]`);
    setText(node, isKnown ? `${which} start like a refusal: ${percent(probability)}` : '');
    node.title = isKnown ? 'Foretold for the message, before anything is generated: the probability that the first token is one that refusals start with.' : '';
    const track = find(`[data-needle="${pane}"]`);
    track.hidden = !isKnown;
    if (isKnown) track.firstChild.style.left = `${100 * probability}%`;
    if (pane === 'unchanged') continue;
    const price = at(curve && curve.kl);
    setText(find(`[data-price="${pane}"]`), price === null ? '' : `KL ${nats(price)}`);
  }
}

const nats = (value) => `${value < 0.005 ? '<0.01' : value.toFixed(2)} nats`;

// -- examples -----------------------------------------------------------------------------------------------------

function open(view) {
  const { opening, harmless, harmful, layer, position, digest, model } = view.examples;
  if (opened === model) return;
  parts = view.examples.parts;
  confine(null);
  opened = model;
  direction = digest;
  [foretelling, outdated] = [0, false]; // what was foretold, or is on its way, is of another model
  paint(null);
  closed = view.examples.closed || null;
  if (closed) close(closed);
  else find('[data-where]').textContent = `at layer ${layer}, position ${String(position).replace('-', '−')}`;
  find('[data-harmless]').replaceChildren(...harmless.map((text) => example(text)));
  find('[data-harmful]').replaceChildren(...harmful.map(fold));
  find('[data-examples]').hidden = false;
  send.disabled = false;
  begin(opening, run);
}

/** Switches off what two servers cannot do, and says why where it is. */
function close(reasons) {
  all('[data-closed]').forEach((node) => {
    node.textContent = reasons[node.dataset.closed];
    node.hidden = false;
  });
  all('[data-dial], [data-box], [data-tint], [data-on="added"], [data-on="control"]').forEach((input) => {
    input.disabled = true;
    input.title = reasons[input.matches('[data-tint]') ? 'tint' : input.matches('[data-dial="removal"]') ? 'strength' : 'added'];
  });
  for (const pane of ['added', 'control']) find(`[data-on="${pane}"]`).checked = false;
  find('[data-tint]').value = 'off';
  find('[data-removed-where]').textContent = 'written into the weights of the export';
  find('.head[data-pane="unchanged"] .wide').textContent = ': same prompt, same settings, a history of its own';
  prompt.placeholder = 'Ask both something';
  find('[data-temperature]').parentElement.title = '0 takes the most likely token each time. Above 0 both servers get the same seed, and draw by themselves.';
  find('[data-segment="removed"]').click();
  showDials();
}

/** The first thing asked: what the link says, else the opening example. */
async function begin(opening, before) {
  const state = await linked();
  if (run !== before) return; // the visitor was faster
  if (begun || (state.model !== undefined && state.model !== opened)) {
    request('fresh', opening, true);
    return;
  }
  begun = true;
  const problem = apply(state);
  if (problem) confine(null, `The link ${problem}`);
  const { prompts = [], turns: own = [] } = state;
  const page = settings();
  if (prompts.length) replay(prompts.map((text, index) => ({ prompt: text, own: bounded({ ...page, ...own[index] }) })));
  else request('fresh', opening, true);
}

/** Puts the settings of a link or a file onto the page; what it cannot be given is the sentence's end. */
function apply(state) {
  let problem = '';
  for (const [name, dial] of [['removal', '[data-dial="removal"]'], ['addition', '[data-dial="addition"]']]) {
    if (name in state) move(find(dial), state[name] * SCALE[name]);
  }
  find('[data-box="addition"]').value = Number(find('[data-dial="addition"]').value).toFixed(2);
  for (const [name, field] of [['temperature', '[data-temperature]'], ['max_new_tokens', '[data-length]'], ['seed', '[data-seed]']]) {
    if (name in state) find(field).value = state[name];
  }
  for (const pane of ['removed', 'added', 'control']) {
    if (`${pane}_on` in state) find(`[data-on="${pane}"]`).checked = state[`${pane}_on`];
  }
  if ('system' in state) find('[data-system]').value = state.system;
  if ('tint' in state) find('[data-tint]').value = state.tint;
  if (state.draft && !prompt.value) {
    prompt.value = state.draft;
    grow();
  }
  if (state.writers !== undefined) {
    const known = (state.writers || []).every((name) => parts.includes(name));
    confine(known ? state.writers : null);
    if (!known) problem = 'names parts that this model does not have: the direction is removed from all.';
  }
  find('[data-length]').value = Math.min(number('[data-length]', 96), mostTokens());
  if (closed) close(closed);
  showDials();
  return problem;
}

function example(text) {
  const chip = make('button', text, 'chip-button');
  chip.type = 'button';
  chip.title = 'Ask this in a new conversation';
  chip.addEventListener('click', () => ask('fresh', text));
  return chip;
}

/** The examples of a category, folded until somebody opens it; one fold is open at a time. */
function fold({ category, texts }) {
  const node = make('details');
  node.name = 'harmful-examples';
  const chips = make('div', undefined, 'chips');
  chips.append(...texts.map(example));
  node.append(make('summary', category || 'all'), chips);
  return node;
}

// -- saving -------------------------------------------------------------------------------------------------------

/**
 * The messages for a link, with what of their settings is not the page's, and how many were answered with a direction that
 * a link cannot name.
 */
function gathered() {
  const said = drawn && !drawn.turns.some((turn) => turn.example) ? drawn.turns : [];
  const page = settings();
  const others = said.map(({ settings: own }) => {
    if (!own) return {};
    const differs = Object.keys(page).filter((name) => JSON.stringify(own[name]) !== JSON.stringify(page[name]));
    const moved = own.direction && own.direction.digest !== inUse.digest && own.direction.of_map;
    return { ...Object.fromEntries(differs.map((name) => [name, own[name]])), ...(moved && { cell: [own.direction.position, own.direction.layer] }) };
  });
  return {
    prompts: said.map((turn) => turn.prompt),
    turns: others.some((own) => Object.keys(own).length) ? others : undefined,
    elsewhere: said.filter(({ settings: own }) => own && own.direction && own.direction.digest !== inUse.digest && !own.direction.of_map).length,
  };
}

/** The conversation as it stands, with everything needed to have it again. */
function conversation() {
  return {
    made_with: document.title,
    model: document.querySelector('#bar [data-model]').textContent,
    direction: { layer: inUse.layer, position: inUse.position, mark: inUse.mark, digest: inUse.digest },
    ...settings(),
    turns: drawn.turns.map(({ prompt: said, settings: own, replies }) => ({ prompt: said, settings: own, replies })),
  };
}

/** In one line what is the same in every pane of a message. */
function settingsLine({ direction: used, ...set }) {
  const read = closed || !used ? '' : `direction: layer ${used.layer}, position ${String(used.position).replace('-', '−')}, ${used.mark} (${used.digest}) · `;
  return `${read}system prompt: ${set.system || 'none'} · temperature ${set.temperature}, seed ${set.seed}, at most ${set.max_new_tokens} tokens`
    + `${set.writers ? ` · removed only from ${set.writers.join(', ')}` : ''}`;
}

function pageOf(saved) {
  const { page, add, text } = newPage(saved.made_with);
  const line = settingsLine(saved);
  add(page.body, 'p', `${saved.model} · ${line}`);
  for (const { prompt: said, settings: own, replies } of saved.turns) {
    add(page.body, 'h2', said);
    if (own && settingsLine(own) !== line) add(page.body, 'p', settingsLine(own));
    const table = add(page.body, 'table');
    const [heads, texts, feet] = ['tr', 'tr', 'tr'].map((tag) => add(table, tag));
    for (const pane of PANES.filter((name) => replies[name])) {
      const reply = replies[pane];
      add(heads, 'th', `${NAMES[pane]} ${pane === 'unchanged' ? '' : `· ${rest(pane, reply)}`}`);
      add(texts, 'td', reply.text);
      add(add(feet, 'td'), 'small', [reply.verdict, because(reply)].filter(Boolean).join(': '));
    }
  }
  return text();
}

function saveAs(kind) {
  const saved = conversation();
  if (kind === 'json') save('conversation.json', 'application/json', `${JSON.stringify(saved, null, 2)}\n`);
  else save('conversation.html', 'text/html', pageOf(saved));
}

// -- opening what was saved ---------------------------------------------------------------------------------------

const MOST_FILE = 6000000; // bytes
const MOST_ASKED = 200;

/** Asks the messages of a saved conversation again: what it says that the panes said is not believed. */
async function openSaved(file) {
  let saved;
  try {
    if (file.size > MOST_FILE) throw new Error(`it has ${file.size} bytes, and at most ${MOST_FILE} are read`);
    saved = readSaved(await file.text());
  } catch (problem) {
    drawErrors({ error: `${file.name} cannot be opened, ${problem.message}: choose a conversation that was saved here as JSON.`, notice: '' });
    return;
  }
  if (!opened) return;
  const { page, messages, direction: used, model } = saved;
  const said = [];
  const inBar = document.querySelector('#bar [data-model]').textContent;
  if (model !== inBar) said.push(`The conversation was held with ${model}: ${inBar} may say something else.`);
  if (messages.some(({ used: its }) => its && its.digest && its.digest !== inUse.digest && !isOfMap(its))) {
    said.push('It was held with a direction that is not on the map, and the file does not have it: the one in use is taken instead.');
  }
  [script, waiting] = [[], null];
  halt();
  if (used && isOfMap(used) && used.digest !== inUse.digest && !closed && !inUse.isOwn) await take(used);
  const problem = apply(page);
  if (problem) confine(null, `The file ${problem}`);
  document.dispatchEvent(new CustomEvent('note', { detail: said }));
  const now = settings();
  replay(messages.map(({ prompt: text, own, used: its }) => ({ prompt: text, own: { ...now, ...bounded(own), ...(!closed && its && isOfMap(its) && its.digest !== inUse.digest && { cell: [its.position, its.layer] }) } })));
}

/** Whether the model's map has this direction; older files do not say so, but where it is from. */
function isOfMap({ of_map: ofMap, mark }) {
  return ofMap ?? mark !== 'from a file';
}

/** Takes the direction for everything on the page; after a moment the one in use stays. */
async function take({ position, layer }) {
  taking = Promise.withResolvers();
  setTimeout(taking.resolve, 4000);
  document.dispatchEvent(new CustomEvent('restore', { detail: { position, layer } }));
  await taking.promise;
  taking = null;
}

/** The settings and messages in a file, which may say anything; throws an error that says what of it is wrong. */
function readSaved(text) {
  let saved;
  try {
    saved = JSON.parse(text);
  } catch {
    throw new Error('it is not JSON');
  }
  if (!isPlain(saved) || !Array.isArray(saved.turns) || !saved.turns.length) throw new Error('there is no message in it');
  if (saved.turns.length > MOST_ASKED) throw new Error(`it has ${saved.turns.length} messages, and at most ${MOST_ASKED} are asked again`);
  const common = given(saved);
  const messages = saved.turns.map((turn, index) => {
    const at = `message ${index + 1}`;
    if (!isPlain(turn) || typeof turn.prompt !== 'string' || !turn.prompt.trim()) throw new Error(`${at} has no text`);
    if (turn.settings !== undefined && turn.settings !== null && !isPlain(turn.settings)) throw new Error(`${at} has settings that are none`);
    const own = { ...common, ...(turn.settings ? given(turn.settings) : strengths(turn.replies)) };
    const used = directionOf(turn.settings || saved);
    const wrong = wrongIn(own);
    if (wrong) throw new Error(`the ${wrong} of ${at} cannot be had here`);
    if (used !== null && !isDirection(used)) throw new Error(`${at} has a direction that is none`);
    return { prompt: turn.prompt, own, used };
  });
  if (directionOf(saved) && !isDirection(saved.direction)) throw new Error('it has a direction that is none');
  if (wrongIn(common)) throw new Error(`its ${wrongIn(common)} cannot be had here`);
  const last = messages[messages.length - 1];
  const { removal, addition, control, ...sampling } = { ...last.own, ...common };
  const page = { ...sampling };
  // What is not said stays as it is on the page, and a pane that is off leaves its dial.
  for (const [name, strength] of [['removed', removal], ['added', addition], ['control', control]]) {
    if (strength !== undefined) page[`${name}_on`] = strength !== null;
  }
  if (typeof removal === 'number') page.removal = removal;
  if (typeof (addition ?? control) === 'number') page.addition = addition ?? control; // one dial is the strength of both
  return {
    messages,
    direction: directionOf(saved) || last.used,
    model: typeof saved.model === 'string' ? saved.model.slice(0, 300) : 'a model that it does not name',
    page,
  };
}

const given = (settings) => Object.fromEntries(Object.keys(SETTINGS).filter((name) => name in settings && name !== 'cell').map((name) => [name, settings[name]]));

/** The strengths that the replies of an older file were given with: it has no settings message by message. */
function strengths(replies) {
  if (!isPlain(replies)) return {};
  const of = (pane) => (isPlain(replies[pane]) ? replies[pane].strength : null);
  return { removal: of('removed'), addition: of('added'), control: of('control') };
}

/** What is said of the direction; two servers have none. */
function directionOf({ direction: said }) {
  return said && said.digest === '' ? null : said ?? null;
}

function isDirection(value) {
  return isPlain(value) && FIELDS.position(value.position) && FIELDS.layer(value.layer) && [value.digest, value.mark].every((text) => typeof text === 'string' && text.length <= 300);
}

// -- controls -----------------------------------------------------------------------------------------------------

/** The height of the composer follows its text, which a reload of the tab leaves as it is. */
function grow() {
  keep('draft', prompt.value, 'sessionStorage');
  prompt.style.height = 'auto';
  if (prompt.scrollHeight) prompt.style.height = `${Math.min(prompt.scrollHeight, 200)}px`; // what is hidden has none
}

function turned() {
  clearTimeout(resting);
  resting = setTimeout(again, PATIENCE);
}

/** The same on a page that is in use: the pane that changes is on, and on a phone the one that is shown. */
function reconfine(names) {
  if (names) {
    find('[data-on="removed"]').checked = true;
    find('[data-segment="removed"]').click();
  }
  confine(names);
  showDials();
  again();
  foretell();
}

function showDials() {
  find('[data-value="removal"]').textContent = `${find('[data-dial="removal"]').value} %`;
  for (const pane of ['removed', 'added', 'control']) {
    element.querySelector('.talk').classList.toggle(`without-${pane}`, !find(`[data-on="${pane}"]`).checked);
  }
  drawForetold();
  find('[data-mode]').textContent = isSampled() ? 'sampled' : 'greedy';
  find('[data-seeded]').hidden = !isSampled();
  const { removal, addition } = settings();
  document.dispatchEvent(new CustomEvent('strengths', { detail: { removal, addition, parts: writers && counted(writers), writers: writers && [...writers].sort(), isSampled: isSampled() } }));
}

function bind() {
  const dial = find('[data-dial="addition"]');
  const box = find('[data-box="addition"]');
  dial.addEventListener('input', () => { box.value = Number(dial.value).toFixed(2); });
  box.addEventListener('change', () => {
    const value = Number.isFinite(box.valueAsNumber) ? Math.min(2, Math.max(-1, box.valueAsNumber)) : 1;
    dial.value = value;
    box.value = value.toFixed(2);
    showDials();
    turned();
  });
  all('[data-dial]').forEach((input) => {
    input.addEventListener('input', () => { showDials(); turned(); });
    input.addEventListener('dblclick', () => move(input, input.defaultValue));
  });
  all('[data-on], [data-temperature], [data-seed], [data-length], [data-system]').forEach((input) => {
    input.addEventListener('change', () => { showDials(); turned(); });
  });
  all('[data-segment]').forEach((button) => button.addEventListener('click', () => {
    find('.talk').dataset.show = button.dataset.segment;
    all('[data-segment]').forEach((other) => other.setAttribute('aria-pressed', String(other === button)));
  }));
  find('[data-tint]').addEventListener('change', askTint);
  find('[data-everywhere]').addEventListener('click', () => reconfine(null));
  find('form').addEventListener('submit', (submit) => {
    submit.preventDefault();
    ask('ask', prompt.value);
  });
  stop.addEventListener('click', (click) => {
    if (click.detail === 2) return; // the second half of a double click on Ask, which stood here
    [waiting, script] = [null, []];
    halt();
  });
  find('[data-retry]').addEventListener('click', () => {
    if (isSampled()) find('[data-seed]').value = number('[data-seed]', 0) + 1;
    again();
  });
  find('[data-undo]').addEventListener('click', () => request('undo'));
  find('[data-edit]').addEventListener('click', () => {
    prompt.value = [drawn.turns[drawn.turns.length - 1].prompt, prompt.value].filter((text) => text.trim()).join('\n');
    grow();
    prompt.focus();
    request('undo');
  });
  all('[data-save]').forEach((button) => button.addEventListener('click', () => saveAs(button.dataset.save)));
  find('[data-open]').addEventListener('change', ({ target }) => {
    const [file] = target.files;
    if (file) openSaved(file).finally(() => { target.value = ''; });
  });
  find('[data-clear]').addEventListener('click', () => {
    script = [];
    request('clear');
  });
  prompt.addEventListener('input', () => { grow(); foretell(); });
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
  const elsewhere = key.isComposing || key.target.closest('dialog, details[open] .sheet, input[type="search"]') || document.querySelector('#bar details[open], dialog[open]');
  if (key.key === 'Escape' && running && !elsewhere) {
    [waiting, script] = [null, []];
    halt();
  }
  const typing = key.target.closest('input:not([type="range"]), textarea, select, [contenteditable], dialog');
  if (typing || key.ctrlKey || key.metaKey || key.altKey) return;
  const addition = find('[data-dial="addition"]');
  if (key.key === '/') {
    key.preventDefault();
    showTab('Talk');
    setTimeout(() => prompt.focus(), 0); // once it is on the screen
  } else if (closed) {
    return; // the other keys move the dials
  } else if (key.key === ',' || key.key === '.') {
    move(addition, addition.valueAsNumber + (key.key === '.' ? 0.05 : -0.05));
  } else if (key.key === '0') {
    const removal = find('[data-dial="removal"]');
    const off = addition.valueAsNumber === 0 && removal.valueAsNumber === 0;
    move(addition, off ? 1 : 0);
    move(removal, off ? 100 : 0);
  }
};

function move(dial, value) {
  dial.value = value;
  dial.dispatchEvent(new Event('input'));
}

document.addEventListener('keydown', onKey);
document.addEventListener('compose', ({ detail }) => {
  if (!element.isConnected) return;
  prompt.value = detail;
  prompt.focus();
  grow();
  foretell();
});
document.addEventListener('draft', ({ detail }) => {
  if (!element.isConnected) return;
  prompt.value = detail;
  grow();
  foretell();
});
document.addEventListener('direction', ({ detail }) => {
  inUse = detail;
  const said = `at layer ${detail.layer}, position ${String(detail.position).replace('-', '−')}`;
  if (element.isConnected && detail.classes) {
    classes = detail.classes;
    const [more, less] = classes.join() === 'harmful,harmless' ? ['more refusal', 'less refusal'] : classes.map((name) => `toward ${name}`);
    setText(find('[data-more]'), more);
    setText(find('[data-less]'), less);
    const [high, low] = classes.join() === 'harmful,harmless' ? ['refusing', 'answering'] : classes;
    setText(find('[data-tint-more]'), `▲ ${high}`);
    setText(find('[data-tint-less]'), `● ${low}`);
  }
  if (!element.isConnected || detail.newModel || direction === detail.digest) return;
  direction = detail.digest;
  find('[data-where]').textContent = said;
  clearTints();
  if (taking) {
    taking.resolve(); // its messages are asked next
    return;
  }
  again();
  foretell();
});
document.addEventListener('dial', ({ detail }) => { if (element.isConnected) move(find(`[data-dial="${detail.name}"]`), detail.value); });
document.addEventListener('strengths-wanted', () => { if (element.isConnected) showDials(); });
document.addEventListener('confine', ({ detail }) => { if (element.isConnected) reconfine(detail); });
document.addEventListener('tint', ({ detail }) => { if (element.isConnected && detail && detail.panes) tinted(detail); });
document.addEventListener('gather', ({ detail }) => {
  if (!element.isConnected) return;
  const on = (pane) => find(`[data-on="${pane}"]`).checked;
  Object.assign(detail, {
    removal: number('[data-dial="removal"]', 100) / 100,
    addition: number('[data-dial="addition"]', 1),
    temperature: number('[data-temperature]', 0),
    max_new_tokens: number('[data-length]', 96),
    removed_on: on('removed'), added_on: on('added'), control_on: on('control'),
    tint: find('[data-tint]').value,
    system: find('[data-system]').value.trim(),
    writers: writers ?? undefined,
    draft: prompt.value.trim() ? prompt.value : undefined,
    seed: number('[data-seed]', 0),
    ...gathered(),
  });
});
document.addEventListener('forecast', ({ detail }) => { if (element.isConnected && detail) foretold(detail); });
document.addEventListener('forecast-wanted', () => { if (element.isConnected) tellForecast(); });
document.addEventListener('star-wanted', () => { if (element.isConnected) foretell(); });
bind();
prompt.value = kept('draft', 'sessionStorage') || '';
grow();
showDials();
if (props.value?.most_tokens) find('[data-length]').max = props.value.most_tokens;
watch('value', draw);
draw();
