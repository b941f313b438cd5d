// What the widgets over time share: stacked memory, rows of spans, a cursor that the mouse and the arrow keys move.
const NS = "http://www.w3.org/2000/svg";

function svgNode(tag, attributes, text) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function node(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function inMemory(mib) {
  if (!mib) return "0 MiB";
  return mib >= 1024 ? `${(mib / 1024).toFixed(2)} GiB` : `${mib.toFixed(mib < 10 ? 1 : 0)} MiB`;
}

function ticks(low, high, count) {  // round numbers
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough);
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-6; t += step) found.push(Number(t.toFixed(6)));
  return found;
}

let numCharts = 0;
function hatches(svg, looks) {  // looks: name -> [colour, hatch]; gives name -> fill of the hatch laid over the colour, "" for none
  const defs = svgNode("defs", {}), fills = {}, id = `wb-hatch-${numCharts += 1}`;
  const lines = { "/": "M0,6 L6,0", ".": "M2,2 h1.5 v1.5 h-1.5 z", x: "M0,0 L6,6 M0,6 L6,0" };
  for (const [name, [, hatch]] of Object.entries(looks)) {
    fills[name] = "";
    if (!hatch) continue;
    const pattern = svgNode("pattern", { id: `${id}-${name}`, width: 6, height: 6, patternUnits: "userSpaceOnUse" });
    pattern.append(svgNode("path", { d: lines[hatch[0]], stroke: "#595959", "stroke-width": 1, fill: "none" }));
    defs.append(pattern);
    fills[name] = `url(#${id}-${name})`;
  }
  svg.append(defs);
  return fills;
}

// Memory stacked by layer over time, and rows of spans under it on the same axis.
//   layers: [{name, color}], the lowest first; looks: span -> [colour, hatch]; rows: names of the rows of spans
function timeChart({ layers, looks, rows = [], label, height = 190, onCursor = () => {} }) {
  const W = 720, LEFT = 64, RIGHT = 12, TOP = 30, rowHeight = rows.length ? Math.max(3, Math.min(18, 320 / rows.length)) : 0;
  const base = TOP + height, rowsTop = base + 8, bottom = rowsTop + rows.length * rowHeight + (rows.length ? 6 : 0), H = bottom + 34;
  const svg = svgNode("svg", {
    viewBox: `0 0 ${W} ${H}`, width: W, role: "slider", tabindex: 0, "aria-label": label, "aria-valuemin": 0, "data-chart": "time" });
  const fills = hatches(svg, { ...looks, asleep: ["", "/"] });
  const clip = `wb-clip-${numCharts}`;  // of the window on the time axis
  svg.append(svgNode("clipPath", { id: clip }));
  svg.lastChild.append(svgNode("rect", { x: LEFT, y: 0, width: W - LEFT - RIGHT, height: H }));
  const back = svgNode("g", {}), areas = layers.map((layer) => svgNode("path", {
    fill: layer.color, stroke: "var(--jp-layout-color0, #FFFFFF)", "stroke-width": 0.5, "clip-path": `url(#${clip})`, "data-layer": layer.name })), front = svgNode("g", {}), spansLayer = svgNode("g", {});
  const cursor = svgNode("line", { y1: TOP, y2: bottom, stroke: "currentColor", "stroke-width": 1, visibility: "hidden", "data-cursor": "" });
  const device = svgNode("path", { fill: "none", stroke: "currentColor", "stroke-width": 1.6, "stroke-dasharray": "6 3", "clip-path": `url(#${clip})`, "data-layer": "GPU" });
  svg.append(back, ...areas, device, spansLayer, front, cursor);
  let data = { times: [], values: [], device: [], events: [], asleep: [], spans: [] }, low = 0, high = 1, at = -1, isFollowing = true;

  const x = (t) => LEFT + (t - low) / (high - low || 1) * (W - LEFT - RIGHT);
  function drawAxes(peak) {
    back.replaceChildren();
    for (const t of ticks(low, high, 8)) {
      back.append(svgNode("line", { x1: x(t), x2: x(t), y1: TOP, y2: bottom, stroke: "currentColor", opacity: 0.12 }),
        svgNode("text", { x: x(t), y: bottom + 14, "text-anchor": "middle" }, t));
    }
    back.append(svgNode("text", { x: (LEFT + W) / 2, y: H - 4, "text-anchor": "middle" }, "seconds since the start"));
    const [unit, scale] = peak >= 1024 ? ["GiB", 1024] : ["MiB", 1];  // one for the whole axis
    for (const m of ticks(0, peak / scale, 4)) {
      const y = base - m * scale / peak * height;
      back.append(svgNode("line", { x1: LEFT, x2: W - RIGHT, y1: y, y2: y, stroke: "currentColor", opacity: 0.12 }),
        svgNode("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, `${m} ${unit}`));
    }
  }
  function drawAreas(peak) {
    const { times, values } = data, floor = new Array(times.length).fill(0);
    areas.forEach((area, i) => {
      const lower = [], upper = [];
      for (let k = 0; k < times.length; k++) {
        const px = x(times[k]).toFixed(1);
        lower.push(`${px},${(base - floor[k] / peak * height).toFixed(1)}`);
        floor[k] += values[k][i] || 0;
        upper.push(`${px},${(base - floor[k] / peak * height).toFixed(1)}`);
      }
      area.setAttribute("d", times.length ? `M${upper.join("L")}L${lower.reverse().join("L")}Z` : "");
    });
    const line = data.device.some((mib) => mib) ? times.map((t, k) => `${x(t).toFixed(1)},${(base - data.device[k] / peak * height).toFixed(1)}`) : [];
    device.setAttribute("d", line.length ? `M${line.join("L")}` : "");
  }
  function drawEvents() {  // names in two rows, those without room are told under the cursor only
    front.replaceChildren();
    const ends = [-Infinity, -Infinity];
    for (const [begin, end] of data.asleep.filter(([a, b]) => b > low && a < high)) {
      front.append(svgNode("rect", { x: x(Math.max(low, begin)), width: Math.max(1, x(Math.min(high, end)) - x(Math.max(low, begin))), y: TOP, height,
        fill: fills.asleep, opacity: 0.5, "data-asleep": "" }));
    }
    for (const [t, name] of data.events.filter(([when]) => when >= low && when <= high)) {
      const px = x(t), row = ends.findIndex((end) => end <= px), length = name.length * 6.6 + 8;
      front.append(svgNode("line", { x1: px, x2: px, y1: TOP, y2: base, stroke: "currentColor", "stroke-dasharray": "3 2", opacity: 0.7, "data-event": name }));
      const left = Math.min(px, W - RIGHT - length);
      if (row < 0 || left < ends[row]) continue;
      front.append(svgNode("text", { x: left, y: TOP - 4 - 12 * row }, name));
      ends[row] = left + length;
    }
  }
  function drawSpans() {
    spansLayer.replaceChildren();
    if (!rows.length) return;
    const first = Math.max(low, data.begin ?? low), last = Math.min(high, data.end ?? high), thin = rowHeight < 9;
    rows.forEach((name, i) => {
      const y = rowsTop + i * rowHeight;
      spansLayer.append(svgNode("rect", { x: x(first), width: Math.max(0, x(last) - x(first)), y, height: rowHeight - 1, fill: "#7F7F7F", opacity: 0.22, "data-idle": name }));
      if (!thin || i === 0) spansLayer.append(svgNode("text", { x: LEFT - 6, y: y + rowHeight / 2 + 4, "text-anchor": "end", "font-size": Math.min(12, rowHeight) }, name));
    });
    for (const [row, kind, begin, end] of data.spans) {
      if (end < low || begin > high) continue;
      const from = x(Math.max(low, begin)), place = { x: from, width: Math.max(1, x(Math.min(high, end)) - from), y: rowsTop + row * rowHeight, height: rowHeight - 1 };
      spansLayer.append(svgNode("rect", { ...place, fill: (looks[kind] || ["#000000"])[0], "data-span": kind, "data-row": rows[row] }));
      if (fills[kind]) spansLayer.append(svgNode("rect", { ...place, fill: fills[kind] }));
    }
  }
  function draw(next, window) {
    data = { ...data, ...next };
    const { times, values } = data;
    [low, high] = window || [times[0] ?? 0, times.at(-1) ?? 1];
    if (high <= low) high = low + 1;
    const inside = values.filter((_, k) => times[k] >= low && times[k] <= high);
    const peak = 1.06 * Math.max(1, ...inside.map((v) => v.reduce((a, b) => a + b, 0)), ...data.device.filter((_, k) => times[k] >= low && times[k] <= high));
    drawAxes(peak);
    drawAreas(peak);
    drawSpans();
    drawEvents();
    if (isFollowing || at >= times.length) at = times.length - 1;
    point();
  }
  function point() {
    const t = data.times[at];
    if (t === undefined) return;
    cursor.setAttribute("x1", x(t));
    cursor.setAttribute("x2", x(t));
    cursor.setAttribute("visibility", isFollowing || t < low || t > high ? "hidden" : "visible");
    const parts = layers.map((layer, i) => [layer.name, data.values[at][i] || 0]);
    const total = parts.reduce((sum, [, mib]) => sum + mib, 0);
    if (data.device[at]) parts.push(["on GPUs (dashed)", data.device[at]]);
    const running = data.spans.filter(([, , begin, end]) => begin <= t && t <= end).map(([row, kind]) => `${rows[row]}: ${kind}`);
    svg.setAttribute("aria-valuemax", data.times.length - 1);
    svg.setAttribute("aria-valuenow", at);
    svg.setAttribute("aria-valuetext", `${t.toFixed(1)} s: ${inMemory(total)}`);
    onCursor({ t, parts, total, running, isFollowing });
  }
  function nearest(t) {
    let best = 0;
    data.times.forEach((other, k) => { if (Math.abs(other - t) < Math.abs(data.times[best] - t)) best = k; });
    return best;
  }
  function choose(k) { isFollowing = false; at = Math.max(0, Math.min(data.times.length - 1, k)); point(); }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), px = (event.clientX - box.left) / box.width * W;
    choose(nearest(low + (px - LEFT) / (W - LEFT - RIGHT) * (high - low)));
  });
  svg.addEventListener("pointerleave", () => { isFollowing = true; at = data.times.length - 1; point(); });
  svg.addEventListener("blur", () => { isFollowing = true; at = data.times.length - 1; point(); });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    choose(at + step);
  });
  return { svg, draw };
}

function legend(looks, label) {  // names with their colours and hatches; looks: name -> [colour, hatch]
  const list = node("ul", { class: "wb-legend", "aria-label": label });
  for (const [name, [color, hatch]] of Object.entries(looks)) {
    const box = svgNode("svg", { width: 14, height: 11, "aria-hidden": "true" });
    const fills = hatches(box, { it: [color, hatch] });
    box.append(svgNode("rect", { width: 14, height: 11, fill: color || "none", opacity: name === "idle" ? 0.22 : 1 }));
    if (fills.it) box.append(svgNode("rect", { width: 14, height: 11, fill: fills.it }));
    list.append(node("li", {}, box, ` ${name}`));
  }
  return list;
}

function whenSeen(el, model, onSeen) {  // draw only what can be seen, and let the kernel know
  let isInView = false, wasSeen = false;
  function look() {
    const isSeen = isInView && !document.hidden;
    if (isSeen === wasSeen) return;
    wasSeen = isSeen;
    model.set("num_seen", Math.max(0, model.get("num_seen")) + (isSeen ? 1 : -1));
    model.save_changes();
    if (isSeen) onSeen();
  }
  const eye = new IntersectionObserver((entries) => { isInView = entries.at(-1).isIntersecting; look(); });
  eye.observe(el);
  document.addEventListener("visibilitychange", look);
  return { isSeen: () => wasSeen, end: () => { eye.disconnect(); document.removeEventListener("visibilitychange", look); isInView = false; look(); } };
}

function keepKeys(el) {  // else JupyterLab takes the arrow keys
  el.addEventListener("focusin", (event) => { event.target.dataset.lmSuppressShortcuts = "true"; });
}

function heldText({ parts, total }) {
  return `${inMemory(total)} held; ` + parts.filter(([, mib]) => mib).map(([name, mib]) => `${name} ${inMemory(mib)}`).join(", ");
}

function overTime(memory) {  // samples, as a chart takes them
  return { times: memory.map(([t]) => t), values: memory.map(([, held]) => held), device: memory.map(([, , mib]) => mib) };
}

// A widget that moves: everything comes with the model, then news, which `add` puts into `state`; its views draw what can be seen, once a frame.
function moving(state, add) {
  const listeners = new Set();
  function take(news, isAll) {
    if (isAll) Object.assign(state, news);
    else add(news);
    if (state.memory.length > 1200) state.memory = state.memory.filter((_, k) => k % 2 || k > 600);
    listeners.forEach((tell) => tell());
  }
  function initialize({ model }) {
    take(model.get("scene"), true);
    model.on("msg:custom", (message) => { if (message.news) take(message.news, false); });
  }
  function watch(el, model, draw) {  // gives what ends it
    let isDue = false;
    const soon = () => {
      if (isDue) return;
      isDue = true;
      requestAnimationFrame(() => { isDue = false; if (eye.isSeen()) draw(); });
    };
    const eye = whenSeen(el, model, soon);
    listeners.add(soon);
    return () => { listeners.delete(soon); eye.end(); };
  }
  return { initialize, watch };
}
