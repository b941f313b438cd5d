// The page of the layout explorer; the arithmetic stands in layout_plan.js, which comes before this in the same module.
const NS = "http://www.w3.org/2000/svg", ORDERS = ["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"], TOP = 20;

function make(tag, attributes, ...children) {
  const isDrawn = ["svg", "rect", "text", "g", "title"].includes(tag);
  const node = isDrawn ? document.createElementNS(NS, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function put(node, attributes) {  // writes only what changes: most cells keep most of their looks
  const old = (node.put ??= {});
  for (const [name, value] of Object.entries(attributes)) {
    if (old[name] === value) continue;
    old[name] = value;
    if (value === null) node.removeAttribute(name);
    else node.setAttribute(name, value);
  }
}

function inShort(ranks) {
  if (ranks.length > 2 && ranks.every((rank, i) => rank === ranks[0] + i)) return `${ranks[0]}-${ranks.at(-1)}`;
  return ranks.length <= 12 ? ranks.join(", ") : `${ranks.slice(0, 4).join(", ")}, ..., ${ranks.at(-1)} (${ranks.length} ranks)`;
}

function letterOf(index) {  // A to Z, then AA, AB, ...
  return (index >= 26 ? letterOf(Math.floor(index / 26) - 1) : "") + String.fromCharCode(65 + (index % 26));
}

function inkOn(color) {  // black or white, whichever contrasts more
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16) / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000000" : "#FFFFFF";
}

function sizeControl(name, onSize) {  // a slider over the sizes that fit, and a field that takes any and says why not
  const slider = make("input", { type: "range", min: 0, "aria-label": `${name} slider` });
  const field = make("input", { type: "number", min: 1, "aria-label": name.replace("_", " "), "data-size": name });
  let offered = [1];
  slider.addEventListener("input", () => onSize(name, offered[Number(slider.value)], field));
  field.addEventListener("change", () => onSize(name, Number(field.value), field));
  const node = make("label", {}, `${name.replace("_", " ")} `, slider, field);
  function show(spec) {
    const size = sizesOf(spec)[name];
    offered = fitting(spec, name);
    Object.assign(slider, { max: Math.max(0, offered.length - 1), value: offered.indexOf(size), disabled: offered.length < 2 });
    slider.setAttribute("aria-valuetext", `${name} ${size}; ${inShort(offered)} fit`);
    node.title = offered.length > 1 ? `${inShort(offered)} fit` : "no other size fits";
    field.value = size;
    field.removeAttribute("aria-invalid");
  }
  return { node, show };
}

function render({ model, el }) {
  let plan, grid, cells = [], numbers = [], tags = [], side = 0, controls = [], controlsOf = "";
  const palette = model.get("palette"), numCluster = model.get("num_cluster_ranks");
  const kind = make("select", { "aria-label": "order of ranks" }, ...Object.entries(KINDS).map(([value, [text]]) => make("option", { value }, text)));
  const order = make("input", { "aria-label": "Megatron order, fastest first", size: 16, list: "wb-orders" });
  const orders = make("datalist", { id: "wb-orders" }, ...ORDERS.map((value) => make("option", { value })));
  const groups = make("textarea", { "aria-label": "groups of your own, as JSON" });
  const alert = make("p", { role: "alert" }), derived = make("span", { "data-derived": "" });
  const first = make("div", { class: "wb-bar" }), sizes = make("div", { class: "wb-bar" }), third = make("div", { class: "wb-bar" });
  const rankField = make("input", { type: "number", min: 0, "aria-label": "rank" });
  const layers = make("input", { type: "number", min: 1, "aria-label": "number of layers" });
  const partition = make("input", { size: 10, placeholder: "vLLM's rule", "aria-label": "layers of each stage" });
  const layersOf = make("span", {}, make("label", {}, "layers ", layers), " ", make("label", {}, "of each stage ", partition));
  const boxes = make("g", {}), texts = make("g", {}), svg = make("svg", { role: "listbox", tabindex: 0 }, boxes, texts);
  const words = make("p", { class: "wb-words", role: "status" }), stages = make("p", { "data-stages": "" });
  const axes = make("fieldset", { class: "wb-groups", "aria-label": "colour by axis" });
  const code = make("input", { class: "wb-code", readonly: "", "aria-label": "code that makes this layout" });
  const copy = make("button", { type: "button" }, "Copy"), use = make("button", { type: "button" }, "Use this layout"), told = make("span", { role: "status", "data-told": "" });
  first.append(make("label", {}, "order ", kind), order, orders, groups);
  third.append(make("label", {}, "rank ", rankField), layersOf);
  el.classList.add("wb-layout");
  el.addEventListener("focusin", (event) => { event.target.dataset.lmSuppressShortcuts = "true"; });  // else JupyterLab takes the arrow keys
  el.addEventListener("keydown", (event) => {  // JupyterLab keeps Enter from a field
    if (event.key === "Enter" && event.target.tagName === "INPUT") event.target.dispatchEvent(new Event("change", { bubbles: true }));
  });
  el.replaceChildren(first, sizes, alert, svg, third, words, axes, stages, make("div", { class: "wb-bar" }, code, copy, ...(numCluster ? [use] : []), told));

  function propose(spec, field) {  // take a spec when it fits, else say why it does not
    const problem = problemOf(spec);
    alert.textContent = problem;
    if (field) field[problem ? "setAttribute" : "removeAttribute"]("aria-invalid", "true");
    if (problem) return;
    const next = planOf(spec);
    if (!next.axes.includes(model.get("color_by"))) model.set("color_by", next.axes.includes("tp") ? "tp" : next.axes[0]);
    model.set("rank", Math.min(model.get("rank"), next.world - 1));
    model.set("spec", spec);
    model.save_changes();
  }
  function changeKind() {
    const spec = model.get("spec"), old = sizesOf(spec), names = KINDS[kind.value][1], world = plan.world;
    const kept = Object.fromEntries(names.filter((name) => old[name] > 1 && name !== "etp").map((name) => [name, old[name]]));
    const groupsNow = Object.fromEntries(plan.axes.filter((axis) => plan.degree[axis] > 1).map((axis) => [axis, plan.groups[axis]]));
    const blank = { kind: kind.value, sizes: kind.value === "supernode" || kind.value === "custom" ? {} : { world_size: world }, order: spec.order, groups: {} };
    if (kind.value === "custom") return propose({ ...blank, groups: Object.keys(groupsNow).length ? groupsNow : { group: [[...plan.member[plan.axes[0]].keys()]] } }, kind);
    const wanted = { ...blank, sizes: { ...blank.sizes, ...kept } };
    propose(problemOf(wanted) ? blank : wanted, kind);
  }
  function readGroups() {
    let given = {};
    try { given = JSON.parse(groups.value); } catch { alert.textContent = "this is no JSON"; groups.setAttribute("aria-invalid", "true"); return; }
    propose({ ...model.get("spec"), groups: given }, groups);
  }

  function showSpec() {  // everything anew: another layout
    const spec = model.get("spec");
    plan = planOf(spec);
    grid = gridOf(plan);
    alert.textContent = "";
    kind.value = spec.kind;
    order.value = spec.order;
    order.hidden = spec.kind !== "megatron";
    groups.hidden = spec.kind !== "custom";
    groups.value = JSON.stringify(spec.groups);
    [kind, order, groups].forEach((field) => field.removeAttribute("aria-invalid"));
    if (controlsOf !== spec.kind) {
      const names = spec.kind === "custom" ? [] : spec.kind === "supernode" ? ["dcp"] : ["world_size", ...KINDS[spec.kind][1]];
      controls = names.map((name) => sizeControl(name, (which, size, field) => propose(withSize(model.get("spec"), which, size), field)));
      sizes.replaceChildren(...controls.map((control) => control.node), derived);
      controlsOf = spec.kind;
    }
    controls.forEach((control) => control.show(spec));
    const left = { vllm: ["external_dp"], megatron: ["dp", "edp"] }[spec.kind] ?? [];
    derived.textContent = left.map((axis) => `${axis.replace("_", " ")} = ${plan.degree[axis]}`).join(", ");
    code.value = codeOf(spec);
    told.textContent = "";
    use.disabled = plan.world !== numCluster;
    use.title = use.disabled ? `the cluster has ${numCluster} ranks` : "";
    if (numCluster && use.disabled) told.textContent = `the cluster has ${numCluster} ranks, this layout ${plan.world}`;
    rankField.max = plan.world - 1;
    layersOf.hidden = !("pp" in plan.degree);
    drawGrid();
    paint();
  }
  function drawGrid() {
    const left = 12 + 6.6 * Math.max(0, ...grid.yTicks.map(([, text]) => text.length));  // the names of rows stand there
    side = Math.max(6, Math.min(46, (760 - left) / grid.width));
    const width = left + grid.width * side + 4, height = TOP + grid.height * side + 4;
    put(svg, { viewBox: `-4 -4 ${width + 8} ${height + 8}`, width, "aria-label": `${plan.world} ranks; arrow keys walk` });
    const plain = (x, y, text, anchor) => make("text", { x, y, class: "wb-plain", "font-size": 11, "text-anchor": anchor, "dominant-baseline": "central" }, text);
    const wideEnough = (names, space) => names.every(([at, text], i) => !i || (at - names[i - 1][0]) * side >= space(text));
    const parts = [];
    if (wideEnough(grid.xTicks, (text) => text.length * 6.5 + 4)) parts.push(...grid.xTicks.map(([at, text]) => plain(left + at * side, 9, text, "middle")));
    if (wideEnough(grid.yTicks, () => 12)) parts.push(...grid.yTicks.map(([at, text]) => plain(0, TOP + at * side, text, "start")));
    for (let rank = cells.length; rank < plan.world; rank++) {  // cells stay from layout to layout: making them is what takes time
      cells[rank] = make("rect", { id: `wb-${uid}-${rank}`, role: "option", "data-rank": rank });
      boxes.append(cells[rank]);
    }
    cells.splice(plan.world).forEach((cell) => cell.remove());
    numbers = [];
    tags = [];
    const box = side - 2, hasTags = side >= 34, inside = (x, y, size, text) =>
      make("text", { x: x + box / 2, y, "text-anchor": "middle", "dominant-baseline": "central", "font-size": size }, text);
    cells.forEach((cell, rank) => {
      const x = left + grid.x[rank] * side + 1, y = TOP + grid.y[rank] * side + 1;
      put(cell, { x, y, width: box, height: box });
      if (side < 18) return;
      parts.push(numbers[rank] = inside(x, y + (hasTags ? 9 : box / 2), hasTags ? 12 : Math.min(12, side * 0.42), rank));
      if (hasTags) parts.push(...(tags[rank] = [inside(x, y + 21, 9.5, ""), inside(x, y + 31, 9.5, "")]));
    });
    texts.replaceChildren(...parts);
  }
  function tagLines(shared) {  // the axes on which a rank stands with the chosen one, in two short lines
    const lines = ["", ""];
    for (const axis of shared.map((name) => name.replace("external_dp", "ext"))) {
      const line = lines[0].length + axis.length <= 7 ? 0 : 1;
      lines[line] = `${lines[line]} ${axis}`.trim();
    }
    return side < 42 && lines[1] ? [`${lines[0]} ..`, ""] : lines[1].length > 8 ? [lines[0], "..."] : lines;
  }
  function paint() {  // another rank or colour: attributes only
    const rank = model.get("rank"), axis = model.get("color_by"), many = plan.axes.filter((a) => plan.degree[a] > 1);
    const with_ = (other) => many.filter((a) => plan.member[a][other] === plan.member[a][rank]);
    rankField.value = rank;
    rankField.removeAttribute("aria-invalid");
    cells.forEach((cell, other) => {
      const shared = with_(other), isLit = shared.length > 0 || other === rank, color = palette[plan.member[axis][other] % palette.length];
      const isOfAxis = shared.includes(axis), letter = letterOf(plan.member[axis][other]);
      put(cell, {
        fill: color, "fill-opacity": isLit ? 1 : 0.3, stroke: isLit ? "currentColor" : "none", "aria-selected": other === rank, "data-axes": shared.join(" "),
        "stroke-width": other === rank ? 4 : isOfAxis ? 2 : 1.3, "stroke-dasharray": isOfAxis || other === rank || side < 12 ? "none" : "4 2",
        "aria-label": isLit ? `${wordsOf(plan, other)}; ${axis} group ${letter}${other === rank ? "" : `; with rank ${rank} in ${shared.join(", ")}`}` : `rank ${other}` });
      if (!numbers[other]) return;
      [numbers[other], ...(tags[other] ?? [])].forEach((text) => put(text, { fill: isLit ? inkOn(color) : "currentColor" }));
      put(numbers[other], { "font-weight": other === rank ? "bold" : "normal" });
      if (!tags[other]) return;
      const lines = other === rank || !shared.length ? [letter, ""] : tagLines(shared);
      lines.forEach((line, k) => { tags[other][k].textContent = line; });
    });
    svg.setAttribute("aria-activedescendant", `wb-${uid}-${rank}`);
    paintLayers(rank);
    paintAxes(rank, axis);
  }
  function paintLayers(rank) {
    words.textContent = wordsOf(plan, rank);
    stages.textContent = "";
    layers.value = model.get("num_layers");
    partition.value = model.get("partition");
    partition.removeAttribute("aria-invalid");
    if (!("pp" in plan.degree)) return;
    try {
      const cut = cutLayers(model.get("num_layers"), plan.degree.pp, model.get("partition"));
      const text = ([from, end]) => (end - from === 1 ? `layer ${from}` : `layers ${from}-${end - 1}`), mine = cut[plan.place.pp[rank]];
      words.textContent += `: ${text(mine)}`;
      if (cut.length > 1) stages.textContent = `pipeline stages: ${cut.slice(0, 16).map((one, i) => `pp ${i}: ${text(one)}`).join("; ")}${cut.length > 16 ? "; ..." : ""}`;
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      stages.textContent = `layers do not fit: ${error.message}`;
      partition.setAttribute("aria-invalid", "true");
    }
  }
  function paintAxes(rank, chosen) {
    const hadFocus = axes.contains(document.activeElement);
    axes.replaceChildren(...plan.axes.map((axis) => {
      const g = plan.member[axis][rank], ranks = plan.groups[axis][g], isChosen = axis === chosen;
      const radio = make("input", { type: "radio", name: `wb-axis-${uid}`, value: axis, "aria-label": `colour by ${axis}` });
      radio.checked = isChosen;
      const swatch = make("span", { class: "wb-swatch", style: isChosen ? `background:${palette[g % palette.length]}` : "" });
      const group = ranks.length === 1 ? "alone" : `${letterOf(g)}: ${inShort(ranks)}`, all = plan.groups[axis].length;
      return make("label", { "data-axis": axis }, radio, " ", swatch, ` ${axis}: ${group}${ranks.length > 1 ? ` (one of ${all} group${all > 1 ? "s" : ""})` : ""}`);
    }));
    if (hadFocus) axes.querySelector("input:checked")?.focus();
  }

  function choose(rank) {
    if (!Number.isInteger(rank) || rank < 0 || rank >= plan.world) {
      words.textContent = `there is no rank ${rankField.value}: ranks are 0 to ${plan.world - 1}`;
      rankField.setAttribute("aria-invalid", "true");
      return;
    }
    model.set("rank", rank);
    model.save_changes();
  }
  function walk(event) {  // to the nearest cell in that direction
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key], rank = model.get("rank");
    if (!step && event.key !== "Home" && event.key !== "End") return;
    event.preventDefault();
    event.stopPropagation();
    if (!step) return choose(event.key === "Home" ? 0 : plan.world - 1);
    let best = rank, least = Infinity;
    for (let other = 0; other < plan.world; other++) {
      const dx = grid.x[other] - grid.x[rank], dy = grid.y[other] - grid.y[rank];
      const ahead = dx * step[0] + dy * step[1], aside = Math.abs(dx * step[1]) + Math.abs(dy * step[0]);
      if (ahead > 0.01 && ahead + 10 * aside < least) [best, least] = [other, ahead + 10 * aside];
    }
    choose(best);
  }
  async function copyCode() {  // the clipboard is there on secure pages only; elsewhere the old way
    code.focus();
    code.select();
    try { await navigator.clipboard.writeText(code.value); } catch { document.execCommand("copy"); }
    told.textContent = "copied";
  }
  const set = (name, value) => { model.set(name, value); model.save_changes(); };
  const answer = (message) => { told.textContent = message.told; };
  kind.addEventListener("change", changeKind);
  order.addEventListener("change", () => propose({ ...model.get("spec"), order: order.value.trim() }, order));
  groups.addEventListener("change", readGroups);
  svg.addEventListener("click", (event) => { if (event.target.dataset.rank) { svg.focus(); choose(Number(event.target.dataset.rank)); } });
  svg.addEventListener("keydown", walk);
  rankField.addEventListener("change", () => choose(rankField.value === "" ? NaN : Number(rankField.value)));
  layers.addEventListener("change", () => { if (Number(layers.value) >= 1) set("num_layers", Math.floor(Number(layers.value))); });
  partition.addEventListener("change", () => set("partition", partition.value.trim()));
  axes.addEventListener("change", (event) => set("color_by", event.target.value));
  copy.addEventListener("click", copyCode);
  use.addEventListener("click", () => { model.send({ use: true }); told.textContent = "asked the cluster to use this layout ..."; });
  const uid = Math.random().toString(36).slice(2, 8), changes = "change:rank change:color_by change:num_layers change:partition";
  const repaint = () => { if (model.get("rank") < plan.world && model.get("color_by") in plan.member) paint(); };  // else a new spec is on its way
  model.on("change:spec", showSpec);
  model.on(changes, repaint);
  model.on("msg:custom", answer);
  showSpec();
  return () => { model.off("change:spec", showSpec); model.off(changes, repaint); model.off("msg:custom", answer); };
}

export default { render };
