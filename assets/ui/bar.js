// The bar. Everything that comes from Python is set as text.

/** A number with a minus sign instead of a hyphen. */
function signed(value) {
  return String(value).replace('-', '−');
}

function drawWaiting({ waiting }) {
  find('[data-waiting]').hidden = !waiting;
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

/** The models to choose from; what is in use is marked. */
function drawModels(view) {
  const inUse = view.state === 'ready' ? view.model.name : '';
  find('[data-offered]').replaceChildren(...view.offered.map((name) => {
    const node = make('button', name, 'model-button');
    node.type = 'button';
    node.setAttribute('aria-pressed', String(name === inUse));
    node.addEventListener('click', () => load(name));
    return node;
  }));
  find('[data-other]').hidden = !view.any_model;
  if (!inUse) find('[data-model]').textContent = 'none: choose one';
}

function load(model) {
  find('[data-models]').open = false;
  if (model.trim()) trigger('load_model', { model: model.trim() });
}

function drawReady(view) {
  find('.facts').hidden = view.state === 'waiting';
  all('[data-ready]').forEach((node) => { node.hidden = view.state !== 'ready'; });
  find('[data-toy]').hidden = !(view.state === 'ready' && view.model.organism);
  if (view.state !== 'ready') return;
  const { model, direction } = view;
  find('[data-model]').replaceChildren(make('b', model.name), ` ${model.parameters}, ${model.layers} layers`);
  find('[data-device]').textContent = `${model.device}, ${model.dtype}`;
  find('[data-toy]').replaceChildren(
    make('b', 'A toy, not a real model.'),
    ` A model organism of ${model.parameters} parameters, trained from scratch on generated sentences to show one phenomenon. `
      + 'What it says is form without knowledge.',
  );
  const chip = find('[data-direction]');
  chip.replaceChildren(
    make('b', `layer ${direction.layer}`),
    ` of ${model.layers} · position ${signed(direction.position)} `,
    make('code', readable(direction.token)),
    make('span', direction.mark, direction.passed ? 'mark' : 'mark relaxed'),
  );
  drawSheet(find('[data-sheet]'), direction);
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
  tokens.append(' “start like a refusal”: the first tokens most raised on harmful prompts, with their share there.');
  sheet.replaceChildren(
    make('p', direction.rule),
    scores,
    make('p', `The difference of mean activations over ${direction.prompts} that the untouched model treats as expected, `
      + 'read at the input of the layer (resid_pre), counted from 0; position −1 is the last token before the reply.'),
    tokens,
  );
}

function draw() {
  const view = props.value || {};
  if (!view.state) return;
  drawWaiting(view);
  drawReady(view);
  drawModels(view);
  const failed = find('[data-failed]');
  failed.hidden = !view.error;
  failed.textContent = view.error;
}

function setTheme(dark) {
  document.body.classList.toggle('dark', dark);
  document.dispatchEvent(new CustomEvent('theme'));
}

const kept = localStorage.getItem('theme');
if (kept) setTheme(kept === 'dark');
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', (change) => {
  if (!localStorage.getItem('theme')) setTheme(change.matches);
});
find('[data-theme]').addEventListener('click', () => {
  const dark = !document.body.classList.contains('dark');
  localStorage.setItem('theme', dark ? 'dark' : 'light');
  setTheme(dark);
});
all('details').forEach((chip) => chip.addEventListener('toggle', () => {
  const sheet = chip.querySelector('.sheet');
  sheet.style.translate = '0';
  const beyond = sheet.getBoundingClientRect().right - (document.documentElement.clientWidth - 12);
  if (beyond > 0) sheet.style.translate = `${-beyond}px`; // the sheet stays on the screen wherever its chip is
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
const about = find('[data-about]');
const onKey = (key) => {
  if (!element.isConnected) {
    document.removeEventListener('keydown', onKey);
  } else if (key.key === '?' && !key.target.closest('input, textarea, select') && !about.open) {
    about.showModal();
  }
};
document.addEventListener('keydown', onKey);
find('[data-help]').addEventListener('click', () => about.showModal());
find('[data-close]').addEventListener('click', () => about.close());
about.addEventListener('click', (click) => { if (click.target === about) about.close(); }); // on the backdrop
watch('value', draw);
draw();
