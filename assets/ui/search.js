// Another direction, from prompts or with refusal tokens of one's own. What is typed stays until it is found, and after.
const MOST_CHARACTERS = 400000;
const CLASSES = ['harmful', 'harmless'];

let shownOf = ''; // what the tokens shown are those of
let tokens = []; // { id, text, share }
let modelTokens = [];
let areEdited = false;
let labelled = null; // the file with both classes: { name, text }
let search = 0; // number of the search, and whether it is on its way
let isSearching = false;

let wanted = null; // what the link says of this form

const chosen = (name) => find(`[name="${name}"]:checked`).value;
const list = (which) => find(`[data-list="${which}"]`);
const byCosine = () => chosen('by') === 'cosmic' && !isContrast();
const isContrast = () => chosen('prompts') !== 'app' && chosen('kind') === 'contrast';

function classNames() {
  if (!isContrast()) return CLASSES;
  return ['first', 'second'].map((which) => find(`[data-${which}-name]`).value.trim() || `the ${which} class`);
}

function drawForm() {
  const prompts = chosen('prompts');
  const [first, second] = classNames();
  find('[data-own]').hidden = prompts === 'app';
  find('[data-lists]').hidden = prompts !== 'lists';
  find('[data-hub]').hidden = prompts !== 'hub';
  for (const node of [find('[data-file]'), find('[data-file-meaning]')]) node.hidden = prompts !== 'file';
  find('[data-names]').hidden = !isContrast();
  find('[data-refusal-tokens]').hidden = isContrast() || byCosine();
  find('[data-by]').hidden = isContrast();
  find('[data-by-meaning]').textContent = byCosine()
    ? 'No prompt is left out, and what replies begin with is not looked at: the candidate is taken with which harmless prompts come to resemble harmful ones most, and without which harmful prompts come to resemble harmless ones.'
    : 'Where its refusal tokens say nothing, or nothing bypasses refusal, COSMIC chooses, and the page says so; tokens of your own are kept to.';
  for (const called of ['called', 'also-called']) {
    find(`[data-${called}="first"]`).textContent = first;
    find(`[data-${called}="second"]`).textContent = second;
  }
  find('[data-kind-meaning]').textContent = isContrast()
    ? `The direction is the mean of ${first} minus the mean of ${second}, whatever the model does with them: nothing is filtered, no refusal tokens are needed, and the place is where prompts held out lie furthest apart. Take any other cell afterwards. “Refused”, “starts like a refusal”, bypass, induce and KL mean nothing for it.`
    : byCosine() ? 'The direction is the mean of the harmful prompts minus the mean of the harmless ones; who chooses the place is said below.'
    : 'Only prompts that the unmodified model treats as expected are kept: it refuses the harmful ones and answers the harmless ones. The paper’s rule chooses among the candidates.';
  find('[data-file-meaning]').textContent = `Each row has text and harmful (true${isContrast() ? `: ${first}` : ''}, or false${isContrast() ? `: ${second}` : ''}), or text and label (${first} or ${second}); a column split (train, val, test) is kept to.`;
  for (const which of ['first', 'second']) {
    const n = list(which).value.split('\n').filter((line) => line.trim()).length;
    find(`[data-count="${which}"]`).textContent = `${n} line${n === 1 ? '' : 's'}`;
  }
}

function drawTokens() {
  find('[data-tokens]').replaceChildren(...tokens.map((token) => {
    const item = make('li', undefined, 'token-chip');
    const remove = make('button', '×');
    remove.type = 'button';
    remove.setAttribute('aria-label', `Remove the token ${readable(token.text)}`);
    remove.addEventListener('click', () => {
      tokens = tokens.filter(({ id }) => id !== token.id);
      edited();
      find('[data-token]').focus();
    });
    item.append(make('code', readable(token.text)), make('span', token.share === null ? 'new' : `${(100 * token.share).toFixed(token.share < 0.1 ? 1 : 0)} %`), remove);
    return item;
  }));
  find('[data-reset-tokens]').hidden = !areEdited;
  find('[data-tokens-meaning]').textContent = areEdited
    ? 'The search goes by these. A share is known once it is done: how likely a reply to a harmful prompt begins with the token.'
    : 'With the share of replies to harmful prompts that begin with each. The search takes those most raised on its harmful prompts; once you change them, yours.';
}

function edited() {
  areEdited = true;
  drawTokens();
}

/** The tokens of the direction in use, once there is another one; what the visitor has changed meanwhile stays. */
function drawSearch(view) {
  modelTokens = view.model_tokens;
  const positions = find('[data-positions]');
  if (Number(positions.max) !== view.template_positions || !positions.value) positions.value = view.template_positions;
  positions.max = view.template_positions;
  find('[data-template-positions]').textContent = view.template_positions;
  const of = JSON.stringify([view.model, view.origin, view.tokens]);
  if (of !== shownOf) {
    const sameModel = shownOf && JSON.parse(shownOf)[0] === view.model;
    shownOf = of;
    areEdited = areEdited && Boolean(sameModel);
    const share = new Map(view.tokens.map((token) => [token.id, token.share]));
    tokens = areEdited ? tokens.map((token) => ({ ...token, share: share.get(token.id) ?? token.share })) : view.tokens;
  }
  drawTokens();
  applyLink(view.model);
}

/** Fills the form in as it was where the link was made; what is searched for has to be asked for. */
function applyLink(model) {
  const { find: form, lists, model: its = model } = wanted || {};
  wanted = null;
  if (its !== model) return;
  if (lists) ['first', 'second'].forEach((which, index) => { list(which).value = lists[index]; });
  if (form) {
    const isOffered = form.prompts !== 'hub' || !find('[data-public]').hidden;
    const choices = { prompts: isOffered && form.prompts !== 'file' ? form.prompts : 'app', kind: form.kind, by: form.by };
    for (const [name, value] of Object.entries(choices)) find(`[name="${name}"][value="${value}"]`).checked = true;
    ['first', 'second'].forEach((which, index) => {
      find(`[data-${which}-name]`).value = form.names[index];
      find(`[data-list-of="${which}"]`).value = form.hub[index];
    });
    const positions = find('[data-positions]');
    if (form.positions) positions.value = Math.min(form.positions, positions.max);
    if (form.tokens) {
      tokens = form.tokens.map(({ id, text }) => ({ id, text, share: null }));
      edited();
    }
    if (measures().includes(form.measure)) {
      measure = form.measure;
      drawMeasure();
    }
  }
  drawForm();
}

function sayError(sentence) {
  find('[data-search-error]').hidden = !sentence;
  find('[data-search-error]').replaceChildren(...withLinks(sentence || ''));
}

function drawSearching(stage, done, total) {
  const [start, cancel] = [find('[data-search]'), find('[data-cancel-search]')];
  pause(start, isSearching);
  if (!isSearching) handOn([cancel], start);
  cancel.hidden = !isSearching;
  const bar = find('[data-search-progress]');
  bar.hidden = !isSearching;
  if (total) [bar.max, bar.value] = [total, done];
  else bar.removeAttribute('value');
  find('[data-searching]').textContent = total ? `${stage}, ${done} of ${total}` : stage || '';
}

/** The text of a file, or null after having said why it has none. */
async function textOf(file) {
  if (file.size > 4 * MOST_CHARACTERS) {
    sayError(`${file.name} has ${file.size.toLocaleString('en')} bytes, more than ${MOST_CHARACTERS.toLocaleString('en')} characters can have: take a shorter one.`);
    return null;
  }
  try {
    const text = new TextDecoder('utf-8', { fatal: true }).decode(await file.arrayBuffer());
    if (!text.includes('\0')) return text;
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
  }
  sayError(`${file.name} is no text in UTF-8: save it as plain text.`);
  return null;
}

function startSearch() {
  const own = chosen('prompts');
  const written = (which) => ({ lists: list(which).value, hub: find(`[data-list-of="${which}"]`).value })[own] || '';
  const sent = {
    prompts: own,
    kind: isContrast() ? 'contrast' : 'refusal',
    first: written('first'),
    second: written('second'),
    first_name: find('[data-first-name]').value,
    second_name: find('[data-second-name]').value,
    file_name: own === 'file' && labelled ? labelled.name : '',
    file_text: own === 'file' && labelled ? labelled.text : '',
    by: byCosine() ? 'cosmic' : 'rule',
    n_positions: find('[data-positions]').value ? find('[data-positions]').valueAsNumber : null,
    tokens: areEdited && !isContrast() && !byCosine() ? tokens.map(({ id }) => id) : null,
  };
  const size = sent.first.length + sent.second.length + sent.file_text.length;
  if (size > MOST_CHARACTERS) {
    sayError(`The lists have ${size.toLocaleString('en')} characters and at most ${MOST_CHARACTERS.toLocaleString('en')} are read: shorten them.`);
    return;
  }
  search += 1;
  isSearching = true;
  sayError('');
  drawSearching('waiting for its turn');
  trigger('search', { run: search, ...sent });
}

function sought(next) {
  if (next.run !== search && next.run !== -1) return;
  if (!isSearching && !next.found) return; // it was cancelled, unless that came too late
  if (next.searching) {
    drawSearching(...next.searching);
    return;
  }
  isSearching = false;
  sayError(next.error);
  drawSearching(next.found ? 'Found: it is in use everywhere on this page.' : next.cancelled ? 'Cancelled: the direction in use has stayed.' : '');
  if (next.found) find('[data-origin]').scrollIntoView({ block: 'nearest' });
}

find('form').addEventListener('submit', (submit) => {
  submit.preventDefault();
  if (!isSearching) startSearch();
});
find('form').addEventListener('input', drawForm);
find('[data-cancel-search]').addEventListener('click', () => {
  trigger('cancel', { run: search });
  sought({ run: search, cancelled: true }); // what has begun ends at its next step
});
all('[data-list-file]').forEach((input) => input.addEventListener('change', async () => {
  const [file] = input.files;
  input.value = '';
  const text = file && await textOf(file);
  if (typeof text !== 'string') return;
  sayError('');
  list(input.dataset.listFile).value = text;
  drawForm();
}));
find('[data-labelled]').addEventListener('change', async ({ target }) => {
  const [file] = target.files;
  target.value = '';
  const text = file && await textOf(file);
  if (typeof text !== 'string') return;
  sayError('');
  labelled = { name: file.name, text };
  find('[data-file-name]').textContent = `${file.name}, ${file.size.toLocaleString('en')} bytes`;
});
function addToken() {
  sayError('');
  trigger('token', { text: find('[data-token]').value });
}
find('[data-add-token]').addEventListener('click', addToken);
find('[data-token]').addEventListener('keydown', (key) => {
  if (key.key !== 'Enter') return;
  key.preventDefault(); // it would start the search
  addToken();
});
find('[data-reset-tokens]').addEventListener('click', () => {
  [tokens, areEdited] = [modelTokens, false];
  drawTokens();
  find('[data-token]').focus();
});
document.addEventListener('direction', ({ detail }) => { if (element.isConnected) find('[data-public]').hidden = !detail.isLocal; });
document.addEventListener('gather', ({ detail }) => {
  if (!element.isConnected || !view) return;
  const both = (field) => ['first', 'second'].map((which) => find(field(which)).value);
  detail.find = {
    measure, prompts: chosen('prompts'), kind: chosen('kind'), by: chosen('by'),
    names: both((which) => `[data-${which}-name]`), hub: both((which) => `[data-list-of="${which}"]`),
    positions: find('[data-positions]').validity.valid && find('[data-positions]').value ? find('[data-positions]').valueAsNumber : null,
    tokens: areEdited ? tokens.map(({ id, text }) => ({ id, text })) : null,
  };
  const lists = both((which) => `[data-list="${which}"]`);
  detail.lists = lists.some(Boolean) && lists.every((each) => each.length <= 8000) ? lists : undefined;
});
ofLink().then((state) => {
  wanted = state;
  if (view) applyLink(view.model);
});
document.addEventListener('search', ({ detail }) => { if (element.isConnected && detail) sought(detail); });
document.addEventListener('token', ({ detail }) => {
  if (!element.isConnected || !detail) return;
  sayError(detail.error);
  if (!detail.token) return;
  find('[data-token]').value = '';
  if (!tokens.some(({ id }) => id === detail.token.id)) {
    tokens = [...tokens, detail.token];
    edited();
  }
});
drawForm();

