"use strict";
// Texts of pairs and judgements go into the page as text nodes only (put below); nothing here parses markup.

// ---- elements

const $ = id => document.getElementById(id);

function put(el, props, kids) {   // attributes, listeners ("onclick") and children: elements, texts, lists of such
  for (const [key, value] of Object.entries(props)) {
    if (value == null || value === false) continue;
    if (key.startsWith("on")) el.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(el.style, value);
    else el.setAttribute(key, value === true ? "" : value);
  }
  for (const kid of kids.flat(Infinity))
    if (kid != null && kid !== false) el.append(kid instanceof Node ? kid : visible(asText(kid)));
  return el;
}
const h = (name, props, ...kids) => put(document.createElement(name), props, kids);
const s = (name, props, ...kids) => put(document.createElementNS("http://www.w3.org/2000/svg", name), props, kids);
const [div, span, td, th] = ["div", "span", "td", "th"].map(name => (className, ...kids) =>
  h(name, {class: className}, kids));
const b = (...kids) => h("b", {}, kids);
const h2 = text => h("h2", {}, text);
const button = (props, ...kids) => h("button", props, kids);
const card = (title, body, name = "", ...more) => h("section", {class: "card " + name},
  div("head", h("h3", {class: "data"}, title), more), div("body", body));
const fold = (title, ...body) => h("details", {class: "card fold"}, h("summary", {}, title), div("body", body));
const table = (name, head, rows) => div("scroll", h("table", {class: name},
  h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows.map(cells => h("tr", {}, cells)))));

function fill(el, ...kids) {   // draws el's children anew; the one that takes the focused one's place gets the focus
  const at = document.activeElement, within = at !== el && el.contains(at);
  const name = within && ["id", "data-is", "data-j", "data-vote", "data-by"].find(key => at.hasAttribute(key));
  const kept = name && `[${name}="${CSS.escape(at.getAttribute(name))}"]`;
  el.replaceChildren();
  put(el, {}, kids);
  if (kept) el.querySelector(kept)?.focus({preventScroll: true});
}

const pressable = act => ({role: "button", tabindex: 0, onclick: act, onkeydown: e => {
  if (e.key !== "Enter" && e.key !== " ") return;
  e.preventDefault();
  act();
}});

// ---- texts and numbers

const asText = x => x !== null && typeof x === "object" ? JSON.stringify(x, null, 1) : String(x);
// Control characters as their symbols, one for one, so that places in the text stay the same.
const visible = text => text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f]/g,
  c => c === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0)));
const wellFormed = text => text.toWellFormed ? text.toWellFormed() : text;   // as an address holds it
const pause = ms => new Promise(done => setTimeout(done, ms));
const count = n => n == null ? "–" : Number(n).toLocaleString("en");
const percent = x => Number.isFinite(x) ? (100 * x).toFixed(1) : "–";
const plainNumber = text => text !== "" && Number.isFinite(+text) ? String(+text) : "";
const phone = () => matchMedia("(max-width: 760px)").matches;
const unique = list => [...new Set(list)];

function wilson(right, n, z = 1.96) {   // the twin of wilson in benchmarks/scores.py, for what the filters leave
  if (!n) return [0, 1];
  const p = right / n, zz = z * z / n, middle = (p + zz / 2) / (1 + zz);
  const half = z * Math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz);
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

// ---- the index, and the chunks of texts

const D = JSON.parse($("index").textContent), J = D.columns, N = J.id.length;   // J: a judgement's row in each column
$("index").remove();
const OUTCOMES = [["right", "✓", "right"], ["wrong", "✗", "wrong"], ["none", "–", "no verdict"], ["tie", "=", "tie"],
  ["unlabelled", "?", "no label"]];
const SIDES = ["a", "b", null, "c", "d"], SIDE = ["A", "B", "none", "C", "D"];   // as LETTERS of data/fields.py
const byTokens = J.tokens.every((x, j) => x != null || J.votes[j] === 0) && J.tokens.some(x => x != null);
const LENGTH = byTokens ? J.tokens : J.chars, UNIT = byTokens ? "tokens" : "characters";
const CACHE_CHUNKS = 48, cache = new Map();

async function item(kind, n) {
  const k = D.chunks[kind].findLastIndex(first => first <= n), items = cache.get(kind + k) ?? unpack(kind + k);
  cache.delete(kind + k);   // and in again: the chunks used last are kept
  cache.set(kind + k, items);
  if (cache.size > CACHE_CHUNKS) cache.delete(cache.keys().next().value);
  return (await items)[n - D.chunks[kind][k]];
}

async function unpack(id) {
  const whole = () => $(id) && ($(id).nextElementSibling || document.readyState !== "loading");
  while (!whole()) {   // while the browser still reads the file, a tag is whole once another one follows it
    if (document.readyState !== "loading")
      throw Error("this file is cut off: a part of its texts is missing; make it again");
    await pause(5);
  }
  const packed = atob($(id).textContent), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

// ---- state: what is shown, kept in the address

const facetName = name => wellFormed(name) || "(none)";
const facet = (key, label, column, names) => ({key, label, column, names: names.map(facetName)});
const FACETS = [
  facet("model", "Model", J.model, D.models.map(m => m.name)),
  facet("benchmark", "Benchmark", J.benchmark, D.names.benchmark),
  facet("section", "Section", J.section, D.names.section),
  facet("subset", "Subset", J.subset, D.names.subset),
  facet("type", "Type", J.type, ["Chat", "Reasoning", "unknown"]),
  facet("order", "Answer order", J.swapped, ["as first shown", "swapped"]),
].filter(f => unique(f.column).length > 1);
const FILTERS = [...FACETS.map(f => f.key), "is", "min", "max", "q"];   // is: outcomes, with commas between
const VIEWS = ["scores", "read", "training"].filter((_, i) =>
  [D.models.length || D.quality.of.length, N, D.runs.length][i]);

// j: the judgement opened, or -1; lost: the id that a link asked for and this page does not have
const fresh = () => ({view: VIEWS[0] ?? "scores", j: -1, lost: "", vote: 0, raw: false, sort: "file",
  ...Object.fromEntries(FILTERS.map(key => [key, ""]))});
let state = fresh();
const seen = new Uint8Array(N);

function address(changes) {
  const x = {...state, ...changes}, params = new URLSearchParams({view: x.view});
  if (x.view !== "read") return "#" + params;
  for (const key of FILTERS) if (x[key] !== "") params.set(key, x[key]);
  if (x.sort !== "file") params.set("sort", x.sort);
  if (x.j >= 0) {
    params.set("j", J.id[x.j]);
    if (D.models.length > 1) params.set("of", D.models[J.model[x.j]].name);
    if (x.vote && x.j === state.j) params.set("vote", x.vote + 1);
  }
  if (x.raw) params.set("raw", "yes");
  return "#" + params;
}

function readAddress() {
  const params = new URLSearchParams(location.hash.slice(1)), x = fresh(), id = params.get("j"), of = params.get("of");
  if (id !== null) {
    x.j = J.id.findIndex((known, j) => wellFormed(known) === id
      && (of === null || wellFormed(D.models[J.model[j]].name) === of));
    if (x.j < 0) x.lost = id;
    if (N) x.view = "read";
  }
  if (VIEWS.includes(params.get("view"))) x.view = params.get("view");
  x.vote = Math.max(0, Math.floor(params.get("vote") - 1) || 0);
  x.raw = params.get("raw") === "yes";
  for (const f of FACETS) if (f.names.includes(params.get(f.key))) x[f.key] = params.get(f.key);
  const asked = (params.get("is") ?? "").split(",");
  x.is = OUTCOMES.map(o => o[0]).filter(name => asked.includes(name)).join();
  for (const key of ["min", "max"]) x[key] = plainNumber(params.get(key) ?? "");
  x.q = params.get("q") ?? "";
  if ([...$("sort").options].some(o => o.value === params.get("sort"))) x.sort = params.get("sort");
  return x;
}

let written = null, addressTimer = 0;
function remember(push, delay) {   // held keys and typing make one entry of the history, where they stop
  clearTimeout(addressTimer);
  const write = () => {
    const hash = address();
    if (hash === location.hash) return;
    written = hash;
    if (push) location.hash = hash; else history.replaceState(null, "", hash);
  };
  if (delay) addressTimer = setTimeout(write, delay); else write();
}

function show(changes, push = true, delay = 0) {
  Object.assign(state, {lost: ""}, changes);
  remember(push, delay);
  drawRead();
}

function change(changes, push = true) {   // a filter: the judgement shown stays if it is still in the list
  Object.assign(state, changes);
  filter();
  show(position.has(state.j) ? {} : {j: -1}, push, push ? 0 : 250);
  seek(true);
}

const openRow = (j, push) => show({j, vote: 0}, push, 120);
const toList = () => show({j: -1});   // where the list fills a screen of its own

function step(by, push) {
  const at = position.has(current) ? position.get(current) + by : 0;
  if (at >= 0 && at < rows.length) openRow(rows[at], push);
}

// ---- filters

let rows = [], position = new Map(), current = -1;   // the list; judgement -> place in it; the judgement in the reader
let candidates = [];   // what the list would be without the search, as judged

const ORDER = {   // what the list is sorted by, lowest first
  pair: j => 2 * J.pair[j] + J.swapped[j],
  long: j => -(LENGTH[j] ?? -1),
  short: j => LENGTH[j] ?? 1e15,
  random: j => scatter(scatter(j)) >>> 0,
};
const scatter = x => Math.imul(x ^ x >>> 16, 0x45d9f3b);

function filter() {
  const choices = (f, chosen) => ({...f, counts: f.names.map(() => 0),
    keeps: j => !chosen.length || chosen.includes(f.names[f.column[j]])});
  const facets = FACETS.map(f => choices(f, state[f.key] === "" ? [] : [state[f.key]]));
  const chosen = state.is ? state.is.split(",") : [];
  const outcomes = choices(facet("is", "Outcome", J.outcome, OUTCOMES.map(o => o[0])), chosen);
  const counted = [...facets, outcomes], tests = [...counted];
  if (state.min !== "" || state.max !== "") {
    const min = state.min === "" ? -1 : +state.min, max = state.max === "" ? Infinity : +state.max;
    tests.push({keeps: j => LENGTH[j] != null && LENGTH[j] >= min && LENGTH[j] <= max});
  }
  const search = {keeps: j => !state.q || found.q !== state.q || found.known[j] === YES};
  tests.push(search);
  rows = [];
  candidates = [];
  for (let j = 0; j < N; j++) {
    const failed = tests.filter(test => !test.keeps(j)), [only] = failed;
    if (failed.length > 1) continue;
    for (const f of counted) if (!only || only === f) f.counts[f.column[j]]++;   // what each choice would leave
    if (!only) rows.push(j);
    if (!only || only === search) candidates.push(j);
  }
  const order = ORDER[state.sort];
  if (order) rows.sort((x, y) => order(x) - order(y) || x - y);
  position = new Map(rows.map((j, i) => [j, i]));
  drawControls(facets, outcomes.counts, chosen);
}

function drawControls(facets, counts, chosen) {
  fill($("outcomes"), OUTCOMES.map(([kind, mark, name], k) => {
    const on = chosen.includes(kind), others = chosen.filter(x => x !== kind);
    return (counts[k] || on || k < 3) && button({"aria-pressed": String(on), "data-is": kind,
      onclick: () => change({is: (on ? others : [...others, kind]).join()})},
      `${mark} ${name} `, span("soft", count(counts[k])));
  }));
  fill($("facets"), facets.map(f => h("label", {}, f.label,
    h("select", {id: "by-" + f.key, onchange: e => change({[f.key]: f.names[e.target.value] ?? ""})},
      h("option", {value: ""}, "all"),
      f.names.map((name, k) => (f.counts[k] > 0 || name === state[f.key]) && h("option",
        {value: k, selected: name === state[f.key]}, name + "  " + count(f.counts[k])))))));
  for (const key of ["min", "max", "sort"]) if (plainNumber($(key).value) !== state[key]) $(key).value = state[key];
  if ($("q") !== document.activeElement || $("q").value.trim() !== state.q) $("q").value = state.q;
  const active = FILTERS.filter(key => state[key] !== "");
  $("active").textContent = active.length ? `(${active.length} set)` : "";
  const labelled = rows.filter(j => OUTCOMES[J.outcome[j]][0] !== "unlabelled").length;
  const right = rows.filter(j => OUTCOMES[J.outcome[j]][0] === "right").length;
  const interval = wilson(right, labelled).map(percent).join(", ");
  fill($("count"),
    h("span", {}, b(count(rows.length)), rows.length < N ? ` of ${count(N)}` : " judgements",
      labelled > 0 && [` · right ${percent(right / labelled)}% `, span("mono", `[${interval}]`)]),
    active.length > 0 && button({id: "clear",
      onclick: () => change(Object.fromEntries(FILTERS.map(key => [key, ""])))}, "clear"));
}

// ---- search: ids at once, texts chunk after chunk in the background

const UNKNOWN = 0, YES = 1, NO = 2;
let found = {q: "", known: [], pairs: new Map()}, turns = 0;   // pairs: whether a pair's own texts hold what is sought

async function seek(leave) {   // leave: once all is searched, the judgement shown makes way for one that was found
  const turn = ++turns, q = state.q, needle = q.toLowerCase(), has = text => text.toLowerCase().includes(needle);
  $("progress").hidden = !q;
  if (!q) return;
  if (found.q !== q) found = {q, known: J.id.map(id => has(id) ? YES : UNKNOWN), pairs: new Map()};
  // Only rows that pass the other filters are looked at; when those change, seek goes on with the rest.
  filter();
  drawRead();
  const {known, pairs} = found, todo = candidates.filter(j => known[j] === UNKNOWN);
  let shown = performance.now(), rested = shown;
  for (const [done, j] of todo.entries()) {
    const n = J.pair[j];
    if (!pairs.has(n)) pairs.set(n, pairTexts(await item("pair", n)).some(has));
    known[j] = pairs.get(n) || (await item("judgement", j)).votes.some(v => has(v.text)) ? YES : NO;
    if (turn !== turns) return;
    if (performance.now() - rested < 12) continue;
    $("progress").textContent = `searching the texts: ${Math.round(100 * done / todo.length)}%`;
    if (performance.now() - shown > 300) {
      filter();
      drawRead();
      shown = performance.now();
    }
    await pause(0);
    rested = performance.now();
    if (turn !== turns) return;
  }
  filter();
  if (leave && state.j >= 0 && !position.has(state.j)) show({j: -1}, false); else drawRead();
  $("progress").textContent = `all texts searched for “${q}”`;
}

const messagesOf = x => typeof x === "string" ? [["assistant", x]] : x;
const pairTexts = x => x === null ? []
  : [...(x.rendered ?? []), ...x.prompt, ...messagesOf(x.a), ...messagesOf(x.b)].map(m => m[1]);

// ---- the list: only the rows in sight exist

const ROW = 54;   // pixels, as in page.css

function drawList() {
  const {scrollTop, clientHeight} = $("list"), first = Math.max(0, Math.floor(scrollTop / ROW) - 5);
  fill($("spacer"), rows.slice(first, Math.ceil((scrollTop + clientHeight) / ROW) + 5).map((j, i) => {
    const [kind, mark, name] = OUTCOMES[J.outcome[j]];
    const about = [
      D.names.subset[J.subset[j]] || D.names.section[J.section[j]] || D.names.benchmark[J.benchmark[j]],
      J.swapped[j] && "swapped",
      LENGTH[j] != null && `${count(LENGTH[j])} ${byTokens ? "tok" : "chars"}`,
      D.models.length > 1 && !state.model && D.models[J.model[j]].name,
    ].filter(Boolean).join(" · ");
    return link(j, {class: "row" + (seen[j] ? " seen" : ""), "data-j": j, style: {top: (first + i) * ROW + "px"},
      tabindex: j === current || !position.has(current) ? 0 : -1, "aria-current": j === current && "true"},
      h("span", {class: "mark " + kind, title: name}, mark),
      div("data", D.previews[J.pair[j]] || J.id[j]), div("under data", about));
  }));
}

const link = (j, props, ...kids) => h("a", {...props, href: address({j}), onclick: e => {
  if (e.ctrlKey || e.metaKey || e.shiftKey) return;   // another tab or window
  e.preventDefault();
  openRow(j);
}}, kids);

function drawRead() {
  if (state.view !== "read") return;
  const opened = state.j >= 0 || state.lost !== "";
  document.body.dataset.open = opened ? "yes" : "no";
  current = opened || phone() || !rows.length ? state.j : rows[0];
  if (!opened) state.vote = 0;
  drawReader();
  const at = position.get(current), list = $("list");
  $("spacer").style.height = rows.length * ROW + "px";
  if (at != null && (at * ROW < list.scrollTop || (at + 1) * ROW > list.scrollTop + list.clientHeight))
    list.scrollTop = at * ROW - list.clientHeight / 3;
  drawList();
}
