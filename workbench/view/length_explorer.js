// Completion lengths as a histogram, an ECDF or a survival curve, all or a part of them, and what another max_tokens would have cut.
const NS = "http://www.w3.org/2000/svg", W = 640, H = 240, LEFT = 48, BOTTOM = 36;

function svgNode(tag, attributes, text) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function percentile(sorted, p) {  // linear, as numpy's
  const at = (sorted.length - 1) * p / 100, low = Math.floor(at), high = Math.ceil(at);
  return sorted[low] + (sorted[high] - sorted[low]) * (at - low);
}

function menu(label, options) {
  const select = document.createElement("select");
  select.setAttribute("aria-label", label);
  for (const [value, text] of options) select.append(new Option(text, value));
  return select;
}

function render({ model, el }) {
  const rows = model.get("rows"), top = rows.length_tokens.reduce((a, b) => Math.max(a, b), 1);
  const shape = menu("shape", [["histogram", "histogram"], ["ecdf", "share at most as long (ECDF)"], ["survival", "share longer (survival)"]]);
  const by = menu("only those of one", [["", "all"], ...Object.keys(rows).filter((k) => k !== "length_tokens").map((k) => [k, k.replace("_", " ")])]);
  const value = menu("which", [["", "-"]]);
  const limit = document.createElement("input");
  Object.assign(limit, { type: "range", min: 1, max: top, value: top });
  limit.setAttribute("aria-label", "max_tokens what-if");
  const bar = document.createElement("div"), status = document.createElement("p");
  bar.append(shape, " of ", by, " ", value, " max_tokens ", limit);
  status.setAttribute("role", "status");
  const svg = svgNode("svg", { viewBox: `0 0 ${W} ${H}`, width: W, role: "img", "aria-label": "completion lengths" });
  el.classList.add("wb-lengths");
  el.addEventListener("focusin", (event) => { event.target.dataset.lmSuppressShortcuts = "true"; });  // else JupyterLab takes the arrow keys
  el.replaceChildren(bar, svg, status);

  const x = (tokens) => LEFT + (tokens / top) * (W - LEFT - 12), y = (share) => 10 + (1 - share) * (H - BOTTOM - 10);
  function chosen() {  // indices, the shortest first
    const all = rows.length_tokens.map((_, i) => i).filter((i) => !by.value || String(rows[by.value][i]) === value.value);
    return all.sort((a, b) => rows.length_tokens[a] - rows.length_tokens[b]);
  }
  function bars(lengths) {
    const width = Math.ceil((top + 1) / 40), counts = new Array(Math.ceil((top + 1) / width)).fill(0);
    lengths.forEach((n) => { counts[Math.floor(n / width)] += 1; });
    const most = Math.max(1, ...counts);
    counts.forEach((count, i) => svg.append(svgNode("rect", {
      x: x(i * width) + 0.5, width: Math.max(1, x(width) - LEFT - 1), y: y(count / most), height: y(0) - y(count / most), fill: "#0072B2", "data-count": count })));
    return most;
  }
  function curve(lengths, isSurvival) {
    const points = lengths.flatMap((n, i) => [i, i + 1].map((k) => [x(n), y(isSurvival ? 1 - k / lengths.length : k / lengths.length)]));
    const start = [LEFT, y(isSurvival ? 1 : 0)];
    svg.append(svgNode("polyline", { points: [start, ...points].map((p) => p.join(",")).join(" "), fill: "none", stroke: "#0072B2", "stroke-width": 2 }));
    return 1;
  }
  function paint() {
    const part = chosen(), lengths = part.map((i) => rows.length_tokens[i]), cap = Number(limit.value);
    const cut = part.filter((i) => rows.length_tokens[i] > cap || rows.finish_reason[i] === "length").length;  // longer, or cut already
    svg.replaceChildren();
    if (!lengths.length) { status.textContent = "no completions to show"; return; }
    const most = shape.value === "histogram" ? bars(lengths) : curve(lengths, shape.value === "survival");
    svg.append(svgNode("line", { x1: x(cap), x2: x(cap), y1: 10, y2: y(0), stroke: "#D55E00", "stroke-dasharray": "5 3" }));
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      svg.append(svgNode("text", { x: x(top * share), y: H - 20, "text-anchor": "middle" }, Math.round(top * share)));
    }
    for (const share of [0, 1]) svg.append(svgNode("text", { x: LEFT - 6, y: y(share) + 4, "text-anchor": "end" }, share * most));
    svg.append(svgNode("text", { x: W / 2, y: H - 4, "text-anchor": "middle" }, "completion length, tokens"));
    const kept = lengths.reduce((sum, n) => sum + Math.min(n, cap), 0), all = lengths.reduce((sum, n) => sum + n, 0);
    const marks = [50, 90, 95, 99].map((p) => `${p} % ≤ ${percentile(lengths, p).toFixed(0)}`).join(", ");
    status.textContent = `${lengths.length} completions: ${marks}. With max_tokens=${cap}: ${cut} cut `
      + `(${(100 * cut / lengths.length).toFixed(0)} %), ${(all ? 100 * (1 - kept / all) : 0).toFixed(0)} % of the tokens saved.`;
  }
  function offer() {
    const values = by.value ? [...new Set(rows[by.value].map(String))].sort((a, b) => a.localeCompare(b, undefined, { numeric: true })) : ["-"];
    value.replaceChildren(...values.map((v) => new Option(v, v)));
    paint();
  }
  by.addEventListener("change", offer);
  [shape, value].forEach((control) => control.addEventListener("change", paint));
  limit.addEventListener("input", paint);
  paint();
}

export default { render };
