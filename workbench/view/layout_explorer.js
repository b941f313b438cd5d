// A grid of ranks to click on or to walk through with the keys: all in the page, the kernel is only told the rank and the axis.
const NS = "http://www.w3.org/2000/svg";
const HUES = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F"];
const DASHES = ["none", "6 3", "2 2", "8 2 2 2", "1 3", "10 4", "4 1"];

function make(tag, attributes, text) {
  const node = tag === "svg" || tag === "rect" || tag === "text" || tag === "g"
    ? document.createElementNS(NS, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function inShort(ranks) {
  return ranks.length <= 12 ? ranks.join(", ") : `${ranks.slice(0, 4).join(", ")}, ... ${ranks.at(-1)} (${ranks.length} ranks)`;
}

function render({ model, el }) {
  const scene = model.get("scene"), axes = Object.keys(scene.groups), n = scene.x.length;
  const member = {};  // axis -> rank -> index of its group
  for (const axis of axes) {
    member[axis] = new Array(n);
    scene.groups[axis].forEach((ranks, g) => ranks.forEach((rank) => { member[axis][rank] = g; }));
  }
  const side = Math.max(6, Math.min(44, 720 / scene.width)), width = scene.width * side, height = scene.height * side;

  const bar = make("div", { class: "wb-bar" }), rankField = make("input", { type: "number", min: 0, max: n - 1, "aria-label": "rank" });
  const colorBy = make("select", { "aria-label": "colour by axis" });
  axes.forEach((axis) => colorBy.append(make("option", { value: axis }, axis)));
  bar.append("rank ", rankField, " colour by ", colorBy);
  const use = make("button", { type: "button" }, "Use this layout");
  if (scene.can_use) bar.append(" ", use);

  const svg = make("svg", { viewBox: `-3 -3 ${width + 6} ${height + 6}`, width: width + 6, role: "grid", tabindex: 0, "aria-label": scene.title });
  const cells = [], numbers = [];
  for (let rank = 0; rank < n; rank++) {
    const at = { x: scene.x[rank] * side + 0.5, y: scene.y[rank] * side + 0.5 };
    const cell = make("rect", { ...at, width: side - 1, height: side - 1, "data-rank": rank, role: "gridcell" });
    cell.setAttribute("aria-label", scene.words[rank]);
    svg.append(cell);
    cells.push(cell);
    if (side < 20) continue;
    const number = make("text", { x: at.x + side / 2, y: at.y + side / 2, "text-anchor": "middle", "dominant-baseline": "central" }, rank);
    number.setAttribute("font-size", Math.min(13, side * 0.4));
    svg.append(number);
    numbers.push(number);
  }
  const status = make("p", { role: "status" }), legend = make("ul", { class: "wb-groups" });
  el.classList.add("wb-layout");
  el.replaceChildren(bar, svg, status, legend);

  function paint() {
    const rank = model.get("rank"), axis = model.get("color_by"), hue = HUES[axes.indexOf(axis) % HUES.length];
    rankField.value = rank;
    colorBy.value = axis;
    cells.forEach((cell, other) => {
      const shared = axes.filter((a) => member[a][other] === member[a][rank]), lit = shared[0];
      const isOfAxis = member[axis][other] === member[axis][rank];
      cell.setAttribute("fill", isOfAxis ? hue : member[axis][other] % 2 ? "#D0D0D0" : "#EBEBEB");
      cell.setAttribute("stroke", other === rank ? "#000000" : lit ? HUES[axes.indexOf(lit) % HUES.length] : "none");
      cell.setAttribute("stroke-width", other === rank ? 3.5 : lit ? 2 : 0);
      cell.setAttribute("stroke-dasharray", lit && other !== rank ? DASHES[axes.indexOf(lit) % DASHES.length] : "none");
      cell.setAttribute("aria-selected", other === rank);
      cell.setAttribute("data-axes", shared.join(" "));
      if (numbers[other]) numbers[other].setAttribute("fill", isOfAxis && hue === "#0072B2" ? "#FFFFFF" : "#000000");
    });
    status.textContent = scene.words[rank];
    legend.replaceChildren(...axes.map((a) => {
      const ranks = scene.groups[a][member[a][rank]], item = make("li", { "data-axis": a });
      item.style.borderLeft = `12px solid ${HUES[axes.indexOf(a) % HUES.length]}`;
      item.textContent = `${a}: ${ranks.length === 1 ? "alone" : inShort(ranks)}`;
      return item;
    }));
  }
  function choose(rank) {
    if (!Number.isInteger(rank) || rank < 0 || rank >= n) {
      status.textContent = `there is no rank ${rankField.value}: ranks are 0 to ${n - 1}`;
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
    if (!step) return choose(event.key === "Home" ? 0 : n - 1);
    let best = rank, least = Infinity;
    for (let other = 0; other < n; other++) {
      const dx = scene.x[other] - scene.x[rank], dy = scene.y[other] - scene.y[rank];
      const ahead = dx * step[0] + dy * step[1], aside = Math.abs(dx * step[1]) + Math.abs(dy * step[0]);
      if (ahead > 0.01 && ahead + 10 * aside < least) [best, least] = [other, ahead + 10 * aside];
    }
    choose(best);
  }
  function press() { model.send({ use: true }); status.textContent = "asked the cluster to use this layout ..."; }
  function told(message) { status.textContent = message.told; }

  svg.addEventListener("click", (event) => { if (event.target.dataset.rank) { svg.focus(); choose(Number(event.target.dataset.rank)); } });
  svg.addEventListener("keydown", walk);
  rankField.addEventListener("change", () => choose(rankField.value === "" ? NaN : Number(rankField.value)));
  colorBy.addEventListener("change", () => { model.set("color_by", colorBy.value); model.save_changes(); });
  use.addEventListener("click", press);
  model.on("change:rank change:color_by", paint);
  model.on("msg:custom", told);
  paint();
  return () => { model.off("change:rank change:color_by", paint); model.off("msg:custom", told); };
}

export default { render };
