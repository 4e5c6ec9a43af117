// ---- the frame: views, keys, theme

const ALL_VIEWS = ["scores", "read", "training"];
const drawn = new Set();   // views that are drawn once

function draw() {
  for (const view of ALL_VIEWS) {
    $(view).hidden = state.view !== view;
    $("to-" + view).setAttribute("aria-current", String(state.view === view));
  }
  if (state.view === "read") {
    filter();
    drawRead();
    seek();
  } else if (!drawn.has(state.view)) {
    drawn.add(state.view);
    if (state.view === "scores") drawScores(); else drawTraining();
  }
}

function turnTo(view) {
  if (!VIEWS.includes(view)) return;
  Object.assign(state, {view, lost: ""});
  remember(true);
  draw();
}

addEventListener("hashchange", () => {
  if (location.hash === written) return;
  written = null;
  clearTimeout(addressTimer);
  state = readAddress();
  draw();
});

const nextVote = x => x.votes.length > 1 && showVote((state.vote + 1) % x.votes.length);
const help = () => $("help").showModal();
const KEYS = {   // of the judgements
  j: () => step(1, false),
  ArrowRight: () => step(1, false),
  k: () => step(-1, false),
  ArrowLeft: () => step(-1, false),
  r: () => rows.length && openRow(rows[Math.floor(Math.random() * rows.length)], false),
  v: () => current >= 0 && item("judgement", current).then(nextVote),
  t: () => current >= 0 && turnRaw(),
  e: tall,
  "/": () => {
    $("filters").open ||= !phone();
    $("q").focus();
    $("q").select();
  },
};

addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey || $("help").open) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName);
  if (e.key === "Escape") {
    if (typing) e.target.blur();
    else if (state.q) change({q: ""});
    else if (phone()) toList();
  }
  if (typing) return;
  if (e.key === "?") help();
  turnTo(ALL_VIEWS[e.key - 1]);
  if (e.key === "/") turnTo("read");
  if (state.view !== "read" || !Object.hasOwn(KEYS, e.key)) return;
  e.preventDefault();
  KEYS[e.key]();
});

for (const view of ALL_VIEWS) {
  $("to-" + view).addEventListener("click", () => turnTo(view));
  $("to-" + view).hidden = !VIEWS.includes(view);
}
$("ask").addEventListener("click", help);
$("list").addEventListener("scroll", () => requestAnimationFrame(drawList));
addEventListener("resize", () => drawRead());
let typed = 0;
$("q").addEventListener("input", () => {
  state.q = $("q").value.trim();
  clearTimeout(typed);
  typed = setTimeout(() => change({}, false), 150);
});
for (const key of ["min", "max"])
  $(key).addEventListener("input", () => change({[key]: plainNumber($(key).value)}, false));
$("sort").addEventListener("change", () => change({sort: $("sort").value}));
$("unit").textContent = byTokens ? "tokens" : "chars";

const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const root = document.documentElement.style, dark = () => root.colorScheme ? root.colorScheme === "dark" : isDark();
function setTheme(name) {   // "": the system's
  root.colorScheme = name;
  $("theme").textContent = dark() ? "Light" : "Dark";
}
$("theme").addEventListener("click", () => {
  setTheme(dark() ? "light" : "dark");
  try { localStorage.setItem("theme", root.colorScheme); } catch { /* it may refuse storage to a file */ }
});
setTheme("");
try { setTheme(localStorage.getItem("theme") ?? ""); } catch { /* as there */ }

const several = (list, what) => list.length > 2 ? `${list.length} ${what}` : list.map(x => x.name).join(", ");
const title = [several(D.models, "models"), several(D.runs, "training runs")].filter(Boolean).join(" · ")
  || D.quality.of.join(", ");
document.title = `${wellFormed(title).slice(0, 80)} · judgements`;
$("title").textContent = visible(title);
$("filters").open = !phone();
state = readAddress();
draw();
