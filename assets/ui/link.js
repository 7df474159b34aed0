
// The state of the page in its address: everything that a reader needs to see the same, and nothing of anybody else.
const MOST_LINK = 8000;
const MOST_STATE = 200000; // of bytes that a link may unpack to
const MOST_MESSAGES = 50;

const within = (low, high, whole = false) => (value) => typeof value === 'number' && value >= low && value <= high && (!whole || Number.isInteger(value));
const oneOf = (...choices) => (value) => choices.includes(value);
const orNull = (allowed) => (value) => value === null || allowed(value);
const orNone = (allowed) => (value) => value === undefined || allowed(value);
const upTo = (longest) => (value) => typeof value === 'string' && value.length <= longest;
const texts = (value, longest) => Array.isArray(value) && value.length === 2 && value.every((text) => typeof text === 'string' && text.length <= longest);
const FIELDS = {
  model: upTo(300),
  position: within(-64, -1, true), layer: within(0, 1000, true),
  removal: within(0, 1), addition: within(-1, 2), temperature: within(0, 2),
  max_new_tokens: within(1, 512, true), seed: within(0, 2 ** 31, true),
  removed_on: oneOf(true, false), added_on: oneOf(true, false), control_on: oneOf(true, false),
  system: upTo(2000),
  writers: (value) => Array.isArray(value) && value.length > 0 && value.length <= 2000 && value.every((name) => /^(embedding|positions|(attention|MLP|PLE) \d{1,4}|head \d{1,4}\.\d{1,4})$/.test(name)),
  tint: oneOf('untouched', 'inside', 'off'),
  draft: upTo(MOST_STATE),
  map: (value) => isPlain(value) && FIELDS.position(value.position) && FIELDS.layer(value.layer) && oneOf('pca', 'turned', 'along', 'umap')(value.axes) && orNone(upTo(200))(value.search) && orNone(within(-180, 180))(value.turn),
  find: (value) => isPlain(value) && oneOf('bypass', 'induce', 'kl', 'comply', 'refuse', 'auroc', 'd_prime')(value.measure) && oneOf('app', 'lists', 'file', 'hub')(value.prompts) && oneOf('refusal', 'contrast')(value.kind)
    && texts(value.names, 40) && texts(value.hub, 500) && oneOf('rule', 'cosmic')(value.by) && orNull(within(1, 64, true))(value.positions) && orNull(areTokens)(value.tokens),
  lists: (value) => texts(value, 8000),
  measure: (value) => isPlain(value) && within(5, 100, true)(value.n) && FIELDS.max_new_tokens(value.length) && oneOf('default', 'paper')(value.rules) && texts(value.lists, 500),
  inside: (value) => texts(value, 2000),
  tab: oneOf('Talk', 'Map', 'Find', 'Measure', 'Inside'),
  prompts: (value) => Array.isArray(value) && value.length <= MOST_MESSAGES && value.every((text) => typeof text === 'string' && text.trim()),
  turns: (value) => Array.isArray(value) && value.length <= MOST_MESSAGES && value.every((each) => isPlain(each) && wrongIn(each) === undefined),
};

const areTokens = (value) => Array.isArray(value) && value.length <= 16 && value.every((each) => isPlain(each) && within(0, 1e7, true)(each.id) && upTo(200)(each.text));
const isPlain = (value) => value !== null && typeof value === 'object' && !Array.isArray(value);

/** The settings of a message, as a request has them: a pane that is off has none. In a link only those that are not the page's. */
const SETTINGS = {
  removal: orNull(FIELDS.removal), addition: orNull(FIELDS.addition), control: orNull(FIELDS.addition),
  temperature: FIELDS.temperature, max_new_tokens: FIELDS.max_new_tokens, seed: FIELDS.seed, system: FIELDS.system,
  writers: orNull(FIELDS.writers),
  cell: (value) => Array.isArray(value) && value.length === 2 && FIELDS.position(value[0]) && FIELDS.layer(value[1]),
};

/** The name of the first setting that is none, or is not one that can be had. */
function wrongIn(settings) {
  return Object.keys(settings).find((name) => !(Object.hasOwn(SETTINGS, name) && SETTINGS[name](settings[name])));
}

async function through(stream, bytes) {
  const body = new Blob([bytes]).stream().pipeThrough(stream);
  return new Uint8Array(await new Response(body).arrayBuffer());
}

/** The state as the part of an address after “#”; of what is too long for one, texts in fields are left out first, then messages. */
async function packed({ prompts, turns, ...state }) {
  const { draft, inside, lists, ...settings } = state;
  const withMessages = { said: { prompts, turns }, left: [] };
  const withoutMessages = { said: { prompts: [] }, left: prompts.length ? [prompts.length === 1 ? 'the message' : `${prompts.length} messages`] : [] };
  for (const messages of prompts.length <= MOST_MESSAGES ? [withMessages, withoutMessages] : [withoutMessages]) {
    for (const texts of [{ said: { draft, inside, lists }, left: [] }, { said: {}, left: draft || inside || lists ? ['what stands in the fields'] : [] }]) {
      const written = new TextEncoder().encode(JSON.stringify({ v: 1, ...settings, ...texts.said, ...messages.said }));
      const bytes = written.length < MOST_STATE ? await through(new CompressionStream('deflate-raw'), written) : [];
      const text = btoa(String.fromCharCode(...bytes)).replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '');
      if (text && text.length <= MOST_LINK) return { text, left: [...messages.left, ...texts.left] };
    }
  }
  return { text: '', left: ['all of it'] };
}

/** What an address says, and what of it cannot be used: such fields are named, left at their defaults, and do no harm. */
async function unpacked(text) {
  if (!text) return { state: {}, problems: [] };
  let read;
  try {
    if (text.length > MOST_LINK) throw new Error('too long');
    const bytes = Uint8Array.from(atob(text.replaceAll('-', '+').replaceAll('_', '/')), (letter) => letter.charCodeAt(0));
    const body = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate-raw'));
    read = JSON.parse(await limited(body, MOST_STATE));
    if (read === null || typeof read !== 'object' || Array.isArray(read) || read.v !== 1) throw new Error('not a state');
  } catch {
    return { state: {}, problems: ['This link cannot be read: the page starts as it always does.'] };
  }
  const { v, ...fields } = read;
  const state = {};
  const bad = [];
  for (const [name, value] of Object.entries(fields)) {
    if (Object.hasOwn(FIELDS, name) && FIELDS[name](value)) state[name] = value;
    else bad.push(name.slice(0, 40));
  }
  if (state.turns && state.turns.length !== (state.prompts || []).length) {
    delete state.turns;
    bad.push('turns');
  }
  return { state, problems: bad.length ? [`The link says something about ${bad.slice(0, 8).join(', ')} that is not known here: left as it was.`] : [] };
}

/** The text of a stream, at most so many bytes of it: a short link may unpack to a very long one. */
async function limited(stream, most) {
  const reader = stream.getReader();
  const parts = [];
  let size = 0;
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
    size += value.length;
    if (size > most) throw new Error('too long');
    parts.push(value);
  }
  return new Blob(parts).text();
}

/** What the address said when the page was opened, read once for all parts; talk waits until the bar has applied it. */
const reading = window.linkOfPage ||= unpacked(location.hash.slice(1));
window.linkApplied ||= Promise.withResolvers();

async function linked() {
  const { state } = await reading;
  await new Promise((resolve) => { setTimeout(resolve, 50); }); // the bar hears of a new model at the same time
  await window.linkApplied.promise;
  return state;
}
