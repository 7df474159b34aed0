// Figures: they are made in Python, without a theme, and painted here in the page's colours.
let library;

/** Plotly is large: it is fetched when a figure is first looked at, from this page's own server. */
function plotly() {
  library ||= window.Plotly ? Promise.resolve() : new Promise((resolve, reject) => {
    const script = document.createElement('script');
    script.src = 'ui/plotly.min.js';
    script.onload = resolve;
    script.onerror = () => {
      library = undefined; // the next figure tries again
      const said = 'The plotting library did not load, and nothing is drawn without it: is the app still running?';
      document.dispatchEvent(new CustomEvent('note', { detail: [said] }));
      reject(new Error(said));
    };
    document.head.append(script);
  });
  return library;
}

function colour(name) {
  return getComputedStyle(element).getPropertyValue(`--${name}`).trim();
}

/** The figure in the colours of the theme: a trace names its role, the style sheet knows the role's colour. */
function painted(figure) {
  const layout = structuredClone(figure.layout);
  layout.font = { ...layout.font, color: colour('muted') };
  layout.hoverlabel = { bgcolor: colour('ground'), bordercolor: colour('rule'), font: { color: colour('ink'), size: 14, family: layout.font.family }, align: 'left' };
  const lines = { gridcolor: colour('rule'), zerolinecolor: colour('rule'), linecolor: colour('rule') };
  for (const [name, axis] of Object.entries(layout)) {
    if (/^[xy]axis/.test(name)) Object.assign(axis, lines, { automargin: true });
  }
  for (const note of layout.scene?.annotations || []) note.hoverlabel = layout.hoverlabel;
  for (const name of layout.scene ? ['xaxis', 'yaxis', 'zaxis'] : []) Object.assign(layout.scene[name], lines, { color: colour('muted') });
  for (const shape of layout.shapes || []) shape.line.color = colour('muted');
  return { data: figure.data.map(paintedTrace), layout };
}

function paintedTrace(trace) {
  if (trace.type === 'heatmap') {
    return { ...trace, colorscale: trace.meta.roles.map((role, index, { length }) => [index / (length - 1), colour(role)]) };
  }
  const line = { ...trace.line, color: colour(trace.meta.role) };
  if (trace.fill) return { ...trace, line, fillcolor: `${colour(trace.meta.role)}33` };
  const edge = { color: colour('ground'), width: trace.mode === 'markers' ? 0.7 : 0 };
  return { ...trace, line, marker: { ...trace.marker, color: colour(trace.meta.role), line: edge } };
}

/** The coordinates that Python has packed: of each role, by layer, a list for each axis. */
function coordinates({ step, ...packed }, layers, counts) {
  return Object.fromEntries(Object.entries(packed).map(([role, text]) => {
    const whole = new Int16Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
    const lists = Array.from({ length: whole.length / counts[role] }, (_, list) => Array.from(whole.subarray(list * counts[role], (list + 1) * counts[role]), (n) => n * step));
    const each = lists.length / layers;
    return [role, Array.from({ length: layers }, (_, layer) => lists.slice(layer * each, (layer + 1) * each))];
  }));
}

const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false, showTips: false };
