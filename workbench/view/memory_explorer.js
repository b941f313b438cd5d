// Memory of a finished run by process and part, spans of the ranks under it, sleeps beside it; all in the page.

function sleepTable(sleeps) {
  if (!sleeps.length) return node("p", {}, "The engine did not sleep.");
  const columns = Object.keys(sleeps[0]), shown = sleeps.slice(-12);
  const head = node("tr", {}, ...columns.map((name) => node("th", { scope: "col" }, name)));
  const table = node("table", { "aria-label": "sleep report" }, node("thead", {}, head),
    node("tbody", {}, ...shown.map((row) => node("tr", {}, ...columns.map((name) => node("td", {}, String(row[name])))))));
  return node("details", { open: "" }, node("summary", {}, `sleep report${sleeps.length > shown.length ? `, the last ${shown.length} of ${sleeps.length}` : ""}`), table);
}

function render({ model, el }) {
  const scene = model.get("scene");
  el.classList.add("wb-time", "wb-memory");
  keepKeys(el);
  if (!scene.times.length) { el.replaceChildren(node("p", { role: "status" }, "no memory samples to show")); return; }
  const step = node("select", { "aria-label": "part of the run" });
  step.append(new Option("the whole run", ""), ...scene.steps.map(([k]) => new Option(`step ${k}`, k)));
  const under = node("p", { role: "status", "data-cursor-text": "" }), ranks = node("p", { "data-ranks-text": "" });
  const chart = timeChart({ layers: scene.layers, looks: scene.looks, rows: scene.rows, label: "memory and spans over time", onCursor: tell });
  const kinds = [...new Set(scene.spans.map(([, kind]) => kind))];
  const looks = Object.fromEntries([...kinds.map((kind) => [kind, scene.looks[kind] || ["#000000", ""]]), ["idle", ["#7F7F7F", ""]], ...(scene.asleep.length ? [["asleep", ["", "/"]]] : [])]);
  const layers = Object.fromEntries(scene.layers.map(({ name, color }) => [name, [color, ""]]));
  el.replaceChildren(node("div", {}, "show ", step), chart.svg, legend(layers, "memory"), legend(looks, "spans"), under, ranks, sleepTable(scene.sleeps));

  function tell({ t, parts, total, running }) {
    under.textContent = `at ${t.toFixed(2)} s: ${heldText({ parts, total })}`;
    ranks.textContent = running.length ? running.slice(0, 12).join(", ") + (running.length > 12 ? `, and ${running.length - 12} more` : "") : "no rank has work then";
  }
  function paint() {
    const chosen = scene.steps.find(([k]) => String(k) === step.value);
    const all = [Math.min(0, scene.times[0]), Math.max(scene.times.at(-1), ...scene.spans.map(([, , , end]) => end))];
    const begin = Math.min(...scene.spans.map(([, , start]) => start), Infinity), end = Math.max(...scene.spans.map(([, , , e]) => e), -Infinity);
    chart.draw({ times: scene.times, values: scene.values, device: scene.device, events: scene.events, asleep: scene.asleep, spans: scene.spans, begin, end }, chosen ? [chosen[1], chosen[2]] : all);
    el.dataset.window = step.value;
  }
  step.addEventListener("change", paint);
  paint();
}

export default { render };
