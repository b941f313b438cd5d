// Layouts in the page: the arithmetic of workbench/plan (layout.py, megatron.py, sizes.py, axis.py, partition.py) and of view/rank_grid.py,
// so that a slider needs no kernel. A test compares both for many layouts. A spec is {kind, sizes, order, groups}.

export const MAX_RANKS = 1024;
export const KINDS = {  // kind -> what the menu says, and its degrees
  vllm: ["vLLM", ["tp", "pp", "dp", "pcp", "dcp"]],
  megatron: ["Megatron", ["tp", "cp", "ep", "pp", "etp"]],
  supernode: ["supernode (two nodes of 8)", ["dcp"]],
  subgroups: ["engines of neighbouring ranks", ["size"]],
  sequence_parallel: ["sequence parallel", ["sp"]],
  custom: ["groups of your own", []],
};
const VLLM_AXES = ["external_dp", "dp", "pp", "pcp", "tp"], MEGATRON = ["tp", "cp", "ep", "dp", "pp"];
const FIXED = { supernode: { world_size: 16, tp: 8, pp: 2 } };

const range = (n) => Array.from({ length: n }, (_, i) => i);
const product = (numbers) => numbers.reduce((a, b) => a * b, 1);
const divisors = (n) => range(n).map((i) => i + 1).filter((d) => n % d === 0);
const cut = (list, size) => range(list.length / size).map((i) => list.slice(i * size, (i + 1) * size));

function fail(text) { throw new RangeError(text); }

export function sizesOf(spec) {  // with defaults filled in
  const sizes = { ...FIXED[spec.kind], ...spec.sizes };
  for (const name of KINDS[spec.kind][1]) sizes[name] ??= name === "etp" ? sizes.tp ?? 1 : 1;
  return sizes;
}

function flat(mesh, order) {  // the ranks with the mesh's dims in this order, the last one fastest
  let found = [0];
  const strides = mesh.shape.map((_, d) => product(mesh.shape.slice(d + 1)));
  for (const d of order) found = found.flatMap((at) => range(mesh.shape[d]).map((i) => at + i * strides[d]));
  return found.map((at) => mesh.ranks[at]);
}

function joined(mesh, axes, chosen) {  // groups that vary in the chosen axes only
  const inside = range(axes.length).filter((d) => chosen.includes(axes[d])), outside = range(axes.length).filter((d) => !chosen.includes(axes[d]));
  return cut(flat(mesh, [...outside, ...inside]), product(inside.map((d) => mesh.shape[d])));
}

function checkDivides(world, degrees) {
  const names = Object.entries(degrees).filter(([, n]) => n > 1).map(([name, n]) => `${name} ${n}`).join(" × ") || "1", size = product(Object.values(degrees));
  if (world % size) fail(`${world} ranks do not divide by ${names} = ${size}; that product must be one of ${divisors(world).join(", ")}`);
  return world / size;
}

function checkDcp({ tp, pcp, dcp }) {
  const fits = pcp > 1 ? [...new Set([1, pcp, tp * pcp])].sort((a, b) => a - b) : divisors(tp);
  const rule = pcp > 1 ? "with pcp > 1, dcp is 1, pcp or tp × pcp" : "dcp divides tp";
  if (!fits.includes(dcp)) fail(`dcp ${dcp} does not fit tp ${tp}, pcp ${pcp}: ${rule}; choose from ${fits.join(", ")}`);
}

function vllm(mesh, dcp) {
  const tables = {}, dims = [0, 1, 2, 3, 4], [, dp, , pcp, tp] = mesh.shape;
  VLLM_AXES.forEach((axis, place) => {
    const order = [...dims];
    [order[place], order[4]] = [4, place];
    tables[axis] = cut(flat(mesh, order), mesh.shape[place]);
  });
  tables.dcp = cut(flat(mesh, dcp > 1 ? [0, 1, 2, 4, 3] : dims), dcp);
  tables.ep = cut(flat(mesh, [0, 2, 1, 3, 4]), dp * pcp * tp);
  return { mesh, meshAxes: VLLM_AXES, groups: tables };
}

function parsedOrder(order, degrees) {
  const named = order.toLowerCase().split("-"), rule = `name each of ${MEGATRON.join(", ")} once, fastest first`;
  const absent = MEGATRON.filter((name) => !named.includes(name));
  const problems = {
    "names unknown axes": named.filter((name) => !MEGATRON.includes(name)),
    "names axes twice": [...new Set(named.filter((name, i) => named.indexOf(name) !== i))],
    "leaves out": absent.filter((name) => degrees[name] > 1).map((name) => `${name} ${degrees[name]}`),
  };
  for (const [text, names] of Object.entries(problems)) if (names.length) fail(`order "${order}" ${text}: ${names.join(", ")}; ${rule}`);
  return [...named, ...absent];
}

function grid(fastestFirst, degrees) {
  const axes = [...fastestFirst].reverse().filter((name) => name in degrees), shape = axes.map((axis) => degrees[axis]);
  return [{ shape, ranks: range(product(shape)) }, axes];
}

function megatron(sizes, order) {
  const { world_size: world, tp, cp, ep, pp, etp } = sizes;
  const dp = checkDivides(world, { tp, cp, pp }), edp = checkDivides(world, { etp, ep, pp });
  const fastest = parsedOrder(order, { tp: Math.max(tp, etp), cp, ep, dp: Math.max(dp, edp), pp });
  const [decoder, decoderAxes] = grid(fastest, { tp, cp, dp, pp }), [experts, expertAxes] = grid(fastest, { tp: etp, ep, dp: edp, pp });
  const groups = Object.fromEntries(["tp", "cp", "pp", "dp"].map((axis) => [axis, joined(decoder, decoderAxes, [axis])]));
  const isApart = pp > 1 && fastest.at(-1) !== "pp" && edp !== dp;
  if (isApart || String(groups.pp) !== String(joined(experts, expertAxes, ["pp"]))) {
    fail(`the experts' pipeline would not be the decoder's: pp is not last in "${order}"; put it last, or choose etp and ep so that edp ${edp} equals dp ${dp}`);
  }
  for (const [name, axis] of [["ep", "ep"], ["etp", "tp"], ["edp", "dp"]]) groups[name] = joined(experts, expertAxes, [axis]);
  return { mesh: decoder, meshAxes: decoderAxes, groups };
}

function custom(groups) {
  const axes = Object.entries(groups ?? {}), listed = axes.flatMap(([, given]) => given).flat();
  const world = listed.length ? Math.max(...listed) + 1 : 0;
  if (!listed.length || listed.some((rank) => !Number.isInteger(rank) || rank < 0)) fail('give groups of ranks from 0 on, such as {"tp": [[0, 1], [2, 3]]}');
  for (const [axis, given] of axes) {
    const ranks = given.flat(), absent = range(world).filter((rank) => !ranks.includes(rank));
    if (given.some((group) => !group.length)) fail(`axis ${axis} has an empty group; leave it out`);
    const twice = ranks.find((rank, i) => ranks.indexOf(rank) !== i);
    if (twice !== undefined) fail(`axis ${axis} names rank ${twice} twice; a rank is in one group of an axis`);
    if (absent.length) fail(`axis ${axis} leaves out ranks ${absent.slice(0, 8).join(", ")} of ${world}; give each a group, if of one`);
  }
  return { world, mesh: null, meshAxes: [], groups };
}

function rows(world, name, size, axes) {
  checkDivides(world, { [name]: size });
  const mesh = { shape: [world / size, size], ranks: range(world) };
  return { mesh, meshAxes: axes, groups: { [axes[1]]: cut(mesh.ranks, size), [axes[0]]: cut(flat(mesh, [1, 0]), world / size) } };
}

function check(spec) {  // throws a RangeError that says why sizes do not fit
  const sizes = sizesOf(spec), { world_size: world, tp, pp, cp, ep, etp, dp, pcp } = sizes;
  for (const [name, size] of Object.entries(sizes)) if (!Number.isInteger(size) || size < 1) fail(`${name} must be a whole number of at least 1`);
  const ranks = spec.kind === "custom" ? custom(spec.groups).world : world;
  if (ranks > MAX_RANKS) fail(`${ranks} ranks are more than the ${MAX_RANKS} that can be shown`);
  if (spec.kind === "vllm") checkDivides(world, { dp, pp, pcp, tp });
  if (spec.kind === "vllm" || spec.kind === "supernode") checkDcp({ pcp: 1, ...sizes });
  if (spec.kind === "subgroups") checkDivides(world, { size: sizes.size });
  if (spec.kind === "sequence_parallel") checkDivides(world, { sp: sizes.sp });
  if (spec.kind !== "megatron") return;
  checkDivides(world, { tp, cp, pp });
  checkDivides(world, { etp, ep, pp });
  const fastest = parsedOrder(spec.order, { tp: Math.max(tp, etp), cp, ep, dp: Math.max(world / (tp * cp * pp), world / (etp * ep * pp)), pp });
  if (pp > 1 && fastest.at(-1) !== "pp") megatron(sizes, spec.order);  // compares both pipelines rank by rank
}

function made(spec) {
  const sizes = sizesOf(spec), { world_size: world, tp, pp, dp, pcp, dcp } = sizes;
  switch (spec.kind) {
    case "vllm": return vllm({ shape: [world / (dp * pp * pcp * tp), dp, pp, pcp, tp], ranks: range(world) }, dcp);
    case "supernode":  // [node, stage, local rank]: tp runs across the nodes
      return vllm({ shape: [1, 1, 2, 1, 8], ranks: flat({ shape: [2, 2, 4], ranks: range(16) }, [1, 0, 2]) }, dcp);
    case "megatron": return megatron(sizes, spec.order);
    case "subgroups": return rows(world, "size", sizes.size, ["replica", "engine"]);
    case "sequence_parallel": return rows(world, "sp", sizes.sp, ["dp", "sp"]);
    default: return custom(spec.groups);
  }
}

export function planOf(spec) {  // the groups of every axis; throws a RangeError that says why sizes do not fit
  check(spec);
  const of = made(spec), world = of.world ?? sizesOf(spec).world_size;
  const plan = { ...of, world, axes: Object.keys(of.groups), member: {}, place: {}, degree: {} };
  for (const axis of plan.axes) {
    plan.member[axis] = new Array(world);
    plan.place[axis] = new Array(world);
    plan.degree[axis] = Math.max(...plan.groups[axis].map((group) => group.length));
    plan.groups[axis].forEach((group, g) => group.forEach((rank, i) => { plan.member[axis][rank] = g; plan.place[axis][rank] = i; }));
  }
  return plan;
}

export function problemOf(spec) {
  try { check(spec); return ""; } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return error.message;
  }
}

export function fitting(spec, name) {  // the sizes that one control can take while all others stay
  const { tp = 1, pp = 1, cp = 1, dp = 1, pcp = 1, size = 1, sp = 1, world_size: world } = sizesOf(spec);
  const step = tp * pp * cp * dp * pcp * size * sp;
  const tried = name === "world_size" ? range(Math.floor(MAX_RANKS / step)).map((i) => (i + 1) * step) : divisors(name === "dcp" ? tp * pcp : world);
  return tried.filter((value) => !problemOf(withSize(spec, name, value)));
}

export function withSize(spec, name, size) { return { ...spec, sizes: { ...spec.sizes, [name]: size } }; }

export function codeOf(spec) {  // the call that makes it again
  if (spec.kind === "custom") return `layout = wb.Layout.custom(${JSON.stringify(spec.groups).replaceAll(",", ", ").replaceAll(":", ": ")})`;
  const sizes = sizesOf(spec), names = KINDS[spec.kind][1];
  const isShown = (name) => (name === "etp" ? sizes.etp !== sizes.tp : sizes[name] !== 1 || name === "size" || name === "sp");
  const shown = names.filter(isShown).map((name) => `${name}=${sizes[name]}`);
  if (spec.kind === "megatron") shown.push(`order="${spec.order}"`);
  if (spec.kind !== "supernode") shown.unshift(`world_size=${sizes.world_size}`);
  return `layout = wb.Layout${spec.kind === "vllm" ? "" : `.${spec.kind}`}(${shown.join(", ")})`;
}

export function wordsOf(plan, rank) {  // "rank 5 = pp 1, tp 1"
  const axes = (plan.meshAxes.length ? plan.meshAxes : plan.axes).filter((axis) => plan.degree[axis] > 1);
  return `rank ${rank}` + (axes.length ? ` = ${axes.map((axis) => `${axis} ${plan.place[axis][rank]}`).join(", ")}` : ", the only one");
}

export function cutLayers(numLayers, numStages, partition) {  // the layers [start, end) of each stage, by vLLM's rule or as "7,8,8,7" says
  const share = Math.floor(numLayers / numStages), rest = numLayers % numStages;
  let counts = range(numStages).map((stage) => share + (stage >= numStages - 1 - rest && stage < numStages - 1 ? 1 : 0));
  if (partition) {
    counts = partition.split(",").map((entry) => (/^\s*\d+\s*$/.test(entry) ? Number(entry) : fail(`"${entry}" is no whole number; write such as 7,8,8,7`)));
    if (counts.length !== numStages) fail(`${counts.length} numbers of layers for ${numStages} stages; give one a stage`);
    if (counts.reduce((a, b) => a + b, 0) !== numLayers) fail(`${partition} adds up to ${counts.reduce((a, b) => a + b, 0)} layers, not to ${numLayers}`);
  }
  if (counts.includes(0)) fail(`stage ${counts.indexOf(0)} of ${numStages} would hold no layer; use fewer stages or more layers`);
  let start = 0;
  return counts.map((count) => [start, (start += count)]);
}

// Where each rank stands: as view/rank_grid.py

const COLUMN_AXES = ["pp", "pcp", "cp", "tp", "sp", "engine"], OUTER_GAP = 0.5, INNER_GAP = 0.2, FOLD_GAP = 1, MAX_TICKS = 16;

function evenRound(x) {  // as Python's round
  const down = Math.floor(x), rest = x - down;
  return rest > 0.5 || (rest === 0.5 && down % 2 !== 0) ? down + 1 : down;
}

function lineOf(plan, axes) {
  const index = new Array(plan.world).fill(0), at = new Array(plan.world).fill(0), degrees = axes.map((axis) => plan.degree[axis]);
  axes.forEach((axis, place) => {
    for (let rank = 0; rank < plan.world; rank++) {
      index[rank] = index[rank] * degrees[place] + plan.place[axis][rank];
      if (place < axes.length - 1) at[rank] += index[rank] * (place ? INNER_GAP : OUTER_GAP);
    }
  });
  return { names: axes, index, at: at.map((gaps, rank) => gaps + index[rank]), numCells: product(degrees), block: product(degrees.slice(1)) };
}

function ticksOf(line) {
  if (!line.names.length) return [];
  const numBlocks = line.numCells / line.block, step = 2 ** Math.max(0, Math.ceil(Math.log2(numBlocks / MAX_TICKS)));
  return range(Math.ceil(numBlocks / step)).map((i) => {
    const at = line.at.filter((_, rank) => Math.floor(line.index[rank] / line.block) === i * step);
    return [(Math.min(...at) + Math.max(...at) + 1) / 2, `${line.names[0]} ${i * step}`];
  });
}

function startsOf(line, size) {
  const starts = new Array(Math.ceil(line.numCells / size)).fill(Infinity);
  line.index.forEach((i, rank) => { const part = Math.floor(i / size); starts[part] = Math.min(starts[part], line.at[rank]); });
  return starts;
}

function firstRanks(y) {
  const first = new Map();
  y.forEach((at, rank) => { if (!first.has(at)) first.set(at, rank); });
  const edges = [...first.keys()].sort((a, b) => a - b), step = 2 ** Math.max(0, Math.ceil(Math.log2(edges.length / MAX_TICKS)));
  return edges.filter((_, i) => i % step === 0).map((at) => [at + 0.5, `rank ${first.get(at)}`]);
}

function folded(across, down) {
  if (across.numCells > 32 && across.numCells > 8 * down.numCells) {  // lines below each other
    const ideal = 2 ** evenRound(Math.log2(Math.sqrt((2 * across.numCells) / down.numCells)));
    const perLine = across.block > 1 && across.block <= 2 * ideal ? across.block * Math.max(1, evenRound(ideal / across.block)) : ideal;
    const gap = down.numCells > 1 ? FOLD_GAP : across.block > 1 ? INNER_GAP : 0, high = Math.max(...down.at) + 1 + gap, starts = startsOf(across, perLine);
    const line = across.index.map((i) => Math.floor(i / perLine)), y = down.at.map((at, rank) => at + line[rank] * high);
    return { x: across.at.map((at, rank) => at - starts[line[rank]]), y, xTicks: [], yTicks: firstRanks(y) };
  }
  if (down.numCells > 16 && down.numCells > 4 * across.numCells) {  // strips beside each other
    const perStrip = Math.min(down.numCells, 2 ** evenRound(Math.log2(Math.sqrt((down.numCells * across.numCells) / 2))));
    const strip = down.index.map((i) => Math.floor(i / perStrip)), wide = Math.max(...across.at) + 1 + FOLD_GAP, starts = startsOf(down, perStrip);
    const y = down.at.map((at, rank) => at - starts[strip[rank]]);
    return { x: across.at.map((at, rank) => at + strip[rank] * wide), y, xTicks: [], yTicks: firstRanks(y) };
  }
  return { x: across.at, y: down.at, xTicks: ticksOf(across), yTicks: ticksOf(down) };
}

export function gridOf(plan) {  // cells of side 1: {x, y, xTicks, yTicks, width, height}
  let made;
  if (plan.meshAxes.length) {
    const wide = plan.meshAxes.filter((axis) => plan.degree[axis] > 1), columns = COLUMN_AXES.filter((axis) => wide.includes(axis));
    const below = wide.filter((axis) => !columns.includes(axis));
    if (!columns.length && below.length) columns.push(below.pop());
    made = folded(lineOf(plan, columns), lineOf(plan, below));
  } else {
    const axis = plan.axes[0], line = (name, index, numCells) => ({ names: [name], index, at: index, numCells, block: 1 });
    const across = line(axis, plan.place[axis], plan.degree[axis]), down = line(`${axis} group`, plan.member[axis], plan.groups[axis].length);
    made = { x: across.at, y: down.at, xTicks: ticksOf(across), yTicks: ticksOf(down) };
  }
  return { ...made, width: Math.max(...made.x) + 1, height: Math.max(...made.y) + 1 };
}
