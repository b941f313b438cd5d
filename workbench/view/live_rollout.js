// A rollout that runs: a histogram of the lengths of what has finished, and memory; everything comes from the kernel.

function bars({ finishes }) {
  const W = 720, H = 190, LEFT = 64, BASE = H - 34, TOP = 12;
  const svg = svgNode("svg", { viewBox: `0 0 ${W} ${H}`, width: W, role: "img", "aria-label": "completion lengths", "data-chart": "lengths" });
  const fills = hatches(svg, finishes), layer = svgNode("g", {});
  svg.append(layer);
  function draw(lengths) {
    const top = lengths.reduce((most, [n]) => Math.max(most, n), 15), width = Math.ceil((top + 1) / 40), kinds = Object.keys(finishes);
    const counts = Array.from({ length: Math.ceil((top + 1) / width) }, () => kinds.map(() => 0));
    for (const [n, reason] of lengths) counts[Math.floor(n / width)][kinds.indexOf(reason)] += 1;
    const most = Math.max(1, ...counts.map((c) => c.reduce((a, b) => a + b, 0)));
    const x = (n) => LEFT + n / (counts.length * width) * (W - LEFT - 12), h = (count) => count / most * (BASE - TOP);
    layer.replaceChildren();
    counts.forEach((of, i) => {
      let y = BASE;
      of.forEach((count, k) => {
        if (!count) return;
        y -= h(count);
        const place = { x: x(i * width) + 0.5, width: Math.max(1, x(width) - LEFT - 1), y, height: h(count) };
        layer.append(svgNode("rect", { ...place, fill: finishes[kinds[k]][0], "data-finish": kinds[k], "data-count": count }));
        if (fills[kinds[k]]) layer.append(svgNode("rect", { ...place, fill: fills[kinds[k]] }));
      });
    });
    for (const n of ticks(0, counts.length * width, 8)) layer.append(svgNode("text", { x: x(n), y: BASE + 14, "text-anchor": "middle" }, n));
    for (const count of new Set([0, most])) layer.append(svgNode("text", { x: LEFT - 6, y: BASE - h(count) + 4, "text-anchor": "end" }, count));
    layer.append(svgNode("line", { x1: LEFT, x2: W - 12, y1: BASE, y2: BASE, stroke: "currentColor", opacity: 0.4 }),
      svgNode("text", { x: (LEFT + W) / 2, y: H - 4, "text-anchor": "middle" }, "completion length, tokens"));
  }
  return { svg, draw };
}

export default () => {
  const state = { lengths: [], memory: [], layers: [] };
  const views = moving(state, (news) => {
    const { lengths, memory } = state;
    lengths.push(...(news.lengths || []));
    memory.push(...(news.memory || []));
    Object.assign(state, news, { lengths, memory });
  });
  return {
    initialize: views.initialize,
    render({ model, el }) {
      el.classList.add("wb-time", "wb-live-rollout");
      keepKeys(el);
      const head = node("p", { role: "status", "data-head": "" }), under = node("p", { "data-cursor-text": "" });
      const histogram = bars(state);
      let chart, names = "", legendOfMemory = node("ul", {});
      const place = node("div", {});
      el.replaceChildren(head, histogram.svg, legend(state.finishes, "finish reasons"), place);
      function build() {  // anew when the layers change: ranks are known with the first sample
        const looks = Object.fromEntries(state.layers.map((layer) => [layer.name, [layer.color, ""]]));
        chart = timeChart({ layers: state.layers, looks: state.looks, label: "memory over time", onCursor: tellCursor });
        legendOfMemory = legend(looks, "processes");
        place.replaceChildren(chart.svg, legendOfMemory, under);
      }
      function tellCursor({ t, parts, total, isFollowing }) {
        under.textContent = `${isFollowing ? "now" : `at ${t.toFixed(1)} s`}: ${heldText({ parts, total })}`;
      }
      function draw() {
        const step = state.num_steps > 1 ? `step ${state.step + 1} of ${state.num_steps}, ` : "", tokens = state.lengths.reduce((sum, [n]) => sum + n, 0);
        const what = state.error ? `ended: ${state.error}` : state.is_done ? "done" : state.phase || "starting";
        head.textContent = `rollout: ${step}${what}; ${state.lengths.length} completions, ${tokens} tokens`;
        el.setAttribute("data-completions", state.lengths.length);
        el.setAttribute("data-points", state.memory.length);
        el.setAttribute("data-done", Boolean(state.is_done));
        histogram.draw(state.lengths);
        if (names !== state.layers.map((layer) => layer.name).join()) { names = state.layers.map((layer) => layer.name).join(); build(); }
        chart.draw({ ...overTime(state.memory) });
      }
      return views.watch(el, model, draw);
    },
  };
};
