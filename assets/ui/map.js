// The map. Python sends every layer of a position at once, so that moving through them asks nobody.
const still = matchMedia('(prefers-reduced-motion: reduce)');
const ROLES = ['harmful', 'harmless'];
const MARKS = { flat: { harmful: '▲', harmless: '●' }, solid: { harmful: '◆', harmless: '●' } };
const FAINT = 0.12;
const BARE = { xaxis: { visible: false }, yaxis: { visible: false }, paper_bgcolor: 'transparent', plot_bgcolor: 'transparent' };

let view = null; // what is drawn
let layer = null;
let figures = null; // the figures of the view, its points and what is shown at them
let axes = 'pca'; // what is to be on the axes
let position = null; // the position that is to be shown
let playing;
let forecast = null; // where the visitor's prompt lies
let umap = null; // the layer that UMAP has laid out, or is laying out
let asks = 0; // number of the last map that was asked for
let inUse = ''; // the direction of the bar
let askedOf = ''; // that of the map that was asked for
let asking;
let layouts = 0;
let ticking;
let eye = null; // from where the cloud is seen, once the slider has turned it
let listed = null; // the prompts that are listed and stand out: words, and indices by role
let dragging = matchMedia('(pointer: coarse)').matches ? null : 'lasso'; // a finger that drags moves the page

const shown = () => (axes === 'umap' ? 'umap' : view.axes);
const solid = () => shown() === 'turned';

// -- the points ---------------------------------------------------------------------------------------------------

/** Text as plotly shows it literally: it reads tags, so what could begin one is escaped. At most six lines. */
function shownAs(text) {
  const lines = text.replace(/\s+/g, ' ').trim().match(/.{1,48}(?= |$)|.{48}/g) || [''];
  const escaped = lines.slice(0, 6).map((line) => line.trim().replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;'));
  return escaped.join('<br>') + (lines.length > 6 ? ' …' : '');
}

function hoverOf(role) {
  return view.prompts[role].map(([text, category]) => `${shownAs(text)}<br><i>${shownAs(view.classes[role])}${category ? `, ${shownAs(category)}` : ''}</i>`);
}

/** What is to be seen: the traces of both classes and the visitor's prompt; no points while UMAP is at work. */
function scatter() {
  if (axes === 'umap' && !(isAsked(umap) && umap.figure)) return { data: [], layout: { ...BARE } };
  const { layout, data } = axes === 'umap' ? umap.figure : figures.map;
  const at = (role) => named(axes === 'umap' ? umap.points[role][0] : figures.points[role][layer]);
  const traces = ROLES.map((role, index) => ({ ...data[index], ...at(role), hovertext: figures.hover[role] }));
  const figure = painted(withStar({ data: traces, layout }));
  if (!solid()) figure.layout.dragmode = dragging || false;
  figure.layout.selections = []; // the list says what was selected; the drawn line would stay where the points were
  figure.layout.selectionrevision = Math.random();
  ROLES.forEach((role, index) => { setApart(figure.data[index], role); });
  return figure;
}

const named = ([x, y, z]) => (z ? { x, y, z } : { x, y });

/** Lets the listed prompts of a class stand out: the others are faint, in 3-D, which cannot fade points, small and grey. */
function setApart(trace, role) {
  const stands = listed && listed[role];
  if (!solid()) {
    Object.assign(trace, { selectedpoints: stands, selected: { marker: { opacity: 1, size: 11 } }, unselected: { marker: { opacity: FAINT } } });
  } else if (stands) {
    const among = new Set(stands);
    const choose = (yes, no) => trace.x.map((_, index) => (among.has(index) ? yes : no));
    Object.assign(trace.marker, { color: choose(colour(role), colour('muted')), size: choose(trace.marker.size + 2, 2) });
  }
}

/** Where the forecast says that the visitor's own prompt lies; at the edge if it lies beyond the axes. */
function star(layout) {
  const stars = forecast && forecast.stars[`${view.position} ${shown()}`];
  const ranges = ['xaxis', 'yaxis', 'zaxis'].map((name) => (layout.scene || layout)[name]?.range);
  const at = stars?.[layer] ? stars[layer].map((value, axis) => Math.max(ranges[axis][0], Math.min(ranges[axis][1], value))) : null;
  const beyond = at && at.some((value, axis) => value !== stars[layer][axis]);
  const said = forecast ? `${shownAs(forecast.prompt)}<br><i>your prompt${beyond ? ', beyond the edge' : ''}</i>` : '';
  return { at, said, beyond };
}

/** The star as a trace; in 3-D as a note, because there nearer points would hide it. */
function withStar({ data, layout }) {
  const { at, said, beyond } = star(layout);
  if (solid()) {
    const note = at && { x: at[0], y: at[1], z: at[2], text: beyond ? '☆' : '★', showarrow: false, hovertext: said, font: { size: 24, color: colour('ink') } };
    const camera = eye ? { ...layout.scene.camera, eye } : layout.scene.camera;
    return { data, layout: { ...layout, scene: { ...layout.scene, camera, annotations: at ? [note] : [] } } };
  }
  const [x, y] = at || [null, null];
  const trace = {
    type: 'scatter', mode: 'markers', name: 'your prompt', meta: { role: 'ink' }, x: [x], y: [y], hoverinfo: 'text', hovertext: [said],
    cliponaxis: false, marker: { symbol: beyond ? 'star-open' : 'star', size: 17 }, unselected: { marker: { opacity: 1 } },
  };
  return { data: [...data, trace], layout };
}

const own = find('[data-own]');

/** The field is another sight of Talk's composer: what is written in one stands in the other. */
function showDraft() {
  const draft = document.querySelector('#talk [data-prompt]');
  if (draft && document.activeElement !== own) own.value = draft.value;
}

own.addEventListener('input', () => document.dispatchEvent(new CustomEvent('draft', { detail: own.value })));

function foretold(next) {
  forecast = next;
  showDraft();
  showYours();
  find('[data-place]').textContent = forecast ? forecast.place.sentence : '';
  if (isDrawn() && axes !== 'umap') drawMap();
}

function showYours() {
  find('[data-yours]').hidden = !forecast || axes === 'umap';
}

// -- drawing ------------------------------------------------------------------------------------------------------

const isDrawn = () => Boolean(seen && figures && window.Plotly && find('[data-map]').data);

function drawMap() {
  const figure = scatter();
  return Plotly.react(find('[data-map]'), figure.data, figure.layout, CONFIG);
}

async function drawFigures() {
  await plotly();
  askUmap();
  const lines = painted(figures.separation);
  lines.layout.shapes = [...(lines.layout.shapes || []), marker()];
  await drawMap();
  await Plotly.react(find('[data-separation]'), lines.data, lines.layout, CONFIG);
  listen();
}

function marker() {
  return { type: 'line', x0: layer, x1: layer, y0: 0, y1: 1, yref: 'paper', line: { color: colour('ink'), width: 2 }, opacity: 0.4 };
}

function listen() {
  const map = find('[data-map]');
  if (map.dataset.listening) return;
  map.dataset.listening = 'yes';
  map.on('plotly_click', ({ points: [point] }) => { if (ROLES[point.curveNumber]) pick(ROLES[point.curveNumber], point.pointNumber); });
  // Taking the drawn line away is told as a selection as well, but without what was drawn.
  map.on('plotly_selected', (event) => { if (event && (event.lassoPoints || event.range)) select(event.points); });
  map.on('plotly_deselect', () => clearList());
  find('[data-separation]').on('plotly_click', ({ points }) => setLayer(points[0].x));
}

async function setLayer(next) {
  layer = Math.max(0, Math.min(view.layers.length - 1, Math.round(next)));
  drawNumbers();
  if (!isDrawn()) return;
  const shapes = [...painted(figures.separation).layout.shapes, marker()];
  Plotly.relayout(find('[data-separation]'), { shapes });
  askUmap();
  if (still.matches || axes === 'umap' || solid()) {
    await drawMap();
  } else {
    const data = scatter().data.map(({ x, y, marker: { symbol } }) => ({ x, y, marker: { symbol } }));
    await Plotly.animate(
      find('[data-map]'),
      { data, traces: [0, 1, 2] },
      { mode: 'immediate', transition: { duration: 260, easing: 'cubic-in-out' }, frame: { duration: 260, redraw: false } },
    ).catch(() => {}); // an animation that a later one cuts short is rejected
  }
}

function percent(share) {
  return `${(100 * share).toFixed(0)} %`;
}

const CAPTIONS = {
  pca: ([first, second]) => `PC1 holds ${percent(first)} and PC2 ${percent(second)} of the variance. `
    + 'Each layer is scaled by the spread of its prompts, so the axes stay where they are.',
  turned: (shares) => `PC1 holds ${percent(shares[0])} of the variance, PC2 and PC3 another ${percent(shares[1] + shares[2])}; in their plane the cloud `
    + 'is turned so that the prompts move least from layer to layer. Each layer is scaled by the spread of its prompts.',
  along: ([along, spread]) => `The direction in use holds ${percent(along)} of the variance here, and the main spread at right angles to it ${percent(spread)}. `
    + 'Both axes count in the length of the direction, the same in every layer; 0 is the mean of the ' + `${view.classes.harmless} prompts.`,
  umap: () => (isAsked(umap) && umap.figure
    ? 'UMAP keeps neighbours together; its distances, axes and gaps mean nothing, and a prompt of yours has no place in it. The numbers beside it are of the linear picture.'
    : `UMAP: ${isAsked(umap) ? `${umap.doing}, ${Math.round((Date.now() - umap.since) / 1000)} s` : 'asked for'} …`),
};
const LABELS = {
  pca: 'on the first two principal components', turned: 'on the first three principal components',
  along: 'along the direction in use and their main spread at right angles to it', umap: 'as UMAP lays them out',
};

function drawNumbers() {
  find('[data-layer]').value = layer;
  const chosen = view.chosen.layer === layer && view.chosen.position === view.position;
  find('[data-layer-value]').textContent = `${layer} of ${view.layers.length}${chosen ? ' · the direction is read here' : ''}`;
  find('[data-map]').setAttribute('aria-label', `Prompts of layer ${layer} ${LABELS[shown()]}`);
  const measured = view.layers[layer];
  const numbers = find('[data-numbers]');
  drawCaption();
  if (!measured) {
    numbers.replaceChildren();
    return;
  }
  const rows = [
    ['AUROC on PC1', measured.auroc_pc1, 3, `Chance that a prompt of the class “${view.classes.harmful}” lies further along PC1 than one of “${view.classes.harmless}”. PC1 never saw a label.`],
    ['AUROC on the mean difference', measured.auroc, 3, 'The same along the mean difference, on prompts it was not made from.'],
    ['d′ on the mean difference', measured.d_prime, 1, 'Distance of the two means in standard deviations, on prompts it was not made from.'],
    ['|cos(PC1, mean difference)|', measured.cos, 3, '1: the direction of largest variance is the difference between the classes.'],
    ['silhouette', measured.silhouette, 2, 'How much nearer a prompt lies to its own class than to the other one in three components: −1 to 1.'],
  ];
  numbers.replaceChildren(...rows.map(([name, value, digits, meaning]) => {
    const row = make('div');
    row.title = meaning;
    row.append(make('dt', name), make('dd', value === null ? 'unknown' : value.toFixed(digits).replace('-', '−')));
    return row;
  }));
}

function drawCaption() {
  const measured = view.layers[layer];
  find('[data-map-caption]').textContent = measured ? CAPTIONS[shown()](measured.shares)
    : 'Nothing to see at this layer: the token here is the same in every prompt, and nothing has been mixed in yet.';
}

function drawPositions() {
  const select = find('[data-position]');
  select.replaceChildren(...view.positions.map(({ position: at, token }) => {
    const here = at === view.chosen.position ? ' (the direction’s)' : '';
    const option = make('option', `${String(at).replace('-', '−')}  ${token ? readable(token) : 'end of the instruction'}${here}`);
    option.value = at;
    option.selected = at === position;
    return option;
  }));
}

function drawControls() {
  find('[data-axes]').value = axes;
  find('[data-turn-holder]').hidden = !solid();
  find('[data-drags]').hidden = solid();
  find('[data-play]').hidden = axes === 'umap'; // each layer would take seconds
  for (const role of ROLES) {
    find(`[data-mark="${role}"]`).textContent = MARKS[solid() ? 'solid' : 'flat'][role];
    find(`[data-class="${role}"]`).textContent = view.classes[role];
  }
  for (const button of all('[data-drag]')) button.setAttribute('aria-pressed', String(button.dataset.drag === dragging));
  showYours();
}

// -- the list of prompts ------------------------------------------------------------------------------------------

function list(words, chosen) {
  listed = chosen && { words, ...chosen };
  drawList();
  if (isDrawn()) drawMap();
}

function drawList() {
  const chosen = ROLES.flatMap((role) => (listed ? listed[role].map((index) => [role, index]) : []));
  find('[data-count]').textContent = !listed ? '' : chosen.length
    ? `${listed.words} ${ROLES.map((role) => `${listed[role].length} ${view.classes[role]}`).join(', ')}` : listed.words;
  find('[data-clear]').hidden = !listed;
  find('[data-list]').hidden = !chosen.length;
  find('[data-list]').replaceChildren(...chosen.map(([role, index]) => {
    const item = make('li');
    const button = make('button', undefined, `key ${role}`);
    button.type = 'button';
    button.append(make('span', MARKS.flat[role]), make('small', ` ${view.classes[role]} `), view.prompts[role][index][0]);
    button.firstChild.setAttribute('aria-hidden', 'true');
    button.title = 'Put it in the composer of Talk';
    button.addEventListener('click', () => pick(role, index));
    item.append(button);
    return item;
  }));
}

function clearList() {
  find('[data-search]').value = '';
  list('', null);
}

function search() {
  const wanted = find('[data-search]').value.trim();
  if (!wanted) {
    list('', null);
    return;
  }
  const found = Object.fromEntries(ROLES.map((role) => [
    role, view.prompts[role].flatMap(([text], index) => (text.toLowerCase().includes(wanted.toLowerCase()) ? [index] : [])),
  ]));
  const any = found.harmful.length + found.harmless.length;
  list(any ? `With “${wanted}”:` : `No prompt has “${wanted}” in it.`, found);
}

function select(points) {
  const found = Object.fromEntries(ROLES.map((role, curve) => [
    role, points.filter((point) => point.curveNumber === curve).map((point) => point.pointNumber),
  ]));
  find('[data-search]').value = '';
  list(found.harmful.length + found.harmless.length ? 'Selected:' : 'No prompt lies in there.', found);
}

let aside = ''; // what the visitor had written before a prompt was picked

/** Puts a prompt in the composer of Talk, where it is foretold: the star moves there. */
function pick(role, index) {
  const [text] = view.prompts[role][index];
  if (own.value.trim() && own.value !== find('[data-go]').dataset.text) aside = own.value;
  find('[data-back]').hidden = !aside;
  find('[data-picked]').replaceChildren(make('small', `In the composer of Talk, ${view.classes[role]}:`), ' ', text);
  find('[data-go]').hidden = false;
  find('[data-go]').dataset.text = text;
  own.value = text;
  document.dispatchEvent(new CustomEvent('compose', { detail: text }));
}

// -- asking -------------------------------------------------------------------------------------------------------

function ask() {
  asks += 1;
  askedOf = inUse;
  find('.map-body').setAttribute('aria-busy', 'true');
  trigger('position', { run: asks, position, axes: axes === 'umap' ? 'pca' : axes });
}

/** What is drawn is what is wanted: a map on its way is not any more. */
function stay() {
  asks += 1;
  find('.map-body').setAttribute('aria-busy', 'false');
}

function isAsked(next) {
  return next !== null && next.model === view.model && next.found === view.found && next.position === view.position && next.layer === layer;
}

/** UMAP takes seconds a layer: it is asked for when a layer has been rested on. */
function askUmap() {
  clearTimeout(asking);
  if (axes !== 'umap' || isAsked(umap) || !view.layers[layer]) return;
  asking = setTimeout(() => {
    layouts += 1;
    umap = { model: view.model, found: view.found, position: view.position, layer, doing: 'asked for', since: Date.now() };
    clearInterval(ticking);
    ticking = setInterval(drawCaption, 1000);
    trigger('umap', { run: layouts, position: view.position, layer });
  }, 300);
}

/** What UMAP is doing, or what it has done; of a layer that has been left meanwhile nothing. */
function laidOut(next) {
  if (axes !== 'umap' || !isAsked(next) || !isAsked(umap)) return;
  umap.doing = next.doing;
  if (next.umap) {
    Object.assign(umap, { figure: JSON.parse(next.umap), points: coordinates(next.points, 1, counts()) });
    clearInterval(ticking);
    if (isDrawn()) drawMap();
  }
  drawCaption();
}

const counts = () => Object.fromEntries(ROLES.map((role) => [role, view.prompts[role].length]));

function draw() {
  const next = props.value || {};
  if (asks && next.asked !== undefined && next.asked !== asks) return; // what is wanted is on its way, or drawn
  const error = find('[data-error]');
  error.hidden = !next.error;
  error.textContent = next.error || '';
  if (next.error && view) {
    [axes, position, umap] = [view.axes, view.position, null];
    clearInterval(ticking);
    find('.map-body').setAttribute('aria-busy', 'false');
    drawPositions();
    drawControls();
  }
  if (view && (next.doing || next.umap)) laidOut(next);
  if (next.map) arrive(next);
}

/** A map that Python has sent; one that is not wanted any more is not shown, because what is wanted is on its way. */
function arrive(next) {
  const isOther = !view || view.model !== next.model;
  if (isOther) [layer, position] = [next.chosen.layer, next.position];
  else if (next.position !== position || (axes !== 'umap' && next.axes !== axes)) return;
  const areOthers = isOther || JSON.stringify(view.prompts) !== JSON.stringify(next.prompts); // then the list and the layout are of prompts that are gone
  if (areOthers) [listed, umap] = [null, null];
  view = next;
  figures = {
    map: JSON.parse(view.map), separation: JSON.parse(view.separation),
    points: coordinates(view.points, view.layers.length, counts()),
    hover: Object.fromEntries(ROLES.map((role) => [role, hoverOf(role)])),
  };
  find('.map-body').setAttribute('aria-busy', 'false');
  find('[data-idle]').hidden = true;
  find('.map-body').hidden = false;
  find('[data-layer]').max = view.layers.length - 1;
  find('[data-claim]').textContent = view.claim;
  drawPositions();
  drawControls();
  drawNumbers();
  if (areOthers) drawList();
  if (seen) drawFigures();
  if ((isOther && axes !== 'umap' && view.axes !== axes) || (inUse && view.direction !== inUse && askedOf !== inUse)) ask();
  applyLink();
  // A position or axes that are new to the server had no star when the message was foretold.
  if (forecast && !forecast.stars[`${view.position} ${view.axes}`]) document.dispatchEvent(new CustomEvent('star-wanted'));
}

let wanted = null; // what the link says of the map

/** Shows what the link shows, of the model that it was made with. */
function applyLink() {
  if (!wanted || !view || (wanted.model !== undefined && wanted.model !== view.model)) return;
  const { map } = wanted;
  wanted = null;
  if (!map) return;
  if (view.positions.some(({ position: each }) => each === map.position)) position = map.position;
  layer = Math.min(map.layer, view.layers.length - 1);
  find('[data-axes]').value = map.axes;
  find('[data-axes]').dispatchEvent(new Event('change'));
  drawPositions();
  setLayer(layer);
  for (const [field, value] of [['[data-search]', map.search], ['[data-turn]', map.turn]]) {
    if (value === undefined) continue;
    find(field).value = value;
    find(field).dispatchEvent(new Event('input'));
  }
}

ofLink().then((state) => {
  wanted = state;
  applyLink();
});
document.addEventListener('gather', ({ detail }) => {
  if (!element.isConnected || !view) return;
  detail.map = { position, layer, axes, search: find('[data-search]').value.slice(0, 200) || undefined, turn: eye ? find('[data-turn]').valueAsNumber : undefined };
});

let seen = false;
new ResizeObserver(() => {
  if (seen || !element.offsetWidth) return;
  seen = true;
  if (figures) drawFigures();
}).observe(element);

// -- controls -----------------------------------------------------------------------------------------------------

function pause() {
  clearInterval(playing);
  playing = undefined;
  find('[data-play]').textContent = 'Play';
}

function canDrawSolids() {
  const gl = make('canvas').getContext('webgl');
  gl?.getExtension('WEBGL_lose_context')?.loseContext(); // a page has few of them
  return gl !== null;
}

find('[data-layer]').addEventListener('input', (event) => { pause(); setLayer(Number(event.target.value)); });
find('[data-position]').addEventListener('change', (event) => {
  position = Number(event.target.value);
  ask();
});
find('[data-axes]').addEventListener('change', (event) => {
  pause();
  axes = event.target.value;
  const lacking = axes === 'turned' && !canDrawSolids();
  if (lacking) axes = 'pca';
  find('[data-note]').textContent = lacking ? 'A picture in 3-D needs WebGL, which this browser does not offer: these are the first two components.' : '';
  const areOther = axes !== 'umap' && view.axes !== axes;
  if (areOther || view.position !== position || view.direction !== inUse) ask();
  else stay();
  if (areOther) return;
  drawControls();
  drawNumbers();
  drawFigures();
});
find('[data-turn]').addEventListener('input', (event) => {
  const angle = (event.target.valueAsNumber * Math.PI) / 180;
  eye = { x: 1.85 * Math.cos(angle), y: 1.85 * Math.sin(angle), z: 0.65 };
  if (isDrawn()) drawMap();
});
find('[data-play]').addEventListener('click', () => {
  if (playing) { pause(); return; }
  find('[data-play]').textContent = 'Pause';
  const next = () => (element.offsetWidth ? setLayer((layer + 1) % view.layers.length) : pause());
  next();
  playing = setInterval(next, 900);
});
for (const button of all('[data-drag]')) {
  button.addEventListener('click', () => {
    dragging = dragging === button.dataset.drag ? null : button.dataset.drag;
    drawControls();
    if (isDrawn()) drawMap();
  });
}
find('[data-search]').addEventListener('input', search);
find('[data-clear]').addEventListener('click', () => { clearList(); find('[data-search]').focus(); });
find('[data-back]').addEventListener('click', () => {
  own.value = aside;
  document.dispatchEvent(new CustomEvent('compose', { detail: aside }));
  handOn([find('[data-back]')], own);
  for (const each of ['[data-back]', '[data-go]']) find(each).hidden = true;
  find('[data-picked]').replaceChildren();
  aside = '';
});
find('[data-go]').addEventListener('click', () => {
  showTab('Talk');
  const detail = find('[data-go]').dataset.text;
  // The tab is shown after the click has been dealt with; what is hidden cannot take the focus.
  setTimeout(() => document.dispatchEvent(new CustomEvent('compose', { detail })), 60);
});
document.addEventListener('theme', () => { if (seen && figures && element.isConnected) drawFigures(); });
const onKey = (key) => {
  if (!element.isConnected) {
    document.removeEventListener('keydown', onKey);
  } else if ((key.key === '[' || key.key === ']') && view && element.offsetWidth && !key.target.closest('select, dialog, input:not([type="range"])')) {
    pause();
    setLayer(layer + (key.key === ']' ? 1 : -1));
  }
};
document.addEventListener('keydown', onKey);
document.addEventListener('direction', ({ detail }) => {
  if (!element.isConnected) return;
  inUse = detail.digest;
  if (!view) return;
  if (detail.newModel) {
    stay(); // its map comes by itself
    return;
  }
  if (view.direction === inUse) {
    if (asks && askedOf !== inUse) {
      [layer, position] = [Number(find('[data-layer]').value), view.position];
      stay();
    }
    return;
  }
  if (view.chosen.layer !== detail.layer || view.chosen.position !== detail.position) [layer, position] = [detail.layer, detail.position];
  ask();
});
document.addEventListener('foretold', ({ detail }) => { if (element.isConnected) foretold(detail); });
watch('value', draw);
draw();
// The tab is made when it is first opened: what has happened until then is caught up with.
document.dispatchEvent(new CustomEvent('forecast-wanted'));
document.dispatchEvent(new CustomEvent('direction-wanted'));
