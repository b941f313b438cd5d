// Completion lengths to look through; the arithmetic stands in length_stats.js, which comes before this in the same module.
const NS = "http://www.w3.org/2000/svg", W = 700, H = 230, LEFT = 52, RIGHT = 14, TOP = 10, BOTTOM = 38, HIGH = 110;
const COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B8AB00", "#7F7F7F"];
const DASHES = ["none", "7 3", "2 2", "9 3 2 3", "4 2", "1 3", "12 4", "5 1"];
const HATCHES = ["", "M0,6 L6,0", "M1,1 h2 v2 h-2 z", "M0,0 L6,6 M0,6 L6,0", "M0,3 h6", "M3,0 v6", "M0,0 L6,6", "M2,3 h2"];
const SHAPES = [["histogram", "histogram"], ["ecdf", "share at most as long (ECDF)"], ["survival", "share longer (survival)"]];
const BY = [["", "all together"], ["origin_rank", "by rank"], ["prompt_index", "by prompt, the longest"], ["step", "by step"], ["finish_reason", "by finish reason"]];
const FINISHES = { stop: 0, length: 1, abort: 7, error: 3 };  // the colours that figures give them

function drawn(tag, attributes, text) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function html(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const menu = (label, options) => html("select", { "aria-label": label }, ...options.map(([value, text]) => html("option", { value }, text)));
const percent = (share) => (Number.isNaN(share) ? "" : share > 0 && share < 0.01 ? "< 1 %" : `${(100 * share).toFixed(0)} %`);
const rounded = (value) => (Number.isNaN(value) ? "" : value.toFixed(value < 10 ? 1 : 0));

function roundTicks(top, most) {  // whole round numbers from 0 to at most `top`
  const step = [1, 2, 5].flatMap((k) => [k, 10 * k, 100 * k, 1000 * k, 10000 * k, 100000 * k]).sort((a, b) => a - b).find((s) => top / s <= most) ?? top;
  return Array.from({ length: Math.floor(top / step) + 1 }, (_, i) => i * step);
}

let numWidgets = 0;
function render({ model, el, state, listeners }) {
  const uid = (numWidgets += 1), hidden = new Set();
  const shape = menu("shape", SHAPES), by = menu("compare", BY);
  const slider = html("input", { type: "range", min: 1, "aria-label": "max_tokens slider" }), field = html("input", { type: "number", min: 1, "aria-label": "max_tokens" });
  const way = menu("a rank's time", [["sum", "all its tokens"], ["max", "its longest completion"]]);
  const whatIf = html("p", { role: "status", "data-what-if": "" }), idleText = html("p", { role: "status", "data-idle": "" });
  const chart = drawn("svg", { viewBox: `0 0 ${W} ${H}`, width: W, role: "img", "data-chart": "lengths" });
  const waits = drawn("svg", { viewBox: `0 0 ${W} ${HIGH}`, width: W, role: "img", "data-chart": "idle" }), table = html("table", {});
  let columns, parted = {}, top = 1, cap = Infinity, binWidth = 1, span = 2;  // tokens: longest, what-if, of a bar, of the whole axis
  el.classList.add("wb-lengths");
  el.replaceChildren(
    html("div", { class: "wb-bar" }, html("label", {}, "show ", shape), html("label", {}, "compare ", by), html("label", {}, "if max_tokens were ", slider, field)),
    chart, table, whatIf, html("div", { class: "wb-bar" }, html("label", {}, "a rank's time is ", way)), waits, idleText);
  el.addEventListener("focusin", (event) => { event.target.dataset.lmSuppressShortcuts = "true"; });  // else JupyterLab takes the arrow keys
  el.addEventListener("keydown", (event) => {  // JupyterLab keeps Enter from a field
    if (event.key === "Enter" && event.target.tagName === "INPUT") event.target.dispatchEvent(new Event("change", { bubbles: true }));
  });

  const x = (tokens) => LEFT + (tokens / span) * (W - LEFT - RIGHT), y = (share) => TOP + (1 - share) * (H - BOTTOM - TOP);
  const looks = (group, k) => (by.value === "finish_reason" ? FINISHES[group.name] ?? 5 : k % COLORS.length);
  const fill = (look) => (HATCHES[look] ? `url(#wb-len-${uid}-${look})` : COLORS[look]);

  function patterns() {
    const defs = drawn("defs", {});
    HATCHES.forEach((path, look) => {
      const pattern = drawn("pattern", { id: `wb-len-${uid}-${look}`, width: 6, height: 6, patternUnits: "userSpaceOnUse" });
      pattern.append(drawn("rect", { width: 6, height: 6, fill: COLORS[look] }), drawn("path", { d: path, stroke: "#FFFFFF", "stroke-width": 1.1, fill: "none" }));
      defs.append(pattern);
    });
    return defs;
  }
  function bars(groups) {  // stacked; gives the highest count
    const floor = new Array(span / binWidth).fill(0), parts = [];
    groups.forEach(({ indices, look }) => {
      const counts = new Array(floor.length).fill(0);
      indices.forEach((i) => { counts[Math.floor(columns.length_tokens[i] / binWidth)] += 1; });
      counts.forEach((count, bin) => { if (count) parts.push([bin, floor[bin], count, look]); floor[bin] += count; });
    });
    const most = Math.max(1, ...floor);
    for (const [bin, from, count, look] of parts) {
      const left = x(bin * binWidth), wide = Math.max(1, x(binWidth) - LEFT - 1);
      chart.append(drawn("rect", { x: left + 0.5, width: wide, y: y((from + count) / most), height: y(from / most) - y((from + count) / most), fill: fill(look), "data-count": count }));
    }
    return most;
  }
  function curves(groups, isSurvival) {
    groups.forEach(({ indices, look }) => {
      const lengths = indices.map((i) => columns.length_tokens[i]), n = lengths.length, points = [`${LEFT},${y(isSurvival ? 1 : 0)}`];
      let before = 0;
      lengths.forEach((length, i) => {
        if (lengths[i + 1] === length) return;  // one corner for equal lengths
        const after = (i + 1) / n, corner = [before, after];
        before = after;
        for (const share of corner) points.push(`${x(length).toFixed(1)},${y(isSurvival ? 1 - share : share).toFixed(1)}`);
      });
      points.push(`${x(span)},${y(isSurvival ? 0 : 1)}`);
      chart.append(drawn("polyline", { points: points.join(" "), fill: "none", stroke: COLORS[look], "stroke-width": 2, "stroke-dasharray": DASHES[look] }));
    });
    return 1;
  }
  function axes(most) {
    chart.append(drawn("line", { x1: LEFT, x2: W - RIGHT, y1: y(0), y2: y(0), stroke: "currentColor", opacity: 0.5 }));
    for (const tokens of roundTicks(span, 8)) chart.append(drawn("text", { x: x(tokens), y: y(0) + 14, "text-anchor": "middle" }, tokens.toLocaleString("en")));
    for (const share of most === 1 ? [0, 0.5, 1] : [0, 1]) {
      chart.append(drawn("text", { x: LEFT - 6, y: y(share) + 4, "text-anchor": "end" }, shape.value === "histogram" ? share * most : percent(share)));
    }
    chart.append(drawn("text", { x: (LEFT + W) / 2, y: H - 5, "text-anchor": "middle" }, "completion length, tokens"));
    const label = drawn("text", { x: 12, y: (y(0) + TOP) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(y(0) + TOP) / 2})` },
      shape.value === "histogram" ? "completions" : "share");
    chart.append(label);
    if (cap >= top) return;
    chart.append(drawn("rect", { x: x(cap), width: W - RIGHT - x(cap), y: TOP, height: y(0) - TOP, fill: "#D55E00", "fill-opacity": 0.12, "data-cut": "" }));
    chart.append(drawn("line", { x1: x(cap), x2: x(cap), y1: TOP, y2: y(0), stroke: "#D55E00", "stroke-width": 2, "stroke-dasharray": "5 3" }));
  }
  function rows(groups) {  // a row a group: its look, which a click hides, and its numbers
    const head = ["", "completions", "mean", "median", "90 %", "95 %", "99 %", "longest", "cut"];
    const body = groups.map((group) => {
      const s = statsOf(columns, group.indices, cap), box = html("input", { type: "checkbox", "aria-label": `show ${group.name}` });
      box.checked = !hidden.has(group.name);
      box.addEventListener("change", () => { hidden[box.checked ? "delete" : "add"](group.name); paint(); table.querySelector(`[data-group="${CSS.escape(group.name)}"] input`)?.focus(); });
      const swatch = drawn("svg", { width: 22, height: 10 });
      swatch.append(shape.value === "histogram" ? drawn("rect", { width: 22, height: 10, fill: fill(group.look) })
        : drawn("line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: COLORS[group.look], "stroke-width": 3, "stroke-dasharray": DASHES[group.look] }));
      const numbers = [s.n, rounded(s.mean), ...[50, 90, 95, 99].map((p) => rounded(s.marks[p])), rounded(s.max), percent(s.cutShare)];
      return html("tr", { "data-group": group.name }, html("th", { scope: "row" }, html("label", {}, box, " ", swatch, ` ${group.name}`)), ...numbers.map((text) => html("td", {}, text)));
    });
    table.replaceChildren(html("tr", {}, ...head.map((text) => html("th", { scope: "col" }, text))), ...body);
  }
  function idle() {
    const { total, busy, idleShare } = idleOf(columns, state.ranks, cap, way.value), n = busy.length, wide = (W - LEFT - RIGHT) / Math.max(1, n);
    const base = HIGH - 30, high = (tokens) => (total ? (tokens / total) * (base - 8) : 0), every = Math.ceil(n / 16);
    waits.replaceChildren(patterns());
    busy.forEach(([rank, tokens], k) => {
      const place = { x: LEFT + k * wide + (wide > 4 ? 1 : 0), width: Math.max(0.5, wide - (wide > 4 ? 2 : 0)), "data-rank": rank };
      waits.append(drawn("rect", { ...place, y: base - high(tokens), height: high(tokens), fill: "#0072B2", "data-tokens": tokens }));
      waits.append(drawn("rect", { ...place, y: base - high(total), height: high(total - tokens), fill: "#8C8C8C", "fill-opacity": 0.35, "data-waits": total - tokens }));
      if (k % every === 0) waits.append(drawn("text", { x: LEFT + (k + 0.5) * wide, y: base + 13, "text-anchor": "middle" }, rank));
    });
    waits.append(drawn("text", { x: LEFT - 6, y: base + 13, "text-anchor": "end" }, "rank"));
    waits.append(drawn("text", { x: LEFT - 6, y: 14, "text-anchor": "end" }, total.toLocaleString("en")));
    idleText.textContent = n < 2 ? "one rank waits for nobody" : `Blue: tokens a rank makes; grey: it waits for the one that takes longest, ${percent(idleShare)} of all ranks' time`
      + ` (if each token costs the same and ranks generate for themselves).`;
    waits.setAttribute("aria-label", idleText.textContent);
    el.dataset.idle = idleShare.toFixed(4);
  }
  function paint() {
    columns = state.columns;
    const n = columns.length_tokens.length, newTop = Math.max(2, columns.length_tokens.reduce((a, b) => Math.max(a, b), 1));
    if (newTop !== top) {
      if (cap >= top) cap = newTop;
      [top, binWidth, slider.max, field.max] = [newTop, Math.ceil((newTop + 1) / 50), newTop, newTop];
      span = Math.ceil((top + 1) / binWidth) * binWidth;
    }
    cap = Math.min(cap, top);
    slider.value = cap;
    if (document.activeElement !== field) field.value = cap;
    chart.replaceChildren(patterns());
    el.dataset.completions = n;
    if (!n) { whatIf.textContent = state.isLive ? "nothing has finished yet" : "no completions to show"; table.replaceChildren(); waits.replaceChildren(); idleText.textContent = ""; return; }
    if (parted.columns !== columns.length_tokens || parted.by !== by.value) {
      parted = { columns: columns.length_tokens, by: by.value, every: groupsBy(columns, "")[0].indices };
      parted.groups = groupsBy(columns, by.value).map((group, k) => ({ ...group, look: looks(group, k) }));
    }
    const { groups } = parted, shown = groups.filter((group) => !hidden.has(group.name));
    axes(shape.value === "histogram" ? bars(shown) : curves(shown, shape.value === "survival"));
    rows(groups);
    const s = statsOf(columns, parted.every, cap);
    whatIf.textContent = `${n.toLocaleString("en")} completions${state.isLive ? " so far" : ""}. With max_tokens=${cap}: ${s.cut.toLocaleString("en")} cut (${percent(s.cutShare)}), ${percent(s.savedShare)} of the tokens saved.`;
    chart.setAttribute("aria-label", `completion lengths, ${shape.value}: median ${rounded(s.marks[50])} tokens. ${whatIf.textContent}`);
    idle();
  }
  function take(value) { if (value >= 1) { cap = Math.floor(Math.min(value, top)); paint(); } }
  by.addEventListener("change", () => { hidden.clear(); paint(); });
  [shape, way].forEach((control) => control.addEventListener("change", paint));
  slider.addEventListener("input", () => take(Number(slider.value)));
  field.addEventListener("change", () => take(Number(field.value)));
  let isDue = false;
  const soon = () => { if (!isDue) { isDue = true; requestAnimationFrame(() => { isDue = false; paint(); }); } };
  listeners.add(soon);
  paint();
  return () => listeners.delete(soon);
}

export default () => {  // news may come before the first view: they are taken from the beginning, for all views
  const state = { columns: {}, ranks: [], isLive: false }, listeners = new Set();
  function take(news) {
    if (news.columns) Object.assign(state, news);
    else for (const [name, values] of Object.entries(news.more ?? {})) state.columns[name] = state.columns[name].concat(values);
    listeners.forEach((tell) => tell());
  }
  return {
    initialize({ model }) {
      take(model.get("scene"));
      model.on("msg:custom", (message) => { if (message.news) take(message.news); });
    },
    render: ({ model, el }) => render({ model, el, state, listeners }),
  };
};
