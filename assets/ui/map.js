// The map. Python sends every layer of a position at once, so that moving through them asks nobody.
const still = matchMedia('(prefers-reduced-motion: reduce)');

let view = null; // what is drawn
let layer = null;
let figures = null;
let playing;
let forecast = null; // where the visitor's prompt lies
let axes = 'pca';
let umap = null; // the layer that UMAP has laid out
let asking;

function atLayer(figure) {
  const data = figure.data.map((trace, index) => ({ ...trace, ...figures.map.frames[layer].data[index] }));
  return { data: [...data, star()], layout: figure.layout };
}

/** The visitor's own prompt, where the forecast says it lies; open at the edge if it lies beyond the axes. */
function star() {
  const at = forecast && forecast.stars[view.position] ? forecast.stars[view.position][layer] : null;
  const within = (value, [low, high]) => Math.max(low, Math.min(high, value));
  const { xaxis, yaxis } = figures.map.layout;
  const [x, y] = at ? [within(at[0], xaxis.range), within(at[1], yaxis.range)] : [null, null];
  const beyond = at && (x !== at[0] || y !== at[1]);
  return {
    type: 'scatter', mode: 'markers', name: 'your prompt', meta: { role: 'ink' }, cliponaxis: false,
    x: [x], y: [y], hoverinfo: 'text', hovertext: [beyond ? 'your prompt, beyond the edge' : 'your prompt'],
    marker: { symbol: beyond ? 'star-open' : 'star', size: 17 },
  };
}

function foretold(next) {
  forecast = next;
  find('[data-yours]').hidden = !forecast || axes !== 'pca';
  find('[data-place]').textContent = forecast ? forecast.place.sentence : '';
  if (!seen || !figures || axes !== 'pca' || !window.Plotly || !find('[data-map]').data) return;
  const drawn = painted({ data: [star()], layout: figures.map.layout }).data[0];
  Plotly.restyle(find('[data-map]'), { x: [drawn.x], y: [drawn.y], hovertext: [drawn.hovertext], 'marker.symbol': drawn.marker.symbol }, [2]);
}

/** What is to be seen: the layer's principal components, or UMAP's picture of it once that is there. */
function scatterFigure() {
  if (axes === 'pca') return painted(atLayer(figures.map));
  const figure = isAsked(umap) ? umap.figure : { data: [], layout: { ...figures.map.layout, xaxis: { visible: false }, yaxis: { visible: false } } };
  return painted(figure);
}

function isAsked(next) {
  return next !== null && next.model === view.model && next.position === view.position && next.layer === layer;
}

/** UMAP takes seconds a layer: it is asked for when a layer has been rested on. */
function askUmap() {
  clearTimeout(asking);
  if (axes !== 'umap' || isAsked(umap) || !view.layers[layer]) return;
  asking = setTimeout(() => trigger('umap', { position: view.position, layer }), 300);
}

async function drawFigures() {
  await plotly();
  askUmap();
  const scatter = scatterFigure();
  const lines = painted(figures.separation);
  lines.layout.shapes = [...(lines.layout.shapes || []), marker()];
  await Plotly.react(find('[data-map]'), scatter.data, scatter.layout, CONFIG);
  await Plotly.react(find('[data-separation]'), lines.data, lines.layout, CONFIG);
  listen();
}

function marker() {
  return { type: 'line', x0: layer, x1: layer, y0: 0, y1: 1, yref: 'paper', line: { color: colour('accent'), width: 2 }, opacity: 0.5 };
}

function listen() {
  const map = find('[data-map]');
  if (map.dataset.listening) return;
  map.dataset.listening = 'yes';
  map.on('plotly_click', ({ points }) => pick(points[0]));
  find('[data-separation]').on('plotly_click', ({ points }) => setLayer(points[0].x));
}

function pick(point) {
  const role = point.data.meta.role;
  if (!view.texts[role]) return;
  const text = view.texts[role][point.pointNumber];
  const picked = find('[data-picked]');
  picked.hidden = false;
  picked.querySelector('p').replaceChildren(make('small', role), ' ', text);
  picked.dataset.text = text;
}

async function setLayer(next) {
  layer = Math.max(0, Math.min(view.layers.length - 1, Math.round(next)));
  drawNumbers();
  if (!window.Plotly || !find('[data-map]').data) return;
  const frame = figures.map.frames[layer];
  const shapes = [...painted(figures.separation).layout.shapes, marker()];
  Plotly.relayout(find('[data-separation]'), { shapes });
  askUmap();
  if (still.matches || axes === 'umap') {
    const scatter = scatterFigure();
    await Plotly.react(find('[data-map]'), scatter.data, scatter.layout, CONFIG);
  } else {
    await Plotly.animate(
      find('[data-map]'),
      { data: [...frame.data, { x: star().x, y: star().y }], traces: [0, 1, 2] },
      { mode: 'immediate', transition: { duration: 260, easing: 'cubic-in-out' }, frame: { duration: 260, redraw: false } },
    ).catch(() => {}); // an animation that a later one cuts short is rejected
  }
}

function percent(share) {
  return `${(100 * share).toFixed(0)} %`;
}

function drawNumbers() {
  find('[data-layer]').value = layer;
  const chosen = view.chosen.layer === layer && view.chosen.position === view.position;
  find('[data-layer-value]').textContent = `${layer} of ${view.layers.length - 1}${chosen ? ' · the direction is read here' : ''}`;
  const measured = view.layers[layer];
  const caption = find('[data-map-caption]');
  const numbers = find('[data-numbers]');
  if (!measured) {
    caption.textContent = 'Nothing to see at this layer: the token here is the same in every prompt, and nothing has been mixed in yet.';
    numbers.replaceChildren();
    return;
  }
  const laidOut = isAsked(umap) ? 'UMAP keeps neighbours together; its distances, axes and gaps mean nothing. The numbers beside it are of the linear picture.' : 'UMAP is laying the prompts out …';
  caption.textContent = axes === 'umap' ? laidOut : `PC1 holds ${percent(measured.explained[0])} and PC2 ${percent(measured.explained[1])} of the variance. `
      + 'Each layer is scaled by the spread of its prompts, so the axes stay where they are.';
  const rows = [
    ['AUROC on PC1', measured.auroc_pc1.toFixed(3), 'Chance that a harmful prompt lies further along PC1 than a harmless one. PC1 never saw a label.'],
    ['AUROC on the direction', measured.auroc.toFixed(3), 'The same along the mean difference, on prompts it was not made from.'],
    ['d′ on the direction', measured.d_prime.toFixed(1), 'Distance of the two means in standard deviations, on prompts it was not made from.'],
    ['|cos(PC1, mean difference)|', measured.cos.toFixed(3), '1: the direction of largest variance is the difference between the classes.'],
  ];
  numbers.replaceChildren(...rows.map(([name, value, meaning]) => {
    const row = make('div');
    row.title = meaning;
    row.append(make('dt', name), make('dd', value));
    return row;
  }));
}

function drawPositions() {
  const select = find('[data-position]');
  select.replaceChildren(...view.positions.map(({ position, token }) => {
    const here = position === view.chosen.position ? ' (the direction’s)' : '';
    const option = make('option', `${String(position).replace('-', '−')}  ${token ? readable(token) : 'end of the instruction'}${here}`);
    option.value = position;
    option.selected = position === view.position;
    return option;
  }));
}

function draw() {
  const next = props.value || {};
  const error = find('[data-error]');
  error.hidden = !next.error;
  error.textContent = next.error || '';
  find('.map-body').setAttribute('aria-busy', 'false');
  if (next.umap) {
    umap = { ...next, figure: JSON.parse(next.umap) };
    drawNumbers();
    if (seen && isAsked(umap)) drawFigures();
    return;
  }
  if (!next.map) return;
  if (!view || view.model !== next.model) [layer, forecast] = [next.layer, null];
  view = next;
  figures = { map: JSON.parse(view.map), separation: JSON.parse(view.separation) };
  find('[data-idle]').hidden = true;
  find('.map-body').hidden = false;
  find('[data-layer]').max = view.layers.length - 1;
  drawPositions();
  drawNumbers();
  if (seen) drawFigures();
  // A position that is new to the server had no star when the message was foretold.
  if (forecast && !forecast.stars[view.position]) document.dispatchEvent(new CustomEvent('star-wanted'));
}

let seen = false;
new ResizeObserver(() => {
  if (seen || !element.offsetWidth) return;
  seen = true;
  if (figures) drawFigures();
}).observe(element);

function pause() {
  clearInterval(playing);
  playing = undefined;
  find('[data-play]').textContent = 'Play';
}

find('[data-layer]').addEventListener('input', (event) => { pause(); setLayer(Number(event.target.value)); });
find('[data-position]').addEventListener('change', (event) => {
  find('.map-body').setAttribute('aria-busy', 'true');
  trigger('position', { position: Number(event.target.value) });
});
find('[data-axes]').addEventListener('change', (event) => {
  axes = event.target.value;
  find('[data-yours]').hidden = !forecast || axes !== 'pca';
  pause();
  drawNumbers();
  drawFigures();
});
find('[data-play]').addEventListener('click', () => {
  if (playing) { pause(); return; }
  find('[data-play]').textContent = 'Pause';
  const next = () => setLayer((layer + 1) % view.layers.length);
  next();
  playing = setInterval(next, 900);
});
find('[data-use]').addEventListener('click', () => {
  document.querySelector('#tabs [role="tab"]').click();
  const detail = find('[data-picked]').dataset.text;
  // The tab is shown after the click has been dealt with; what is hidden cannot take the focus.
  setTimeout(() => document.dispatchEvent(new CustomEvent('compose', { detail })), 60);
});
document.addEventListener('theme', () => { if (seen && figures && element.isConnected) drawFigures(); });
const onKey = (key) => {
  if (!element.isConnected) {
    document.removeEventListener('keydown', onKey);
  } else if ((key.key === '[' || key.key === ']') && view && element.offsetWidth && !key.target.closest('select, dialog')) {
    pause();
    setLayer(layer + (key.key === ']' ? 1 : -1));
  }
};
document.addEventListener('keydown', onKey);
document.addEventListener('direction', ({ detail }) => {
  if (!element.isConnected || !view || detail.newModel || (view.chosen.layer === detail.layer && view.chosen.position === detail.position)) return;
  layer = detail.layer;
  trigger('position', { position: detail.position });
});
document.addEventListener('foretold', ({ detail }) => { if (element.isConnected) foretold(detail); });
watch('value', draw);
draw();
// The tab is made when it is first opened: what has happened until then is caught up with.
document.dispatchEvent(new CustomEvent('forecast-wanted'));
document.dispatchEvent(new CustomEvent('direction-wanted'));
