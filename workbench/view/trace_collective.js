// A collective step by step: members are columns, parts are rows, a message is an arrow over its row. All in the page.
const NS = "http://www.w3.org/2000/svg";
const GAP = 0.35, LANE = 18, LEFT = 74, NAMES = 22;

function svgNode(tag, attributes, text) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function htmlNode(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function short(value) {
  return typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value);
}

export function heldText(held, maxLetters) {  // "10, 11", "10..17", "2 prompts"
  if (held === null) return "";
  if (typeof held === "string") return held;
  const values = held.map(short), text = values.join(", ");
  return text.length <= maxLetters || values.length === 1 ? text : `${values[0]}..${values.at(-1)}`;
}

export function lanesOf(transfers) {  // a lane above its row for each message, so that no two arrows of a row lie on each other
  const lanes = new Array(transfers.length).fill(0), taken = {};
  const far = (k) => Math.abs(transfers[k].target - transfers[k].source);
  for (const k of [...lanes.keys()].sort((a, b) => far(a) - far(b))) {
    const t = transfers[k], low = Math.min(t.source, t.target), high = Math.max(t.source, t.target);
    const meets = (lane) => (taken[[t.part, lane]] ?? []).some(([a, b]) => a < high && low < b);
    while (meets(lanes[k])) lanes[k] += 1;
    (taken[[t.part, lanes[k]]] ??= []).push([low, high]);
  }
  return lanes;
}

export function kindsOf(scene, number) {  // [member][part] -> what the cell is in this step
  const step = scene.steps[number], isLast = number === scene.steps.length - 1;
  const kinds = step.held.map((row, member) => row.map((held, part) =>
    held === null ? "empty" : isLast && scene.results[member].includes(part) ? "result" : "holds"));
  for (const t of step.transfers) kinds[t.source][t.part] = "sends";
  for (const t of step.transfers) kinds[t.target][t.part] = "got";
  return kinds;
}

export function inWords(scene, number, t) {
  const name = (held) => heldText(held, 40).replaceAll("\n", " "), before = scene.steps[number - 1].held[t.target][t.part];
  const after = scene.steps[number].held[t.target][t.part], what = `${scene.parts[t.part]} (${name(t.carried)})`;
  const then = t.is_reduced ? `, which has ${name(before)}: together ${name(after)}` : "";
  return `${scene.members[t.source]} sends ${what} to ${scene.members[t.target]}${then}`;
}

function render({ model, el }) {
  const scene = model.get("scene"), last = scene.steps.length - 1, n = scene.members.length;
  const numLanes = Math.max(1, ...scene.steps.flatMap((step) => lanesOf(step.transfers)).map((lane) => lane + 1));
  const hasWords = scene.steps.some((step) => step.held.flat().some((held) => typeof held === "string"));
  const cell = Math.min(80, 690 / (n * (1 + GAP))), row = hasWords ? 34 : 24, pitch = row + numLanes * LANE + 6, font = Math.min(12, cell * 0.3);
  const width = LEFT + n * (1 + GAP) * cell, height = NAMES + scene.parts.length * pitch + 8;
  const xOf = (member) => LEFT + member * (1 + GAP) * cell, yOf = (part) => NAMES + part * pitch + numLanes * LANE;

  const slider = htmlNode("input", { type: "range", min: 0, max: last, step: 1, "aria-label": "step" });
  const back = htmlNode("button", { type: "button", "aria-label": "previous step" }, "◀");
  const next = htmlNode("button", { type: "button", "aria-label": "next step" }, "▶");
  const count = htmlNode("span", { class: "wb-count" }), title = htmlNode("p", { class: "wb-title", role: "status" });
  const svg = svgNode("svg", { viewBox: `0 0 ${width} ${height}`, width, role: "img" });
  const messages = htmlNode("ul", { class: "wb-messages", "aria-label": "messages of this step" }), key = htmlNode("ul", { class: "wb-key" });
  el.classList.add("wb-collective");
  el.addEventListener("focusin", (event) => { event.target.dataset.lmSuppressShortcuts = "true"; });  // else JupyterLab takes the arrow keys
  el.replaceChildren(htmlNode("p", {}, scene.finding), htmlNode("div", {}, back, " ", slider, " ", next, " ", count), title, svg, key, messages);

  function drawCells(number) {
    kindsOf(scene, number).forEach((of, member) => of.forEach((kind, part) => {
      const look = scene.kinds[kind], x = xOf(member), y = yOf(part);
      svg.append(svgNode("rect", {
        x, y, width: cell, height: row, fill: look.face, stroke: look.edge, "stroke-width": look.line * 1.4,
        "stroke-dasharray": kind === "empty" ? "2 3" : "none", "data-member": member, "data-part": part, "data-kind": kind }));
      const lines = heldText(scene.steps[number].held[member][part], cell / (font * 0.6)).split("\n");
      lines.forEach((line, i) => svg.append(svgNode("text", {
        x: x + cell / 2, y: y + row / 2 + (i - (lines.length - 1) / 2) * font * 1.15, "text-anchor": "middle", "dominant-baseline": "central",
        "font-size": font, fill: "#000000" }, line)));
    }));
  }
  function drawArrows(number) {
    const { transfers } = scene.steps[number], lanes = lanesOf(transfers);
    transfers.forEach((t, k) => {
      const towards = t.target > t.source ? 1 : -1, top = yOf(t.part), over = top - (lanes[k] + 0.62) * LANE;
      const x0 = xOf(t.source) + (0.5 + 0.22 * towards) * cell, x1 = xOf(t.target) + (0.5 - 0.22 * towards) * cell;
      const arrow = svgNode("g", { "data-source": t.source, "data-target": t.target, "data-part": t.part });
      arrow.append(svgNode("title", {}, inWords(scene, number, t)));
      arrow.append(svgNode("path", { class: "wb-arrow", d: `M${x0} ${top}V${over}H${x1}V${top - 5}`, "stroke-width": 1.5 }));
      arrow.append(svgNode("path", { class: "wb-tip", d: `M${x1 - 4} ${top - 7}h8l-4 7z` }));
      svg.append(arrow);
    });
  }
  function paint() {
    const number = model.get("step"), step = scene.steps[number], words = step.transfers.map((t) => inWords(scene, number, t));
    svg.replaceChildren();
    scene.members.forEach((name, member) => svg.append(svgNode("text", {
      class: "wb-name", x: xOf(member) + cell / 2, y: 13, "text-anchor": "middle", "font-size": Math.min(13, cell * 0.34) },
    cell < 44 ? name.replace("rank ", "") : name)));
    scene.parts.forEach((name, part) => svg.append(svgNode("text", {
      class: "wb-name", x: 0, y: yOf(part) + row / 2, "dominant-baseline": "central", "font-size": 12 }, name)));
    drawCells(number);
    drawArrows(number);
    svg.setAttribute("aria-label", [step.title, ...words].join(". "));
    slider.value = number;
    slider.setAttribute("aria-valuetext", `step ${number} of ${last}: ${step.title}`);
    count.textContent = `step ${number} of ${last}`;
    title.textContent = step.title;
    back.disabled = number === 0;
    next.disabled = number === last;
    messages.replaceChildren(...words.map((text) => htmlNode("li", {}, text)));
    el.dataset.step = number;
  }
  function go(number) {
    model.set("step", Math.max(0, Math.min(last, number)));
    model.save_changes();
  }
  const used = new Set(scene.steps.flatMap((_, number) => kindsOf(scene, number).flat()));
  key.append(...Object.entries(scene.kinds).filter(([kind]) => used.has(kind)).map(([kind, look]) => htmlNode("li", {}, htmlNode("span", {
    style: `background:${look.face};border:${look.line * 1.4}px ${kind === "empty" ? "dotted" : "solid"} ${look.edge}` }), look.words)));
  slider.addEventListener("input", () => go(Number(slider.value)));
  back.addEventListener("click", () => go(model.get("step") - 1));
  next.addEventListener("click", () => go(model.get("step") + 1));
  model.on("change:step", paint);
  paint();
  return () => model.off("change:step", paint);
}

export default { render };
