// ---- line plots

const brief = x => {
  const size = Math.abs(x);
  if (x === 0 || size < 1e4 && Number.isInteger(x)) return String(x);
  if (size >= 1e5 || size < 1e-3) return x.toExponential(1).replace("e+", "e").replace(".0e", "e");
  return size >= 1e4 ? +(x / 1e3).toFixed(1) + "k" : String(+x.toPrecision(3));
};

function niceTicks(low, high, n = 4) {
  const raw = (high - low) / n || 1, base = Math.pow(10, Math.floor(Math.log10(raw)));
  const gap = [1, 2, 2.5, 5, 10].find(k => k * base >= raw * .999) * base, first = Math.ceil(low / gap - 1e-9);
  const ticks = Array.from({length: 2 * n + 1}, (_, i) => (first + i) * gap);
  return ticks.filter(x => x <= high + gap * 1e-6);
}

function thin(points, most = 400) {   // the lowest and the highest of each bin, so that no peak is lost
  if (points.length <= 2 * most) return points;
  const out = [], size = Math.ceil(points.length / most);
  for (let i = 0; i < points.length; i += size) {
    const bin = points.slice(i, i + size).sort((x, y) => x[1] - y[1]);
    out.push(...[bin[0], bin.at(-1)].sort((x, y) => x[0] - y[0]));
  }
  return out;
}

const NONE = "none";   // instead of a number, where there was nothing to measure
const measured = point => typeof point[1] === "number";

function smooth(points) {   // mean over a window of a thirtieth of the run, of what was measured
  const numbers = points.filter(measured), half = Math.floor(numbers.length / 60), sums = [0];
  for (const [, y] of numbers) sums.push(sums.at(-1) + y);
  let i = 0;
  return points.map(point => {
    if (!measured(point)) return point;
    const from = Math.max(0, i - half), to = Math.min(numbers.length, ++i + half);
    return [point[0], (sums[to] - sums[from]) / (to - from)];
  });
}

function pieces(points) {   // cut where nothing was measured: no line leads across
  const out = [[]];
  for (const point of points) if (measured(point)) out.at(-1).push(point); else out.push([]);
  return out.filter(piece => piece.length);
}

const ends = list => list.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);

function scale(low, high, from, to, log) {   // from the values low..high to the pixels from..to
  const f = log ? Math.log : x => x;
  return x => from + (to - from) * ((f(x) - f(low)) / (f(high) - f(low)));
}

// lowest and highest value of a plot, with some air around the curves, but none of a sign that no value has
function yRange(ys, log, top) {
  let [low, high] = ys.length ? ends(ys) : [0, 1];
  if (low === high) [low, high] = low === 0 ? [0, 1] : [Math.min(0, low), Math.max(0, high)];   // a constant: from 0
  const pad = (high / 2 - low / 2) * .12;
  if (!log) {
    if (low < 0 || low > pad) low -= pad;
    if (high > 0 || high < -pad) high += pad;
  }
  if (top) {   // within 0 and top, and no closer than a twentieth of it
    high = Math.min(top, high);
    low = Math.max(0, Math.min(low, high - top / 20));
    high = Math.max(high, low + top / 20);
  }
  return [Math.max(low, -8e307), Math.min(high, 8e307)];   // so that high - low is a number
}

// series: [{name, m: number of its colour, points: [[x, y]]}], y a text where no number is: what is there instead; log:
// "x" or "y", where the values allow it; top: all values are within 0 and top; onpick(x) on click; group: plots that
// share a cursor
function linePlot({title, what, series: given, log = "", top = 0, onpick, group = []}) {
  const drawable = ([x, y]) => Number.isFinite(x) && (Number.isFinite(y) || typeof y === "string");
  const series = given.map(x => ({...x, points: x.points.filter(drawable)}));
  const W = 320, H = 170, L = 40, R = W - 12, T = 8, B = H - 22;
  const steps = unique(series.flatMap(x => x.points.map(([step]) => step))).sort((x, y) => x - y);
  const ys = series.flatMap(x => x.points.filter(measured).map(([, y]) => y)), [lowest, highest] = ends(ys);
  const logX = log === "x" && steps[0] > 0, logY = log === "y" && lowest > 0 && highest / lowest > 30;
  const [y0, y1] = yRange(ys, logY, top), air = steps.length === 1 ? .5 : 0;
  const [x0, x1] = [steps[0] - air, steps.at(-1) + air];
  const X = scale(x0, x1, L, R, logX), toY = scale(y0, y1, B, T, logY), Y = y => toY(Math.max(y0, Math.min(y1, y)));
  const xTicks = logX ? steps.filter((_, i) => i % Math.ceil(steps.length / 6) === 0)
    : niceTicks(x0, x1).filter(Number.isInteger);
  const decades = () => niceTicks(Math.log10(y0), Math.log10(y1)).filter(Number.isInteger).map(k => 10 ** k);
  const counts = ys.every(Number.isInteger);   // no ticks between the whole numbers
  const yTicks = logY ? decades() : niceTicks(y0, y1).filter(t => !counts || Number.isInteger(t));

  const line = piece => "M" + thin(piece).map(([x, y]) => X(x).toFixed(1) + " " + Y(y).toFixed(1)).join("L");
  const path = points => pieces(points).map(piece => line(piece) + "h0").join("");   // h0: a single point is a dot
  const curve = ({m, points}) => {
    const good = points.filter(measured), dense = good.length > 120;
    const bad = points.filter(point => !measured(point) && point[1] !== NONE);
    return s("g", {class: inColour(m)},
      good.length > 1 && s("path", {class: "curve ink" + (dense ? " faint" : ""), d: path(points)}),
      dense && s("path", {class: "curve ink", d: path(smooth(points))}),
      good.length <= 30 && good.map(([x, y]) => s("circle", {class: "fill", cx: X(x), cy: Y(y), r: 2.6})),
      bad.slice(0, 200).map(([x, name]) => s("text", {class: "bad", x: X(x), y: T + 9, "text-anchor": "middle"}, "×",
        s("title", {}, `${name} at ${x}`))));
  };
  const cursor = s("line", {class: "cursor", y1: T, y2: B, visibility: "hidden"}), read = div("read");
  const svg = s("svg", {viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "img", "aria-label": title},
    yTicks.map(t => [s("line", {class: "grid", x1: L, x2: R, y1: Y(t), y2: Y(t)}),
      s("text", {x: L - 4, y: Y(t) + 4, "text-anchor": "end"}, brief(t))]),
    xTicks.map(t => s("text", {x: Math.min(X(t), W - 14), y: H - 6, "text-anchor": "middle"}, brief(t))),
    series.map(curve), cursor);

  const key = x => series.length > 1 && [stroke(x.m), h("span", {hidden: series.length > 3}, " " + x.name), " "];
  const value = ({points}, x) => {   // at x, or the last
    const found = x === null ? points.at(-1) : points.find(point => point[0] === x);
    return !found ? "–" : measured(found) ? brief(found[1]) : found[1];
  };
  const distance = (x, place) => Math.abs(X(x) - place);
  const nearest = place => steps.reduce((best, x) => distance(x, place) < distance(best, place) ? x : best);
  let at = null;
  const point = x => {   // the cursor at x, or gone
    at = x === null || !steps.length ? null : nearest(X(x));
    cursor.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at !== null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, X(at));
    fill(read, at === null ? "last: " : `${brief(at)}: `, series.map((x, i) =>
      [i > 0 && " · ", key(x), b(value(x, at))]));
  };
  group.push(point);
  const tell = x => group.forEach(follow => follow(x));
  const under = e => {
    const box = svg.getBoundingClientRect();
    return nearest((e.clientX - box.left) * W / box.width);
  };
  put(svg, {
    onpointermove: e => steps.length && tell(under(e)),
    onpointerleave: () => tell(null),
    onblur: () => tell(null),
    onclick: e => steps.length && onpick?.(under(e)),
    onkeydown: e => {
      const by = {ArrowLeft: -1, ArrowRight: 1}[e.key];
      if (e.key === "Enter" && at !== null) onpick?.(at);
      if (!by || !steps.length) return;
      e.preventDefault();
      e.stopPropagation();
      tell(steps[Math.max(0, Math.min(steps.length - 1, at === null ? 0 : steps.indexOf(at) + by))]);
    },
  }, []);
  point(null);
  return plot(title, what, svg, read);
}
