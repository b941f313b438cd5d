// Statistics of completion lengths in the page, as workbench/plan/lengths.py has them. Columns are arrays of one entry a completion.

export function percentileOf(sorted, p) {  // linear, as numpy's
  const at = ((sorted.length - 1) * p) / 100, low = Math.floor(at), high = Math.ceil(at);
  return sorted[low] + (sorted[high] - sorted[low]) * (at - low);
}

// Of completions given the shortest first, with max_tokens = cap: longer ones are cut there, and those cut already stay cut.
export function statsOf(columns, indices, cap) {
  const lengths = indices.map((i) => Math.min(columns.length_tokens[i], cap)), n = lengths.length;
  let total = 0, all = 0, cut = 0;
  indices.forEach((i, k) => {
    total += lengths[k];
    all += columns.length_tokens[i];
    cut += columns.length_tokens[i] > cap || columns.finish_reason[i] === "length";
  });
  const marks = Object.fromEntries([50, 90, 95, 99].map((p) => [p, n ? percentileOf(lengths, p) : NaN]));
  return { n, mean: total / n, marks, max: n ? lengths[n - 1] : NaN, cut, cutShare: n ? cut / n : NaN, total, savedShare: all ? 1 - total / all : 0 };
}

function names(values) {
  return [...new Set(values)].sort((a, b) => a - b || String(a).localeCompare(String(b)));
}

function blocks(keys, word, most) {  // neighbouring numbers in at most `most` blocks: "rank 3", or of many "ranks 4-7"
  const size = Math.ceil(keys.length / most) || 1, found = [];
  for (let i = 0; i < keys.length; i += size) found.push(keys.slice(i, i + size));
  return found.map((of) => [of.length === 1 ? `${word} ${of[0]}` : `${word}s ${of[0]}-${of.at(-1)}`, of]);
}

// [{name, indices}], indices the shortest first; at most `most` groups, of many prompts those with the longest mean.
export function groupsBy(columns, by, most = 8) {
  const every = columns.length_tokens.map((_, i) => i).sort((a, b) => columns.length_tokens[a] - columns.length_tokens[b]);
  if (by === "finish_reason") return names(columns.finish_reason).map((name) => ({ name, indices: every.filter((i) => columns.finish_reason[i] === name) }));
  if (by === "prompt_index") {
    const of = new Map();
    every.forEach((i) => {
      const name = `${columns.step[i] ? `step ${columns.step[i]}, ` : ""}rank ${columns.origin_rank[i]}, prompt ${columns.prompt_index[i]}`;
      if (!of.has(name)) of.set(name, []);
      of.get(name).push(i);
    });
    const mean = (indices) => indices.reduce((sum, i) => sum + columns.length_tokens[i], 0) / indices.length;
    return [...of].map(([name, indices]) => ({ name, indices })).sort((a, b) => mean(b.indices) - mean(a.indices)).slice(0, most);
  }
  if (by !== "origin_rank" && by !== "step") return [{ name: "all", indices: every }];
  const word = by === "step" ? "step" : "rank";
  return blocks(names(columns[by]), word, most).map(([name, keys]) => {
    const chosen = new Set(keys);
    return { name, indices: every.filter((i) => chosen.has(columns[by][i])) };
  });
}

// How long each rank works and waits, in tokens, when all wait in each step for the one that takes longest.
//   way: "sum", a rank's completions one after another; "max", all at once, so that its longest one counts
export function idleOf(columns, ranks, cap, way) {
  const took = new Map(), busy = new Map(ranks.map((rank) => [rank, 0]));  // step -> rank -> tokens; rank -> tokens
  columns.length_tokens.forEach((length, i) => {
    if (!took.has(columns.step[i])) took.set(columns.step[i], new Map());
    const ofStep = took.get(columns.step[i]), rank = columns.origin_rank[i], tokens = Math.min(length, cap), before = ofStep.get(rank) ?? 0;
    ofStep.set(rank, way === "max" ? Math.max(before, tokens) : before + tokens);
  });
  let total = 0, worked = 0;
  for (const ofStep of took.values()) {
    total += Math.max(...ofStep.values());
    ofStep.forEach((tokens, rank) => { busy.set(rank, (busy.get(rank) ?? 0) + tokens); worked += tokens; });
  }
  return { total, busy: [...busy].sort((a, b) => a[0] - b[0]), idleShare: total ? 1 - worked / (busy.size * total) : 0 };
}
