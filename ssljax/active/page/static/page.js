// The labelling page. Names and texts are shown by textContent alone.

const KEYS = '1234567890abcdefghijklmnopqrtvwxy'; // without s, u, z
const AHEAD = 8; // images that are loaded before they are shown
const $ = (id) => document.getElementById(id);

let state = null; // of the server
let who = localStorage.getItem('who') || '';
let view = 'label';
let queue = [], current = null, shownAt = 0;
let chosenQueue = 'acquisition', chosenClass = '';
let fetching = null, asked = 0, zoomed = false, filter = '', round = null;
const latencies = []; // ms from a key to the next image, for measurements
const images = new Map(); // loaded ones, by address

// Elements.

function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  set(made, props, children);
  return made;
}

function svg(tag, props = {}, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
  set(made, props, children);
  return made;
}

function set(made, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (name === 'value' || name === 'checked') made[name] = value;
    else made.setAttribute(name, value === true ? '' : value);
  }
  made.append(...children.flat().filter((c) => c !== null && c !== undefined));
}

function button(text, onclick, props = {}) {
  return el('button', {type: 'button', onclick, ...props}, text);
}

function options(pairs, chosen, onchange, props = {}) {
  const made = el('select', {onchange: (e) => onchange(e.target.value), ...props},
    ...pairs.map(([value, text]) => el('option', {value}, text)));
  made.value = chosen;
  return made;
}

const percent = (x) => `${(100 * x).toFixed(1)} %`;
const sure = (x) => x >= 0.995 ? '99+ %' : `${Math.round(100 * x)} %`;
const address = (item, size = 'image') => `/${size}/${item.id}?v=${item.stamp}`;

function colour(name) {
  const place = state.classes.findIndex((c) => c.name === name);
  if (place < 0) return 'hsl(0 0% 55%)';
  return `hsl(${(place * 137.5 + 210) % 360} 65% ${place % 2 ? 45 : 55}%)`;
}

function picture(item, size) {
  const img = el('img', {src: address(item, size), alt: item.file, draggable: 'false'});
  img.addEventListener('load', () => {
    if (Math.max(img.naturalWidth, img.naturalHeight) <= 64) img.classList.add('tiny');
  });
  return img;
}

// Requests.

class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

async function ask(path, body) {
  let answer;
  try {
    answer = await fetch(path, body === undefined ? {} : {
      method: 'POST', body: JSON.stringify(body),
      headers: {'content-type': 'application/json'},
    });
  } catch {
    throw new Refused(0, 'the server does not answer; it may have ended');
  }
  let content = null;
  try { content = await answer.json(); } catch { /* no JSON: see below */ }
  if (!answer.ok) {
    const text = content?.problem || `the server answers ${answer.status}`;
    throw new Refused(answer.status, text);
  }
  return content;
}

let problemOf = {};
function problem(part, text) {
  if (text) problemOf[part] = text; else delete problemOf[part];
  const all = Object.values(problemOf);
  $('banner').hidden = !all.length;
  $('banner').textContent = all.join('  ·  ');
}

// Answers are kept in the browser until the server has saved them.

let pendingName = '', pending = []; // see start
let lost = false; // unsaved answers would be lost with the page
let sending = null;

function keep() {
  try {
    localStorage.setItem(pendingName, JSON.stringify(pending));
    lost = false;
  } catch { lost = true; } // no room, or forbidden
  facts();
}

function key() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, '0')).join('');
}

function give(items, fields) {
  const answers = items.map((item) => ({
    key: key(), id: item.id, file: item.file, stamp: item.stamp,
    shown: item.shown, ...(typeof fields === 'function' ? fields(item) : fields),
  }));
  const given = new Set(items.map((item) => item.id));
  queue = queue.filter((item) => !given.has(item.id));
  if (view !== 'label' && current && given.has(current.id)) current = queue.shift() || null;
  // A request has at most so many answers.
  const batch = key();
  for (let k = 0; k < answers.length; k += 100) {
    pending.push({who, batch, answers: answers.slice(k, k + 100)});
  }
  keep();
  return send();
}

function send() {
  if (!sending) sending = sendAll().finally(() => { sending = null; });
  return sending;
}

async function sendAll() {
  while (pending.length) {
    try {
      await ask('/api/answers', pending[0]);
      problem('save', '');
    } catch (error) {
      if (error.status === 400) { // it can never be saved
        problem('refused', `Not saved: ${error.message}`);
        setTimeout(() => problem('refused', ''), 12000);
      } else {
        const count = pending.reduce((n, p) => n + p.answers.length, 0);
        problem('save', `Not saved: ${error.message}. ` +
          `${count} answer${count > 1 ? 's are' : ' is'} kept here and sent again.`);
        setTimeout(send, 2000);
        return;
      }
    }
    pending.shift();
    keep();
  }
  refresh();
}

// One image after the other.

// A class of one character has its own key; the others have those that are left.
function keys() {
  const names = state.classes.map((c) => c.name.toLowerCase());
  const own = names.map((n, k) => n.length === 1 && KEYS.includes(n) && names.indexOf(n) === k ? n : '');
  const left = [...KEYS].filter((c) => !own.includes(c));
  return own.map((c) => c || left.shift() || '');
}

async function fill() {
  if (fetching || queue.length >= AHEAD || !who) return;
  const known = [...queue, ...(current ? [current] : [])].map((i) => i.id);
  for (const p of pending) known.push(...p.answers.map((a) => a.id));
  const query = new URLSearchParams({
    queue: chosenQueue, of: chosenClass, count: AHEAD + 4, who, exclude: known.join(','),
  });
  const mine = asked, wait = ask(`/api/next?${query}`);
  fetching = wait;
  try {
    const found = await wait;
    if (mine !== asked) return; // another queue was chosen meanwhile
    const there = new Set([...queue, current].filter(Boolean).map((i) => i.id));
    queue.push(...found.filter((item) => !there.has(item.id)));
    problem('next', '');
  } catch (error) {
    problem('next', error.message);
  } finally {
    if (fetching === wait) fetching = null;
  }
  preload();
  if (!current && queue.length) advance();
}

function preload() {
  for (const item of queue.slice(0, AHEAD)) {
    const where = address(item);
    if (!images.has(where)) {
      const img = new Image();
      img.src = where;
      img.decode?.().catch(() => {});
      images.set(where, img);
    }
  }
  const wanted = new Set([...queue, current].filter(Boolean).map((i) => address(i)));
  for (const where of images.keys()) if (!wanted.has(where)) images.delete(where);
}

function advance(began) {
  current = queue.shift() || null;
  zoomed = false;
  if (view === 'label') drawImage(began);
  fill();
}

function answer(fields) {
  if (!current) return;
  const began = performance.now();
  const item = current;
  if (fields.label) flash(fields.label);
  give([item], fields);
  advance(began);
}

const label = (name) => answer({answer: 'label', label: name});

async function undo() {
  await send(); // what is on its way is saved first
  if (pending.length) { // not saved yet: take it back here
    const last = pending.pop();
    keep();
    back(last.answers.map((a) => ({id: a.id, file: a.file, stamp: a.stamp, shown: a.shown})));
    return;
  }
  try {
    back(await ask('/api/undo', {who}));
  } catch (error) {
    problem('refused', error.message);
    setTimeout(() => problem('refused', ''), 8000);
  }
  refresh();
}

function back(items) {
  if (!items.length) return;
  if (view === 'grid') { grid.load(); return; }
  if (view !== 'label') return;
  if (current) queue.unshift(current);
  queue.unshift(...items);
  current = null;
  advance();
}

function flash(name) {
  for (const b of document.querySelectorAll('.class')) {
    if (b.dataset.name === name) {
      b.classList.add('flash');
      setTimeout(() => b.classList.remove('flash'), 140);
    }
  }
}

function drawLabel() {
  const side = el('aside', {class: state.classes.length > 16 ? 'side many' : 'side'},
    el('div', {class: 'queue'},
      options([['acquisition', 'Most useful first'], ['uncertainty', 'Least confident first'],
        ['class', 'Of one predicted class'], ['random', 'Random'],
        ['others', 'Labelled by others'], ['unsure', 'Skipped and unsure']],
      chosenQueue, (value) => { chosenQueue = value; restart(); },
      {'aria-label': 'Which images', class: chosenQueue === 'class' ? '' : 'wide'}),
      chosenQueue === 'class' ? options([['', 'class …'],
        ...state.classes.map((c) => [c.name, c.name])], chosenClass,
      (value) => { chosenClass = value; restart(); }, {'aria-label': 'Class'}) : null),
    el('div', {class: 'tools'},
      button(['Undo', el('kbd', {}, 'u')], undo),
      button(['Skip', el('kbd', {}, 's')], () => answer({answer: 'skip'})),
      button(['Unsure', el('kbd', {}, '?')], () => answer({answer: 'unsure'})),
      button(['Zoom', el('kbd', {}, 'z')], zoom)),
    el('div', {class: 'find'}, el('input', {id: 'find', type: 'search', value: filter,
      placeholder: 'Find a class (press /)', 'aria-label': 'Find a class',
      oninput: (e) => { filter = e.target.value; drawClasses(); },
      onkeydown: (e) => {
        if (e.key === 'Enter') {
          const first = document.querySelector('.class');
          if (first && filter) { label(first.dataset.name); clearFilter(); }
        } else if (e.key === 'Escape') clearFilter();
      }})),
    el('div', {class: 'classes', id: 'classes'}));
  $('view').replaceChildren(el('div', {class: 'label'},
    el('div', {class: 'stage'}, el('div', {class: 'picture', id: 'picture'}),
      el('div', {class: 'caption', id: 'caption'})), side));
  drawImage();
}

function clearFilter() {
  filter = '';
  if ($('find')) { $('find').value = ''; $('find').blur(); }
  drawClasses();
}

function restart() {
  queue = []; current = null; fetching = null; asked += 1;
  drawLabel();
  fill();
}

function drawImage(began) {
  const place = $('picture');
  if (!place) return;
  place.className = 'picture';
  if (!current) {
    place.replaceChildren(el('p', {class: 'empty soft'}, nothing()));
    $('caption').replaceChildren();
    drawClasses();
    return;
  }
  const item = current, img = picture(item);
  img.addEventListener('load', () => {
    if (began) latencies.push(performance.now() - began);
    shownAt = performance.now();
  }, {once: true});
  img.addEventListener('error', () => unreadable(item));
  place.replaceChildren(img);
  const {suggestion, confidence, queue: from, blind} = item.shown;
  const said = item.was ? `was: ${item.was}`
    : blind || from === 'start' ? 'drawn at random, shown without a suggestion'
      : suggestion ? [`suggested: `, el('b', {}, suggestion), ` ${sure(confidence)}`,
        ' ', el('kbd', {}, 'Enter')] : 'no suggestion yet';
  $('caption').replaceChildren(el('span', {class: 'path'}, item.file),
    el('span', {class: 'hint-label soft'}, said));
  drawClasses();
}

function nothing() {
  if (!who) return '';
  if (fetching) return 'Loading …';
  if (!state.images) {
    return state.complete ? 'The folder has no images.' : 'Listing the images …';
  }
  if (chosenQueue === 'class') return 'Choose a class; its predictions come after the first round of learning.';
  if (chosenQueue === 'unsure') return 'No image was skipped or unsure.';
  if (chosenQueue === 'others') return 'You have seen all images that others labelled.';
  return 'All images have an answer.';
}

async function unreadable(item) {
  if (current !== item) return;
  let reason = 'it could not be loaded';
  try {
    await fetch(address(item, 'thumb')).then((answer) => answer.ok || answer.json())
      .then((said) => { reason = said?.problem || reason; });
    if (reason === 'it could not be loaded') setTimeout(() => current === item && drawImage(), 2000);
  } catch { // the server has ended
    setTimeout(() => current === item && drawImage(), 2000);
  }
  if (current !== item) return;
  $('picture').replaceChildren(el('p', {class: 'empty'},
    el('b', {}, 'This image cannot be shown: '), reason, el('br'),
    el('span', {class: 'soft'}, 'Press s to skip it.')));
}

function suggested() {
  if (!current || current.shown.blind || current.shown.queue === 'start') return null;
  return current.shown.suggestion;
}

function drawClasses() {
  const place = $('classes');
  if (!place) return;
  if (!state.classes.length) {
    place.replaceChildren(el('p', {class: 'soft'}, 'There are no classes yet. '),
      button('Add classes', () => show('classes')));
    return;
  }
  const wanted = filter.toLowerCase(), all = keys();
  const mine = state.classes.map((c, k) => ({...c, k}))
    .filter((c) => c.name.toLowerCase().includes(wanted));
  place.replaceChildren(...mine.flatMap((c) => {
    const made = el('button', {type: 'button', class: 'class', 'data-name': c.name,
      title: c.guideline || c.name, onclick: () => label(c.name)},
    el('kbd', {}, all[c.k] || '·'), el('span', {class: 'name'}, c.name),
    el('span', {class: 'count'}, String(c.count)));
    if (suggested() === c.name) made.classList.add('suggested');
    return c.guideline ? [made, el('div', {class: 'guide'}, c.guideline)] : [made];
  }));
}

function zoom() {
  zoomed = !zoomed;
  $('picture')?.classList.toggle('zoomed', zoomed);
}

// A grid of many images.

const grid = {
  items: [], chosen: new Set(), of: '', order: 'desc', last: -1, more: true, busy: false,

  async load(append = false) {
    if (this.busy) return;
    this.busy = true;
    const query = new URLSearchParams({of: this.of, order: this.order, count: 48, who,
      skip: append ? this.items.length : 0});
    try {
      const found = await ask(`/api/grid?${query}`);
      this.more = found.length === 48;
      const there = new Set(append ? this.items.map((i) => i.id) : []);
      const fresh = found.filter((i) => !there.has(i.id));
      this.items = append ? [...this.items, ...fresh] : fresh;
      if (!append) this.chosen.clear();
      problem('next', '');
    } catch (error) {
      problem('next', error.message);
    } finally {
      this.busy = false;
    }
    if (view === 'grid') this.draw();
  },

  draw() {
    const bar = el('div', {class: 'bar row'},
      options([['', 'all classes'], ...state.classes.map((c) => [c.name, c.name])], this.of,
        (value) => { this.of = value; this.load(); }, {'aria-label': 'Predicted class'}),
      options([['desc', 'most confident first'], ['asc', 'least confident first']], this.order,
        (value) => { this.order = value; this.load(); }, {'aria-label': 'Order'}),
      button('All', () => this.select(this.items.map((i) => i.id))),
      button('None', () => this.select([])),
      el('span', {class: 'row', id: 'act'}));
    const tiles = el('div', {class: 'tiles', id: 'tiles', onpointerdown: (e) => lasso(e)},
      ...this.items.map((item, k) => el('button', {type: 'button', class: 'tile',
        'aria-pressed': 'false', 'data-id': item.id, title: item.file,
        onclick: (e) => this.click(k, e)},
      picture(item, 'thumb'), el('span', {}, el('b', {}, item.shown.suggestion ?? '–'),
        item.shown.suggestion ? el('i', {}, sure(item.shown.confidence)) : null))));
    const end = this.items.length
      ? (this.more ? el('p', {class: 'empty'}, button('More', () => this.load(true))) : null)
      : el('p', {class: 'empty soft'}, state.round
        ? 'No unlabelled image is predicted to be of this class.'
        : 'Predictions come after the first round of learning: label a few images of two classes.');
    const scrolled = $('view').scrollTop;
    $('view').replaceChildren(el('div', {}, bar, tiles, ...(end ? [end] : [])));
    $('view').scrollTop = scrolled;
    this.mark();
  },

  click(k, event) {
    const id = this.items[k].id;
    if (event.shiftKey && this.last >= 0) {
      const [a, b] = [Math.min(k, this.last), Math.max(k, this.last)];
      for (const item of this.items.slice(a, b + 1)) this.chosen.add(item.id);
    } else if (this.chosen.has(id)) this.chosen.delete(id);
    else this.chosen.add(id);
    this.last = k;
    this.mark();
  },

  select(ids) { this.chosen = new Set(ids); this.mark(); },

  mark() {
    for (const tile of document.querySelectorAll('.tile')) {
      tile.setAttribute('aria-pressed', String(this.chosen.has(Number(tile.dataset.id))));
    }
    const count = this.chosen.size, act = $('act');
    if (!act) return;
    const own = new Set(this.picked().map((i) => i.shown.suggestion));
    const named = own.size === 1 ? [...own][0] : 'predicted';
    act.replaceChildren(
      button(count ? `Confirm ${count} as ${named}` : 'Select images to confirm',
        () => this.confirm(), {class: 'primary', disabled: !count || own.has(null), id: 'confirm'}),
      options([['', `label as …`], ...state.classes.map((c) => [c.name, c.name])], '',
        (value) => value && this.as(value), {'aria-label': 'Label as', disabled: !count}));
  },

  picked() { return this.items.filter((i) => this.chosen.has(i.id)); },

  confirm() {
    const picked = this.picked().filter((i) => i.shown.suggestion);
    if (picked.length) {
      this.finish(give(picked, (i) => ({answer: 'label', label: i.shown.suggestion})));
    }
  },

  as(name) {
    const picked = this.picked();
    if (picked.length) this.finish(give(picked, {answer: 'label', label: name}));
  },

  async finish(saved) {
    this.items = this.items.filter((i) => !this.chosen.has(i.id));
    this.chosen.clear();
    this.last = -1;
    this.draw();
    await saved;
    if (this.items.length < 24 && view === 'grid') this.load();
  },
};

function lasso(event) {
  if (event.button || event.pointerType !== 'mouse' || event.shiftKey) return;
  const x = event.clientX, y = event.clientY;
  let box = null;
  const tiles = [...document.querySelectorAll('.tile')];
  const before = new Set(grid.chosen);
  const move = (e) => {
    if (!box && Math.hypot(e.clientX - x, e.clientY - y) < 8) return;
    if (!box) { box = el('div', {class: 'lasso'}); document.body.append(box); }
    const r = {left: Math.min(x, e.clientX), right: Math.max(x, e.clientX),
      top: Math.min(y, e.clientY), bottom: Math.max(y, e.clientY)};
    box.style.left = `${r.left}px`; box.style.top = `${r.top}px`;
    box.style.width = `${r.right - r.left}px`; box.style.height = `${r.bottom - r.top}px`;
    const ids = tiles.filter((t) => {
      const b = t.getBoundingClientRect();
      return b.left < r.right && b.right > r.left && b.top < r.bottom && b.bottom > r.top;
    }).map((t) => Number(t.dataset.id));
    grid.select([...before, ...ids]);
  };
  const up = () => {
    document.removeEventListener('pointermove', move);
    document.removeEventListener('pointerup', up);
    if (box) {
      box.remove();
      // The click that follows belongs to the lasso.
      const stop = (e) => { e.stopPropagation(); e.preventDefault(); };
      document.addEventListener('click', stop, {capture: true, once: true});
      setTimeout(() => document.removeEventListener('click', stop, {capture: true}), 50);
    }
  };
  document.addEventListener('pointermove', move);
  document.addEventListener('pointerup', up);
}

// The map.

const map = {
  points: [], by: 'prediction', scale: 1, x: 0, y: 0, moved: false,

  async load() {
    try { this.points = await ask('/api/map'); problem('next', ''); }
    catch (error) { problem('next', error.message); }
    if (view === 'map') this.draw();
  },

  draw() {
    const canvas = el('canvas', {'aria-label': 'Map of the images',
      onwheel: (e) => this.wheel(e), onpointermove: (e) => this.move(e),
      onpointerdown: (e) => { this.moved = false; this.from = [e.clientX, e.clientY]; },
      onpointerup: () => { this.from = null; }, onpointerleave: () => this.peek(null),
      onclick: (e) => this.open(e)});
    $('view').replaceChildren(el('div', {class: 'map'},
      el('div', {class: 'bar row'},
        options([['prediction', 'coloured by prediction'], ['label', 'coloured by label']],
          this.by, (value) => { this.by = value; this.draw(); }, {'aria-label': 'Colours'}),
        button('Whole map', () => { this.scale = 1; this.x = this.y = 0; this.paint(); }),
        el('div', {class: 'legend'}, ...this.legend())),
      el('div', {class: 'place', id: 'place'}, canvas,
        ...(this.points.length ? [] : [el('p', {class: 'empty soft'}, 'The map comes with the first predictions.')]))));
    this.canvas = canvas;
    this.paint();
  },

  legend() {
    const row = (name, tone) => {
      const dot = el('i', {class: 'dot'});
      dot.style.background = tone;
      return el('span', {}, dot, name);
    };
    const used = new Set(this.points.map((p) => this.name(p)));
    return [...state.classes.filter((c) => used.has(c.name)).slice(0, 60)
      .map((c) => row(c.name, colour(c.name))),
    ...(used.has(null) ? [row(this.by === 'label' ? 'no label' : 'no prediction', 'hsl(0 0% 55%)')] : [])];
  },

  name(p) { return this.by === 'label' ? p[5] : p[4]; },

  at(p) {
    const {clientWidth: w, clientHeight: h} = this.canvas;
    return [20 + (p[2] * this.scale + this.x) * (w - 40), 20 + (p[3] * this.scale + this.y) * (h - 40)];
  },

  paint() {
    const {clientWidth: w, clientHeight: h} = this.canvas, dense = devicePixelRatio || 1;
    this.canvas.width = w * dense; this.canvas.height = h * dense;
    const c = this.canvas.getContext('2d');
    c.scale(dense, dense);
    const sorted = [...this.points].sort((a, b) => (this.name(a) ? 1 : 0) - (this.name(b) ? 1 : 0));
    const text = getComputedStyle(document.body).color;
    for (const p of sorted) {
      const [x, y] = this.at(p), name = this.name(p);
      c.globalAlpha = name ? 0.85 : 0.35;
      c.fillStyle = colour(name);
      c.beginPath(); c.arc(x, y, p[5] ? 5 : 3, 0, 7); c.fill();
      if (p[5]) { c.strokeStyle = text; c.lineWidth = 1; c.stroke(); }
    }
  },

  near(event) {
    const box = this.canvas.getBoundingClientRect();
    const [mx, my] = [event.clientX - box.left, event.clientY - box.top];
    let best = null, least = 16;
    for (const p of this.points) {
      const [x, y] = this.at(p), far = Math.hypot(x - mx, y - my);
      if (far < least) { least = far; best = p; }
    }
    return best;
  },

  move(event) {
    if (this.from) {
      const [fx, fy] = this.from, dx = event.clientX - fx, dy = event.clientY - fy;
      if (!this.moved && Math.hypot(dx, dy) < 5) return;
      this.moved = true;
      this.x += dx / (this.canvas.clientWidth - 40);
      this.y += dy / (this.canvas.clientHeight - 40);
      this.from = [event.clientX, event.clientY];
      this.paint();
      return;
    }
    this.peek(this.near(event));
  },

  wheel(event) {
    event.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    const mx = (event.clientX - box.left - 20) / (this.canvas.clientWidth - 40);
    const my = (event.clientY - box.top - 20) / (this.canvas.clientHeight - 40);
    const by = Math.exp(-event.deltaY / 500), next = Math.min(40, Math.max(1, this.scale * by));
    this.x = mx - (mx - this.x) * next / this.scale;
    this.y = my - (my - this.y) * next / this.scale;
    this.scale = next;
    this.paint();
  },

  peek(p) {
    document.querySelector('.peek')?.remove();
    if (!p) return;
    const [x, y] = this.at(p), {clientWidth: w, clientHeight: h} = this.canvas;
    const made = el('div', {class: 'peek'}, picture({id: p[0], file: p[1], stamp: p[6]}, 'thumb'), p[1],
      el('br'), p[5] ? `label: ${p[5]}` : p[4] ? `predicted: ${p[4]}` : 'no prediction');
    made.style.left = `${Math.min(x + 12, w - 200)}px`;
    made.style.top = `${Math.min(y + 12, Math.max(0, h - 190))}px`;
    $('place').append(made);
  },

  open(event) {
    const p = !this.moved && this.near(event);
    if (!p) return;
    if (current) queue.unshift(current);
    current = {id: p[0], file: p[1], stamp: p[6],
      shown: {queue: 'map', suggestion: p[4], confidence: null, blind: !p[4]}};
    show('label');
  },
};

// Review.

async function review() {
  const place = el('section', {}, el('p', {class: 'soft'}, 'Loading …'));
  $('view').replaceChildren(place);
  let odd, both, changed;
  try {
    [odd, both, changed] = await Promise.all(
      ['disagreements', 'conflicts', 'changed'].map((name) => ask(`/api/${name}`)));
  } catch (error) { problem('next', error.message); return; }
  if (view !== 'review') return;
  const settle = (item, name, card) => {
    give([item], {answer: 'label', label: name, final: true});
    card.remove();
  };
  const cards = (items, buttons, text) => el('div', {class: 'cards'}, ...items.map((item) => {
    const card = el('div', {class: 'card'}, picture(item, 'thumb'), el('div', {},
      el('span', {class: 'path'}, item.file), el('span', {class: 'small'}, text(item))));
    card.lastChild.append(el('div', {class: 'row'}, ...buttons(item, card),
      options([['', 'other …'], ...state.classes.map((c) => [c.name, c.name])], '',
        (name) => name && settle(item, name, card), {'aria-label': 'Other class'})));
    return card;
  }));
  const {files, agreed, pairs} = both.agreement;
  place.replaceChildren(
    el('h2', {}, `Disagreements (${odd.length})`),
    el('p', {class: 'soft'}, 'Labels that a model predicts otherwise which was not trained on them. ' +
      'They come from 50 labels on.'),
    cards(odd, (item, card) => [
      button(`Keep ${item.given}`, () => settle(item, item.given, card)),
      button(`Change to ${item.shown.suggestion}`, () => settle(item, item.shown.suggestion, card))],
    (item) => `given ${item.given}, predicted ${item.shown.suggestion} ${sure(item.shown.confidence)}`),
    el('h2', {}, `Conflicts between annotators (${both.files.length})`),
    el('p', {class: 'soft'}, files
      ? `${files} images were labelled by several people; they agree on ${percent(agreed)}.`
      : 'No image was labelled by several people. The queue "Labelled by others" shows you theirs.'),
    ...(pairs.length ? [el('table', {}, el('tr', {}, ...['annotators', 'images', 'agree', "Cohen's kappa"]
      .map((t) => el('th', {}, t))), ...pairs.map(([a, b, n, share, kappa]) => el('tr', {},
      el('td', {}, `${a}, ${b}`), el('td', {class: 'n'}, String(n)), el('td', {class: 'n'}, percent(share)),
      el('td', {class: 'n'}, kappa === null ? '–' : kappa.toFixed(2)))))] : []),
    cards(both.files, (item, card) => [...new Set(Object.values(item.answers))].map((name) =>
      button(name, () => settle(item, name, card))),
    (item) => Object.entries(item.answers).map(([a, l]) => `${a}: ${l}`).join(', ')),
    el('h2', {}, `Changed files (${changed.length})`),
    el('p', {class: 'soft'}, changed.length
      ? 'These labelled files were replaced or removed since. They are not learned from.'
      : 'No labelled file was replaced or removed since.'),
    el('ul', {class: 'path'}, ...changed.map((file) => el('li', {}, file))));
}

// Progress.

function progress() {
  const most = Math.max(1, ...state.classes.map((c) => c.count)), e = state.error;
  const figure = (value, text) => el('div', {class: 'figure'}, el('b', {}, value), text);
  const left = state.images - state.answered;
  $('view').replaceChildren(el('section', {},
    el('div', {class: 'figures'},
      figure(String(state.labelled), 'labelled images'),
      figure(`${Math.max(0, left)}${state.complete ? '' : ' …'}`, 'without an answer'),
      figure(e ? percent(e.error) : '–', e
        ? `estimated error on ${e.images} random images (95 %: ${percent(e.low)} to ${percent(e.high)})`
        : 'estimated error: needs random images after a round of learning'),
      figure(state.round ? String(state.round) : '–', state.round
        ? `round of learning, ${state.trained_on} labels` : 'round of learning')),
    ...(state.hint ? [el('p', {}, el('b', {}, state.hint))] : []),
    el('p', {class: 'soft'}, learning()),
    el('div', {class: 'columns'},
      el('div', {}, el('h2', {}, 'Labels of each class'),
        el('div', {class: 'bars'}, ...state.classes.flatMap((c) => {
          const bar = el('i');
          bar.style.width = `${100 * c.count / most}%`;
          return [el('span', {class: 'name', title: c.name}, c.name), el('span', {}, bar),
            el('span', {class: 'soft'}, String(c.count))];
        }))),
      el('div', {}, el('h2', {}, 'Estimated error'), curve(),
        el('p', {class: 'soft small'}, 'Each point is the error on 20 random images, shown without ' +
          'a suggestion, of the model at that time; the bars are 95 % intervals. It holds for ' +
          'images that have no label yet.'),
        el('h2', {}, 'Export'),
        el('div', {class: 'row'}, ...[['csv', 'CSV'], ['labelstudio', 'Label Studio'], ['coco', 'COCO']]
          .map(([kind, text]) => el('a', {href: `/export/${kind}`, download: ''}, text)))))));
}

function learning() {
  const l = state.learner, names = state.annotators.join(', ');
  const said = l.state === 'training' ? `Learning from ${l.labels} labels …`
    : l.state === 'predicting' ? 'Predicting all images …'
      : l.seconds ? `The last round took ${l.seconds} s (${state.method}); ${l.message}.`
        : l.message ? `${l.message}.` : 'Learning is off.';
  const text = said.charAt(0).toUpperCase() + said.slice(1);
  const links = state.links ? ` ${state.links} symbolic links are left out.` : '';
  return `${text}${names ? ` Annotators: ${names}.` : ''}${links}`;
}

function curve() {
  const points = state.curve, w = 560, h = 230, left = 46, bottom = 34;
  if (!points.length) return el('p', {class: 'soft'}, 'The curve begins after 20 random images, labelled after the first round.');
  const most = Math.max(10, ...points.map((p) => p.labels)) * 1.05;
  const top = Math.min(1, Math.max(0.1, ...points.map((p) => p.high)));
  const x = (n) => left + n / most * (w - left - 8), y = (v) => 8 + (1 - v / top) * (h - bottom - 8);
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((t) => t * top);
  return svg('svg', {class: 'curve', viewBox: `0 0 ${w} ${h}`, role: 'img',
    'aria-label': 'Estimated error against the number of labels'},
  ...ticks.flatMap((t) => [svg('line', {class: 'grid', x1: left, x2: w - 8, y1: y(t), y2: y(t)}),
    svg('text', {x: left - 6, y: y(t) + 4, 'text-anchor': 'end'}, `${Math.round(100 * t)} %`)]),
  ...[0, 0.5, 1].map((t) => svg('text', {x: x(t * most / 1.05), y: h - 18, 'text-anchor': 'middle'},
    String(Math.round(t * most / 1.05)))),
  svg('text', {x: (left + w) / 2, y: h - 3, 'text-anchor': 'middle'}, 'labels'),
  ...points.map((p) => svg('line', {class: 'band', x1: x(p.labels), x2: x(p.labels), y1: y(p.low), y2: y(p.high)})),
  svg('polyline', {class: 'line', points: points.map((p) => `${x(p.labels)},${y(p.error)}`).join(' ')}),
  ...points.map((p) => svg('circle', {cx: x(p.labels), cy: y(p.error), r: 4})));
}

// Classes.

async function change(body, path = '/api/classes', redraw = true) {
  try {
    await ask(path, body);
    problem('refused', '');
  } catch (error) {
    problem('refused', `Not saved: ${error.message}`);
    setTimeout(() => problem('refused', ''), 12000);
  }
  await refresh();
  if (redraw && view === 'classes') classes();
}

function classes() {
  const all = keys();
  const fresh = el('input', {placeholder: 'New class', maxlength: 100, id: 'fresh', 'aria-label': 'New class'});
  $('view').replaceChildren(el('section', {},
    el('form', {class: 'row', onsubmit: (e) => {
      e.preventDefault();
      change({op: 'add', name: fresh.value.trim()}).then(() => $('fresh')?.focus());
    }}, fresh, el('button', {class: 'primary'}, 'Add class')),
    ...state.classes.map((c, k) => {
      const name = el('input', {value: c.name, maxlength: 100, 'aria-label': `Name of ${c.name}`});
      const text = el('textarea', {maxlength: 4000, placeholder: 'Guideline: what belongs to this class, what does not',
        'aria-label': `Guideline of ${c.name}`, rows: 2,
        onchange: () => change({name: c.name, text: text.value}, '/api/guideline', false)});
      text.value = c.guideline;
      return el('div', {class: 'edit'},
        el('div', {class: 'row'}, el('kbd', {}, all[k] || '·'), name,
          button('Rename', () => name.value.trim() !== c.name &&
            change({op: 'rename', name: c.name, to: name.value.trim()})),
          options([['', 'merge into …'], ...state.classes.filter((o) => o !== c).map((o) => [o.name, o.name])], '',
            (to) => to && confirm(`Make all ${c.count} labels "${c.name}" those of "${to}"?`) &&
              change({op: 'merge', name: c.name, to}), {'aria-label': `Merge ${c.name}`}),
          el('span', {class: 'soft'}, `${c.count} label${c.count === 1 ? '' : 's'}`)),
        text);
    })));
}

// The whole page.

const VIEWS = {
  label: ['Label', () => { drawLabel(); fill(); }],
  grid: ['Grid', () => { grid.draw(); grid.load(); }],
  map: ['Map', () => { map.draw(); map.load(); }],
  review: ['Review', review],
  progress: ['Progress', progress],
  classes: ['Classes', classes],
};

function show(name) {
  view = name;
  $('tabs').replaceChildren(...Object.entries(VIEWS).map(([k, [text]]) =>
    button(text, () => show(k), {'aria-current': k === view ? 'page' : null, 'data-view': k})));
  $('view').scrollTop = 0;
  VIEWS[name][1]();
}

function facts() {
  if (!state) return;
  const unsaved = pending.reduce((n, p) => n + p.answers.length, 0), l = state.learner;
  const busy = {training: 'learning …', predicting: 'predicting …', starting: 'preparing …'}[l.state];
  $('facts').replaceChildren(
    el('span', {id: 'count'}, `${state.labelled} of ${state.images} labelled`),
    ...(unsaved > 2 ? [el('span', {}, `${unsaved} not saved yet`)] : []),
    el('span', {id: 'learning'}, busy || (state.round ? `round ${state.round}` : 'no round yet')),
    button(who || 'name', askWho, {title: 'Change your name'}));
}

let drawn = '';
async function refresh() {
  try {
    state = await ask('/api/state');
    problem('server', '');
  } catch (error) {
    problem('server', error.message.charAt(0).toUpperCase() + error.message.slice(1) + '.');
    return;
  }
  problem('learner', state.learner.state === 'failed' ? state.learner.message : '');
  problem('index', state.problem);
  facts();
  if (round !== null && state.round !== round) { // new suggestions
    queue = queue.slice(0, 2);
    if (view === 'map') map.load();
    if (view === 'grid' && !grid.chosen.size) grid.load();
  }
  round = state.round;
  const now = JSON.stringify([state.classes, state.curve, state.error, state.learner, state.images]);
  if (now !== drawn) {
    drawn = now;
    if (view === 'label') drawClasses();
    if (view === 'progress') progress();
  }
  if (view === 'label') {
    fill();
    if (!current && $('picture')) drawImage();
  }
}

function askWho() {
  $('name').value = who;
  $('who').showModal();
}

$('who').addEventListener('close', () => {
  const name = $('name').value.trim();
  if (!name && !who) { askWho(); return; }
  who = name || who;
  localStorage.setItem('who', who);
  facts();
  restartIfLabel();
});

function restartIfLabel() { if (view === 'label') restart(); }

document.addEventListener('keydown', (event) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if ($('who').open || typing) return;
  if (view === 'grid' && (event.ctrlKey || event.metaKey) && event.key === 'a') {
    event.preventDefault();
    grid.select(grid.items.map((i) => i.id));
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const pressed = event.key.toLowerCase();
  const place = state && event.key.length === 1 ? keys().indexOf(pressed) : -1;
  const named = place >= 0 ? state.classes[place].name : undefined;
  let done = true;
  if (pressed === 'u') undo();
  else if (view === 'label') {
    if (named !== undefined) label(named);
    else if (pressed === 's') answer({answer: 'skip'});
    else if (pressed === '?') answer({answer: 'unsure'});
    else if (pressed === 'z') zoom();
    else if (pressed === '/') $('find').focus();
    else if (pressed === 'enter' && event.target === document.body && suggested()) label(suggested());
    else done = false;
  } else if (view === 'grid') {
    if (named !== undefined && grid.chosen.size) grid.as(named);
    else if (pressed === 'enter' && grid.chosen.size) grid.confirm();
    else if (pressed === 'escape') grid.select([]);
    else done = false;
  } else done = false;
  if (done) event.preventDefault();
});

addEventListener('resize', () => { if (view === 'map') map.paint(); });
addEventListener('beforeunload', (event) => { if (pending.length && lost) event.preventDefault(); });

async function start() {
  await refresh();
  if (!state) { setTimeout(start, 2000); return; }
  pendingName = `pending ${state.store}`; // another store may use this port
  pending = JSON.parse(localStorage.getItem(pendingName) || '[]');
  if (!state.classes.length) show('classes'); else show('label');
  if (!who) askWho();
  if (pending.length) send();
  setInterval(refresh, 2000);
}

// For measurements and tests.
globalThis.page = {
  latencies,
  grid,
  get state() { return state; },
  get current() { return current; },
  get preloaded() {
    return [...images.values()].filter((i) => i.complete && i.naturalWidth).length;
  },
};
start();
