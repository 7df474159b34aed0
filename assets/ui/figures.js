// Figures: they are made in Python, without a theme, and painted here in the page's colours.
let library;

/** Plotly is large: it is fetched when a figure is first looked at, from this page's own server. */
function plotly() {
  library ||= window.Plotly ? Promise.resolve() : new Promise((resolve, reject) => {
    const script = document.createElement('script');
    script.src = 'ui/plotly.min.js';
    script.onload = resolve;
    script.onerror = () => reject(new Error('The plotting library did not load: reload the page.'));
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
  for (const axis of [layout.xaxis, layout.yaxis]) {
    Object.assign(axis, { gridcolor: colour('rule'), zerolinecolor: colour('rule'), linecolor: colour('rule'), automargin: true });
  }
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

const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false, showTips: false };
