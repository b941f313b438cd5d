// A cluster that moves: tiles, who waits for whom, memory. Everything comes from the kernel; only buttons go back, between cells.
const BLOCKED = "A cell runs in the kernel, which hears these buttons only afterwards: use the notebook's stop button (\u25a0). "
  + "They act beside cells that run with %%ranks --bg.";

function tile(status, rank) {
  const [state, cell, waitsIn, waitsS, mib] = status, what = state === "running" && waitsIn ? "waits" : state;
  const first = what === "waits" ? `${waitsIn.split(" of ")[0]}` : what;
  const second = what === "waits" ? `of ${waitsIn.split(" of ").slice(1).join(" of ")}, ${waitsS.toFixed(1)} s` : cell === null ? "\u00a0" : `cell ${cell}`;
  return { what, words: [`rank ${rank}`, first, second, mib ? inMemory(mib) : "\u00a0"] };
}

function whoWaits(waits) {
  const box = node("div", { class: "wb-waits", role: "status", "aria-label": "who waits for whom" });
  if (!waits.waiting) { box.hidden = true; return box; }
  const shown = waits.waiting.slice(0, 16), list = node("ul", {});
  for (const [rank, missing, what, place] of shown) {
    list.append(node("li", { "data-waits": rank, "data-for": missing.join(" ") },
      `rank ${rank} \u2192 ${missing.length ? `waits for ${missing.slice(0, 8).join(", ")}${missing.length > 8 ? ", ..." : ""}` : "waits for a message"} in ${what}${place ? ` (${place})` : ""}`));
  }
  for (const [rank, cause, where] of waits.missing.slice(0, 16)) list.append(node("li", { "data-missing": rank }, `rank ${rank} ${cause}${where ? `: ${where}` : ""}`));
  const rest = waits.waiting.length - shown.length;
  if (rest > 0) list.append(node("li", {}, `and ${rest} more`));
  box.append(node("b", {}, waits.sentence), list);
  return box;
}

export default () => {
  const state = {};
  const views = moving(state, (news) => Object.assign(state, news, {
    memory: state.memory.concat(news.memory || []), events: state.events.concat(news.events || []).slice(-400) }));
  return {
    initialize: views.initialize,
    render({ model, el }) {
      el.classList.add("wb-time", "wb-live");
      keepKeys(el);
      const head = node("p", { "data-head": "" }), engines = node("p", { "data-engines": "" }), hint = node("p", { "data-hint": "" });
      const told = node("pre", { role: "status", "data-told": "" }), under = node("p", { "data-cursor-text": "" });
      const buttons = Object.fromEntries(["interrupt", "diagnose", "respawn"].map((act) => [act, node("button", { type: "button", "data-act": act }, act)]));
      const tiles = node("ul", { class: `wb-tiles${state.ranks.length > 64 ? " wb-many" : ""}`, "aria-label": "ranks" });
      const cells = state.ranks.map((_, rank) => node("li", { "data-rank": rank }));
      tiles.append(...cells);
      let waits = whoWaits({});
      const chart = timeChart({ layers: state.layers, looks: state.looks, label: "memory over time", height: 150, onCursor: tellCursor });
      let names = legend({}, "processes");
      const bar = node("div", { role: "toolbar", "aria-label": "cluster" }, ...Object.values(buttons));
      el.replaceChildren(head, bar, hint, tiles, waits, told, engines, chart.svg, names, under);

      function tellCursor({ t, parts, total, isFollowing }) {
        under.textContent = `${isFollowing ? "now" : `at ${t.toFixed(1)} s`}: ${heldText({ parts, total })}`;
      }
      function drawTiles() {
        state.ranks.forEach((status, rank) => {
          const { what, words } = tile(status, rank), text = words.join(", ");
          if (cells[rank].dataset.text === text) return;
          cells[rank].dataset.text = text;
          cells[rank].dataset.state = what;
          cells[rank].title = text;
          cells[rank].replaceChildren(node("b", {}, state.ranks.length > 64 ? `${rank}${what[0]}` : `${words[0]}: ${words[1]}`), node("span", {}, words[2]), node("span", {}, words[3]));
        });
      }
      function drawLegend() {  // of what has held memory: an engine may come later
        const shown = state.layers.filter((_, i) => state.memory.some(([, held]) => held[i])), next = shown.map(({ name }) => name).join();
        if (names.dataset.of === next) return;
        const fresh = legend(Object.fromEntries(shown.map(({ name, color }) => [name, [color, ""]])), "processes");
        fresh.dataset.of = next;
        names.replaceWith(fresh);
        names = fresh;
      }
      function drawButtons() {
        const isDead = state.ranks.some(([what]) => what === "dead");
        const can = { interrupt: Boolean(state.cell), diagnose: true, respawn: isDead && !state.cell };
        for (const [act, button] of Object.entries(buttons)) {
          const isOn = state.can_act && can[act] && !state.is_closed;
          button.setAttribute("aria-disabled", !isOn);
          button.style.opacity = isOn ? 1 : 0.45;
          button.title = state.is_closed ? "the cluster is closed" : !state.can_act ? BLOCKED : can[act] ? "" : { interrupt: "no cell runs", respawn: "no dead rank, or a cell still runs" }[act];
        }
        hint.textContent = state.is_closed || state.can_act ? "" : BLOCKED;
        hint.hidden = !hint.textContent;
      }
      function draw() {
        const doing = state.is_closed ? "closed; this is its last picture" : state.cell ? `${state.cell} runs since ${state.cell_s.toFixed(1)} s` : "idle";
        head.textContent = `${state.ranks.length} ranks, generation ${state.generation}: ${doing}`;
        engines.textContent = state.engines.map(([name, status, phase]) => `engine ${name}: ${phase ? phase.replace("_", " ") : status.replace("_", " ")}`).join("; ");
        el.dataset.t = state.t;
        el.dataset.closed = Boolean(state.is_closed);
        el.dataset.canAct = Boolean(state.can_act);
        drawTiles();
        drawButtons();
        const next = JSON.stringify(state.waits);
        if (waits.dataset.of !== next) { const fresh = whoWaits(state.waits); fresh.dataset.of = next; waits.replaceWith(fresh); waits = fresh; }
        told.textContent = state.told || "";
        told.hidden = !state.told;
        drawLegend();
        chart.draw({ ...overTime(state.memory), events: state.events, asleep: state.asleep });
      }
      for (const [act, button] of Object.entries(buttons)) {
        button.addEventListener("click", () => {
          if (button.getAttribute("aria-disabled") === "true") { hint.textContent = button.title; hint.hidden = false; return; }
          state.told = `${act} ...`;
          model.send({ act });
          draw();
        });
      }
      return views.watch(el, model, draw);
    },
  };
};
