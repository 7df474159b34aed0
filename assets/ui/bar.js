// The bar. Everything that comes from Python is set as text.

/** A number with a minus sign instead of a hyphen. */
function signed(value) {
  return String(value).replace('-', '−');
}

function drawWaiting({ waiting, state, any_model: isLocal }) {
  find('.facts').hidden = state === 'waiting';
  if (!waiting) handOn([find('[data-cancel-load]')], find('[data-model]'));
  find('[data-waiting]').hidden = !waiting;
  find('[data-cancel-load]').hidden = state === 'waiting' && !isLocal; // others wait for it as well
  if (!waiting) return;
  const count = waiting.total ? `, ${waiting.done} of ${waiting.total}` : '';
  find('[data-stage]').textContent = `${waiting.stage}${count}`;
  const bar = find('progress');
  if (waiting.total) {
    bar.max = waiting.total;
    bar.value = waiting.done;
  } else {
    bar.removeAttribute('value');
  }
}

/** Who answers where it is two servers: they are chosen when the app is started. */
function drawServers(view) {
  find('[data-model]').replaceChildren(make('b', 'two servers'));
  find('[data-offered]').replaceChildren(...view.servers.map(({ pane, said }) => make('p', `${pane}: ${said}`)));
  find('[data-other]').hidden = true;
  find('[data-models-note]').textContent = 'Other servers are named when the app is started, with --baseline and --ablated; no others are asked.';
  tell({ model: view.model, direction: { digest: '', own: false } });
}

/** The models to choose from; what is in use is marked. */
function drawModels(view) {
  const held = find('[data-offered]').contains(document.activeElement) && document.activeElement.textContent;
  const inUse = view.state === 'ready' ? view.model.name : '';
  find('[data-offered]').replaceChildren(...view.offered.map((name) => {
    const node = make('button', name, 'model-button');
    node.type = 'button';
    node.setAttribute('aria-pressed', String(name === inUse));
    node.addEventListener('click', () => load(name));
    return node;
  }));
  if (held) all('.model-button').find((node) => node.textContent === held)?.focus();
  find('[data-other]').hidden = !view.any_model;
  if (!inUse && !told) find('[data-model]').textContent = 'none: choose one';
}

function load(model) {
  closeSheets();
  if (model.trim()) trigger('load_model', { model: model.trim() });
}

function drawReady(view) {
  all('[data-ready]').forEach((node) => { node.hidden = view.state !== 'ready'; });
  find('[data-toy]').hidden = !(view.state === 'ready' && view.model.organism);
  find('[data-demo]').hidden = view.state !== 'ready' || (view.model.organism && view.any_model) || kept('demo') === 'seen';
  find('[data-meaning-of]').hidden = true;
  if (view.state !== 'ready') return;
  const { model, direction } = view;
  all('[data-class]').forEach((node) => { node.textContent = direction.classes[node.dataset.class]; });
  find('[data-model]').replaceChildren(make('b', model.name), make('span', ` ${model.parameters}, ${model.layers} layers`, 'wide'));
  find('[data-device]').textContent = [model.device, model.dtype, model.thinking].filter(Boolean).join(', ');
  find('[data-toy]').replaceChildren(
    make('b', 'A toy, not a real model.'),
    make('span', ` A model organism of ${model.parameters} parameters, trained from scratch on generated sentences to show one phenomenon.`, 'wide'),
    ' What it says is form without knowledge.',
  );
  find('[data-meaning-of]').hidden = !direction.meaning;
  find('[data-meaning-of]').textContent = direction.meaning;
  const chip = find('[data-direction]');
  chip.replaceChildren(
    make('b', `layer ${direction.layer}`),
    make('span', ` of ${model.layers}`, 'wide'),
    ` · position ${signed(direction.position)} `,
    make('code', readable(direction.token)),
    make('span', direction.mark, direction.passed ? 'mark' : 'mark relaxed'),
  );
  drawSheet(find('[data-sheet]'), direction);
  drawSmallMap(direction);
}

let shownCells = '';

/** The candidates as in Find, small: a click takes one. */
function drawSmallMap({ candidates: { measure, positions, cells }, layer: usedLayer, position: usedPosition, mark }) {
  const holder = find('[data-small-map]');
  const shown = JSON.stringify([measure, positions, cells, usedLayer, usedPosition, mark]);
  if (shownCells === shown) return; // what another model's loading says is no reason to draw it anew
  shownCells = shown;
  const held = holder.contains(document.activeElement) && document.activeElement.dataset.small;
  const table = make('table');
  const head = table.insertRow();
  const layers = [...new Set(cells.map(({ layer }) => layer))];
  const title = (text, scope) => Object.assign(make('th', text), { scope });
  head.append(title('layer', 'col'), ...layers.map((layer) => title(String(layer), 'col')));
  for (const { position, token } of positions) {
    const row = table.insertRow();
    const name = title(`${signed(position)} `, 'row');
    name.append(make('code', readable(token)));
    row.append(name);
    for (const cell of cells.filter((each) => each.position === position)) {
      const isUsed = cell.layer === usedLayer && position === usedPosition && mark !== 'from a file';
      const node = make('button', cell.value === null ? '?' : cell.chosen ? '★' : '', 'small-cell');
      node.type = 'button';
      node.classList.toggle('rejected', cell.rejected);
      node.disabled = cell.zero;
      node.dataset.small = `${position} ${cell.layer}`;
      node.title = `Layer ${cell.layer}, position ${signed(position)}: ${measure} ${cell.value === null ? 'not measured' : signed(cell.value.toFixed(2))}${cell.rejected ? ', discarded by the rule' : ''}${cell.chosen ? ', the rule’s choice' : ''}`;
      node.setAttribute('aria-label', node.title);
      node.setAttribute('aria-pressed', String(isUsed));
      node.tabIndex = -1;
      if (cell.value !== null) node.style.setProperty('--value', scoreColour(measure, cell.value));
      node.addEventListener('click', () => trigger('restore', { position, layer: cell.layer }));
      row.insertCell().append(node);
    }
  }
  holder.replaceChildren(table);
  const stop = holder.querySelector('[aria-pressed="true"]') || holder.querySelector('button:not(:disabled)');
  if (stop) stop.tabIndex = 0; // one stop for the whole map, the arrows go on from there
  if (held) [...holder.querySelectorAll('button')].find((node) => node.dataset.small === held)?.focus();
}

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

find('[data-small-map]').addEventListener('keydown', (key) => {
  const cell = key.target.closest('td');
  if (!STEPS[key.key] || !cell) return;
  key.preventDefault();
  const [down, right] = STEPS[key.key];
  const rows = [...cell.closest('table').rows];
  rows[cell.parentNode.rowIndex + down]?.cells[cell.cellIndex + right]?.querySelector('button:not(:disabled)')?.focus();
});

/** The strengths of Talk, which are those of the page. */
function drawStrengths({ removal, addition, parts, isSampled }) {
  const said = { removal: removal === null ? 'off' : `${Math.round(100 * removal)} %${parts ? ` from ${parts}` : ''}`, addition: addition === null ? 'off' : `${signed(addition.toFixed(2))}×` };
  find('[data-strengths]').textContent = `⊖ ${said.removal} ⊕ ${said.addition}${isSampled ? ', sampled' : ''}`;
  find('[data-strengths]').setAttribute('aria-label', `Strengths: removed ${said.removal}, added ${said.addition}${isSampled ? ', sampled' : ''}`);
  for (const input of all('[data-strength]')) {
    const value = { removal: removal === null ? null : 100 * removal, addition }[input.dataset.strength];
    input.disabled = value === null; // a pane that is off is switched on in Talk
    if (value !== null) input.value = value;
    input.nextElementSibling.textContent = said[input.dataset.strength];
  }
}

function drawSheet(sheet, direction) {
  const scores = make('table');
  for (const score of direction.scores) {
    const row = scores.insertRow();
    row.append(make('th', score.name), make('td', signed(score.value), 'number'), make('td', score.meaning));
  }
  const size = scores.insertRow();
  size.append(make('th', 'size'), make('td', direction.norm, 'number'), make('td', '‖r‖, the distance between the two means; 1× adds this much'));
  const tokens = make('p', 'Replies that start with ');
  direction.refusal_tokens.forEach((token, index) => {
    if (index) tokens.append(', ');
    tokens.append(make('code', readable(token.text)), ` ${Math.round(100 * token.share)} %`);
  });
  tokens.append(' “start like a refusal”, with the share of replies to harmful prompts that do.');
  sheet.replaceChildren(
    make('p', direction.rule),
    scores,
    make('p', `The difference of mean activations over ${direction.prompts}, `
      + 'read at the input of the layer (resid_pre), counted from 0; position −1 is the last token before the reply.'),
    tokens,
  );
}

let last = {};

/** While another model is on its way only that is said: what is in use may change meanwhile. */
function draw() {
  const view = { ...last, ...props.value };
  if (!view.state) return;
  last = view;
  drawWaiting(view);
  drawReady(view);
  if (view.state === 'served') drawServers(view);
  else drawModels(view);
  if (view.state === 'ready' && props.value.state) tell(view);
  if (view.error) closeSheets();
  const failed = find('[data-failed]');
  failed.hidden = !view.error;
  failed.replaceChildren(...withLinks(view.error || ''));
}

const MOST_BYTES = 6000000;

// -- the link -----------------------------------------------------------------------------------------------------

/** Takes the direction that the link names, once the model is ready; Talk asks when that is done. */
async function follow({ model, direction }) {
  if (missed) {
    [missed, arrived, following] = [false, false, false];
    window.linkApplied = Promise.withResolvers();
  }
  const { state, problems } = await reading;
  const said = [...problems];
  const there = state.layer === undefined || state.position === undefined || (state.layer === direction.layer && state.position === direction.position);
  if (state.model !== undefined && state.model !== model.name) {
    missed = true;
    note([...said, `The link was made with ${state.model}: load that model here to see the same.`]);
    if (last.offered.includes(state.model)) offerModel(state.model);
    arrive();
    return;
  } else if (!there && !following) {
    following = true;
    trigger('restore', { position: state.position, layer: state.layer });
    note(said);
    setTimeout(() => {
      if (arrived) return;
      note([...said, 'The direction that the link names is not on the map of this model, or took too long: the rule’s choice stays.']);
      arrive();
    }, 4000);
    return;
  }
  note(said);
  arrive();
}

/** Nothing is fetched because a link says so: somebody has to press this. */
function offerModel(name) {
  const button = make('button', 'Load it', 'quiet');
  button.type = 'button';
  button.addEventListener('click', () => load(name));
  find('[data-note]').append(' ', button);
}

let missed = false; // the model of the link is another one
let following = false;
let arrived = false;

async function arrive() {
  if (arrived) return;
  arrived = true;
  window.linkApplied.resolve();
  const { state } = await reading;
  showTab(state.tab);
}

/** An open sheet would cover what is said below the bar; the focus stays where it was opened. */
function closeSheets() {
  all('details[open]').forEach((chip) => {
    handOn([chip], chip.querySelector('summary'));
    chip.open = false;
  });
}

function note(said) {
  if (said.length) closeSheets();
  handOn([find('[data-note]')], find('[data-model]'));
  find('[data-note]').textContent = said.join(' ');
}

async function copyLink() {
  const { state: opened } = await reading;
  // Of a tab that was not opened since, the link is handed on as it came.
  const state = missed ? {} : Object.fromEntries(['map', 'find', 'lists', 'measure', 'inside'].filter((name) => name in opened).map((name) => [name, opened[name]]));
  document.dispatchEvent(new CustomEvent('gather', { detail: state }));
  const tab = document.querySelector('#tabs [role="tab"][aria-selected="true"]').textContent.trim();
  const { model, position, layer, isSaved, isOwn } = told;
  const here = isSaved || isOwn ? {} : { position, layer };
  const { elsewhere, ...said } = state;
  const { text: hash, left } = await packed({ ...said, ...here, model, tab });
  const lost = [elsewhere > 0 && 'Messages that were answered with a direction that is no longer in use, and not on the map, are asked with the one in use.', isOwn && 'A direction that you had found is not part of it: save it as a file, and hand that on.', isSaved && !isOwn && 'A direction from a file is not part of it: hand the file on as well.', left.length && `Too long for a link, and not in it: ${left.join(', ')}.`].filter(Boolean);
  history.replaceState(null, '', `#${hash}`);
  try {
    await navigator.clipboard.writeText(location.href);
    note([lost.length ? 'The link is copied.' : 'The link is copied: it asks these messages again, with the settings of each, on this tab.', ...lost]);
  } catch {
    note(['The address of the page is the link now: copy it from there.', ...lost]);
  }
}

let told = null;

/** Says which direction is in use to the parts of the page that depend on it. */
function tell({ model, direction, any_model: isLocal }) {
  const { position, layer, digest } = direction;
  const now = { model: model.name, position, layer, digest, mark: direction.mark, isSaved: direction.mark === 'from a file', isOwn: direction.own, classes: direction.classes, isLocal };
  if (JSON.stringify(now) === JSON.stringify(told)) return;
  const newModel = told === null || told.model !== now.model;
  told = now;
  find('[data-link]').disabled = false;
  if (!arrived || (missed && newModel)) follow({ model, direction });
  document.dispatchEvent(new CustomEvent('direction', { detail: { ...now, newModel } }));
}

function setTheme(dark) {
  document.body.classList.toggle('dark', dark);
  document.dispatchEvent(new CustomEvent('theme'));
}

if (kept('theme')) setTheme(kept('theme') === 'dark');
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', (change) => {
  if (!kept('theme')) setTheme(change.matches);
});
find('[data-theme]').addEventListener('click', () => {
  const dark = !document.body.classList.contains('dark');
  keep('theme', dark ? 'dark' : 'light');
  setTheme(dark);
});
all('details').forEach((chip) => chip.addEventListener('toggle', () => {
  const sheet = chip.querySelector('.sheet');
  sheet.style.translate = '0';
  const beyond = sheet.getBoundingClientRect().right - (document.documentElement.clientWidth - 12);
  if (beyond > 0) sheet.style.translate = `${-beyond}px`; // the sheet stays on the screen wherever its chip is
  if (chip.open) sheet.querySelector('.small-cell[aria-pressed="true"]')?.scrollIntoView({ block: 'nearest', inline: 'center' });
}));
document.addEventListener('click', (click) => {
  all('details[open]').forEach((chip) => { if (!chip.contains(click.target)) chip.open = false; });
});
element.addEventListener('keydown', (key) => {
  const chip = find('details[open]');
  if (key.key !== 'Escape' || !chip) return;
  chip.open = false;
  chip.querySelector('summary').focus();
});
find('[data-other]').addEventListener('submit', (submit) => {
  submit.preventDefault();
  load(find('#other-model').value);
});
find('[data-demo-seen]').addEventListener('click', () => {
  keep('demo', 'seen');
  handOn([find('[data-demo]')], find('[data-model]'));
  find('[data-demo]').hidden = true;
});
window.addEventListener('hashchange', () => location.reload()); // a link put into the address of the open page
find('[data-candidates]').addEventListener('click', () => {
  closeSheets();
  showTab('Find').focus();
});
for (const input of all('[data-strength]')) {
  input.addEventListener('input', () => document.dispatchEvent(new CustomEvent('dial', { detail: { name: input.dataset.strength, value: input.valueAsNumber } })));
}
document.addEventListener('strengths', ({ detail }) => { if (element.isConnected) drawStrengths(detail); });
find('[data-cancel-load]').addEventListener('click', () => trigger('cancel_load', {}));
find('[data-link]').addEventListener('click', copyLink);
all('[data-save-direction]').forEach((button) => button.addEventListener('click', () => trigger('save_direction', { format: button.dataset.saveDirection })));
find('[data-load-direction]').addEventListener('change', async ({ target }) => {
  const files = [...target.files];
  target.value = '';
  if (!files.length) return;
  const size = files.reduce((sum, file) => sum + file.size, 0);
  if (size > MOST_BYTES) {
    note([`${files.map((file) => file.name).join(', ')}: ${size} bytes, and at most ${MOST_BYTES} are read here; the command line reads more.`]);
    return;
  }
  const read = async (file) => {
    const bytes = new Uint8Array(await file.arrayBuffer());
    return { name: file.name, data: btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), '')) };
  };
  trigger('load_direction', { files: await Promise.all(files.map(read)) });
});
document.addEventListener('file', ({ detail }) => {
  if (!element.isConnected || !detail) return;
  if (detail.error) note([detail.error]);
  else if (detail.data) save(detail.name, 'application/octet-stream', Uint8Array.from(atob(detail.data), (letter) => letter.charCodeAt(0)));
});
/** A finger cannot hover: what it taps, or a button that it rests on, says here what its tooltip would. */
function showTip(event, isHeld) {
  const titled = event.pointerType === 'touch' && event.target.closest('[title]');
  const isMeant = titled && isHeld === Boolean(titled.closest('button, a, summary, .file')); // of text a finger that rests selects some
  find('[data-tip]').textContent = isMeant ? titled.title : '';
  find('[data-tip]').hidden = !isMeant;
  if (isMeant && isHeld) event.preventDefault();
}

const onTap = (event) => {
  if (element.isConnected) {
    showTip(event, event.type === 'contextmenu');
  } else {
    for (const name of ['click', 'contextmenu']) document.removeEventListener(name, onTap);
  }
};
for (const name of ['click', 'contextmenu']) document.addEventListener(name, onTap);
const about = find('[data-about]');
const onKey = (key) => {
  if (!element.isConnected) {
    document.removeEventListener('keydown', onKey);
  } else if (key.key === '?' && !key.target.closest('input:not([type="range"]), textarea, select') && !about.open) {
    about.showModal();
  }
};
document.addEventListener('keydown', onKey);
find('[data-help]').addEventListener('click', () => about.showModal());
find('[data-close]').addEventListener('click', () => about.close());
about.addEventListener('click', (click) => { if (click.target === about) about.close(); }); // on the backdrop
document.addEventListener('note', ({ detail }) => { if (element.isConnected) note(detail); });
document.addEventListener('restore', ({ detail }) => { if (element.isConnected) trigger('restore', detail); });
document.addEventListener('direction-wanted', () => {
  if (element.isConnected && told) document.dispatchEvent(new CustomEvent('direction', { detail: { ...told, newModel: false } }));
});
watch('value', draw);
draw();
document.dispatchEvent(new CustomEvent('strengths-wanted'));
