// ---- scores: rows of scores.json, whose keys are shown as they come

const TABLES = ["rows", "budgets", "swap", "positions"];
const PLAIN = {__proto__: null, n: "counted", of: "published", no_verdict: "no verdict %", ties: "ties %",
  budget: "token budget"};
for (const m of D.models)   // no prototype, so that r[key] finds nothing but data
  for (const name of TABLES) m[name] = m[name].map(r => Object.assign(Object.create(null), r));

const heading = key => PLAIN[key] ?? key.replaceAll("_", " ");
const keysOf = list => unique(list.flatMap(Object.keys));
// both ends of an interval: one half-width would be wrong near 0 and 100, where intervals are lopsided
const ended = (low, high, text) => Number.isFinite(low) && Number.isFinite(high) ? text : "";
const interval = (low, high) => ended(low, high, ` [${percent(low)}, ${percent(high)}]`);
const range = ({low, high}) => ended(low, high, `${percent(low)} to ${percent(high)}`);
const isShare = (key, x) => x >= -1 && x <= 1 && !/^(n|of|right|wrong|tokens|seconds|budget|n_.*|.*_n)$/.test(key);

function valueText(key, x) {
  if (x == null) return "–";
  if (typeof x !== "number") return asText(x);
  if (isShare(key, x)) return percent(x);
  return Number.isInteger(x) ? count(x) : Math.abs(x) < 100 ? x.toPrecision(3) : x.toFixed(0);
}

// a model has a colour, of page.css, and a form
const inColour = m => "m" + m % 8;
const FORMS = [["circle", {r: 4.5}], ["rect", {x: -4, y: -4, width: 8, height: 8}],
  ["path", {d: "M0 -5.5L5.2 4H-5.2Z"}], ["path", {d: "M0 -6L5 0L0 6L-5 0Z"}]];
const dot = (m, x, y, [name, shape] = FORMS[m % 4]) => s("svg", {x, y, overflow: "visible", width: 1, height: 1},
  s(name, {class: "fill", ...shape}));
const swatch = m => s("svg", {width: 14, height: 14, class: inColour(m), "aria-hidden": "true"}, dot(m, 7, 7));
const stroke = m => s("svg", {width: 18, height: 10, class: inColour(m), "aria-hidden": "true"},
  s("line", {class: "ink", "stroke-width": 3, x1: 0, x2: 18, y1: 6, y2: 6}));
const legend = () => D.models.length > 1 && div("legend", D.models.map((m, i) =>
  h("span", {}, swatch(i), span("data", m.name))));

function drawScores() {
  if (!D.models.length) return fill($("scores"), quality());
  const models = D.models, counted = models.filter(m => m.counted).map(m => m.name).join(", ");
  const all = name => models.flatMap(m => m[name].map(r => models.length > 1 ? {model: m.name, ...r} : r));
  const kinds = unique(all("rows").filter(r => r.kind !== "overall").map(tableOf));
  const tables = [["swap", "Both orders of the answers"], ["positions", "Where the better answer stands"],
    ["budgets", "Token budgets"]].filter(([name]) => all(name).length);
  fill($("scores"),
    headline(models),
    counted && h("p", {class: "soft"}, "No scores.json beside ", span("data", counted),
      ": the share right is counted from the judgements; ties and missing verdicts count as wrong."),
    h2("Scores with 95% intervals"), legend(), div("card", div("body", dotPlot(models))),
    all("budgets").length > 0 && [h2("Score within a token budget"), legend(), div("plots", budgetPlots(models))],
    h2("Lengths of judgements"), lengths(models),
    kinds.length > 0 && [h2("Tables"), h("p", {class: "soft"}, "Scores, no verdict (of the judgements) and ",
      "ties (of the pairs) in percent; tokens and seconds are means of a judgement. A name leads to its judgements."),
      kinds.map(kind => scoreTable(kind, models))],
    tables.map(([name, title]) => [h2(title), name === "budgets" ? plainTable(all(name))
      : quantityTables(name, models)]),
    quality(),
    h2("How this was made"), models.map(madeOf));
}

function quality() {   // of the texts: a column for each model and each file of chains, in the words of data/quality.py
  const {of, groups} = D.quality, heads = of.map(name => th("num data", name));
  const block = ([group, lines]) => [[h("th", {class: "group", colspan: of.length + 1}, group)],
    ...lines.map(([name, cells]) => [td("", name), cells.map(x => td("num", x))])];
  return of.length > 0 && [h2("Quality of the texts"), h("p", {class: "soft"}, "A text is a vote or a chain. ",
    "Quotations are looked for in the answer that they are said to be from; each rule lets more pass than the last."),
    div("card", div("body", table("quality", [th("", ""), heads], groups.flatMap(block))))];
}

function madeOf(m) {
  const more = Object.entries(m).filter(([key]) => ![...TABLES, "name", "folder", "counted", "settings"].includes(key));
  return fold([span("data", m.name), span("soft data", "  " + m.folder)], pairsTable({...flat(m.settings),
    ...Object.fromEntries(more)}));
}

const flat = x => x && typeof x === "object" && !Array.isArray(x) ? x : {};
const pairsTable = x => table("", [], Object.entries(x).map(([key, y]) =>
  [th("data", key), td("data mono text", asText(y))]));

function headline(models) {   // one model: a tile for each benchmark; several: a table
  const isHead = r => r.kind === "overall" || r.benchmark === "average";
  const of = r => r.of && r.of !== r.n ? ` of ${count(r.of)}` : "";
  const about = r => div("soft", r.benchmark === "average" ? "of the benchmarks" : `${count(r.n)}${of(r)} counted`);
  const alike = all => unique(all.filter(Boolean).map(r => about(r).textContent)).length === 1;   // else each its own
  const names = unique(models.flatMap(m => m.rows.filter(isHead).map(r => r.benchmark)));
  const found = names.map(name => models.map(m => m.rows.find(r => r.benchmark === name && isHead(r))));
  if (models.length === 1) return div("tiles", found.map(([r]) => div("tile", h("h3", {class: "data"}, r.benchmark),
    div("big", percent(r.score), span("soft", "%")), div("soft", range(r)), about(r))));
  const cell = (r, all) => {
    const best = r && r.score === Math.max(...all.map(x => x ? x.score : -1));
    return td("num" + (best ? " best" : ""),
      r ? [percent(r.score), div("soft", range(r)), !alike(all) && about(r)] : "–");
  };
  return div("card headline", div("body", table("",
    [th("", "Model"), found.map((all, i) =>
      th("num", span("data", names[i]), alike(all) && about(all.find(Boolean))))],
    models.map((m, k) => [td("data", swatch(k), " ", m.name), found.map(all => cell(all[k], all))]))));
}

function budgetPlots(models) {
  const points = (m, benchmark) => {
    const heads = m.budgets.filter(r => r.benchmark === benchmark && (r.kind ?? "overall") === "overall");
    return heads.filter(r => r.name === heads[0].name).map(r => [r.budget, 100 * r.score]);
  };
  return unique(models.flatMap(m => m.budgets.map(r => r.benchmark))).map(benchmark => linePlot({
    title: benchmark, log: "x", top: 100,
    what: "score %, by tokens allowed for a judgement (a later verdict does not count)",
    series: models.map((m, i) => ({name: m.name, m: i, points: points(m, benchmark)})).filter(x => x.points.length)}));
}

function dotPlot(models) {   // a line for each score, with a dot and its interval for each model
  const wanted = r => typeof r.score === "number"
    && (["overall", "section", "domain", "difficulty"].includes(r.kind) || r.benchmark === "average");
  const end = (r, key) => Number.isFinite(r[key]) ? r[key] : r.score;
  const all = models.flatMap((m, i) => m.rows.filter(wanted).map(r =>
    ({...r, i, low: end(r, "low"), high: end(r, "high"), written: interval(r.low, r.high)})));
  const floor = Math.max(0, Math.floor(10 * Math.min(...all.map(r => r.low)) - 0.3) / 10);
  const x = value => 100 * Math.max(0, Math.min(1, (value - floor) / (1 - floor))) + "%";
  const gap = floor >= 0.6 ? 0.1 : 0.2, H = 18, ticks = [];
  for (let t = Math.ceil(floor / gap - 1e-9) * gap; t <= 1.0001; t += gap) ticks.push(t);
  const rule = (name, value, height) => s("line", {class: name, x1: x(value), x2: x(value), y1: 0, y2: height});
  const mark = (r, y) => s("g", {class: inColour(r.i)},
    s("line", {class: "ink", "stroke-width": 2.5, x1: x(r.low), x2: x(r.high), y1: y, y2: y}), dot(r.i, x(r.score), y));
  const line = same => {
    const found = models.map((m, i) => same.find(r => r.i === i)).filter(Boolean), height = H * found.length;
    const title = r => `${models[r.i].name}: ${percent(r.score)}%${r.written}, n = ${count(r.n)}`;
    return [div("data" + (same[0].kind === "overall" ? " over" : ""), same[0].name || "(none)"),
      s("svg", {height, role: "img"}, s("title", {}, found.map(title).join("\n")),
        ticks.map(t => rule("grid", t, height)), floor < 0.5 && rule("chance", 0.5, height),
        found.map((r, k) => mark(r, H * (k + .5)))),
      div("num", found.map(r => div("", percent(r.score), span("soft", r.written))))];
  };
  const block = ([benchmark, rows]) => {
    const lines = [...Map.groupBy(rows, r => r.kind + "\n" + r.name).values()];
    return [h("h3", {class: "data"}, benchmark), lines.slice(0, 40).map(line),
      lines.length > 40 && div("soft more", `and ${lines.length - 40} more in the tables`)];
  };
  return div("dots", [...Map.groupBy(all, r => r.benchmark)].map(block), div("data"), s("svg", {height: 18},
    ticks.map(t => s("text", {x: x(t), y: 13, "text-anchor": "middle"}, Math.round(100 * t)))), h("span", {}),
    floor < 0.5 && div("soft more", "Dashed: 50, what a coin gets on single pairs; on best-of-n items it gets less."));
}

const tableOf = r => `${r.benchmark}: ${r.kind}`;

function scoreTable(title, models) {
  const all = models.map(m => m.rows.filter(r => tableOf(r) === title));
  if (models.length === 1) return card(title, plainTable(all[0], ["benchmark", "kind"], linkTo));
  const keys = keysOf(all.flat()).filter(key => !["benchmark", "kind", "name", "low", "high", "of"].includes(key));
  const names = unique(all.flat().map(r => r.name)), box = h("div", {});
  const row = (key, name) => {
    const found = all.map(list => list.find(r => r.name === name)), one = found.find(Boolean);
    const best = Math.max(...found.map(r => r?.score ?? -1)), isScore = key === "score";
    const counted = unique(found.filter(Boolean).map(r => valueText("n", r.n)));   // the models' may differ
    return [td("", linkTo(one)), td("num", counted.join(" / ")), found.map(r =>
      td("num" + (isScore && r?.score === best ? " best" : ""), r ? valueText(key, r[key]) : "–",
        isScore && r && span("soft", interval(r.low, r.high))))];
  };
  const head = [th("", ""), th("num", PLAIN.n), models.map((m, i) => th("num data", swatch(i), " " + m.name))];
  const draw = key => fill(box, table("", head, names.map(name => row(key, name))));
  draw("score");
  return card(title, box, "", h("select", {"aria-label": "what to show", onchange: e => draw(e.target.value)},
    keys.map(key => h("option", {value: key, selected: key === "score"}, heading(key)))));
}

function linkTo(row) {   // a row's name, leading to its judgements where the filters can tell them
  const name = row.name ?? "", chosen = {};
  const choose = (key, value) => {
    if (!D.names[key].includes(value)) return false;
    chosen[key] = facetName(value);
    return true;
  };
  const [section, subset] = row.kind === "domain and difficulty" ? name.split(" ") : [name, null];
  const known = subset ? choose("section", section) && choose("subset", subset)
    : choose("section", name) || choose("subset", name);
  const shown = name || "(none)";
  if (!known || !choose("benchmark", row.benchmark) || /^published variant/.test(row.kind)) return span("data", shown);
  return h("a", {class: "data", href: address({...fresh(), view: "read", ...chosen})}, shown);
}

function plainTable(list, hidden = [], nameOf = null) {   // columns from the rows' keys; a heading sorts
  const all = keysOf(list), ranged = ["score", "low", "high"].every(key => all.includes(key));
  const keys = all.filter(key => !hidden.includes(key) && !(ranged && (key === "low" || key === "high")));
  const isText = key => list.some(r => typeof r[key] === "string"), box = h("div", {});
  const cell = (r, key) => td(isText(key) ? "data" : "num", key === "name" && nameOf ? nameOf(r)
    : [valueText(key, r[key]), key === "score" && ranged && span("soft", interval(r.low, r.high))]);
  const rank = x => x == null ? -Infinity : typeof x === "object" ? asText(x) : x;
  let by = null, down = true;
  const head = key => {
    const [order, arrow] = by !== key ? [null, ""] : down ? ["descending", " ↓"] : ["ascending", " ↑"];
    const sort = () => {
      down = by === key ? !down : !isText(key);
      by = key;
      draw();
    };
    return h("th", {class: isText(key) ? "" : "num", "aria-sort": order},
      button({"data-by": key, title: "sort", onclick: sort}, heading(key) + arrow));
  };
  const draw = () => {
    const lower = (x, y) => rank(x[by]) < rank(y[by]) ? -1 : rank(x[by]) > rank(y[by]) ? 1 : 0;
    const sorted = by === null ? list : [...list].sort((x, y) => down ? lower(y, x) : lower(x, y));
    fill(box, table("", keys.map(head), sorted.map(r => keys.map(key => cell(r, key)))));
  };
  draw();
  return box;
}

// positions or swap: a line for each quantity, in the words of benchmarks/scores.py. The columns are one model's
// benchmarks, or several models, in a table for each benchmark
function quantityTables(name, models) {
  const words = D.quantities[name], all = models.flatMap((m, i) => m[name].map(r => ({i, r})));
  const what = key => Object.hasOwn(words, key) ? words[key] : heading(key);
  const cell = (r, key) => td("num", valueText(key, r[key]),
    span("soft", interval(r[key + "_low"], r[key + "_high"])));
  const draw = (list, head) => {
    const keys = keysOf(list.map(x => x.r)), ends = keys.flatMap(key => [key + "_low", key + "_high"]);
    const shown = keys.filter(key => key !== "benchmark" && !ends.includes(key));
    return table("", [th("", ""), list.map(head)],
      shown.map(key => [td("", what(key)), list.map(({r}) => cell(r, key))]));
  };
  if (models.length === 1) return draw(all, ({r}) => th("num data", r.benchmark ?? ""));
  return [...Map.groupBy(all, ({r}) => r.benchmark ?? "")].map(([benchmark, list]) =>
    card(benchmark, draw(list, ({i}) => th("num data", swatch(i), " " + models[i].name))));
}

// a histogram for each model, lengths on a logarithmic axis: right below, wrong and the rest on top
function lengths(models) {
  const known = LENGTH.filter(x => x > 0).sort((x, y) => x - y), low = known[0], high = known.at(-1);
  if (!known.length) return h("p", {class: "soft"}, "No lengths were recorded.");
  const W = 320, H = 150, top = 8, base = H - 20, B = 28;
  const bin = x => Math.min(B - 1, Math.floor(B * Math.log(x / low) / Math.log(high / low * 1.0001 || 2)));
  const edge = k => count(Math.round(low * Math.pow(high / low, k / B))), left = k => 4 + (W - 8) * k / B;
  const KINDS = ["right", "wrong", "none"];
  const histogram = (m, i) => {
    const bins = Array.from({length: B}, () => [0, 0, 0]);
    for (let j = 0; j < N; j++)
      if (J.model[j] === i && LENGTH[j] > 0) bins[bin(LENGTH[j])][Math.min(2, J.outcome[j])]++;
    const most = Math.max(1, ...bins.map(([right, wrong, other]) => right + wrong + other));
    const column = (counts, k) => {
      const [right, wrong, other] = counts, share = Math.round(100 * right / (right + wrong));
      const title = `${edge(k)} to ${edge(k + 1)} ${UNIT}: ${right} right, ${wrong} wrong, ${other} other`
        + (right + wrong ? ` (${share}% right)` : "");
      let at = base;
      const bars = counts.map((n, kind) => {
        const height = (base - top) * n / most;
        at -= height;
        return n > 0 && s("rect", {class: "h-" + KINDS[kind], x: left(k) + .5, width: (W - 8) / B - 1, y: at, height});
      });
      return s("g", {}, s("title", {}, title), bars,
        s("rect", {x: left(k), width: (W - 8) / B, y: top, height: base - top, fill: "transparent"}));
    };
    const ticks = [[0, "start"], [B / 2, "middle"], [B, "end"]].map(([k, anchor]) =>
      s("text", {x: left(k), y: H - 5, "text-anchor": anchor}, edge(k)));
    const svg = s("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `lengths of ${m.name}’s judgements`},
      s("line", {class: "grid", x1: 4, x2: W - 4, y1: base, y2: base}), ticks, bins.map(column));
    return plot(m.name, [`${UNIT} of a judgement (log scale): `, span("right", "■ right "), span("wrong", "■ wrong "),
      span("none", "■ no verdict, tie, no label")], svg);
  };
  return div("plots", models.slice(0, 12).map(histogram));
}

const plot = (title, what, svg, read) => div("plot", h("h3", {class: "data"}, title), div("what", what), svg, read);
