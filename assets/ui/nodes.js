// What every part of the page begins with: its nodes, new ones, tokens that can be read, files to keep.
const find = (selector) => element.querySelector(selector);
const all = (selector) => [...element.querySelectorAll(selector)];

// What a part cannot do with two servers instead of a model is said where it would be.
if (props.value && props.value.closed) {
  const reason = find('[data-closed]') || find('[data-idle]');
  [reason.textContent, reason.hidden] = [props.value.closed, false];
}

/** A new node; text is set as text, never as markup. */
function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

/** A sentence as nodes, in which pages of the hub, and nothing else, are links. */
function withLinks(sentence) {
  return sentence.split(/(https:\/\/huggingface\.co\/[\w./-]*\w)/).map((part, index) => {
    if (index % 2 === 0) return part;
    const link = make('a', part);
    [link.href, link.target, link.rel] = [part, '_blank', 'noopener noreferrer'];
    return link;
  });
}

/** A token as it can be read: line breaks and spaces are part of it. */
function readable(token) {
  return token.replace(/\n/g, '⏎').replace(/\t/g, '⇥').replace(/ /g, '␣') || '∅';
}

/** Hands the focus on, should one of these have it: what is about to be hidden, disabled or replaced would lose it. */
function handOn(nodes, heir) {
  if (nodes.some((node) => node.contains(document.activeElement))) heir.focus();
}

/** A button that cannot be pressed meanwhile, and keeps the focus, which one that is disabled would lose. */
function pause(button, now) {
  button.setAttribute('aria-disabled', String(now));
}

const LOG_ODDS_REACH = 12; // at which the colour is full
const SHARE = { KL: (kl) => kl / 0.3, AUROC: (auroc) => 2 * auroc - 1, 'd′': (distance) => distance / 6, comply: (cosine) => cosine, refuse: (cosine) => cosine };

/** The colour of a candidate's score: by its side where it is log-odds of refusing, else by its size, as in cividis. */
function scoreColour(measure, value) {
  if (!SHARE[measure]) {
    const strength = Math.min(1, Math.abs(value) / LOG_ODDS_REACH);
    return `color-mix(in oklab, var(--${value < 0 ? 'harmless' : 'harmful'}) ${(48 * strength).toFixed(0)}%, var(--ground))`;
  }
  const share = Math.min(1, Math.max(0, SHARE[measure](value)));
  return `color-mix(in oklab, color-mix(in oklab, #fde945 ${100 * share}%, #2a4a86) 42%, var(--ground))`;
}

/** Shows a tab, and gives its button; nothing for a name that none has. */
function showTab(name) {
  const tab = [...document.querySelectorAll('#tabs [role="tab"]')].find((each) => each.textContent.trim() === name);
  tab?.click();
  return tab;
}

/** What the link says, once the bar has applied it, to a part that is to look as it did for whoever made the link. */
async function ofLink() {
  const { state } = (await window.linkOfPage) || { state: {} };
  await window.linkApplied?.promise;
  return state;
}

/** What the browser keeps of this page for the next visit, or for a reload of this tab, where it keeps anything: some refuse to. */
function kept(name, storage = 'localStorage') {
  try {
    return window[storage].getItem(name);
  } catch {
    return null;
  }
}

function keep(name, value, storage = 'localStorage') {
  try {
    window[storage].setItem(name, value);
  } catch {
    // It is asked again then.
  }
}

/** Gives the visitor a file. */
function save(name, type, content) {
  const link = make('a');
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** A page to keep: every text is set as text, nothing is loaded from anywhere. Gives the page, and how to add to it. */
function newPage(title) {
  const page = document.implementation.createHTMLDocument(title);
  const add = (parent, tag, text) => {
    const node = page.createElement(tag);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };
  page.documentElement.lang = 'en';
  const meta = page.createElement('meta');
  meta.setAttribute('charset', 'utf-8');
  page.head.prepend(meta);
  add(page.head, 'style', 'body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c1b18;background:#fff}'
    + 'table{width:100%;border-collapse:collapse;table-layout:fixed}td,th{text-align:left;vertical-align:top;padding:.5rem 1rem .5rem 0;border-top:1px solid #dcdad2;white-space:pre-wrap;overflow-wrap:anywhere}small,th{color:#5d5b54;font-weight:400}'
    + 'p{white-space:pre-wrap;overflow-wrap:anywhere}img{width:100%;max-width:36rem}');
  add(page.body, 'h1', title);
  return { page, add, text: () => `<!doctype html>\n${page.documentElement.outerHTML}` };
}
