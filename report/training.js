// ---- training

const METRICS = {
  __proto__: null,
  reward: ["Reward", "mean over the step’s rollouts, −1 to 1"],
  accuracy: ["Accuracy", "share of rollouts that earned +1"],
  eval_accuracy: ["Held-out accuracy", "greedy, on held-out pairs; no verdict is wrong"],
  frac_no_verdict: ["No verdict", "share of rollouts"],
  judgement_tok: ["Judgement length", "mean tokens of a rollout"],
  kl: ["KL", "nats per token, against the reference"],
  entropy: ["Entropy", "nats per token"],
  mismatch: ["Mismatch", "sampler’s against trainer’s log-probability, mean, nats"],
  mismatch_max: ["Mismatch, largest", "nats"],
  loss: ["Loss", "per token"],
  decode_tok_s: ["Decoding speed", "tokens written a second, rank 0"],
  prefill_tok_s: ["Prefill speed", "prompt tokens read a second, rank 0"],
  update_tok_s: ["Update speed", "packed tokens a second, all ranks"],
  train_tok_s: ["Training speed", "packed tokens a second, all ranks"],
  lr: ["Learning rate", ""],
  grad_norm: ["Gradient norm", "before clipping"],
  frac_zero_spread: ["Groups without spread", "share of pairs whose rewards are all equal"],
  frac_unfinished: ["Unfinished", "share of rollouts cut off"],
  clip_frac: ["Clipped", "share of tokens whose gradient the clip removed"],
  n_skipped: ["Skipped steps", "optimizer steps not taken: loss or gradient not finite"],
};
const LOGGED = ["mismatch", "mismatch_max", "grad_norm", "kl"];
const ALWAYS = ["loss", "grad_norm"];   // null in these was not finite; elsewhere there was nothing to measure
const has = (r, key) => Object.hasOwn(r.columns, key);

function drawTraining() {
  const runs = D.runs.map((r, m) => ({...r, m})), having = runs.filter(r => r.samples.steps.length);
  fill($("training"),
    stage("Reinforcement learning (GRPO)", runs.filter(r => has(r, "reward"))),
    stage("Distillation (SFT)", runs.filter(r => !has(r, "reward"))),
    having.length > 0 && [h2("Samples over time"), samplesOf(having)],
    h2("How these runs were started"), runs.map(startOf));
  if (having.length) drawSamples();
}

function startOf({name, config}) {
  const command = Array.isArray(config.command) && {command: config.command.map(asText).join(" ")};
  return fold(span("data", name), pairsTable({...config, ...flat(config.options), options: "below", ...command}));
}

function stage(title, runs) {   // the plots of runs that have much the same metrics; a box for each run hides it
  if (!runs.length) return null;
  const hidden = new Set(), plots = h("div", {});
  const ranks = Object.keys(METRICS), domains = ranks.indexOf("eval_accuracy") + .5;
  const rank = key => key in METRICS ? ranks.indexOf(key) : key.startsWith("eval_accuracy") ? domains : Infinity;
  const draw = () => {
    const shown = runs.filter(r => !hidden.has(r)), group = [];
    const keys = unique(shown.flatMap(r => Object.keys(r.columns))).filter(key => key !== "step");
    const known = keys.filter(key => rank(key) < Infinity).sort((x, y) => rank(x) - rank(y));
    const rest = keys.filter(key => rank(key) === Infinity).sort();
    const drawn = list => div("plots", list.map(key => metricPlot(key, shown, group)));
    const summary = `${rest.length} more: ${rest.slice(0, 6).join(", ")}${rest.length > 6 ? " …" : ""}`;
    fill(plots, drawn(known), rest.length > 0 && h("details", {open: plots.querySelector("details")?.open},
      h("summary", {}, summary), drawn(rest)));
  };
  const box = r => h("input", {type: "checkbox", checked: true, onchange: e => {
    if (e.target.checked) hidden.delete(r); else hidden.add(r);
    draw();
  }});
  draw();
  return [h2(title), div("legend", runs.map(r => h("label", {}, box(r), " ", stroke(r.m),
    span("data", `${r.name} (${count(r.n)} rows)`)))), runs.map(skippedIn), plots];
}

function skippedIn(run) {   // a line that says so where a run has skipped optimizer steps
  if (!has(run, "n_skipped")) return null;
  const {step, n_skipped: counts} = run.columns, at = step.filter((_, i) => counts[i] > 0);
  if (!at.length) return null;
  const n = counts.filter(Number.isFinite).reduce((sum, x) => sum + x, 0);
  const steps = at.slice(0, 12).map(brief).join(", ") + (at.length > 12 ? " …" : "");
  return h("p", {class: "wrong"}, "× ", span("data", run.name),
    `: ${count(n)} optimizer step${n === 1 ? "" : "s"} skipped, at step ${steps}: loss or gradient was not finite`);
}

function metricPlot(key, runs, group) {
  const series = runs.filter(r => has(r, key)).map(({name, m, columns}) => {
    const shown = y => y !== "null" ? y : ALWAYS.includes(key) ? "not finite" : NONE;
    return {name, m, points: columns[key].map((y, i) => [columns.step[i], shown(y)]).filter(([, y]) => y !== null)};
  });
  const domain = key.startsWith("eval_accuracy_") && key.slice(14);
  const [title, what] = METRICS[key] ?? (domain ? ["Held-out: " + domain, "greedy accuracy"] : [key, ""]);
  const bad = series.flatMap(x => x.points).filter(point => !measured(point) && point[1] !== NONE).length;
  return linePlot({title, series, group, log: LOGGED.includes(key) ? "y" : "", onpick: pickStep,
    top: /accuracy|frac|no_verdict/.test(key) ? 1 : 0,
    what: [key in METRICS && span("mono", key), " ", what, bad > 0 && span("wrong", ` × ${bad} not finite`)]});
}

// ---- samples: what the model wrote at a step

let sampled = {run: -1, step: Infinity};   // the run shown; the step asked for
const sampleSteps = () => unique(D.runs[sampled.run].samples.steps).sort((x, y) => x - y);

function slideTo(step) {
  sampled.step = step;
  drawSamples();
}

function pickStep(step) {
  if (!$("samples")) return;
  slideTo(step);
  $("samples").scrollIntoView({block: "start"});
}

function samplesOf(runs) {   // the controls, which stay, and a place for the samples
  sampled.run = (runs.find(r => has(r, "reward")) ?? runs[0]).m;
  const move = by => () => slideTo(sampleSteps()[+$("step").value + by] ?? sampled.step);
  const choose = e => {
    sampled.run = +e.target.value;
    drawSamples();
  };
  return h("div", {id: "samples"}, div("steps",
    h("select", {"aria-label": "run", hidden: runs.length < 2, onchange: choose},
      runs.map(r => h("option", {value: r.m, selected: r.m === sampled.run}, r.name))),
    button({"aria-label": "earlier", onclick: move(-1)}, "‹"),
    button({"aria-label": "later", onclick: move(1)}, "›"),
    h("b", {class: "place"}),
    h("input", {type: "range", id: "step", min: 0, "aria-label": "step",
      oninput: e => slideTo(sampleSteps()[+e.target.value])})), h("div", {id: "shown"}));
}

async function drawSamples() {
  const {run, step: asked} = sampled, {first, steps} = D.runs[run].samples, known = sampleSteps();
  const step = known.reduce((best, x) => Math.abs(x - asked) < Math.abs(best - asked) ? x : best, known.at(-1));
  const numbers = steps.map((x, i) => x === step ? first + i : -1).filter(n => n >= 0).slice(0, 64);
  Object.assign($("step"), {max: known.length - 1, value: known.indexOf(step)});
  $("samples").querySelector(".place").textContent = `step ${brief(step)}`;
  const items = await Promise.all(numbers.map(n => item("sample", n)));
  if (run === sampled.run && asked === sampled.step) fill($("shown"), items.map(sample));
}

function sample(x) {
  const [kind, mark, name] = OUTCOMES[x.outcome], v = x.votes[0];
  const texts = typeof x.prompt === "string" ? [normal(x.prompt)] : null;
  const book = {quotes: [], texts: texts && {A: texts, B: texts}}, judged = v && judgedParts(v, book);
  const signed = y => typeof y === "number" ? (y > 0 ? "+" : "") + brief(y) : y;
  const fact = (label, value) => value != null && h("span", {}, label + " ", b(value));
  const facts = div("facts", span("badge " + kind, `${mark} ${name}`), span("data mono", x.id),
    fact("verdict", SIDE[SIDES.indexOf(x.verdict)]), fact("label", SIDE[SIDES.indexOf(x.winner)]),
    fact("reward", signed(x.reward)), fact("advantage", signed(x.advantage)));
  const prompt = texts && card("Prompt", div("text data", painted(x.prompt, marksIn(book, 0))), "prompt");
  return div("sample", facts, div(prompt ? "sides" : "", prompt, h("div", {}, judged)));
}
