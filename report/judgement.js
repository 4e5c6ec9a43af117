// ---- quotations: what the judge quotes is looked for in the answers, and marked there

const FOLD = {"’": "'", "‘": "'", "“": '"', "”": '"', "‐": "-", "‑": "-"};

function normal(text) {   // {text: lower case, one blank for white space, map: place there -> place in the original}
  let out = "", blank = true;
  const map = [];
  for (let i = 0; i < text.length; i++) {
    if (/[*`#_]/.test(text[i])) continue;   // a judge quotes the words, seldom the markdown around them
    const white = /\s/.test(text[i]), lower = text[i].toLowerCase();
    if (white && blank) continue;
    blank = white;
    out += white ? " " : FOLD[text[i]] ?? (lower.length === 1 ? lower : text[i]);
    map.push(i);
  }
  return {text: out, map};
}

function locate(quotation, texts) {   // {found: "all" | "part" | "none" | "empty", places: [[which text, from, to]]}
  const bare = x => x.replace(/^[\s"']+|[\s"']+$/g, ""), whole = bare(normal(quotation).text);
  const at = piece => {
    const i = texts.findIndex(t => t.text.includes(piece));
    if (i < 0) return null;
    const from = texts[i].text.indexOf(piece);
    return [i, texts[i].map[from], texts[i].map[from + piece.length - 1] + 1];
  };
  if (!whole) return {found: "empty", places: []};
  const once = at(whole);
  if (once) return {found: "all", places: [once]};
  const pieces = whole.split(/\[\s*(?:\.{3,}|…)\s*\]|\.{3,}|…|" "|",? and "/).map(bare).filter(x => x.length > 1);
  const places = pieces.map(at).filter(Boolean);
  return {found: !places.length ? "none" : places.length === pieces.length ? "all" : "part", places};
}

function cutQuotes(text) {   // [string | {kind, side, text, block}]: one pass; a tag that is never closed stays text
  const out = [], tag = /<(quote|summary)_([AB])>/g, unclosed = new Set();
  let at = 0, m;
  while ((m = tag.exec(text))) {
    const [, kind, side] = m, close = `</${kind}_${side}>`;
    const end = unclosed.has(close) ? -1 : text.indexOf(close, tag.lastIndex);
    if (end < 0) { unclosed.add(close); continue; }
    let before = text.slice(at, m.index), after = end + close.length;
    const line = /^[ \t]*(\n|$)/.exec(text.slice(after, after + 40));
    const block = line !== null && /(^|\n)[ \t]*$/.test(before.slice(-40));   // it has its lines to itself
    if (block) {
      before = before.replace(/\n[ \t]*$/, "");
      after += line[0].length;
    }
    out.push(before, {kind, side, text: text.slice(tag.lastIndex, end).trim(), block});
    tag.lastIndex = at = after;
  }
  return [...out, text.slice(at)];
}

// A part of the judgement as elements; its quotations go into book.quotes. book.texts: {A: [normal text], B: ...}
const quoted = (text, book) => div("text data", cutQuotes(text).map(piece =>
  typeof piece === "string" ? piece : quotation(piece, book)));

function quotation({kind, side, text, block}, book) {
  const name = `${side.toLowerCase()}${block ? " block" : ""}`, other = side === "A" ? "B" : "A";
  if (kind === "summary") return span(`quote summary ${name}`, span("who", `${side}, in short`), text);
  const {found, places} = book.texts ? locate(text, book.texts[side]) : {found: "empty", places: []};
  const n = book.quotes.push({n: book.quotes.length + 1, side, places}), linked = places.length > 0;
  let note = linked ? `${side} ${n}` : side;
  if (found === "part") note += ", only in part";
  if (found === "none") note = `not found in answer ${side}`;
  if (found === "none" && locate(text, book.texts[other]).found === "all") note += `, but in ${other}`;
  const press = linked && {title: "show in the answer", ...pressable(() => flash(`mark[data-q~="${n}"]`))};
  return h("span", {class: `quote ${name}${linked ? " linked" : ""}${found === "none" ? " lost" : ""}`, "data-n": n,
    "data-found": found, ...press}, span("who", note), text);
}

const marksIn = (book, i, side) => book.quotes.filter(q => !side || q.side === side).flatMap(q =>   // in text i
  q.places.filter(place => place[0] === i).map(([, from, to]) => ({n: q.n, side: q.side, from, to})));

// the text with its quotations marked and fenced code set in monospace; marks may overlap
function painted(text, marks) {
  const fences = [...text.matchAll(/^```[\s\S]*?(?:^```|$(?![\s\S]))/gm)].map(m => [m.index, m.index + m[0].length]);
  const cuts = unique([0, text.length, ...marks.flatMap(m => [m.from, m.to]), ...fences.flat()]);
  cuts.sort((x, y) => x - y);
  return cuts.slice(0, -1).map((from, i) => {
    const part = text.slice(from, cuts[i + 1]), over = marks.filter(m => m.from <= from && from < m.to);
    const inside = fences.some(([start, end]) => start <= from && from < end) ? span("code", part) : part;
    if (!over.length) return inside;
    const ending = over.filter(m => m.to === cuts[i + 1]);
    return h("mark", {class: over[0].side.toLowerCase(), "data-q": over.map(m => m.n).join(" "),
      "data-n": ending.map(m => m.n).join(), title: "quoted by the judge",
      ...pressable(() => flash(`.quote[data-n="${over[0].n}"]`))}, inside);
  });
}

function flash(selector) {
  const el = $("reader").querySelector(selector);
  if (!el) return;
  el.scrollIntoView({block: "center"});
  el.focus({preventScroll: true});
  $("reader").querySelector(".flash")?.classList.remove("flash");
  void el.offsetWidth;   // restarts the animation
  el.classList.add("flash");
}

function light() {   // marks what the search found, where the browser can; a hit across two nodes stays unmarked
  if (!CSS.highlights) return;
  const needle = state.q.toLowerCase(), hits = new Highlight();
  for (const body of needle ? $("reader").querySelectorAll(".card > .body") : []) {
    const nodes = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
    while (nodes.nextNode() && hits.size < 2000) {
      const node = nodes.currentNode, text = node.data.toLowerCase();
      if (text.length !== node.data.length) continue;   // places in it would be others
      for (let at = text.indexOf(needle); at >= 0 && hits.size < 2000; at = text.indexOf(needle, at + needle.length))
        hits.add(new StaticRange({startContainer: node, startOffset: at, endContainer: node,
          endOffset: at + needle.length}));
    }
  }
  CSS.highlights.set("searched", hits);
}

// ---- one judgement

let drawnAs = "";   // what the reader shows

function drawReader() {
  const text = `${current} ${state.vote} `, now = text + state.raw;
  if (now === drawnAs && current >= 0) {
    drawBar();
    light();
    return;
  }
  const top = drawnAs.startsWith(text) ? $("reader").scrollTop : 0;   // raw or not: the same place
  drawnAs = now;
  drawJudgement(top);
}

async function drawJudgement(top) {
  const j = current, reader = $("reader"), note = text => h("p", {class: "empty data"}, text);
  if (j < 0) {
    if (state.lost) return fill(reader, div("bar", backButton()), note(`No judgement ${state.lost} in this report.`));
    return fill(reader, note(rows.length ? "Choose a judgement." : "No judgement passes these filters."));
  }
  let x, pair;
  try {
    [x, pair] = await Promise.all([item("judgement", j), item("pair", J.pair[j])]);
  } catch (e) {
    if (current === j) fill(reader, note(`This judgement cannot be shown: ${e.message}`));
    return;
  }
  if (current !== j) return;
  seen[j] = 1;
  if (state.vote >= x.votes.length) state.vote = 0;
  const v = x.votes[state.vote], book = {quotes: [], texts: null}, answers = pair && answersOf(pair, J.swapped[j]);
  const normals = messages => messages.map(([, content]) => normal(content));
  if (pair) book.texts = {A: normals(pair.rendered ?? answers.A), B: normals(pair.rendered ?? answers.B)};
  const judged = !v ? remark("Judgement", "Only the outcome was recorded, no text.", "rest")
    : state.raw ? card("Raw text", div("text data code", v.text), "raw") : judgedParts(v, book);
  fill(reader, div("bar", barOf(j)), factsOf(j, x, v, book), pillsOf(j, x), twinsOf(j), asked(j, pair, answers, book),
    div("judged", judged));
  reader.scrollTop = top;
  light();
  drawList();
  const next = rows[position.get(j) + 1];
  if (next != null) Promise.all([item("judgement", next), item("pair", J.pair[next])]).catch(() => 0);   // ahead
}

const answersOf = (pair, swapped) => swapped ? {A: messagesOf(pair.b), B: messagesOf(pair.a)}
  : {A: messagesOf(pair.a), B: messagesOf(pair.b)};
const remark = (title, text, name) => card(title, h("p", {class: "soft"}, text), name);

function drawBar() {   // it changes when the list does
  const bar = $("reader").querySelector(".bar");
  if (bar && current >= 0) fill(bar, barOf(current));
}

function barOf(j) {
  const [kind, mark, name] = OUTCOMES[J.outcome[j]], at = position.get(j);
  const turn = (id, text, title, on, act) => button({id, title, "aria-pressed": String(on), onclick: act,
    class: id === "tall" && "wide"}, text);
  return [backButton(),
    button({id: "previous", "aria-label": "previous judgement", title: "previous (k)", onclick: () => step(-1)}, "‹"),
    button({id: "next", "aria-label": "next judgement", title: "next (j)", onclick: () => step(1)}, "›"),
    span("soft place", at == null ? "not in this list" : `${count(at + 1)} / ${count(rows.length)}`),
    span("badge " + kind, `${mark} ${name}`),
    h("span", {}, "verdict ", b(SIDE[J.verdict[j]]), span("soft", " · "), "label ", b(SIDE[J.label[j]])),
    span("spring"),
    turn("tall", "full answers", "answers in full height (e)", document.body.classList.contains("tall"), tall),
    turn("raw", "raw text", "the judgement as it was written (t)", state.raw, turnRaw)];
}

const backButton = () => button({id: "back", onclick: toList}, "‹ list");
const turnRaw = () => show({raw: !state.raw}, false);
const tall = () => {
  document.body.classList.toggle("tall");
  drawBar();
};

function factsOf(j, x, v, book) {
  const where = unique(["benchmark", "section", "subset"].map(key => D.names[key][J[key][j]]).filter(Boolean));
  const n = book.quotes.length, lost = book.quotes.filter(q => !q.places.length).length;
  const facts = [
    where.map((name, i) => [i > 0 && " › ", h("b", {class: "data"}, name)]),
    h("a", {class: "data mono", id: "permalink", href: address({j}), title: "link to this judgement"}, J.id[j]),
    ["by ", h("b", {class: "data"}, D.models[J.model[j]].name)],
    v && (v.n_tokens != null ? [b(count(v.n_tokens)), " tokens"] : [b(count(v.text.length)), " characters"]),
    v && v.seconds != null && [b(v.seconds.toFixed(1)), " s"],
    v && v.finished === true && "finished",
    v && v.finished === false && span("cut", "cut off by the token limit"),
    x.n_prompt_tokens != null && ["prompt ", b(count(x.n_prompt_tokens)), " tokens"],
    v && ["type ", b(v.parts.type ?? "unknown")],
    v && v.parts.fault && span("cut", `not well-formed: ${v.parts.fault}`),
    J.swapped[j] > 0 && ["A and B ", b("swapped"), " (was B and A)"],
    n > 0 && [b(n), n > 1 ? " quotations" : " quotation", lost > 0 && span("cut", `, ${lost} not found`)],
    v && v.at && Object.entries(v.at).map(([tokens, side]) => [`at ${tokens}: `, b(SIDE[SIDES.indexOf(side)]), "  "]),
    x.item != null && !J.id[j].includes(x.item) && ["item ", span("data mono", x.item)],
  ];
  return div("facts", facts.filter(Boolean).map(fact => h("span", {}, fact)));
}

function pillsOf(j, x) {   // a button for each vote, where there are several
  const markOf = verdict => OUTCOMES[verdict === null ? 2 : verdict === SIDES[J.label[j]] ? 0 : 1][1];
  const pill = (v, i) => button({"data-vote": i, "aria-pressed": String(i === state.vote), onclick: () => showVote(i)},
    `vote ${i + 1}: ${v.verdict ? v.verdict.toUpperCase() : "none"} `, SIDES[J.label[j]] && markOf(v.verdict));
  const several = x.votes.length > 1;
  return several && h("div", {class: "pills votes", role: "group", "aria-label": "Votes"}, x.votes.map(pill));
}

const showVote = vote => show({j: current, vote}, false);

function twinsOf(j) {   // links to the other judgements of the same pair
  const twins = [...J.pair.keys()].filter(k => J.pair[k] === J.pair[j] && k !== j).slice(0, 40);
  const name = k => (J.model[k] !== J.model[j] ? D.models[J.model[k]].name : J.swapped[k] ? "" : "as first shown")
    + (J.swapped[k] ? " swapped" : "");
  return twins.length > 0 && div("facts twins", h("span", {}, "the same pair: "), twins.map(k =>
    link(k, {}, span(OUTCOMES[J.outcome[k]][0], OUTCOMES[J.outcome[k]][1] + " "), span("data", name(k)))));
}

function asked(j, pair, answers, book) {   // the question and the answers
  const missing = "The question and the answers are not on disk beside these judgements.";
  if (!pair) return remark("Texts", missing, "no-texts");
  if (pair.rendered)
    return card("As shown to the judge", conversation(pair.rendered, i => marksIn(book, i)), "rendered");
  const side = letter => {
    const low = letter.toLowerCase(), chars = answers[letter].reduce((n, m) => n + m[1].length, 0);
    return card(`Answer ${letter}`, conversation(answers[letter], i => marksIn(book, i, letter)), `side-${low}`,
      SIDES[J.label[j]] === low && span("tag right labelled", "★ better (label)"),
      SIDES[J.verdict[j]] === low && span("tag chosen", "☞ judge’s choice"),
      span("spring"), span("soft tag", `${count(chars)} chars`));
  };
  const title = pair.prompt.length > 1 ? "Conversation" : "Question";
  return [card(title, conversation(pair.prompt, () => []), "question"), div("sides", side("A"), side("B"))];
}

const conversation = (messages, marksOf) => messages.map(([role, content], i) =>
  [messages.length > 1 && div("role data", role), div("text data", painted(content, marksOf(i)))]);

function judgedParts(v, book) {   // the cards of a vote's text, in the order in which a chain has them
  const {thinking, type, rubric, justify, solution, evaluation, rest} = v.parts;
  const alone = !rubric && !solution && !evaluation;
  return [
    thinking && h("details", {class: "card fold", open: alone && !rest},
      h("summary", {}, `Thinking (${count(thinking.length)} characters)`), div("body text data", thinking)),
    rubric && card("Rubric", [typeof rubric === "string" ? quoted(rubric, book) : rubricTable(rubric, book),
      justify && div("justify", quoted(justify, book))], "rubric-card"),
    solution && card("The judge’s own solution", quoted(solution, book), "solution"),
    evaluation && card("Evaluation", quoted(evaluation, book), "evaluation"),
    alone && !thinking && !rest && remark("Judgement", "Nothing but a verdict was written.", "rest"),
    rest && card(alone && !type ? "Judgement" : "Outside these parts", quoted(rest, book), "rest"),
  ];
}

function rubricTable(items, book) {
  const weights = items.map(([, weight]) => parseFloat(weight) || 0), most = Math.max(...weights, 1e-9);
  const bar = i => h("span", {class: "weight", style: {width: 48 * weights[i] / most + "px"}});
  const rows = items.map(([name, weight, text], i) => [td("data", name), td("", weight != null && [bar(i), weight]),
    td("", text && quoted(text, book))]);
  const sum = weights.reduce((x, y) => x + y, 0), inPercent = items.some(([, weight]) => /%/.test(weight ?? ""));
  if (sum && items.length > 1 && inPercent && Math.abs(sum - 100) > 0.5)
    rows.push([td("soft", "sum"), td("wrong", `${+sum.toFixed(2)}%`), td("")]);
  const head = ["Criterion", "Weight", items.some(x => x[2]) && "What meets it"];
  return table("rubric", head.map(text => th("", text)), rows);
}
